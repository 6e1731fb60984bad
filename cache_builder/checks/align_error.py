"""The difference between a cached map sampled under a crop and the teacher's live map of the crop, by scale and level.

This is the error of training on crops of cached maps. Maps are compared on the teacher's own grid over the crop, token by
token, by the cosine after the teacher's mean token is subtracted from both: the part that all tokens share would make any
two maps similar. The geometry is that of training (`radio_cache.geometry.crops`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cache_builder.pipeline.preprocess import teacher_input, view_pixels
from cache_builder.teachers import load_recorded
from cache_builder.teachers.base import Teacher
from radio_cache.errors import ConfigError
from radio_cache.geometry.crops import BoxXYXY, crop_weights, valid_hw, visible_box_xyxy
from radio_cache.reader import Cache, CachedTeacher

SCALES = (1.0, 0.9, 0.7, 0.5, 0.35)
"""Default sides of crops, as shares of the side that the teacher sees."""


@dataclass(frozen=True)
class AlignError:
    """Centred cosine between cached and live maps, for one level, scale and mirroring.

    Attributes:
        level_px: input size of the cached map.
        mirrored: whether the crop was flipped before the live teacher ran.
        scale: side of the crop, as a share of the side that the teacher sees.
        cosine: mean over crops.
        standard_error: of the mean; NaN for a single crop.
        crops: number of crops.
    """

    teacher: str
    level_px: int
    mirrored: bool
    scale: float
    cosine: float
    standard_error: float
    crops: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AlignRequest:
    """The configuration of the measurement.

    Attributes:
        teachers: names; () for all.
        limit: largest number of images, sampled by the seed.
        scales: sides of the crops, above 0 and at most 1; each image gives one crop per scale.
        seed: of the sample and of the positions of the crops.
        device: of the live teachers.
    """

    teachers: tuple[str, ...] = ()
    limit: int = 64
    scales: tuple[float, ...] = SCALES
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, not {self.limit}")
        for scale in self.scales:
            if not 0 < scale <= 1:
                raise ConfigError(f"the scale of a crop must be above 0 and at most 1, not {scale}")


def measure(
    cache: Cache, request: AlignRequest, on_message: Callable[[str], None] = lambda _: None
) -> list[AlignError]:
    """Compare every teacher's cached maps with its live maps of random crops.

    The live teacher runs at its first size, and is compared with the cached maps of all its levels.

    Args:
        cache: with at least one image that is complete for each teacher.
        request: of the measurement.
        on_message: called with one sentence per teacher.

    Returns:
        One entry per teacher, level, mirroring and scale.

    Raises:
        ConfigError: for a cache without teachers or complete images.
        TeacherError: if a teacher cannot be loaded.
    """
    if not cache.teachers.names():
        raise ConfigError(f"{cache.url} has no teacher yet: add one with `radio-cache build --teacher`")
    errors: list[AlignError] = []
    for name in request.teachers or cache.teachers.names():
        levels = cache.teachers.levels(name)
        teacher = load_recorded(levels[0].spec)
        teacher.to(torch.device(request.device))
        rows = cache.usable_rows([level.name for level in levels])
        if len(rows) == 0:
            raise ConfigError(f"{cache.url} has no image that is complete for {name}: run the build to its end")
        rng = np.random.default_rng(request.seed)
        chosen = np.sort(rng.permutation(rows)[: request.limit])
        on_message(f"{name}: {len(chosen)} images, {len(request.scales)} scales")
        errors += _teacher_errors(cache, teacher, levels, chosen, request)
    return errors


def _teacher_errors(
    cache: Cache, teacher: Teacher, levels: Sequence[CachedTeacher], rows: NDArray[np.int64], request: AlignRequest
) -> Iterator[AlignError]:
    # (c,), of the first level, at whose size the live teacher runs.
    mean = levels[0].spatial_mean_std()[0]
    cosines: dict[tuple[int, bool, float], list[float]] = {}
    for row in rows.tolist():
        image = cache.decode(cache.read_file(row))
        maps = [level.maps([row])[0] for level in levels]
        # Seeded per row, so that an image keeps its crops when `limit` changes.
        rng = np.random.default_rng((request.seed, row))
        for scale in request.scales:
            # One box per scale for all levels, so that their cosines compare.
            box = _box(rng, visible_box_xyxy((image.height, image.width), levels[0].spec.geometry), scale)
            for mirrored in (False, True):
                live, valid = _live(teacher, image.crop(box), mirrored, request.device)
                for number, level in enumerate(levels):
                    cached, cached_valid = _cached(
                        maps[number], level, box, (image.height, image.width), live.shape[:2]
                    )
                    # (grid_h, grid_w, c): a flipped map stands for the map of the flipped crop, as in training
                    if mirrored:
                        cached, cached_valid = cached[:, ::-1], cached_valid[:, ::-1]
                    value = _cosine(cached - mean, live - mean, valid & cached_valid)
                    cosines.setdefault((number, mirrored, scale), []).append(value)
    for (number, mirrored, scale), values in cosines.items():
        # ddof=1: the mean is estimated from the same values.
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        side = levels[number].spec.geometry.input_hw[0]
        yield AlignError(levels[0].name, side, mirrored, scale, float(np.mean(values)), error, len(values))


def _box(rng: np.random.Generator, visible_box: BoxXYXY, scale: float) -> tuple[int, int, int, int]:
    """Return a random box of whole pixels, since the live teacher receives whole pixels only."""
    x0, y0, x1, y1 = visible_box
    w, h = max(1, round(scale * (x1 - x0))), max(1, round(scale * (y1 - y0)))
    left, top = round(x0 + rng.uniform() * (x1 - x0 - w)), round(y0 + rng.uniform() * (y1 - y0 - h))
    return (left, top, left + w, top + h)


def _live(
    teacher: Teacher, crop: Image.Image, mirrored: bool, device: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the teacher's features of the crop, on an even grid (grid_h, grid_w, c), and the valid mask."""
    geometry, hw = teacher.spec.geometry, (crop.height, crop.width)
    # A centre crop would show the teacher less than the box that the cached map is sampled under.
    if geometry.fit == "crop":
        geometry = replace(geometry, fit="squash")
    pixels = view_pixels(ImageOps.mirror(crop) if mirrored else crop, geometry)
    with torch.inference_mode():
        # (h, w, 3) -> (1, h, w, 3); copied because the array may be read-only
        batch = teacher_input(
            torch.from_numpy(pixels.copy())[None].to(device), [valid_hw(hw, geometry)], teacher.spec.normalisation
        )
        features = teacher(batch).spatial[0].float().cpu().numpy()
    return _sampled(features, geometry, (0.0, 0.0, float(crop.width), float(crop.height)), hw, geometry.grid_hw)


