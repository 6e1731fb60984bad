"""A folder for timm: `timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)`.

It carries the student's own code as a package that registers the model, so that no radio-cache is needed to use it.
"""

import functools
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from jaxtyping import Float
from torch import Tensor

from radio_cache.storage.local import write_atomically
from trainer.exports.carried_code import carried_files
from trainer.exports.hugging_face import refuse_torch_module
from trainer.exports.preprocessing import timm_pretrained_cfg
from trainer.exports.written import PLACE, FlatFeatures, Written
from trainer.model.files import save_tensors
from trainer.model.student import STARTING_SETTINGS, DistilledStudent

_CARRIED = "trainer.carried.timm_radio_student"
_PACKAGE = "radio_student_for_timm"
_REGISTER = """# Importing this registers `radio_student` with timm.
from .timm_radio_student import RadioStudent as RadioStudent
"""


def write_timm(model: DistilledStudent, folder: Path) -> Written:
    """Write config.json, model.safetensors and a package that registers `radio_student`, without heads of teachers.

    Raises:
        ExportError: for a user's own network.
    """
    refuse_torch_module(model, "timm")
    import_module(_CARRIED)  # registers it here, too
    config = model.config
    # Sources of first weights are left out: whoever loads the folder must not need those files.
    overrides = {key: value for key, value in config.overrides.items() if key not in STARTING_SETTINGS}
    document = {
        "architecture": "radio_student",
        "num_classes": 0,
        "num_features": model.summary_dim,
        "model_args": {"student": config.student, "overrides": overrides},
        "pretrained_cfg": timm_pretrained_cfg(config),
    }
    tensors = {f"student.{key}": value.contiguous() for key, value in model.student.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "config.json", json.dumps(document, indent=1).encode())
    (folder / _PACKAGE).mkdir()
    for file, text in carried_files(_CARRIED).items():
        write_atomically(folder / _PACKAGE / file, text.encode())
    write_atomically(folder / _PACKAGE / "__init__.py", _REGISTER.encode())

    @functools.cache
    def load() -> tuple[Any, Any]:
        whole, maps = (
            timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=maps).eval()
            for maps in (False, True)
        )
        return whole, maps

    def run(images: Float[Tensor, "b 3 h w"]) -> FlatFeatures:
        whole, maps = load()
        # features_only returns one map per stage; the student's is that of its own stride. (b, c, h, w) -> (b, h * w, c)
        spatial = maps(images)[maps.feature_info.reduction().index(model.patch_size)]
        return {"summary": whole(images), "features": spatial.flatten(2).transpose(1, 2)}

    return Written(
        use=(
            f"import sys, timm; sys.path.insert(0, '{PLACE}')",
            f"import {_PACKAGE}  # registers the model",
            f"model = timm.create_model('local-dir:{PLACE}', pretrained=True, features_only=True)",
            "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
            "maps = model(transform(photo)[None])  # photo: a PIL image, RGB",
        ),
        run=run,
        notes=("timm models have no heads of teachers: safetensors and hf keep them",) if model.heads else (),
    )
