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

    origin: model, input, licence and weights, in words. bytes_per_image: stored bytes over the images of finished shards.
    map_bytes: the part of stored_bytes that is maps.
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
        return self.stored_bytes / max(1, self.images_done)

    @property
    def bits_per_value(self) -> float:
        """Stored bits of the maps, checksums and indexes included, for each of their values."""
        values = self.views * self.grid_hw[0] * self.grid_hw[1] * self.spatial_dim
        return 8 * self.map_bytes / max(1, self.images_done) / values


def teacher_infos(cache: Cache) -> list[TeacherInfo]:
    """Return one entry per teacher, by name."""
    infos: list[TeacherInfo] = []
    for teacher in cache.teachers.values():
        done = [receipt for receipt in cache.receipts(teacher.name) if receipt]
        spec = teacher.spec
        height, width = spec.geometry.input_hw
        more = f", and of {spec.views - 1} more view{'s' * (spec.views > 2)} of every image" if spec.views > 1 else ""
        infos.append(
            TeacherInfo(
                name=teacher.name,
                origin=f"{spec.model} at {height}x{width} px ({spec.geometry.fit}, sees "
                f"{photo_share(spec.geometry):.0%} of a 4:3 photo){more}{_loaded(spec)}; {spec.licence}; {spec.weights} "
                f"(SHA-256 {spec.weights_sha256[:12]})",
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


def _loaded(spec: TeacherSpec) -> str:
    """Return the loading options of the weights, as a suffix for a sentence."""
    return "".join(f"; {name.replace('_', ' ')}: {printable(value)}" for name, value in spec.loaded.items())


def cosine(fidelity: Fidelity | None) -> str:
    """Mean cosine of stored and true tokens for a table, cut, not rounded: 0.98996 must not look like 0.99."""
    return "-" if fidelity is None else f"{math.floor(fidelity.cosine * 1e4 + 1e-6) / 1e4:.4f}"


def describe(cache: Cache) -> Group:
    """Return the answer to `radio-cache info`: a headline, a row per teacher, what is missing."""
    meta = cache.meta
    failures = cache.failures()
    classes = len(meta.class_names) or len(set(cache.index.labels[cache.index.labels >= 0].tolist()))
    head = Text.assemble(
        (cache.url, "bold"),
        f"\n{cache.num_images} images in {meta.num_shards} shard{'s' * (meta.num_shards > 1)} of {meta.shard_images}, "
        f"{classes or 'no'} classes"
        f", {_unusable(failures)}; from {printable(meta.containers[0].path)}"
        + (f" and {len(meta.containers) - 1} more" if len(meta.containers) > 1 else "")
        + (f"\nimages kept in it, too: shorter side at most {meta.pixels}" if meta.pixels else "")
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
        notes.append("not complete: the same `radio-cache build` command goes on where it stopped")
    notes += [_told_of(name, teacher.conversion) for name, teacher in cache.teachers.items() if teacher.conversion]
    notes += [printable(drift.describe(cache.url)) for drift in low_fidelity_shards(cache)]
    notes += [f"{name} cannot be read: {printable(str(error))}" for name, error in cache.teachers.unreadable.items()]
    origins = "\n".join(f"{info.name}: {printable(info.origin)}" for info in infos)
    body = [rows, Text(f"\n{origins}")] if infos else [Text("no teacher yet")]
    return Group(head, *body, *(Text(f"\n{note}") for note in notes))


def _unusable(failures: list[Failure]) -> str:
    """Return the number of unusable images, and how many of those were never read."""
    unreadable = sum(failure.is_unreadable for failure in failures)
    return f"{len(failures)} unusable" + (
        f" ({unreadable} of them could not be read, and may be fine)" if unreadable else ""
    )


def _told_of(name: str, conversion: Transcoding) -> str:
    """Return a note that a cosine is the product of two, and how to measure it."""
    before = f", which kept {cosine(conversion.fidelity)} of the teacher's" if conversion.fidelity else ""
    return (
        f"{name} was encoded again, from {conversion.source}{before}: its cosine is an estimate, which radio-cache verify "
        "--recompute measures"
    )


def describe_failures(cache: Cache) -> Table | Text:
    """Return every image that cannot be used, and why: first those whose bytes show it, then those that could not be read."""
    failures = sorted(cache.failures(), key=lambda failure: failure.is_unreadable)
    if not failures:
        return Text(f"every image of {cache.url} that was looked at can be used")
    rows = table(f"{len(failures)} image{'s' * (len(failures) != 1)} cannot be used", "image", "why", left=2)
    for failure in failures:
        key = os.fsencode(cache.index.key(failure.row)).decode(errors="replace")  # names need not be UTF-8
        rows.add_row(Text(printable(key)), Text(printable(failure.reason)))  # not strings: brackets are no markup
    unreadable = sum(failure.is_unreadable for failure in failures)
    if unreadable:
        rows.caption_justify = "left"
        rows.caption = Text(
            f"The last {unreadable} could not be read, and may be fine: the build command looks at them again. "
            "--retry-unusable looks at all of them again."
        )
    return rows
