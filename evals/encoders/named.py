"""Encoders from the options `--run`, `--model` and `--weights`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cache_builder.commands.build_options import per_teacher
from cache_builder.teachers import TeacherOptions, find_teacher
from evals.encoders.base import LiveEncoder
from evals.encoders.student import StudentEncoder
from radio_cache.errors import ConfigError, RadioCacheError
from radio_cache.terminal.output import print_line
from trainer.model.files import CONFIG_FILE

Family = Literal["student", "teacher", "timm", "open_clip", "onnx"]

FORMS = (
    "a run or export folder, teacher:NAME, timm:NAME, open_clip:NAME/WEIGHTS, or FILE.onnx; @PX behind it sets the size"
)

# A name may hold spaces and dots, but no slash: a path with "=" in a folder is not a name.
_NAMED = re.compile(r"([\w .-]+)=(.+)")
# Greedy: only the last @ is the size, so that paths may hold others.
_SIZED = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class ModelName:
    """One `--model`: [NAME=]MODEL[@PX].

    Attributes:
        name: of its rows in tables.
        family: who loads it.
        path_or_name: a path, or the name in its library.
        size_px: side of its input; None for the model's own.
    """

    name: str
    family: Family
    path_or_name: str
    size_px: int | None

    @classmethod
    def parsed(cls, text: str) -> "ModelName":
        """Parse the value of `--model`.

        Raises:
            ConfigError: if it has none of the forms in `FORMS`.
        """
        named = _NAMED.fullmatch(text)
        path_or_name = named[2] if named else text
        sized = _SIZED.fullmatch(path_or_name)
        size_px = int(sized[2]) if sized else None
        unsized = sized[1] if sized else path_or_name
        name = named[1] if named else path_or_name
        prefix, colon, library_name = unsized.partition(":")
        # A prefix decides before the file system does: a folder called "timm:x" needs "./timm:x".
        if colon and prefix in ("teacher", "timm", "open_clip") and library_name:
            if prefix == "teacher":
                find_teacher(library_name)  # an unknown name is an error before anything is loaded
            return cls(name if named else path_or_name.removeprefix("teacher:"), prefix, library_name, size_px)
        # Without a prefix it is a path: an ONNX file, or a folder with a student.
        path = Path(unsized)
        if path.suffix == ".onnx":
            if not path.is_file():
                raise ConfigError(f"--model {text}: there is no file {path}")
            return cls(name if named else path.name, "onnx", unsized, size_px)
        if (path / CONFIG_FILE).exists():
            # resolve() names the folder even for ".".
            return cls(name if named else path.resolve().name, "student", unsized, size_px)
        raise ConfigError(f"--model {text} is none of these: {FORMS}")


def parse_models(
    models: Sequence[str], weights: Sequence[str]
) -> list[tuple[ModelName, Path | Literal["random"] | None]]:
    """Parse `--model` and `--weights` into models with their weights.

    Args:
        models: `[NAME=]MODEL[@PX]`.
        weights: `[NAME=]FILE` or `[NAME=]random`, NAME being that of the model in tables.

    Raises:
        ConfigError: for two models of one name, for weights that belong to no model, and for those of a student or an
            ONNX file.
    """
    parsed = [ModelName.parsed(text) for text in models]
    names = [model.name for model in parsed]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called {repeated[0]}: name one, as in --model 'other={repeated[0]}'")
    if weights and not names:
        raise ConfigError(f"--weights {weights[0]}: there is no --model it could belong to")
    # Weights go by the name of the row, so that one architecture can be compared with two files.
    files = per_teacher("--weights", weights, names, _weights, shared=False)
    for model in parsed:
        if model.name in files and model.family in ("student", "onnx"):
            raise ConfigError(
                f"--weights {files[model.name]}: {model.name} is a {model.family} and has its own weights"
            )
        if model.family == "teacher" and files.get(model.name) == "random":
            raise ConfigError(f"--weights {model.name}=random: a teacher is its weights; give FILE, or leave it out")
    return [(model, files.get(model.name)) for model in parsed]


def load_model(model: ModelName, weights: Path | Literal["random"] | None, *, device: torch.device) -> LiveEncoder:
    """Load the encoder of one `--model`.

    Args:
        model: of `parse_models`.
        weights: of `parse_models`.
        device: where it runs.

    Raises:
        RadioCacheError: if the model cannot be loaded; the message names the cure.
    """
    # Libraries are imported in their branch: each takes seconds, and may not be installed.
    from evals.encoders.network import NetworkEncoder, live_teacher

    match model.family:
        case "student":
            return StudentEncoder.of_run(
                Path(model.path_or_name), name=model.name, trained=True, device=device, size_px=model.size_px
            )
        case "teacher":
            # parse_models refuses random weights for teachers; None takes the published ones.
            options = TeacherOptions(weights=None if weights == "random" else weights, size_px=model.size_px)
            encoder = live_teacher(model.path_or_name, options, device=device)
            # A teacher may be compared at several sizes, and each needs a name of its own.
            encoder.name = model.name
            return encoder
        case "timm":
            from evals.encoders.timm_model import timm_network

            network = timm_network(model.path_or_name, weights, size_px=model.size_px, device=device)
            return NetworkEncoder(network, name=model.name, kind="model", device=device)
        case "open_clip":
            from evals.encoders.open_clip_model import open_clip_network

            network = open_clip_network(model.path_or_name, weights, size_px=model.size_px, device=device)
            return NetworkEncoder(network, name=model.name, kind="model", device=device)
        case "onnx":
            from evals.encoders.onnx_model import OnnxEncoder, open_onnx

            session = open_onnx(Path(model.path_or_name), gpu=device.type == "cuda")
            return OnnxEncoder(session, Path(model.path_or_name), name=model.name, size_px=model.size_px)


def load_runs(runs: Sequence[Path], *, device: torch.device, untrained: bool = True) -> list[StudentEncoder]:
    """Load the student of every run and, beside it, the same network before its first step.

    A run may have started from weights that are no longer available (`--init`, `--pretrained`). The untrained network is
    then left out with a message.

    Args:
        runs: folders of training runs.
        device: where students run.
        untrained: whether the untrained networks are loaded.
    """
    encoders: list[StudentEncoder] = []
    for run, name in zip(runs, run_names(runs), strict=True):
        encoders.append(StudentEncoder.of_run(run, name=name, trained=True, device=device))
        if not untrained:
            continue
        try:
            start = StudentEncoder.of_run(run, name=f"{name}, untrained", trained=False, device=device)
        # The trained student does not need those weights any more, so the evaluation goes on.
        except RadioCacheError as exc:
            print_line(
                f"'{name}, untrained' is left out, because the weights that {run} started from cannot be had: {exc}"
            )
        else:
            encoders.append(start)
    return encoders


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return the names of the students in tables: "student" for one run, folder names for several, paths if those repeat."""
    if len(runs) == 1:
        return ["student"]
    # Folder names read well, but runs of two projects may share them: then the paths are unique.
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _weights(text: str) -> Path | Literal["random"]:
    return "random" if text == "random" else Path(text).expanduser()
