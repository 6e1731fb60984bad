"""Export formats of `radio-export`. Every exported file is read back and compared with the student."""

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

# Two sizes of batch show an export that took the batch of its example as a constant.
_BATCHES = (1, 3)


def write_safetensors(model: DistilledStudent, folder: Path) -> Written:
    """Write weights and a JSON, as `trainer.load_student` reads them."""
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
"""(student, folder) -> record of the written files; the writer of ONNX takes any_size, too."""

FORMATS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "hf": write_hugging_face,
    "timm": write_timm,
    "onnx": write_onnx,
    "torch-export": write_program,
}

GRAPHS = frozenset({"onnx", "torch-export"})
"""Formats that cannot be trained further, so batch norms and position biases are folded."""


@dataclass(frozen=True)
class Exported:
    """One exported format.

    Attributes:
        change: `largest_change` between the features of the student and of the exported file.
        num_bytes: size of the folder.
    """

    format: str
    folder: Path
    num_bytes: int
    change: float
    written: Written

    def moved(self, old: Path, new: Path) -> "Exported":
        """Return the record with `old` replaced by `new`, also in the lines of use."""
        folder = new / self.folder.relative_to(old)
        use = tuple(line.replace(PLACE, str(folder)) for line in self.written.use)
        return replace(self, folder=folder, written=replace(self.written, use=use))


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        exported: one record per format.
        folding: change of the features by folding batch norms, position biases and reparametrised weights; None without
            folding.
        checkpoint: a description of the exported checkpoint; None for the final student of the run.
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
    on_progress: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Write a trained student to `out`, with one subfolder per format if there are several, each with a model card.

    Args:
        run: folder of the run, or of an export.
        out: a new or an empty folder. After an error nothing is left there.
        formats: names of `FORMATS`.
        adaptors: heads that hf, onnx and torch-export return; safetensors and hf keep the weights of all.
        card: contents of the model card.
        centre_share: another than the run's, see `StudentConfig`.
        allow_modules: as for `load_student`.
        checkpoint: "best", "last" or a number of steps, instead of the final student of the run.
        any_size: let onnx take images of any size that the student accepts.
        on_progress: called with a line for each stage.

    Raises:
        ExportError: for students or settings that a format does not support.
        ConfigError: for unknown names.
        NotACacheError: if `out` is not empty.
    """
    with allowing_modules(allow_modules):  # for reading the export back
        return _export(run, out, formats, adaptors, card or Card(), centre_share, checkpoint, any_size, on_progress)


def _export(
    run: str | Path,
    out: Path,
    formats: Sequence[str],
    adaptors: Heads,
    card: Card,
    centre_share: float | None,
    checkpoint: str | None,
    any_size: bool,
    on_progress: Callable[[str], None],
) -> ExportReport:
    for name in formats:
        if name not in FORMATS:
            raise ExportError(unknown_name("export format", name, FORMATS))
    if any_size and "onnx" not in formats:
        raise ExportError(
            "any size is for the format onnx: safetensors, hf and timm take any as they are, torch-export cannot"
        )
    target = out.resolve() if out.is_symlink() else out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NotACacheError(f"{out} exists and is not empty: choose another --out, or remove it")
    on_progress(f"reading {run}")
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
        # Files of torch.export support weights in their plain layout only.
        deployed = model.student.deploy().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # the stub lacks it
        folded = DistilledStudent(deployed, model.adaptors, model.config).eval()
        folded.use_heads(model.heads)
        # Reported by itself: it is a change of the network, not of the format.
        folding = max(
            largest_change(_run(lambda x: flat_features(folded(x)), images[n]), expected[n]) for n in _BATCHES
        )
    document = model_card(model, Path(run), card)
    if document.from_cache:
        on_progress(
            f"the model card shows images of {model.config.cache}: {', '.join(document.from_cache)}. If they are private: "
            "--no-picture, or --picture IMAGE"
        )
    names = tuple(dict.fromkeys(formats))
    # Written beside the target and renamed at the end, so that a killed export leaves no partial one.
    aside = _new_folder(target)
    try:
        exported: list[Exported] = []
        for number, name in enumerate(names, 1):
            on_progress(f"{number}/{len(names)} {name}: writing it, reading it back")
            folder, student = aside if len(names) == 1 else aside / name, folded if name in GRAPHS else model
            write = partial(FORMATS[name], any_size=True) if any_size and name == "onnx" else FORMATS[name]
            exported.append(_write(name, write, student, folder, images, expected))
        # After all formats: a card beside a format that failed would describe nothing.
        for export in exported:
            document.write(export.folder, export.format, export.written.use, export.written.notes)
            _write_checksums(export.folder)
        try:
            aside.rename(target)  # replaces an empty folder only
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise NotACacheError(
                f"{out} was filled by another process meanwhile and was not touched: choose another --out"
            ) from exc
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return ExportReport(tuple(export.moved(aside, out) for export in exported), folding, of_checkpoint)


def _new_folder(target: Path) -> Path:
    """Create a temporary folder beside `target` with a unique name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}{TEMPORARY}{uuid.uuid4().hex}")
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
    """Write one format and compare its features with the student's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _library_errors_as_export_errors(name, folder),
        torch.random.fork_rng(devices=[]),
    ):  # loading builds models with first weights
        written = write(model, folder)
        change = max(largest_change(_run(written.run, images[count]), expected[count]) for count in images)
    # Negated, so that NaN is refused as well.
    if not change <= TOLERANCE:
        raise ExportError(
            f"--format {name}: its features differ from those of '{model.config.student}' by {change:.1e} "
            "of the largest value. This is a bug, or the network computes differently there: choose another format"
        )
    return Exported(
        name, folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), change, written
    )


@contextlib.contextmanager
def _library_errors_as_export_errors(name: str, folder: Path) -> Generator[None]:
    """Turn errors of the writing library into ExportError, or into a StorageError if the system refused a write."""
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
            f"--format {name} cannot be written: {type(exc).__name__}: {line:.300}. Nothing is left of this export. Choose "
            "another format"
        ) from exc


def _noise(count: int, image_hw: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    # Noise exercises every channel; the seed keeps the reported changes reproducible. (count, 3, h, w)
    return torch.rand(count, 3, *image_hw, generator=torch.Generator().manual_seed(count))


def _run(call: Callable[[Tensor], FlatFeatures], images: Tensor) -> FlatFeatures:
    with torch.inference_mode():
        return call(images)
