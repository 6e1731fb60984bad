"""A folder for Hugging Face transformers. It carries the student's own code: no radio-cache is needed to use it."""

import functools
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from radio_cache.storage.local import write_atomically
from trainer.exports.carried_code import carried_files
from trainer.exports.libraries import library, no_progress_bar
from trainer.exports.preprocessing import image_processor_settings, timm_pretrained_cfg
from trainer.exports.written import PLACE, ExportError, FlatFeatures, Written, flat_features
from trainer.model.files import save_tensors
from trainer.model.student import STARTING_SETTINGS, DistilledStudent
from trainer.students import foreign_module

_CARRIED = "trainer.carried.modeling_radio_student"


def write_hugging_face(model: DistilledStudent, folder: Path) -> Written:
    """Write config.json, model.safetensors, preprocessor_config.json and the code.

    Raises:
        ExportError: for a user's own network.
    """
    library("transformers", "the format hf")
    refuse_torch_module(model, "hf")
    carried: Any = import_module(_CARRIED)
    fields = model.config.to_json()
    fields["overrides"] = {key: value for key, value in fields["overrides"].items() if key not in STARTING_SETTINGS}
    name = _CARRIED.rpartition(".")[2]
    # transformers' own centre crops lie a pixel beside torchvision's in one image of four. With these keys in config.json,
    # AutoImageProcessor takes timm's own transform.
    crop: dict[str, Any] = {}
    if model.config.fit == "crop":
        crop = {
            "image_processor_type": "TimmWrapperImageProcessor",
            "pretrained_cfg": timm_pretrained_cfg(model.config),
        }
    config: Any = carried.RadioStudentConfig(
        distilled=fields,
        adaptors=list(model.heads),
        architectures=["RadioStudentModel"],
        **crop,
        auto_map={"AutoConfig": f"{name}.RadioStudentConfig", "AutoModel": f"{name}.RadioStudentModel"},
    )
    like = carried.RadioStudentModel(config).eval()
    carried.take_weights(like.distilled, model.state_dict())
    tensors = {key: value.contiguous().clone() for key, value in like.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    processor = image_processor_settings(model)
    write_atomically(folder / "preprocessor_config.json", json.dumps(processor, indent=1).encode())
    for file, text in carried_files(_CARRIED).items():
        write_atomically(folder / file, text.encode())

    @functools.cache
    def load() -> Any:
        # The class here, and not the folder's copy of it, which would be cached in the user's home.
        with no_progress_bar():
            return carried.RadioStudentModel.from_pretrained(folder)

    def run(images: Float[Tensor, "b 3 h w"]) -> FlatFeatures:
        return flat_features(load()(images))

    # By default transformers resizes in torch, whose bicubic filter is up to two grey levels beside Pillow's.
    pillow = ", backend='pil'" if model.config.fit == "squash" else ""
    return Written(
        use=(
            "from transformers import AutoImageProcessor, AutoModel",
            f"model = AutoModel.from_pretrained('{PLACE}', trust_remote_code=True)",
            f"processor = AutoImageProcessor.from_pretrained('{PLACE}'{pillow})",
            "out = model(**processor(image, return_tensors='pt'))",
        ),
        run=run,
        notes=("needs torch, transformers and timm where it is used, and not radio-cache",),
    )


def refuse_torch_module(model: DistilledStudent, what: str) -> None:
    """Raise ExportError for a user's own network, whose code cannot be exported."""
    if foreign_module(model.config.student) is not None:
        raise ExportError(
            f"--format {what}: the code of '{model.config.student}' is your own package, which the folder cannot carry; "
            "choose safetensors, onnx or torch-export"
        )
