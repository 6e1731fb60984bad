"""The sections of a report, one per evaluation: a table, a chart or pictures, or the reason why it could not be run."""

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
    """Settings of the sections.

    Attributes:
        run: folder of the student's run.
        cache: holds the teachers.
        images: to evaluate on, the bank or the queries.
        masks: folders of images and masks, for segmentation.
        classes: names of the classes in the masks.
        crop_px: side of the windows for segmentation.
        limit: images of each evaluation at most, drawn by `seed`.
        device: where models run.
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
    """One section.

    Attributes:
        name: of the evaluation.
        title: heading on the page.
        text: below the heading.
        header, rows: a table whose first column holds names; empty for none.
        svg: a chart.
        picture: (h, w, 3).
        notes: limits of the figures, one sentence each.
        record: for report.json; None for pictures alone.
    """

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
    """An evaluation that could not be run, and the reason."""

    name: str
    reason: str


def make_sections(
    config: SectionsConfig, names: Sequence[str], *, progress: Progress | None = None
) -> tuple[list[Section], list[NotRun]]:
    """Run evaluations; one that fails is listed with the reason, and the others go on.

    Args:
        config: for all of them.
        names: keys of `SECTIONS`.
        progress: receives the progress of each.

    Returns:
        The sections, and the evaluations that were not run.

    Raises:
        ConfigError: for an unknown name.
    """
    sections: list[Section] = []
    not_run: list[NotRun] = []
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(unknown_name("evaluation", name, SECTIONS))
        try:
            sections.append(SECTIONS[name](config, progress))
        # Errors of our own explain why an evaluation is not possible; others are bugs and stop the page.
        except RadioCacheError as exc:
            not_run.append(NotRun(name, str(exc)))
    return sections, not_run


def _zero_shot(config: SectionsConfig, progress: Progress | None) -> Section:
    result = run_zero_shot(
        ZeroShotConfig(
            images=config.images, runs=(config.run,), limit=config.limit, seed=config.seed, device=config.device
        ),
        progress=progress,
    )
    return Section(
        name="zero-shot",
        title="Zero-shot classification",
        text=f"{result.protocol}.",
        header=("features", "text tower", "top-1", "top-5"),
        notes=result.notes,
        record=result.to_json(),
        rows=tuple((row.name, row.text, f"{row.top1:.1%}", f"{row.top5:.1%}") for row in result.rows),
    )


def _segment(config: SectionsConfig, progress: Progress | None) -> Section:
    if config.masks is None:
        raise ConfigError("there are no masks: give --masks IMAGES MASKS, folders of images and of their masks")
    result = run_segment(
        SegmentConfig(
            train=config.masks,
            classes=config.classes,
            runs=(config.run,),
            limit=config.limit,
            seed=config.seed,
            pictures=3,
            # Windows of the student's own input size: no resampling of its position embedding.
            crop_px=config.crop_px,
            device=config.device,
        ),
        progress=progress,
    )
    # A longer legend would be larger than the pictures.
    legend = key_colours(result.class_names[:_CLASSES_SHOWN])
    return Section(
        name="segment",
        title="Segmentation",
        text=f"{result.protocol}.",
        header=("features", "mIoU", "pixel accuracy"),
        rows=tuple((row.name, f"{row.scores.mean_iou:.1%}", f"{row.scores.pixel_accuracy:.1%}") for row in result.rows),
        picture=_pixels(picture_grid([pictures.panes for pictures in result.pictures], legend=legend)),
        notes=result.notes,
        record=result.to_json(),
    )


def _rank(config: SectionsConfig, progress: Progress | None) -> Section:
    result = run_rank(
        RankConfig(
            images=config.images, runs=(config.run,), limit=config.limit, seed=config.seed, device=config.device
        ),
        progress=progress,
    )
    return Section(
        name="rank",
        title="Rank and similarity of features",
        text=f"{result.protocol}. A rank of 1 is one direction for all images; a "
        "similarity of 1 is the same space up to a rotation.",
        header=("features", "RankMe", *(f"similarity to {name}" for name in result.teachers)),
        notes=result.notes,
        record=result.to_json(),
        rows=tuple(
            (row.name, f"{row.rank:.0f} of {row.width}", *(f"{row.cka[name]:.2f}" for name in result.teachers))
            for row in result.rows
        ),
    )


def _mode_switch(config: SectionsConfig, progress: Progress | None) -> Section:
    result = run_mode_switch(
        # 32 images: each of five sizes is a pass of the student over all of them.
        ModeSwitchConfig(run=config.run, cache=config.cache, limit=32, seed=config.seed, device=config.device),
        progress=progress,
    )
    # By teacher, so that the sizes of one teacher stand below each other.
    ordered = sorted(result.rows, key=lambda row: (row.teacher, row.size_px))
    return Section(
        name="mode-switch",
        title="At other resolutions",
        text=f"{result.protocol}. Fidelity is the teacher's variance over the error.",
        header=("teacher", "input", "cosine", "fidelity"),
        svg=result.chart(),
        notes=result.notes,
        record=result.to_json(),
        rows=tuple((row.teacher, f"{row.size_px} px", f"{row.cosine:.2f}", f"{row.fidelity:.2f}") for row in ordered),
    )


def _throughput(config: SectionsConfig, progress: Progress | None) -> Section:
    result = run_throughput(
        # Latency at one image, throughput at 16.
        ThroughputConfig(runs=(config.run,), batches=(1, 16), device=config.device),
        progress=progress,
    )
    return Section(
        name="throughput",
        title="Speed",
        text=f"{result.protocol}.",
        notes=result.notes,
        record=result.to_json(),
        header=("network", "batch", "images/s", "M params", "GFLOPs"),
        rows=tuple(
            (row.name, str(row.batch), f"{row.images_per_s:,.0f}", f"{row.params_m:,.1f}", f"{row.gflops:,.2f}")
            for row in result.rows
        ),
    )


def _retrieve(config: SectionsConfig, progress: Progress | None) -> Section:
    rows = run_retrieve(
        RetrieveConfig(
            images=config.images,
            runs=(config.run,),
            num_queries=2,
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
        title="Similarity within an image",
        picture=_pixels(picture_grid(rows)),
        text="Cosine of all tokens with the ringed one, after their mean was subtracted; bright is similar.",
    )


def _pixels(picture: Image.Image) -> NDArray[np.uint8]:
    # The template embeds arrays, not PIL images.
    return np.asarray(picture.convert("RGB"), np.uint8)


# A dict, so that the order of the page is the order here.
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
