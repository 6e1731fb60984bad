"""A folder for Hugging Face transformers. It carries the student's own code: no radio-cache is needed to use it."""

import functools
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from radio_cache.local_storage import write_atomically
from trainer.data import eval_box_xyxy
from trainer.distilled import STARTING_SETTINGS, DistilledStudent
from trainer.export import save_tensors
from trainer.exports.carried_code import carried_files
from trainer.exports.libraries import library, no_progress_bar
from trainer.exports.written import PLACE, ExportError, FlatFeatures, Written, flat_features
from trainer.students import foreign_module

_CARRIED = "trainer.carried.modeling_radio_student"


def write_hugging_face(model: DistilledStudent, folder: Path) -> Written:
    """config.json, model.safetensors, preprocessor_config.json and the code. Raises ExportError for a user's own network."""
    library("transformers", "the format hf")
    refuse_torch_module(model, "hf")
    carried: Any = import_module(_CARRIED)
    fields = model.config.to_json()
    fields["overrides"] = {key: value for key, value in fields["overrides"].items() if key not in STARTING_SETTINGS}
    name = _CARRIED.rpartition(".")[2]
    config: Any = carried.RadioStudentConfig(
        distilled=fields, adaptors=list(model.heads), architectures=["RadioStudentModel"],
        auto_map={"AutoConfig": f"{name}.RadioStudentConfig", "AutoModel": f"{name}.RadioStudentModel"},
    )  # fmt: skip
    like = carried.RadioStudentModel(config).eval()
    carried.take_weights(like.distilled, model.state_dict())
    tensors = {key: value.contiguous().clone() for key, value in like.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    write_atomically(folder / "preprocessor_config.json", json.dumps(image_processor_settings(model), indent=1).encode())
    for file, text in carried_files(_CARRIED).items():
        write_atomically(folder / file, text.encode())

    @functools.cache
    def load() -> Any:
        # The class here, and not the folder's copy of it, which would be cached in the user's home.
        with no_progress_bar():
            return carried.RadioStudentModel.from_pretrained(folder)

    def run(images: Float[Tensor, "b 3 h w"]) -> FlatFeatures:
        return flat_features(load()(images))

    return Written(
        use=(
            "from transformers import AutoImageProcessor, AutoModel",
            f"model = AutoModel.from_pretrained('{PLACE}', trust_remote_code=True)",
            f"processor = AutoImageProcessor.from_pretrained('{PLACE}')",
            "out = model(**processor(image, return_tensors='pt'))",
        ),
        run=run,
        notes=("needs torch, transformers and timm where it is used, and not radio-cache",),
    )


def refuse_torch_module(model: DistilledStudent, what: str) -> None:
    """A user's own network cannot be carried."""
    if foreign_module(model.config.student) is not None:
        raise ExportError(
            f"--format {what}: the code of '{model.config.student}' is your own package, which the folder cannot carry; "
            "choose safetensors, onnx or torch-export"
        )


def image_processor_settings(model: DistilledStudent) -> dict[str, Any]:
    """What a student is shown of an image outside of training, in transformers' words (`trainer.data.eval_box_xyxy`)."""
    h, w = model.config.image_hw
    rest: dict[str, Any] = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False, "do_convert_rgb": True}
    bicubic: dict[str, Any] = {"do_resize": True, "resample": 3}
    if model.config.fit == "squash":
        return {"image_processor_type": "ViTImageProcessor", **bicubic, "size": {"height": h, "width": w}, **rest}
    box = eval_box_xyxy((h, w), "crop", model.config.centre_share)
    assert box is not None
    shorter = round(min(h, w) ** 2 / (box[2] - box[0]))
    return {
        "image_processor_type": "CLIPImageProcessor", **bicubic, "size": {"shortest_edge": shorter},
        "do_center_crop": True, "crop_size": {"height": h, "width": w}, **rest,
    }  # fmt: skip
