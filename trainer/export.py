"""What leaves a run: weights as safetensors and a JSON beside them, and `load_student`, which reads both. No pickle."""

import errno
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from stat import S_IMODE

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from radio_cache.errors import ConfigError, NotACacheError, RadioCacheError, StoreError
from radio_cache.local_storage import write_atomically
from trainer.distilled import STARTING_SETTINGS, DistilledStudent, Heads, StudentConfig, build_distilled
from trainer.students import ViT
from trainer.students.vit import TRAINING_SETTINGS

_SYSTEM_ERROR = re.compile(r"os error (\d+)")

CONFIG_FILE, WEIGHTS_FILE = "student.json", "student.safetensors"


def deployable(model: DistilledStudent) -> DistilledStudent:
    """The model in evaluation, without what only training needs; a copy where there was any."""
    if not isinstance(model.student, ViT):
        return model.eval()
    overrides = {key: value for key, value in model.config.overrides.items() if key not in TRAINING_SETTINGS}
    if overrides == model.config.overrides:
        return model.eval()
    plain = DistilledStudent(model.student.materialised(), model.adaptors, replace(model.config, overrides=overrides))
    plain.use_heads(model.heads)
    return plain.eval()


def save_student(model: DistilledStudent, folder: Path) -> None:
    """Write `student.safetensors` and `student.json`, each whole or not at all, weights first.

    Reparametrised weights are written as the plain weights they stand for.
    """
    model = deployable(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # of another student, perhaps: it must not lie beside these weights
    temporary = folder / f"{WEIGHTS_FILE}.partial"
    try:
        save_tensors({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        temporary.replace(folder / WEIGHTS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(folder / CONFIG_FILE, json.dumps(model.config.to_json(), indent=1).encode())


def holds_student(folder: Path) -> bool:
    """Whether a student was written there to its end: the weights come first, the configuration last."""
    return (folder / CONFIG_FILE).exists() and (folder / WEIGHTS_FILE).exists()


def save_tensors(tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that those may read who may read any new file: the library makes it its owner's alone.

    Raises OSError where the system refuses it, such as for a full disk.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as exc:  # in whose words the system's error is hidden
        number = _SYSTEM_ERROR.search(str(exc))
        code = errno.EIO if number is None else int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from exc
    path.chmod(mode)


def load_student(
    path: str | Path, *, adaptors: Heads = (), untrained: bool = False, allow_modules: Iterable[str] = ()
) -> DistilledStudent:
    """A trained student from a run or an export folder, in eval mode, on the CPU.

    adaptors: the teachers whose features to give beside the student's own; "all" of them, or none.
    untrained: with the weights the run started from.
    allow_modules: modules that the folder may name as the student's code (`torch-module:`), because you know them and trust
        them: importing a module runs it. None by default.
    Raises NotACacheError if there is no student at `path`, ConfigError for a teacher the student never had or a module that is
    not allowed.
    """
    folder = Path(path)
    if not holds_student(folder):
        hint = "the run is not finished: the same radio-train command goes on" if (folder / "recipe.json").exists() else (
            "give the folder that radio-train --out or radio-export --out made")  # fmt: skip
        raise NotACacheError(f"{folder} holds no trained student ({WEIGHTS_FILE} and {CONFIG_FILE}): {hint}")
    try:
        config = StudentConfig.from_json(json.loads((folder / CONFIG_FILE).read_text()), allow_modules=allow_modules)
    except ConfigError as exc:
        raise ConfigError(f"{folder / CONFIG_FILE}: {exc}") from exc
    rng = torch.get_rng_state()
    # Weights that will be replaced are not worth a download.
    kept = {key: value for key, value in config.overrides.items() if untrained or key not in STARTING_SETTINGS}
    try:
        model = build_distilled(replace(config, overrides=kept))
    except RadioCacheError as exc:
        raise type(exc)(f"{folder / CONFIG_FILE}: {exc}") from exc
    except Exception as exc:  # every constructor refuses settings in its own way
        raise StoreError(
            f"{folder / CONFIG_FILE} describes no student that this radio-cache can build ({type(exc).__name__}: {exc}): "
            "it is damaged, or was written by another version; restore it from a copy, or export the run again"
        ) from exc
    model.config = config
    torch.set_rng_state(rng)
    if not untrained:
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except RuntimeError as exc:
            raise StoreError(
                f"{folder / WEIGHTS_FILE} does not fit student '{config.student}' as this radio-cache builds it: "
                f"use the version that trained it, or train again ({str(exc).strip().splitlines()[-1].strip()})"
            ) from exc
    model.use_heads(adaptors)
    return model.eval()
