"""Segmentation by a linear probe: teachers, students and models side by side, on the same images."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.encoders import LiveEncoder
from evals.encoders.gathered import live_encoders, refuse_namesakes
from evals.errors import EvalError
from evals.segmentation.features import CachedTeacherMaps, StoredMaps, WindowMaps, fitted
from evals.segmentation.masks import MaskedImages, MaskFormat, ade20k, class_list, mask_folders, split, voc2012
from evals.segmentation.pictures import MaskPictures, overlay, thumbnail
from evals.segmentation.predict import Confusion, Scores, predicted_classes
from evals.segmentation.probe import Batch, LinearProbe, ProbeConfig, train_probe
from evals.segmentation.windows import window_classes
from evals.shared.devices import Device
from evals.shared.notes import counted
from evals.shared.progress import Progress
from evals.shared.published import ROWS, PaperRow
from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.torch import pick_device

PAPER_CROP_PX = 512
_ADE_IMAGES, _VOC_IMAGES = 2000, 1449
_TEST_SHARE = 0.2
_PREDICTED_AT_ONCE = 16


def default_features() -> Path:
    """Where maps are kept unless --features says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radio-cache" / "features"


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """What to compare and on what. ade20k, voc: a data set's folder; or train: folders of images and of masks, and test:
    the same; without test a fifth of the training images is drawn for it.

    classes, first_id, ignore: what the numbers in masks of folders mean, see `MaskFormat` and `class_list`.
    crop_px: side of the windows; each encoder takes the nearest it can. features: the folder where maps are kept.
    cache: whose teachers are compared, as it holds them. runs, models, weights: as for k-NN. pictures: how many to make.
    limit: images of each part at most, drawn by seed, as the test part and the pictures are; the probe has a seed of its own.
    """

    ade20k: Path | None = None
    voc: Path | None = None
    train: tuple[Path, Path] | None = None
    test: tuple[Path, Path] | None = None
    classes: str | None = None
    first_id: int = 0
    ignore: int = 255
    cache: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    crop_px: int = PAPER_CROP_PX
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    features: Path | None = None
    limit: int | None = None
    seed: int = 0
    pictures: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.ade20k, self.voc, self.train)) != 1:
            raise ConfigError("images with masks are one of --ade20k DIR, --voc DIR, or --train IMAGES MASKS")
        if self.test is not None and self.train is None:
            raise ConfigError("--test IMAGES MASKS goes with --train IMAGES MASKS; ADE20K and VOC have test images")
        if self.cache is None and not self.runs and not self.models:
            raise ConfigError("nothing to evaluate: give --run RUN, --model WHAT or --cache CACHE")
        if self.crop_px < 1 or self.pictures < 0 or (self.limit is not None and self.limit < 2):
            raise ConfigError("--crop is at least 1 pixel, --pictures 0 or more, --limit at least 2 images")


