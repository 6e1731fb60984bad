"""Shared by the commands of radio-eval: options, progress lines, and the JSON record of a result."""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, TypeVar, final, get_args

import click

from evals.shared.devices import Device
from radio_cache.terminal.files import OutputFile, write_output
from radio_cache.terminal.output import ProgressLine

F = TypeVar("F", bound=Callable[..., Any])

AGAIN = "Nothing was written; the same command starts over."

IMAGES = "a cache, a folder with one subfolder per class, or tars such as 'train-{000..004}.tar'"

PATH = click.Path(path_type=Path)
# A choice, as FAISS and torch have to agree on it; cuda:1 would hold for torch alone.
device_option = click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    default="auto",
    show_default=True,
    help="Device to run on; auto takes a GPU if there is one.",
)
runs_option = click.option(
    "--run",
    "runs",
    type=PATH,
    multiple=True,
    metavar="FOLDER",
    help="Folder of a run of radio-train, whose student is evaluated. Repeatable.",
)
_models = click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL[@PX]",
    help="Another model to evaluate: the folder of a run or an export, teacher:NAME, timm:NAME, open_clip:NAME/WEIGHTS or "
    "FILE.onnx. NAME= sets its name in tables, @PX its input size in pixels. Repeatable.",
)
_weights = click.option(
    # Belongs to --model, not to --run: a student has its own weights.
    "--weights",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Load the weights of a --model from this local file, in its library's own format; 'random' leaves it untrained. "
    "Repeatable.",
)
json_option = click.option(
    "--json",
    "json_file",
    type=OutputFile(),
    metavar="FILE",
    help="Also write the results to this file as JSON, with protocol, settings, versions and image hashes; - is standard "
    "output.",
)
seed_option = click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of all random choices.")


class EncoderOptions(TypedDict):
    """The parameters that `encoder_options` adds to a command: encoders and device."""

    runs: tuple[Path, ...]
    models: tuple[str, ...]
    weights: tuple[str, ...]
    device: Device


# A TypedDict for **kwargs: pyright checks that configs take exactly these fields.
class SampledEncoderOptions(EncoderOptions):
    """The parameters that `encoder_options` and `sampling_options` add to a command."""

    limit: int | None
    seed: int


def encoder_options(command: F) -> F:
    """Add --run, --model, --weights and --device to a command."""
    # Applied from the inside out, so that help lists them in this order.
    return runs_option(_models(_weights(device_option(command))))


def sampling_options(limit: int | None = None) -> Callable[[F], F]:
    """Return a decorator that adds --limit, with this default, and --seed to a command."""
    option = click.option(
        "--limit",
        type=int,
        metavar="N",
        default=limit,
        show_default=limit is not None,
        help="Use at most N images of each set, drawn at random." + (" [default: all]" if limit is None else ""),
    )
    # The default of --limit differs by command, hence a factory.
    return lambda command: option(seed_option(command))


def write_record(file: Path | None, record: dict[str, Any], config: Any = None) -> None:
    """Write a result with its settings, software and hardware as JSON.

    Args:
        file: None writes nothing.
        record: of the result.
        config: a dataclass with the settings; None for a result without.
    """
    if file is not None:
        # Imports torch, which takes seconds: only commands that ran an evaluation get here.
        from evals.shared.record import settings_record
        from evals.shared.versions import hardware, software_versions

        settings = {} if config is None else {"settings": settings_record(config)}
        # The record first, so that its protocol is at the top of the file.
        full = {**record, **settings, "versions": software_versions(), "hardware": hardware()}
        write_output(file, json.dumps(full, indent=1, default=str).encode())


@final
class ProgressLines:
    """A context manager that reports progress on standard error, on a new line whenever the name of the task changes."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None
        self._name, self._num_done = "", 0

    def __call__(self, name: str, num_done: int, total: int, /, *, unit: str = "images") -> None:
        """Report progress, see `evals.shared.progress.Progress`."""
        if name != self._name:
            self._close()
            self._name, self._num_done, self._line = name, 0, ProgressLine(name, total, unit=unit).__enter__()
        assert self._line is not None, "opened above for a new name"
        self._line.advance(num_done - self._num_done)  # the line counts steps, not totals
        self._num_done = num_done

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None
