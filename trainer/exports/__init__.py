"""What leaves the house, by format: `radio-export`. Everything written is read back and compared with the student."""

import contextlib
import errno
import functools
import hashlib
import shutil
import uuid
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.allowed_modules import allowing_modules
from radio_cache.errors import NotACacheError, RadioCacheError, unknown_name
from radio_cache.storage.local import TEMPORARY, refused_by_system, write_atomically
from trainer.exports.graphs import write_onnx, write_program
from trainer.exports.hugging_face import write_hugging_face
from trainer.exports.model_card import CARD_FILE, Card, model_card
from trainer.exports.timm_folder import write_timm
from trainer.exports.written import PLACE, TOLERANCE, ExportError, FlatFeatures, Written, flat_features, largest_change
from trainer.model.files import deployable, load_student, save_student
from trainer.model.student import DistilledStudent, Heads, with_centre_share
from trainer.run.checkpoint_student import student_from_checkpoint
from trainer.students import ERadio, foreign_module

__all__ = ["FORMATS", "ExportError", "ExportReport", "Exported", "export_student"]

CHECKSUMS_FILE = "SHA256SUMS"

_BATCHES = (1, 3)


def write_safetensors(model: DistilledStudent, folder: Path) -> Written:
    """Weights and a JSON, as `trainer.load_student` reads them."""
    save_student(model, folder)

    @functools.cache
    def load() -> DistilledStudent:
        return load_student(folder, adaptors=model.heads)

    def run(images: Float[Tensor, "b 3 h w"]) -> FlatFeatures:
        return flat_features(load()(images))

    heads = f", adaptors={list(model.heads)!r}" if model.heads else ""
    module = foreign_module(model.config.student)
    allowed = "" if module is None else f", allow_modules=[{module!r}]"
    return Written(
        use=(
            "from trainer import load_student",
            f"model = load_student('{PLACE}'{heads}{allowed})",
            "out = model(model.preprocess(photo))  # photo: a PIL image; a model takes images (b, 3, h, w) in [0, 1]",
        ),
        run=run,
    )


Writer = Callable[..., Written]
"""(student, folder) -> what was written; that of ONNX takes any_size, too."""

FORMATS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "hf": write_hugging_face,
    "timm": write_timm,
    "onnx": write_onnx,
    "torch-export": write_program,
}

GRAPHS = frozenset({"onnx", "torch-export"})
"""Formats that cannot be trained on, so that batch norms and position biases are folded away in them."""


@dataclass(frozen=True)
class Exported:
    """One format. change: of what was read back, see `largest_change`; num_bytes: of the folder."""

    format: str
    folder: Path
    num_bytes: int
    change: float
    written: Written

    def moved(self, old: Path, new: Path) -> "Exported":
        """The same below another folder; what shows how it is used names that."""
        folder = new / self.folder.relative_to(old)
        use = tuple(line.replace(PLACE, str(folder)) for line in self.written.use)
        return replace(self, folder=folder, written=replace(self.written, use=use))


@dataclass(frozen=True)
class ExportReport:
    """folding: how much folding batch norms, position biases and reparametrised weights changed; None if nothing was.

    checkpoint: which one it is of, and how good; None for the student that the run ended with.
    """

    exported: tuple[Exported, ...]
    folding: float | None
    checkpoint: str | None = None


