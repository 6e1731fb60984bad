"""Mode switch: how well a student predicts each teacher at several input sizes.

A student may follow one teacher at low and another at high resolution: the mode switch of RADIOv2.5 (arXiv 2412.07679).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.encoders import StudentEncoder, load_runs
from evals.encoders.trained_on import held_out_of
from evals.errors import EvalError
from evals.shared.charts import line_chart
from evals.shared.devices import Device
from evals.shared.image_set import CacheImages, ImageSet, image_set
from evals.shared.notes import left_out_notes
from evals.shared.progress import Progress
from radio_cache.errors import ConfigError
from radio_cache.geometry.crops import crop_weights
from radio_cache.reader import Cache
from radio_cache.torch import pick_device

PAPER_IMAGES = 100
# Half to twice the training size, denser around it.
_SHARES = (0.5, 0.75, 1.0, 1.5, 2.0)
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ModeSwitchConfig:
    """Settings of a mode-switch evaluation.

    Attributes:
        run: folder of the student's run.
        cache: holds the teachers; None takes the cache that the student learned from.
        sizes: of the student's input, pixels; empty takes half to twice the training size.
        limit: images at most, drawn by `seed`.
    """

    run: Path
    cache: str | Path | None = None
    sizes: tuple[int, ...] = ()
    limit: int | None = PAPER_IMAGES
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class ModeSwitchRow:
    """One teacher at one size of the student's input.

    Attributes:
        cosine: mean over tokens, after the teacher's mean token was subtracted from both.
        fidelity: variance of the teacher's tokens over the mean squared error; 1 is no better than the mean token.
        summary_cosine: None without summaries.
    """

    teacher: str
    size_px: int
    cosine: float
    fidelity: float
    summary_cosine: float | None


@dataclass(frozen=True, kw_only=True)
class ModeSwitchTable:
    """The measurements, and how they were made."""

    protocol: str
    images: dict[str, str | int]
    trained_px: int
    rows: tuple[ModeSwitchRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table."""
        return asdict(self)

    def chart(self) -> str:
        """Plot cosine against input size, one line per teacher, as SVG."""
        sizes = sorted({row.size_px for row in self.rows})
        cosine_of = {(row.teacher, row.size_px): row.cosine for row in self.rows}
        teachers = list(dict.fromkeys(row.teacher for row in self.rows))
        lines = {teacher: [cosine_of.get((teacher, size), float("nan")) for size in sizes] for teacher in teachers}
        return line_chart(
            lines, [str(size) for size in sizes], x_title="student's input, pixels", y_title="cosine with the teacher"
        )


def run_mode_switch(config: ModeSwitchConfig, *, progress: Progress | None = None) -> ModeSwitchTable:
    """Compare the student's maps at every size with the cached maps of its teachers.

    Raises:
        RadioCacheError: if run or cache cannot be opened, or the cache has none of the teachers.
    """
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"--limit needs at least 1 image, got {config.limit}")
    device = torch.device(pick_device(config.device))
    # The untrained student is left out: its heads predict nothing.
    (student,) = load_runs((config.run,), device=device, untrained=False)
    cache = Cache(config.cache or student.config.cache)
    # The first map space is the backbone's own, which has no teacher to compare with.
    teachers = [name for name in student.map_spaces[1:] if name in cache.teachers]
    if not teachers:
        raise EvalError(f"{cache.url} holds none of the student's teachers ({', '.join(student.map_spaces[1:])})")
    images, held_out = held_out_of(image_set(CacheImages(cache), teachers=teachers), [student])
    images = images.sampled(config.limit, config.seed)
    rows: list[ModeSwitchRow] = []
    trained_px = student.geometry.input_hw[0]
    sizes, notes = _sizes(student, config.sizes)
    for number, size in enumerate(sizes):
        # The same weights at another size; only the view and the token grid change.
        sized = student.at_size(size)
        rows += _compare(sized, cache, images, teachers, size)
        if progress is not None:
            progress("sizes", number + 1, len(sizes), unit="sizes")
    protocol = (
        f"{len(images):,} images at {', '.join(map(str, sizes))} px, trained at {trained_px} px; the student's heads against its "
        "teachers' cached maps, sampled where the student has its tokens"
    )
    return ModeSwitchTable(
        protocol=protocol,
        images=images.identity(),
        trained_px=trained_px,
        rows=tuple(rows),
        notes=(*held_out, *left_out_notes(images), *notes),
    )


