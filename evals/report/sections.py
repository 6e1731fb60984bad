"""The parts of a page about a run that its evaluations fill: a table, a chart or pictures each, or the reason why not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.features.mode_switch import ModeSwitchConfig, run_mode_switch
from evals.features.rank import RankConfig, run_rank
from evals.features.retrieve import RetrieveConfig, run_retrieve
from evals.features.similarity import SimilarityConfig, run_similarity
from evals.segmentation import SegmentConfig, run_segment
from evals.segmentation.pictures import key_colours
from evals.shared.devices import Device
from evals.shared.progress import Progress
from evals.throughput import ThroughputConfig, run_throughput
from evals.zero_shot import ZeroShotConfig, run_zero_shot
from radio_cache.errors import ConfigError, RadioCacheError, unknown_name
from radio_cache.view.picture_grid import picture_grid

_CLASSES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class SectionsConfig:
    """What the parts of a page are about. images: to evaluate on, the bank or the queries. cache: holds the teachers.

    masks: images and their masks, for segmentation; classes: what they are called; crop_px: side of the windows, pixels.
    limit: images of each evaluation, at most, drawn by seed.
    """

    run: Path
    cache: str | Path
    images: str | Path
    masks: tuple[Path, Path] | None = None
    classes: str | None = None
    crop_px: int
    limit: int = 2000
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part. header, rows: a table, the first column being names; empty for none. svg: a chart. picture: (h, w, 3)."""

    name: str
    title: str
    text: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    svg: str = ""
    picture: NDArray[np.uint8] | None = None
    notes: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class NotRun:
    """An evaluation that could not be done for this run, and why."""

    name: str
    reason: str


def make_sections(
    config: SectionsConfig, names: Sequence[str], *, progress: Progress | None = None
) -> tuple[list[Section], list[NotRun]]:
    """The sections named, in order; one that cannot be made is told with its reason, and the others go on.

    Raises ConfigError for a name that is none.
    """
    made: list[Section] = []
    missing: list[NotRun] = []
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(unknown_name("evaluation", name, SECTIONS))
        try:
            made.append(SECTIONS[name](config, progress))
        except RadioCacheError as exc:
            missing.append(NotRun(name, str(exc)))
    return made, missing


def _zero_shot(config: SectionsConfig, progress: Progress | None) -> Section:
    found = run_zero_shot(
        ZeroShotConfig(
            images=config.images, runs=(config.run,), limit=config.limit, seed=config.seed, device=config.device
        ),
        progress=progress,
    )
    return Section(
        name="zero-shot",
        title="Zero-shot classification",
        text=f"{found.protocol}.",
        header=("features", "sentences by", "top-1", "top-5"),
        notes=found.notes,
        record=found.to_json(),
        rows=tuple((row.name, row.text, f"{row.top1:.1%}", f"{row.top5:.1%}") for row in found.rows),
    )


def _segment(config: SectionsConfig, progress: Progress | None) -> Section:
    if config.masks is None:
        raise ConfigError("there are no masks: give --masks IMAGES MASKS, folders of images and of their masks")
    found = run_segment(
        SegmentConfig(
            train=config.masks,
            classes=config.classes,
            runs=(config.run,),
            limit=config.limit,
            seed=config.seed,
            pictures=3,
            crop_px=config.crop_px,
            device=config.device,
        ),
        progress=progress,
    )
    legend = key_colours(found.class_names[:_CLASSES_SHOWN])
    return Section(
        name="segment",
        title="Segmentation",
        text=f"{found.protocol}.",
        header=("features", "mIoU", "pixels right"),
        rows=tuple((row.name, f"{row.scores.mean_iou:.1%}", f"{row.scores.pixel_accuracy:.1%}") for row in found.rows),
        picture=_pixels(picture_grid([one.panes for one in found.pictures], legend=legend)),
        notes=found.notes,
        record=found.to_json(),
    )


def _rank(config: SectionsConfig, progress: Progress | None) -> Section:
    found = run_rank(
        RankConfig(
            images=config.images, runs=(config.run,), limit=config.limit, seed=config.seed, device=config.device
        ),
        progress=progress,
    )
    return Section(
        name="rank",
        title="How rich, and how alike",
        text=f"{found.protocol}. A rank of 1 is one direction for all images; a likeness "
        "of 1 is the same space up to a rotation.",
        header=("features", "RankMe", *(f"like {name}" for name in found.teachers)),
        notes=found.notes,
        record=found.to_json(),
        rows=tuple(
            (row.name, f"{row.rank:.0f} of {row.width}", *(f"{row.cka[name]:.2f}" for name in found.teachers))
            for row in found.rows
        ),
    )


def _mode_switch(config: SectionsConfig, progress: Progress | None) -> Section:
    found = run_mode_switch(
        ModeSwitchConfig(run=config.run, cache=config.cache, limit=32, seed=config.seed, device=config.device),
        progress=progress,
    )
    ordered = sorted(found.rows, key=lambda row: (row.teacher, row.size_px))
    return Section(
        name="mode-switch",
        title="At other resolutions",
        text=f"{found.protocol}. Fidelity is the teacher's variance over the error.",
        header=("teacher", "input", "cosine", "fidelity"),
        svg=found.chart(),
        notes=found.notes,
        record=found.to_json(),
        rows=tuple((row.teacher, f"{row.size_px} px", f"{row.cosine:.2f}", f"{row.fidelity:.2f}") for row in ordered),
    )


def _throughput(config: SectionsConfig, progress: Progress | None) -> Section:
    found = run_throughput(
        ThroughputConfig(runs=(config.run,), batches=(1, 16), device=config.device), progress=progress
    )
    return Section(
        name="throughput",
        title="Speed",
        text=f"{found.protocol}.",
        notes=found.notes,
        record=found.to_json(),
        header=("network", "batch", "images/s", "M params", "GFLOPs"),
        rows=tuple(
            (row.name, str(row.batch), f"{row.images_per_s:,.0f}", f"{row.params_m:,.1f}", f"{row.gflops:,.2f}")
            for row in found.rows
        ),
    )


def _retrieve(config: SectionsConfig, progress: Progress | None) -> Section:
    rows = run_retrieve(
        RetrieveConfig(
            images=config.images,
            runs=(config.run,),
            queries=2,
            k=5,
            limit=config.limit,
            seed=config.seed,
            device=config.device,
        ),
        progress=progress,
    )
    return Section(
        name="retrieve",
        title="Nearest images",
        picture=_pixels(picture_grid(rows)),
        text="The query left, then its nearest images by the cosine of summaries; a green border is the query's class.",
    )


def _similarity(config: SectionsConfig, progress: Progress | None) -> Section:
    rows = run_similarity(
        SimilarityConfig(
            images=config.images, runs=(config.run,), num_images=2, seed=config.seed, device=config.device
        ),
        progress=progress,
    )
    return Section(
        name="similarity",
        title="What is alike within an image",
        picture=_pixels(picture_grid(rows)),
        text="Cosine of all tokens with the ringed one, after their mean was subtracted; bright is alike.",
    )


def _pixels(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture.convert("RGB"), np.uint8)


SECTIONS: dict[str, Callable[[SectionsConfig, Progress | None], Section]] = {
    "zero-shot": _zero_shot,
    "segment": _segment,
    "retrieve": _retrieve,
    "similarity": _similarity,
    "rank": _rank,
    "mode-switch": _mode_switch,
    "throughput": _throughput,
}
"""Evaluations beside k-NN, in the order of the page."""
