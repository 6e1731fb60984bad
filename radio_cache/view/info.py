"""The contents of a cache as a table."""

import math
import os
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from radio_cache.checks.fidelity_loss import low_fidelity_shards
from radio_cache.format.schema import Failure, TeacherSpec
from radio_cache.format.transcoding import Transcoding
from radio_cache.geometry.crops import photo_share
from radio_cache.reader import Cache
from radio_cache.statistics.fidelity import Fidelity
from radio_cache.terminal.output import human_bytes, printable, table


@dataclass(frozen=True)
class TeacherInfo:
    """One teacher of a cache.

    Attributes:
        origin: description of the model, its input, licence and weights.
        fit: resizing of images to the input, as in the teacher's geometry.
        codec: label of the codec.
        fidelity: as recorded; None without a record.
        shards_done: number of finished shards.
        stored_bytes: of the finished shards.
        map_bytes: part of `stored_bytes` that holds maps.
        images_done: usable images of the finished shards.
    """

    name: str
    origin: str
    input_hw: tuple[int, int]
    fit: str
    grid_hw: tuple[int, int]
    spatial_dim: int
    views: int
    summary_dim: int | None
    codec: str
    fidelity: Fidelity | None
    shards_done: int
    num_shards: int
    stored_bytes: int
    map_bytes: int
    images_done: int

    @property
    def bytes_per_image(self) -> float:
        """Stored bytes per usable image of the finished shards."""
        return self.stored_bytes / max(1, self.images_done)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value of the maps, checksums and indices included."""
        # (views, grid_h, grid_w, c) values of one image
        values = self.views * self.grid_hw[0] * self.grid_hw[1] * self.spatial_dim
        return 8 * self.map_bytes / max(1, self.images_done) / values


def teacher_infos(cache: Cache) -> list[TeacherInfo]:
    """Return one entry per teacher, by name."""
    infos: list[TeacherInfo] = []
    for teacher in cache.teachers.values():
        done = [receipt for receipt in cache.receipts(teacher.name) if receipt]
        spec = teacher.spec
        height, width = spec.geometry.input_hw
        view_note = (
            f", and of {spec.views - 1} more view{'s' * (spec.views > 2)} of every image" if spec.views > 1 else ""
        )
        infos.append(
            TeacherInfo(
                name=teacher.name,
                origin=f"{spec.model} at {height}x{width} px ({spec.geometry.fit}, sees "
                f"{photo_share(spec.geometry):.0%} of a 4:3 photo){view_note}{_loading_note(spec)}; {spec.licence}; "
                f"{spec.weights} (SHA-256 {spec.weights_sha256[:12]})",
                input_hw=spec.geometry.input_hw,
                fit=spec.geometry.fit,
                grid_hw=spec.geometry.grid_hw,
                spatial_dim=spec.spatial_dim,
                views=spec.views,
                summary_dim=spec.summary_dim,
                codec=spec.codec.label,
                fidelity=teacher.fidelity(),
                shards_done=len(done),
                num_shards=cache.meta.num_shards,
                stored_bytes=sum(file.num_bytes for receipt in done for file in receipt.files),
                map_bytes=sum(
                    file.num_bytes for receipt in done for file in receipt.files if file.path.startswith("spatial/")
                ),
                images_done=sum(receipt.num_rows - len(receipt.failures) for receipt in done),
            )
        )
    return infos


def _loading_note(spec: TeacherSpec) -> str:
    """Return the loading options of the weights, as a suffix for a sentence."""
    return "".join(f"; {name.replace('_', ' ')}: {printable(value)}" for name, value in spec.loaded.items())


def cosine(fidelity: Fidelity | None) -> str:
    """Return the mean cosine of stored and true tokens for a table, or "-" if none is recorded.

    The number is cut, not rounded: 0.98996 must not look like 0.99.
    """
    # 1e-6 keeps a cosine such as 0.9900 from losing a digit to its binary fraction.
    return "-" if fidelity is None else f"{math.floor(fidelity.cosine * 1e4 + 1e-6) / 1e4:.4f}"


def describe(cache: Cache) -> Group:
    """Return the output of `radio-cache info`: a headline, a row per teacher, and notes on missing or damaged parts."""
    meta = cache.meta
    failures = cache.failures()
    # Without names, the distinct labels count; a negative label means none.
    classes = len(meta.class_names) or len(set(cache.index.labels[cache.index.labels >= 0].tolist()))
    head = Text.assemble(
        (cache.url, "bold"),
        f"\n{cache.num_images} images in {meta.num_shards} shard{'s' * (meta.num_shards > 1)} of {meta.shard_images}, "
        f"{classes or 'no'} classes"
        f", {_unusable(failures)}; from {printable(meta.containers[0].path)}"
        + (f" and {len(meta.containers) - 1} more" if len(meta.containers) > 1 else "")
        + (f"\nimages stored in it: shorter side at most {meta.pixels}" if meta.pixels else "")
        + f"\nwritten by {printable(meta.creator)}\n",
    )
    rows = table("", "teacher", "maps", "summary", "codec", "cosine", "bits/value", "per image", "stored", "built")
    infos = teacher_infos(cache)
    for info in infos:
        rows.add_row(
            info.name,
            f"{info.grid_hw[0]}x{info.grid_hw[1]}x{info.spatial_dim}",
            str(info.summary_dim or "none"),
            info.codec,
            cosine(info.fidelity),
            f"{info.bits_per_value:.2f}",
            human_bytes(info.bytes_per_image),
            human_bytes(info.stored_bytes),
            f"{info.shards_done / info.num_shards:.0%}",
        )
    scanned = sum(receipt is not None for receipt in cache.receipts("images"))
    notes = [f"images checked: {scanned} of {meta.num_shards} shards"] if scanned < meta.num_shards else []
    if any(info.shards_done < info.num_shards for info in infos):
        notes.append("not complete: run the same `radio-cache build` command again to continue")
    notes += [
        _transcoding_note(name, teacher.conversion) for name, teacher in cache.teachers.items() if teacher.conversion
    ]
    notes += [printable(low_shards.describe(cache.url)) for low_shards in low_fidelity_shards(cache)]
    notes += [f"{name} cannot be read: {printable(str(error))}" for name, error in cache.teachers.unreadable.items()]
    origins = "\n".join(f"{info.name}: {printable(info.origin)}" for info in infos)
    body = [rows, Text(f"\n{origins}")] if infos else [Text("no teacher yet")]
    return Group(head, *body, *(Text(f"\n{note}") for note in notes))


def _unusable(failures: list[Failure]) -> str:
    """Return a phrase with the number of unusable images, and of those among them that could not be read."""
    unreadable = sum(failure.is_unreadable for failure in failures)
    return f"{len(failures)} unusable" + (
        f" ({unreadable} of them could not be read, and may be fine)" if unreadable else ""
    )


def _transcoding_note(name: str, conversion: Transcoding) -> str:
    """Return a note that the cosine of a transcoded teacher is an estimate, and how to measure it."""
    # The product of both cosines, since the teacher did not run again.
    before = f", which had a cosine of {cosine(conversion.fidelity)} with the teacher" if conversion.fidelity else ""
    return (
        f"{name} was transcoded from {conversion.source}{before}: its cosine is an estimate. To measure it, run radio-cache "
        "verify --recompute"
    )


def describe_failures(cache: Cache) -> Table | Text:
    """Return a table of the unusable images with their reasons, or a sentence if there are none.

    Images that could not be read come last, since a later build may read them.
    """
    failures = sorted(cache.failures(), key=lambda failure: failure.is_unreadable)
    if not failures:
        return Text(f"every scanned image of {cache.url} can be used")
    rows = table(f"{len(failures)} image{'s' * (len(failures) != 1)} cannot be used", "image", "why", left=2)
    for failure in failures:
        # Names of files need not be UTF-8.
        key = os.fsencode(cache.index.key(failure.row)).decode(errors="replace")
        # `Text` instead of strings, in which rich would read brackets as markup.
        rows.add_row(Text(printable(key)), Text(printable(failure.reason)))
    unreadable = sum(failure.is_unreadable for failure in failures)
    if unreadable:
        rows.caption_justify = "left"
        rows.caption = Text(
            f"The last {unreadable} could not be read, and may be fine: the build command tries them again. "
            "--retry-unusable tries all of them again."
        )
    return rows