def _sizes(student: StudentEncoder, requested_sizes: Sequence[int]) -> tuple[list[int], list[str]]:
    """Return the sizes to evaluate, each supported by the student, and notes about those that were moved."""
    trained = student.geometry.input_hw[0]
    candidate_sizes = list(requested_sizes) or [round(trained * share) for share in _SHARES]
    if too_small := [size for size in candidate_sizes if size < 1]:
        raise ConfigError(f"--size {too_small[0]}: a size is at least one pixel")
    # Moved sizes may coincide, so duplicates are dropped at the end.
    supported_sizes = [student.model.nearest_supported_resolution(size, size)[0] for size in candidate_sizes]
    moved = [
        f"{size} to {supported}"
        for size, supported in zip(candidate_sizes, supported_sizes, strict=True)
        if size != supported and requested_sizes
    ]
    notes = [f"Sizes moved to the nearest that the student takes: {', '.join(moved)}."] if moved else []
    if len(set(supported_sizes)) == 1:
        notes.append("The student takes one size only: there is no curve.")
    return sorted(set(supported_sizes)), notes


def _compare(
    student: StudentEncoder, cache: Cache, images: ImageSet, teachers: Sequence[str], size: int
) -> list[ModeSwitchRow]:
    """Return one row per teacher for one input size."""
    # Per teacher: sum of cosines, of squared teacher values, of squared errors, number of tokens.
    sums = {name: np.zeros(4) for name in teachers}
    summary_cosines: dict[str, list[NDArray[np.float64]]] = {name: [] for name in teachers}
    for first in range(0, len(images), _BATCH):
        batch = images.at(np.arange(first, min(first + _BATCH, len(images))))
        # The images of a cache were decoded when it was built, so none is left out.
        decoded = [image for position in range(len(batch)) if (image := batch.decoded(position)) is not None]
        pixels = np.stack([student.pixels_of(image) for image in decoded])
        with torch.inference_mode():
            out = student.outputs(torch.from_numpy(pixels))
        hws = [(image.height, image.width) for image in decoded]
        boxes = [student.seen_box_xyxy(hw) for hw in hws]
        for name in teachers:
            teacher = cache.teachers[name]
            prediction = out.maps[name].float().cpu().numpy()
            # The teacher's map is sampled where the student has its tokens: (b, H, W, c) -> (b, h, w, c).
            weights = crop_weights(boxes, hws, teacher.spec.geometry, out_hw=(prediction.shape[1], prediction.shape[2]))
            target = weights.sample(teacher.maps(batch.rows))
            # Over all tokens of the cache, not of this batch, so that batches agree.
            mean = teacher.spatial_mean_std()[0]
            # Boolean indexing flattens the valid tokens: (b, h, w, c) -> (tokens, c).
            a, b = prediction[weights.valid] - mean, target[weights.valid] - mean
            cosines = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
            # Sums, not means: batches differ in their number of valid tokens.
            sums[name] += [cosines.sum(), (b**2).sum(), ((a - b) ** 2).sum(), len(cosines)]
            if name in out.summaries:
                summary_cosines[name].append(
                    _row_cosines(out.summaries[name].float().cpu().numpy(), teacher.summaries(batch.rows))
                )
    return [
        ModeSwitchRow(
            teacher=name,
            size_px=size,
            cosine=float(total[0] / total[3]),
            # A perfect prediction has no error; the floor keeps the ratio finite.
            fidelity=float(total[1] / max(total[2], 1e-12)),
            summary_cosine=float(np.concatenate(summary_cosines[name]).mean()) if summary_cosines[name] else None,
        )
        for name, total in sums.items()
    ]


def _row_cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of `a` with the same row of `b`, both (n, c)."""
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1).astype(np.float64) / np.maximum(scale, 1e-12)