@dataclass(frozen=True, kw_only=True)
class SegmentRow:
    """One encoder. windows: it was trained and tested on. width: of its maps. steps: of the probe."""

    name: str
    kind: str
    about: str
    width: int
    window_px: int
    windows: int
    steps: int
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class SegmentTable:
    """What was measured and how. train, test: identity of images and masks. paper: published rows on the same test images."""

    protocol: str
    class_names: tuple[str, ...]
    train: dict[str, str | int]
    test: dict[str, str | int]
    rows: tuple[SegmentRow, ...]
    notes: tuple[str, ...]
    pictures: tuple[MaskPictures, ...] = ()
    paper: tuple[tuple[PaperRow, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(replace(self, pictures=()))


def run_segment(config: SegmentConfig, *, progress: Progress | None = None) -> SegmentTable:
    """Open images, runs and models; train a probe for each; compare. Raises RadioCacheError with what is wrong."""
    device = torch.device(pick_device(config.device))
    train, test = masked_images(config)
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    cache = None if config.cache is None else Cache(config.cache)
    refuse_namesakes(name for name, _ in _all_names(live, cache))
    sizes = tuple([pairs.size_hw(position) for position in range(len(pairs))] for pairs in (train, test))
    folder = config.features or default_features()
    rows: list[SegmentRow] = []
    pictures: dict[str, list[NDArray[np.int16]]] = {}
    shown = _shown(test, config)
    for name, encoder in _all_names(live, cache):
        if encoder is None:
            assert cache is not None, "only teachers of a cache have no encoder"
            maps: list[WindowMaps] = [
                CachedTeacherMaps(cache, cache.teachers[name], pairs, hw)
                for pairs, hw in zip((train, test), sizes, strict=True)
            ]
        else:
            sized = fitted(encoder, config.crop_px)
            maps = [
                StoredMaps(sized, pairs, hw, folder, progress=progress)
                for pairs, hw in zip((train, test), sizes, strict=True)
            ]
        row, predictions = _row(maps[0], maps[1], train, test, config, shown, device, progress)
        rows.append(row)
        pictures[name] = predictions
    notes = _notes(train, test, rows, config)
    return SegmentTable(
        protocol=_protocol(config, train, test),
        class_names=train.format.class_names,
        train=train.identity(),
        test=test.identity(),
        rows=tuple(rows),
        notes=notes,
        pictures=_pictures(test, shown, pictures),
        paper=_paper(config, test),
    )


def masked_images(config: SegmentConfig) -> tuple[MaskedImages, MaskedImages]:
    """Training and test images, limited, with a class for every id in their masks. Raises EvalError."""
    if config.ade20k is not None:
        train, test = ade20k(config.ade20k)
    elif config.voc is not None:
        train, test = voc2012(config.voc)
    else:
        assert config.train is not None, "one of the three is given, see SegmentConfig"
        format = MaskFormat(class_list(config.classes), config.first_id, config.ignore)
        train = mask_folders(*config.train, format)
        if config.test is None:
            train, test = split(train, test_share=_TEST_SHARE, seed=config.seed)
        else:
            test = mask_folders(*config.test, format)
        if not format.class_names:
            count = 1 + max(train.largest_class(), test.largest_class())
            if count == 0:
                raise EvalError(f"{train.place}: no pixel of any mask has a class; all are {config.ignore} (--ignore)")
            if count == 1:
                raise EvalError(
                    f"{train.place}: every pixel that counts is of class {config.first_id}, so that any answer is right; pixels "
                    f"of {config.ignore} are nobody's (--ignore: give another number, such as -1, where that is a class)"
                )
            names = class_list(str(count))
            train, test = (replace(pairs, format=replace(format, class_names=names)) for pairs in (train, test))
    return train.limited(config.limit, config.seed), test.limited(config.limit, config.seed)


def _all_names(live: Sequence[LiveEncoder], cache: Cache | None) -> list[tuple[str, LiveEncoder | None]]:
    if cache is not None:
        cache.teachers.refuse_unreadable()
    return [*((name, None) for name in (cache.teachers if cache else ())), *((one.name, one) for one in live)]


def _row(
    train_maps: WindowMaps,
    test_maps: WindowMaps,
    train: MaskedImages,
    test: MaskedImages,
    config: SegmentConfig,
    shown: Sequence[int],
    device: torch.device,
    progress: Progress | None,
) -> tuple[SegmentRow, list[NDArray[np.int16]]]:
    """One encoder's row, and what its probe predicts for the images that are shown."""
    name = train_maps.name

    def told(step: int, steps: int) -> None:
        if progress is not None:
            progress(f"{name}: probe", step, steps, unit="steps")

    count = len(train.format.class_names)
    probe = train_probe(
        _reader(train_maps, train),
        len(train_maps.windows),
        width=train_maps.width,
        classes=count,
        config=config.probe,
        device=device,
        on_step=told,
    )
    confusion, kept = Confusion(count), dict[int, NDArray[np.int16]]()
    for position, group in groupby(range(len(test_maps.windows)), key=lambda row: test_maps.windows[row].position):
        hw = test.size_hw(position)
        predicted = _predicted(probe, test_maps, list(group), hw, device)
        confusion.add(test.classes(position, hw), predicted)
        if position in shown:
            kept[position] = predicted
        if progress is not None:
            progress(f"{name}: test", position + 1, len(test))
    row = SegmentRow(
        name=name,
        kind=train_maps.kind,
        about=train_maps.about,
        width=train_maps.width,
        window_px=train_maps.window_hw[0],
        windows=len(train_maps.windows) + len(test_maps.windows),
        steps=config.probe.steps_for(len(train_maps.windows)),
        scores=confusion.scores(),
    )
    return row, [kept[position] for position in shown]


def _reader(maps: WindowMaps, images: MaskedImages) -> Callable[[NDArray[np.int64]], Batch]:
    """Reads maps and classes of windows; masks are kept, as many as a few hundred megabytes hold."""

    @lru_cache(maxsize=512)
    def classes(position: int) -> NDArray[np.int16]:
        return images.classes(position, images.size_hw(position))

    def read(rows: NDArray[np.int64]) -> Batch:
        windows = [maps.windows[row] for row in rows]
        labels = [window_classes(classes(one.position), one, maps.window_hw) for one in windows]
        return maps.read(rows.tolist()), np.stack(labels)

    return read


def _predicted(
    probe: LinearProbe, maps: WindowMaps, rows: Sequence[int], image_hw: tuple[int, int], device: torch.device
) -> NDArray[np.int16]:
    with torch.inference_mode():
        parts = [
            probe(torch.from_numpy(maps.read(rows[n : n + _PREDICTED_AT_ONCE])).to(device).permute(0, 3, 1, 2))
            for n in range(0, len(rows), _PREDICTED_AT_ONCE)
        ]
        return predicted_classes(torch.cat(parts), [maps.windows[row] for row in rows], maps.window_hw, image_hw)


def _shown(test: MaskedImages, config: SegmentConfig) -> list[int]:
    order = np.random.default_rng(config.seed).permutation(len(test))
    return sorted(order[: config.pictures].tolist())


def _pictures(
    test: MaskedImages, shown: Sequence[int], predictions: dict[str, list[NDArray[np.int16]]]
) -> tuple[MaskPictures, ...]:
    made: list[MaskPictures] = []
    count = len(test.format.class_names)
    for number, position in enumerate(shown):
        image = test.image(position)
        panes = [(test.keys[position], thumbnail(image))]
        panes.append(("truth", overlay(image, test.classes(position, (image.height, image.width)), count)))
        panes += [(name, overlay(image, found[number], count)) for name, found in predictions.items()]
        made.append(MaskPictures(test.keys[position], tuple(panes)))
    return tuple(made)


def _protocol(config: SegmentConfig, train: MaskedImages, test: MaskedImages) -> str:
    return (
        f"linear probe (batch norm, 1x1 convolution) on frozen maps; windows of {config.crop_px} px every two thirds, "
        f"shorter side resized to them; AdamW at {config.probe.lr:g}, warm-up, then linearly to 0, batches of "
        f"{config.probe.batch} windows, "
        f"no augmentation; {len(train):,} training and {len(test):,} test images; {len(train.format.class_names)} classes; "
        f"scored at the images' own size"
    )


def _paper(config: SegmentConfig, test: MaskedImages) -> tuple[tuple[PaperRow, float], ...]:
    """Published rows, where the test images are those of the paper by their number."""
    if config.ade20k is not None and len(test) == _ADE_IMAGES:
        return tuple((row, row.ade20k) for row in ROWS if row.ade20k is not None)
    if config.voc is not None and len(test) == _VOC_IMAGES:
        return tuple((row, row.voc) for row in ROWS if row.voc is not None)
    return ()


def _notes(
    train: MaskedImages, test: MaskedImages, rows: Sequence[SegmentRow], config: SegmentConfig
) -> tuple[str, ...]:
    notes: list[str] = []
    for pairs in (train, test):
        if pairs.left_out:
            notes.append(f"{counted(pairs.left_out, 'image', 'images')} of {pairs.place} without a mask left out.")
    if unlabelled := test.unlabelled_share():
        below = f", or below {test.format.first_id}" if test.format.first_id > 0 else ""
        notes.append(
            f"{unlabelled:.1%} of the pixels of the test masks have no class ({test.format.ignore}{below}), and are not scored."
        )
    names = train.format.class_names
    compared = {row.name: sum(row.scores.pixels) for row in rows}
    most = max(compared, key=compared.__getitem__)
    widest = next(row.scores.pixels for row in rows if row.name == most)
    absent = [name for name, pixels in zip(names, widest, strict=True) if not pixels]
    if absent:
        listed = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        notes.append(
            f"{counted(len(absent), 'class is', 'classes are')} in no test image ({listed}), and counted only for those that "
            "predict it."
        )
    if less := [
        f"{name} {pixels / compared[most]:.0%}" for name, pixels in compared.items() if pixels < compared[most]
    ]:
        notes.append(f"Not all were scored on all pixels, but on those they were shown: {', '.join(less)}.")
    if other := [
        f"{row.name} {row.window_px} px" for row in rows if row.window_px != config.crop_px and row.kind != "teacher"
    ]:
        notes.append(
            f"Windows of another size than {config.crop_px} px, the nearest that the network takes: {', '.join(other)}."
        )
    if config.ade20k is not None or config.voc is not None:
        notes.append(
            "The papers train on randomly scaled, flipped and recoloured crops, for which features cannot be kept; expect "
            "somewhat lower figures here, for all rows alike."
        )
    return tuple(notes)
