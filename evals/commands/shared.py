"""What the commands of radio-eval share: options, progress lines, and how a result is written down."""

import dataclasses
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
device_option = click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    default="auto",
    show_default=True,
    help="Where models run and neighbours are searched.",
)
runs_option = click.option(
    "--run", "runs", type=PATH, multiple=True, help="Folder of a training run. May be given again."
)
_models = click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]WHAT[@PX]",
    help="Anything else to compare: a run or export folder, teacher:NAME, timm:NAME, open_clip:NAME/WEIGHTS or "
    "FILE.onnx; @PX sets its input size. May be given again.",
)
_weights = click.option(
    "--weights",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Local weights of a --model in its library's own format; 'random' for none.",
)
json_option = click.option(
    "--json",
    "json_file",
    type=OutputFile(),
    metavar="FILE",
    help="Write protocol, settings, versions, image hashes and rows here; - is standard output.",
)
seed_option = click.option("--seed", default=0, show_default=True, help="Of what is drawn at random.")


class Compared(TypedDict):
    """What `compared` adds to a command: who is compared, and where they run."""

    runs: tuple[Path, ...]
    models: tuple[str, ...]
    weights: tuple[str, ...]
    device: Device


class Drawn(Compared):
    """What `compared` and `drawn` add to a command: who is compared, on how many images, drawn by which seed."""

    limit: int | None
    seed: int


def compared(command: F) -> F:
    """--run, --model, --weights and --device."""
    return runs_option(_models(_weights(device_option(command))))


def drawn(limit: int | None = None) -> Callable[[F], F]:
    """--limit, with its default, and --seed."""
    option = click.option(
        "--limit",
        type=int,
        metavar="N",
        default=limit,
        show_default=limit is not None,
        help="Use at most N images of each place, drawn at random.",
    )
    return lambda command: option(seed_option(command))


def write_record(file: Path | None, record: dict[str, Any], config: Any = None) -> None:
    """Write a result with its settings (a dataclass) and the software that made it; nothing without a file."""
    if file is not None:
        from evals.shared.versions import hardware, software_versions

        settings = {} if config is None else {"settings": dataclasses.asdict(config)}
        full = {**record, **settings, "versions": software_versions(), "hardware": hardware()}
        write_output(file, json.dumps(full, indent=1, default=str).encode())


@final
class ProgressLines:
    """One progress line after the other on standard error: a new one whenever the name changes. A context manager."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None
        self._name, self._done = "", 0

    def __call__(self, name: str, done: int, total: int, /, *, unit: str = "images") -> None:
        if name != self._name:
            self._close()
            self._name, self._done, self._line = name, 0, ProgressLine(name, total, unit=unit).__enter__()
        assert self._line is not None, "opened above for a new name, and kept until the next"
        self._line.advance(done - self._done)
        self._done = done

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
