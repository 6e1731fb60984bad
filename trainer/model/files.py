"""Student files: weights as safetensors and a JSON beside them, and `load_student`, which reads both. No pickle."""

import contextlib
import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils import parametrize

from radio_cache.errors import ConfigError, NotACacheError, RadioCacheError, StoreError
from radio_cache.format.schema import refuse_teacher_name
from radio_cache.format.strict_json import parse_json
from radio_cache.storage.local import write_atomically
from trainer.model.student import (
    STARTING_SETTINGS,
    WEIGHTS_SHA256,
    DistilledStudent,
    Heads,
    StudentConfig,
    build_distilled,
)
from trainer.students import Student, ViT, foreign_module, is_of_timm
from trainer.students.reparametrised import plain_state
from trainer.students.vit import TRAINING_SETTINGS

CONFIG_FILE, WEIGHTS_FILE = "student.json", "student.safetensors"


def deployable(model: DistilledStudent) -> DistilledStudent:
    """Return the model in evaluation mode, or a copy of it without the parts that only training needs."""
    if not isinstance(model.student, ViT):
        return model.eval()
    overrides = {key: value for key, value in model.config.overrides.items() if key not in TRAINING_SETTINGS}
    if overrides == model.config.overrides:
        return model.eval()
    # Heads are shared with the original, not copied: they have no parts of training.
    plain = DistilledStudent(model.student.materialised(), model.adaptors, replace(model.config, overrides=overrides))
    plain.use_heads(model.heads)
    return plain.eval()


def save_student(model: DistilledStudent, folder: Path) -> None:
    """Write `student.safetensors` and `student.json`, each whole or not at all, weights first.

    Reparametrised weights are written as the plain weights they stand for.
    """
    model = deployable(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(
        missing_ok=True
    )  # it may belong to another student, and must not lie beside these weights
    sha256 = save_tensors({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS_FILE)
    document = {**model.config.to_json(), WEIGHTS_SHA256: sha256}
    write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=1).encode())


def holds_student(folder: Path) -> bool:
    """Return whether a student was written there to its end: the weights come first, the configuration last."""
    return (folder / CONFIG_FILE).exists() and (folder / WEIGHTS_FILE).exists()


