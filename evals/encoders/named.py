"""From what a user types to encoders: `--run`, `--model` and the teachers of a cache."""

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
from radio_cache.terminal.output import say
from trainer.model.files import CONFIG_FILE

Family = Literal["student", "teacher", "timm", "open_clip", "onnx"]

FORMS = (
    "a run or export folder, teacher:NAME, timm:NAME, open_clip:NAME/WEIGHTS, or FILE.onnx; @PX behind it sets the size"
)

_NAMED = re.compile(r"([\w .-]+)=(.+)")
_SIZED = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class ModelName:
    """One `--model`: [NAME=]WHAT[@PX]. name: what tables call it. what: a path, or the name in its library."""

    name: str
    family: Family
    what: str
    size_px: int | None

    @classmethod
    def parsed(cls, text: str) -> "ModelName":
        """Raises ConfigError, with the forms there are, for anything else."""
        given = _NAMED.fullmatch(text)
        what = given[2] if given else text
        sized = _SIZED.fullmatch(what)
        size_px = int(sized[2]) if sized else None
        plain = sized[1] if sized else what
        name = given[1] if given else what
        prefix, colon, rest = plain.partition(":")
        if colon and prefix in ("teacher", "timm", "open_clip") and rest:
            if prefix == "teacher":
                find_teacher(rest)
            return cls(name if given else what.removeprefix("teacher:"), prefix, rest, size_px)
        path = Path(plain)
        if path.suffix == ".onnx":
            if not path.is_file():
                raise ConfigError(f"--model {text}: there is no file {path}")
            return cls(name if given else path.name, "onnx", plain, size_px)
        if (path / CONFIG_FILE).exists():
            return cls(name if given else path.resolve().name, "student", plain, size_px)
        raise ConfigError(f"--model {text} is none of these: {FORMS}")


def parse_models(
    models: Sequence[str], weights: Sequence[str]
) -> list[tuple[ModelName, Path | Literal["random"] | None]]:
    """The models named, each with its weights. weights: `[NAME=]FILE` or `[NAME=]random`, NAME as tables call it.

    Raises ConfigError for two of one name, and for weights of nobody or of a student.
    """
    parsed = [ModelName.parsed(text) for text in models]
    names = [model.name for model in parsed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called {twice[0]}: name one, as in --model 'other={twice[0]}'")
    if weights and not names:
        raise ConfigError(f"--weights {weights[0]}: there is no --model it could belong to")
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
    """The encoder of one `--model`. Libraries are imported when they are needed. Raises RadioCacheError with the cure."""
    from evals.encoders.network import NetworkEncoder, live_teacher

    match model.family:
        case "student":
            return StudentEncoder.of_run(
                Path(model.what), name=model.name, trained=True, device=device, size_px=model.size_px
            )
        case "teacher":
            options = TeacherOptions(weights=None if weights == "random" else weights, size_px=model.size_px)
            encoder = live_teacher(model.what, options, device=device)
            encoder.name = model.name
            return encoder
        case "timm":
            from evals.encoders.timm_model import timm_network

            network = timm_network(model.what, weights, size_px=model.size_px, device=device)
            return NetworkEncoder(network, name=model.name, kind="model", device=device)
        case "open_clip":
            from evals.encoders.open_clip_model import open_clip_network

            network = open_clip_network(model.what, weights, size_px=model.size_px, device=device)
            return NetworkEncoder(network, name=model.name, kind="model", device=device)
        case "onnx":
            from evals.encoders.onnx_model import OnnxEncoder, open_onnx

            session = open_onnx(Path(model.what), gpu=device.type == "cuda")
            return OnnxEncoder(session, Path(model.what), name=model.name, size_px=model.size_px)


def load_runs(runs: Sequence[Path], *, device: torch.device, untrained: bool = True) -> list[StudentEncoder]:
    """The student of every run and, beside it, the same network before its first step.

    A run may have started from weights that are gone since (`--init`, `--pretrained`): then that network cannot be made
    again, which is said, and the trained one stands alone.
    """
    encoders: list[StudentEncoder] = []
    for run, name in zip(runs, run_names(runs), strict=True):
        encoders.append(StudentEncoder.of_run(run, name=name, trained=True, device=device))
        if not untrained:
            continue
        try:
            start = StudentEncoder.of_run(run, name=f"{name}, untrained", trained=False, device=device)
        except RadioCacheError as exc:
            say(f"'{name}, untrained' is left out, because the weights that {run} started from cannot be had: {exc}")
        else:
            encoders.append(start)
    return encoders


def run_names(runs: Sequence[Path]) -> list[str]:
    """What tables call the students of runs: "student" for one, folder names for several, paths where those are alike."""
    if len(runs) == 1:
        return ["student"]
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _weights(text: str) -> Path | Literal["random"]:
    return "random" if text == "random" else Path(text).expanduser()