def export_student(
    run: str | Path,
    out: Path,
    *,
    formats: Sequence[str] = ("safetensors",),
    adaptors: Heads = "all",
    card: Card | None = None,
    centre_share: float | None = None,
    allow_modules: Iterable[str] = (),
    checkpoint: str | None = None,
    any_size: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Write a trained student to `out`, one folder below it per format if there are several, each with a model card.

    adaptors: the heads that hf, onnx and torch-export give; safetensors and hf keep all of them.
    centre_share: another than the run's, see `StudentConfig`.
    allow_modules: as for `load_student`.
    checkpoint: of the run, "best", "last" or a number of steps, instead of the student that it ended with.
    any_size: let onnx take images of any size that the student takes. say: hears what is done now, in a line each.
    Raises ExportError for what a format cannot do, ConfigError for unknown names, NotACacheError if `out` is not empty;
    nothing is left at `out` then.
    """
    with allowing_modules(allow_modules):  # what is written is read back
        return _export(run, out, formats, adaptors, card or Card(), centre_share, checkpoint, any_size, say)


def _export(
    run: str | Path,
    out: Path,
    formats: Sequence[str],
    adaptors: Heads,
    card: Card,
    centre_share: float | None,
    checkpoint: str | None,
    any_size: bool,
    say: Callable[[str], None],
) -> ExportReport:
    for name in formats:
        if name not in FORMATS:
            raise ExportError(unknown_name("export format", name, FORMATS))
    if any_size and "onnx" not in formats:
        raise ExportError(
            "any size is for the format onnx: safetensors, hf and timm take any as they are, torch-export cannot"
        )
    place = out.resolve() if out.is_symlink() else out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NotACacheError(f"{out} exists and is not empty: choose another --out, or remove it")
    say(f"reading {run}")
    of_checkpoint: str | None = None
    if checkpoint is None:
        model = deployable(load_student(run, adaptors=adaptors))
    else:
        model, of_checkpoint = student_from_checkpoint(Path(run), checkpoint, adaptors=adaptors)
        model = deployable(model)
    if centre_share is not None:
        model.config = with_centre_share(model.config, centre_share)
    images = {count: _noise(count, model.config.image_hw) for count in _BATCHES}
    expected = {count: _run(lambda x: flat_features(model(x)), images[count]) for count in _BATCHES}
    folded, folding = model, None
    if isinstance(model.student, ERadio) and not GRAPHS.isdisjoint(formats):
        # Files of torch.export take weights in their plain layout alone.
        deployed = model.student.deploy().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # the stub lacks it
        folded = DistilledStudent(deployed, model.adaptors, model.config).eval()
        folded.use_heads(model.heads)
        folding = max(
            largest_change(_run(lambda x: flat_features(folded(x)), images[n]), expected[n]) for n in _BATCHES
        )
    document = model_card(model, Path(run), card)
    if document.from_cache:
        say(
            f"the model card shows images of {model.config.cache}: {', '.join(document.from_cache)}. Where they are private: "
            "--no-picture, or --picture IMAGE"
        )
    names = tuple(dict.fromkeys(formats))
    aside = _new_folder(place)
    try:
        exported: list[Exported] = []
        for number, name in enumerate(names, 1):
            say(f"{number}/{len(names)} {name}: writing it, reading it back")
            folder, student = aside if len(names) == 1 else aside / name, folded if name in GRAPHS else model
            write = partial(FORMATS[name], any_size=True) if any_size and name == "onnx" else FORMATS[name]
            exported.append(_write(name, write, student, folder, images, expected))
        for one in exported:
            document.write(one.folder, one.format, one.written.use, one.written.notes)
            _write_checksums(one.folder)
        try:
            aside.rename(place)  # takes the place of an empty folder, and of no other
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise NotACacheError(
                f"{out} was filled by another process meanwhile: nothing of it was touched. Choose another --out"
            ) from exc
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return ExportReport(tuple(one.moved(aside, out) for one in exported), folding, of_checkpoint)


def _new_folder(place: Path) -> Path:
    """Make a folder beside `place` that no other export has, and that nobody else's can be taken for."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}{TEMPORARY}{uuid.uuid4().hex}")
    aside.mkdir()
    return aside


def _write_checksums(folder: Path) -> None:
    """List every file but the card, which people edit, for `sha256sum -c`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CARD_FILE)
    lines: list[str] = []
    for file in files:
        with file.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        lines.append(f"{digest}  {file.relative_to(folder).as_posix()}\n")
    write_atomically(folder / CHECKSUMS_FILE, "".join(lines).encode())


def _write(
    name: str,
    write: Writer,
    model: DistilledStudent,
    folder: Path,
    images: dict[int, Tensor],
    expected: dict[int, FlatFeatures],
) -> Exported:
    """One format, read back."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _telling_what_failed(name, folder),
        torch.random.fork_rng(devices=[]),
    ):  # loading builds models with first weights
        written = write(model, folder)
        change = max(largest_change(_run(written.run, images[count]), expected[count]) for count in images)
    if not change <= TOLERANCE:
        raise ExportError(
            f"--format {name}: what was written gives other features than '{model.config.student}': they differ by {change:.1e} "
            "of the largest value. This is a bug, or a network that computes differently there; choose another format"
        )
    return Exported(
        name, folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), change, written
    )


@contextlib.contextmanager
def _telling_what_failed(name: str, folder: Path) -> Generator[None]:
    """Turn what a library raises while it writes into an error that says what the system refused, or what the library said."""
    try:
        yield
    except RadioCacheError:
        raise
    except Exception as exc:  # torch, transformers, onnx and timm have errors of their own, without a common base
        refused = refused_by_system(folder, exc)
        if refused is not None:
            raise refused from exc
        line = next((line.strip() for line in str(exc).splitlines() if line.strip()), "")
        raise ExportError(
            f"--format {name} cannot be written: {type(exc).__name__}: {line:.300}. Nothing is left of this export; choose "
            "another format"
        ) from exc


def _noise(count: int, image_hw: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    return torch.rand(count, 3, *image_hw, generator=torch.Generator().manual_seed(count))


def _run(call: Callable[[Tensor], FlatFeatures], images: Tensor) -> FlatFeatures:
    with torch.inference_mode():
        return call(images)