def save_tensors(tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all.

    Returns:
        The SHA-256 of the file.

    Raises:
        StorageError: the disk is full, or may not be written.
    """
    data = save(tensors, metadata)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def load_student(
    path: str | Path, *, adaptors: Heads = (), untrained: bool = False, allow_modules: Iterable[str] = ()
) -> DistilledStudent:
    """Load a trained student from a run or an export folder, in eval mode, on the CPU.

    Args:
        path: folder of a run or an export.
        adaptors: teachers whose features the model returns beside the student's own: names, "all", or none.
        untrained: load the weights that the run started from.
        allow_modules: modules that the folder may name as the student's code (`torch-module:`), because you know and trust
            them: importing a module runs it. None by default.

    Raises:
        NotACacheError: if there is no student at `path`.
        ConfigError: for a teacher that the student has no head for, or a module that is not allowed.
    """
    folder = Path(path)
    if not holds_student(folder):
        is_run = (folder / "recipe.json").exists()
        hint = (
            "the run is not finished: continue it with the same radio-train command, or use radio-export --checkpoint last"
            if is_run
            else "give the folder that radio-train --out or radio-export --out made"
        )
        raise NotACacheError(f"{folder} holds no trained student ({WEIGHTS_FILE} and {CONFIG_FILE}): {hint}")
    config, sha256 = read_config(folder, allow_modules=allow_modules)
    shapes = tensor_shapes(folder / WEIGHTS_FILE)
    # The first weights will be replaced, so their download is skipped.
    fresh = {key: value for key, value in config.overrides.items() if key not in STARTING_SETTINGS}
    # Before the SHA-256, which reads the whole file: a file of another student is refused at once.
    _refuse_other_shapes(folder, replace(config, overrides=fresh), shapes)
    if not untrained:
        _refuse_changed(folder, sha256)
    # Building seeds the generator with the run's seed. Loading must not change the caller's random numbers.
    rng = torch.get_rng_state()
    with _naming_the_config(folder):
        model = build_distilled(config if untrained else replace(config, overrides=fresh))
    if untrained and config.init is not None:
        start_from(model.student, Path(config.init))
    model.config = config
    torch.set_rng_state(rng)
    if not untrained:
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except RuntimeError as exc:
            raise _misfit(folder, config, str(exc).strip().splitlines()[-1].strip()) from exc
        except SafetensorError as exc:
            raise _damaged(folder / WEIGHTS_FILE, exc) from exc
    model.use_heads(adaptors)
    return model.eval()


@torch.no_grad()
def start_from(student: Student, folder: Path) -> None:
    """Give a student the weights of a finished one, in place. Its heads are not touched.

    Args:
        student: receives the weights; its network must be that of the finished student.
        folder: of a run or an export.

    Raises:
        ConfigError: there is no such student, or its network is another.
    """
    try:
        source = load_student(folder).student
    except NotACacheError as exc:
        raise ConfigError(f"--init {folder}: {exc}") from exc
    weights = source.state_dict()
    needed = plain_state(student)
    # A counter of training, which a new run starts from 0.
    needed.pop("window_draws", None)
    for name in sorted(weights.keys() | needed.keys()):
        shapes = [tuple(of[name].shape) if name in of else None for of in (weights, needed)]
        if shapes[0] != shapes[1]:
            old, new = ("none" if shape is None else str(list(shape)) for shape in shapes)
            raise ConfigError(
                f"--init {folder}: its student '{source.name}' is another network than '{student.name}' here: '{name}' is {old} "
                f"there, and {new} here. Leave out --student, and settings of the student: they are then those of --init"
            )
    for name, value in weights.items():
        path, _, kind = name.rpartition(".")
        module = student.get_submodule(path)
        if parametrize.is_parametrized(module, kind):
            setattr(module, kind, value)  # sets the parameters that it is computed from
        else:
            cast(Tensor, getattr(module, kind)).copy_(value)


def read_config(folder: Path, *, allow_modules: Iterable[str] = ()) -> tuple[StudentConfig, str | None]:
    """Read `student.json`, which is untrusted.

    Returns:
        The configuration, and the SHA-256 of the weights beside it; None in folders of earlier versions.

    Raises:
        StoreError: the file is damaged. ConfigError: another version wrote it, or it names a module that is not allowed.
    """
    file = folder / CONFIG_FILE
    try:
        document = parse_json(file.read_bytes())
        if not isinstance(document, dict):
            raise ValueError("it is no object")  # noqa: TRY004  # of JSON; caught below
    except ValueError as exc:
        raise _damaged(file, exc) from exc
    data = cast(dict[str, Any], document)
    sha256 = data.get(WEIGHTS_SHA256)
    if sha256 is not None and not isinstance(sha256, str):
        raise _damaged(file, f"{WEIGHTS_SHA256} is no text")
    try:
        config = StudentConfig.from_json(data, allow_modules=allow_modules)
        for teacher in config.teachers:
            refuse_teacher_name(teacher.name)  # it goes into lines of Python, on the screen and in model cards
    except ConfigError as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    except ValueError as exc:
        raise _damaged(file, exc) from exc
    return config, sha256


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a safetensors file, without its tensors. Raises StoreError for a damaged file."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as exc:
        raise _damaged(file, exc) from exc


def _refuse_other_shapes(folder: Path, config: StudentConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors that a student would have with its weights file, before any memory is allocated.

    A wrong number in `student.json` may require terabytes, or an endless number of layers.
    """
    if foreign_module(config.student) is not None:
        return  # the caller allowed this module, and it may build anything
    depths = [_sum(config.overrides.get(name)) for name in ("depth", "depths")]
    # Even on the meta device each layer costs time, so their number is bounded by that of the stored tensors first.
    layers = max(config.adaptor_blocks, len(config.teachers), *depths)
    if layers > len(shapes):
        raise _misfit(folder, config, f"it would have {layers} layers, and the file holds {len(shapes)} tensors")
    rng = torch.get_rng_state()
    try:
        with torch.device("meta"), _naming_the_config(folder):
            state = build_distilled(config).state_dict()
    except StoreError:
        if not is_of_timm(config.student):
            raise
        return  # some architectures of timm cannot be built on the meta device
    finally:
        torch.set_rng_state(rng)
    needed = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(needed.keys() | shapes.keys()):
        if needed.get(name) != shapes.get(name):
            stored, built = (f"is {list(of[name])}" if name in of else "is not there" for of in (shapes, needed))
            raise _misfit(folder, config, f"'{name}' {stored} in the file, and {built} in the student")


def _sum(value: Any) -> int:
    values = cast(list[Any], value) if isinstance(value, list | tuple) else [value]
    return sum(number for number in values if isinstance(number, int))


@contextlib.contextmanager
def _naming_the_config(folder: Path) -> Generator[None]:
    """Turn whatever a constructor raises for the settings of `student.json` into an error that names the file."""
    try:
        yield
    except RadioCacheError as exc:
        raise type(exc)(f"{folder / CONFIG_FILE}: {exc}") from exc
    except Exception as exc:  # every constructor refuses settings in its own way
        raise StoreError(
            f"{folder / CONFIG_FILE} describes no student that this radio-cache can build ({type(exc).__name__}: {exc}): "
            "it is damaged, or was written by another version; restore it from a copy, or export the run again"
        ) from exc


def _refuse_changed(folder: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with (folder / WEIGHTS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise StoreError(
            f"{folder / WEIGHTS_FILE} is not the file that was written with {CONFIG_FILE}: its SHA-256 is {digest:.12}, recorded "
            f"is {sha256:.12}. It was damaged or changed: restore it from a copy, or export the run again. If you changed it "
            f"yourself, remove '{WEIGHTS_SHA256}' from {CONFIG_FILE}"
        )


def _misfit(folder: Path, config: StudentConfig, why: str) -> StoreError:
    return StoreError(
        f"{folder / WEIGHTS_FILE} does not fit student '{config.student}' as this radio-cache builds it: "
        f"use the version that trained it, or train again ({why})"
    )


def _damaged(file: Path, why: object) -> StoreError:
    return StoreError(f"{file} is damaged ({why}): restore it from a copy, or export the run again")