def _cached(
    features: NDArray[np.float32],
    level: CachedTeacher,
    box: BoxXYXY,
    image_hw: tuple[int, int],
    out_hw: tuple[int, ...],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return _sampled(features, level.spec.geometry, box, image_hw, (out_hw[0], out_hw[1]))


def _sampled(
    features: NDArray[np.float32], geometry: Any, box: BoxXYXY, image_hw: tuple[int, int], out_hw: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    weights = crop_weights([box], [image_hw], geometry, out_hw=out_hw)
    # (h, w, c) -> (1, h, w, c) -> (out_h, out_w, c), in float64 for the differences of similar maps
    return weights.sample(features[None])[0].astype(np.float64), weights.valid[0]


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64], valid: NDArray[np.bool_]) -> float:
    # (h, w, c) -> (h, w); the bound avoids 0 / 0 for a token equal to the mean
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    products = (a * b).sum(-1) / np.maximum(lengths, 1e-12)
    return float(products[valid].mean())


def save_plot(errors: Sequence[AlignError], path: str) -> None:
    """Plot cosine by scale: a panel per teacher, a line per level, dashed if mirrored.

    Args:
        errors: from `measure`.
        path: of the picture; its ending sets the format.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib

        # Draws into a file, on machines without a display.
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as exc:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib, or use --json") from exc
    teachers = list(dict.fromkeys(error.teacher for error in errors))
    figure, axes = plt.subplots(1, len(teachers), figsize=(5 * len(teachers), 4), sharey=True, squeeze=False)
    for axis, teacher in zip(axes[0], teachers, strict=True):
        teacher_errors = [error for error in errors if error.teacher == teacher]
        for number, level in enumerate(sorted({error.level_px for error in teacher_errors})):
            for mirrored in (False, True):
                line = sorted(
                    (e for e in teacher_errors if (e.level_px, e.mirrored) == (level, mirrored)),
                    key=lambda error: error.scale,
                )
                axis.errorbar(
                    [e.scale for e in line],
                    [e.cosine for e in line],
                    [e.standard_error for e in line],
                    color=f"C{number}",
                    linestyle="--" if mirrored else "-",
                    marker="o",
                    markersize=3,
                    label=f"{level} px" + (", mirrored" if mirrored else ""),
                )
        axis.set(title=teacher, xlabel="side of the crop, share of the image", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("centred cosine, cached map and live teacher")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
