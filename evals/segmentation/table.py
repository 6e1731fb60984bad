"""Linear-probe segmentation of teachers, students and models on the same images, as a table."""

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
# Sizes of the validation sets, by which published rows are recognised.
_ADE_IMAGES, _VOC_IMAGES = 2000, 1449
_TEST_SHARE = 0.2
_BATCH_WINDOWS = 16


def default_features() -> Path:
    """Return the folder of stored maps if --features names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radio-cache" / "features"


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Settings of a segmentation evaluation. Images with masks are one of `ade20k`, `voc` and `train`.

    Attributes:
        ade20k, voc: folder of the data set.
        train, test: folders of images and of masks; without `test`, a fifth of the training images is drawn for it.
        classes, first_id, ignore: meaning of the numbers in the masks of folders, see `class_list` and `MaskFormat`.
        cache: its teachers are compared by their cached maps.
        runs, models, weights: as for k-NN.
        crop_px: side of the windows; each encoder takes the nearest size it supports.
        probe: training of the probe, with a seed of its own.
        features: folder of stored maps.
        limit: images of each part at most, drawn by `seed`, as the test part and the pictures are.
        pictures: number of test images to draw.
        device: where models and probes run.
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
            raise ConfigError("nothing to evaluate: give --run RUN, --model MODEL or --cache CACHE")
        if self.crop_px < 1 or self.pictures < 0 or (self.limit is not None and self.limit < 2):
            raise ConfigError("--crop is at least 1 pixel, --pictures 0 or more, --limit at least 2 images")


@dataclass(frozen=True, kw_only=True)
class SegmentRow:
    """One encoder.

    Attributes:
        about: a short description of the encoder.
        width: channels of its maps.
        window_px: side of its windows.
        windows: number of windows in training and test.
        steps: of the probe.
    """

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
    """The scores, and how they were measured.

    Attributes:
        train, test: identity of images and masks.
        notes: limits of the figures, one sentence each.
        pictures: of a few test images; no part of the record.
        paper: published rows on the same test images, with their mIoU in per cent.
    """

    protocol: str
    class_names: tuple[str, ...]
    train: dict[str, str | int]
    test: dict[str, str | int]
    rows: tuple[SegmentRow, ...]
    notes: tuple[str, ...]
    pictures: tuple[MaskPictures, ...] = ()
    paper: tuple[tuple[PaperRow, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table, without pictures."""
        return asdict(replace(self, pictures=()))


def run_segment(config: SegmentConfig, *, progress: Progress | None = None) -> SegmentTable:
    """Open images, runs and models, train a probe on each, and score it.

    Raises:
        RadioCacheError: if something cannot be opened or compared.
    """
    device = torch.device(pick_device(config.device))
    # Data before models: a wrong folder is noticed at once.
    train, test = masked_images(config)
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    cache = None if config.cache is None else Cache(config.cache)
    refuse_namesakes(name for name, _ in _all_names(live, cache))
    # Headers only; sizes decide where windows lie.
    sizes = tuple([pairs.size_hw(position) for position in range(len(pairs))] for pairs in (train, test))
    folder = config.features or default_features()
    rows: list[SegmentRow] = []
    predictions_of: dict[str, list[NDArray[np.int16]]] = {}
    picture_positions = _picture_positions(test, config)
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
        row, predictions = _row(maps[0], maps[1], train, test, config, picture_positions, device, progress)
        rows.append(row)
        predictions_of[name] = predictions
    notes = _notes(train, test, rows, config)
    return SegmentTable(
        protocol=_protocol(config, train, test),
        class_names=train.format.class_names,
        train=train.identity(),
        test=test.identity(),
        rows=tuple(rows),
        notes=notes,
        pictures=_pictures(test, picture_positions, predictions_of),
        paper=_paper(config, test),
    )


def masked_images(config: SegmentConfig) -> tuple[MaskedImages, MaskedImages]:
    """Return training and test images, limited, with a class for every id in their masks.

    Raises:
        EvalError: if images or masks are missing, or no two classes are labelled.
    """
    if config.ade20k is not None:
        train, test = ade20k(config.ade20k)
    elif config.voc is not None:
        train, test = voc2012(config.voc)
    else:
        assert config.train is not None, "one of the three is given, see SegmentConfig"
        format = MaskFormat(class_list(config.classes), config.first_id, config.ignore)
        train = mask_folders(*config.train, format)
        if config.test is None:
            # Seeded by --seed, so that runs compared later use the same split.
            train, test = split(train, test_share=_TEST_SHARE, seed=config.seed)
        else:
            test = mask_folders(*config.test, format)
        # Without a list, the masks themselves define the classes: all are read once for their largest id.
        if not format.class_names:
            count = 1 + max(train.largest_class(), test.largest_class())
            if count == 0:
                raise EvalError(
                    f"{train.location}: no pixel of any mask has a class; all are {config.ignore} (--ignore)"
                )
            if count == 1:
                raise EvalError(
                    f"{train.location}: every pixel that counts is of class {config.first_id}, so that any answer is "
                    f"right; pixels of {config.ignore} are unlabelled (--ignore: give another number, such as -1, if that is a "
                    "class)"
                )
            # Both parts get the same names, whichever of them has the highest id.
            names = class_list(str(count))
            train, test = (replace(pairs, format=replace(format, class_names=names)) for pairs in (train, test))
    return train.limited(config.limit, config.seed), test.limited(config.limit, config.seed)


def _all_names(live: Sequence[LiveEncoder], cache: Cache | None) -> list[tuple[str, LiveEncoder | None]]:
    """Return the names of all rows with their encoder; None for a teacher of the cache."""
    if cache is not None:
        cache.teachers.refuse_unreadable()
    return [
        *((name, None) for name in (cache.teachers if cache else ())),
        *((encoder.name, encoder) for encoder in live),
    ]


def _row(
    train_maps: WindowMaps,
    test_maps: WindowMaps,
    train: MaskedImages,
    test: MaskedImages,
    config: SegmentConfig,
    picture_positions: Sequence[int],
    device: torch.device,
    progress: Progress | None,
) -> tuple[SegmentRow, list[NDArray[np.int16]]]:
    """Return one encoder's row, and the predictions of its probe for the images to draw."""
    name = train_maps.name

    def on_step(step: int, steps: int) -> None:
        if progress is not None:
            progress(f"{name}: probe", step, steps, unit="steps")

    # Training and test share their classes by construction.
    count = len(train.format.class_names)
    probe = train_probe(
        _reader(train_maps, train),
        len(train_maps.windows),
        width=train_maps.width,
        classes=count,
        config=config.probe,
        device=device,
        on_step=on_step,
    )
    confusion, predictions = Confusion(count), dict[int, NDArray[np.int16]]()
    # Windows are in order of their images, so each group is a whole image.
    for position, group in groupby(range(len(test_maps.windows)), key=lambda row: test_maps.windows[row].position):
        hw = test.size_hw(position)
        # One image at a time: its windows overlap, so they are merged before scoring.
        predicted = _predicted(probe, test_maps, list(group), hw, device)
        confusion.add(test.classes(position, hw), predicted)
        # Predictions are megapixels each; only those to draw are stored.
        if position in picture_positions:
            predictions[position] = predicted
        if progress is not None:
            progress(f"{name}: test", position + 1, len(test))
    row = SegmentRow(
        name=name,
        kind=train_maps.kind,
        about=train_maps.description,
        width=train_maps.width,
        window_px=train_maps.window_hw[0],
        windows=len(train_maps.windows) + len(test_maps.windows),
        steps=config.probe.steps_for(len(train_maps.windows)),
        scores=confusion.scores(),
    )
    return row, [predictions[position] for position in picture_positions]


def _reader(maps: WindowMaps, images: MaskedImages) -> Callable[[NDArray[np.int64]], Batch]:
    """Return a function that reads maps and classes of windows."""

    # Windows of one image are drawn in different steps: 512 masks take a few hundred megabytes.
    @lru_cache(maxsize=512)
    def classes(position: int) -> NDArray[np.int16]:
        return images.classes(position, images.size_hw(position))

    def read(rows: NDArray[np.int64]) -> Batch:
        windows = [maps.windows[row] for row in rows]
        labels = [window_classes(classes(window.position), window, maps.window_hw) for window in windows]
        return maps.read(rows.tolist()), np.stack(labels)

    return read


def _predicted(
    probe: LinearProbe, maps: WindowMaps, rows: Sequence[int], image_hw: tuple[int, int], device: torch.device
) -> NDArray[np.int16]:
    """Return (h, w) the predicted class of every pixel of one image."""
    with torch.inference_mode():
        # (b, h, w, c) -> (b, c, h, w), a few windows at a time
        parts = [
            probe(torch.from_numpy(maps.read(rows[n : n + _BATCH_WINDOWS])).to(device).permute(0, 3, 1, 2))
            for n in range(0, len(rows), _BATCH_WINDOWS)
        ]
        return predicted_classes(torch.cat(parts), [maps.windows[row] for row in rows], maps.window_hw, image_hw)


def _picture_positions(test: MaskedImages, config: SegmentConfig) -> list[int]:
    """Return the positions of the test images to draw."""
    # A permutation, so that a larger number adds pictures to those of a smaller one.
    order = np.random.default_rng(config.seed).permutation(len(test))
    return sorted(order[: config.pictures].tolist())


def _pictures(
    test: MaskedImages, positions: Sequence[int], predictions: dict[str, list[NDArray[np.int16]]]
) -> tuple[MaskPictures, ...]:
    """Return image, truth and predictions of the images to draw."""
    pictures: list[MaskPictures] = []
    count = len(test.format.class_names)
    for number, position in enumerate(positions):
        image = test.image(position)
        panes = [(test.keys[position], thumbnail(image))]
        panes.append(("truth", overlay(image, test.classes(position, (image.height, image.width)), count)))
        panes += [(name, overlay(image, predicted[number], count)) for name, predicted in predictions.items()]
        pictures.append(MaskPictures(test.keys[position], tuple(panes)))
    return tuple(pictures)


def _protocol(config: SegmentConfig, train: MaskedImages, test: MaskedImages) -> str:
    """Return the protocol as one line of text."""
    return (
        f"linear probe (batch norm, 1x1 convolution) on frozen maps; windows of {config.crop_px} px every two thirds, "
        f"shorter side resized to them; AdamW at {config.probe.lr:g}, warm-up, then linearly to 0, batches of "
        f"{config.probe.batch} windows, "
        f"no augmentation; {len(train):,} training and {len(test):,} test images; {len(train.format.class_names)} classes; "
        f"scored at the images' own size"
    )


def _paper(config: SegmentConfig, test: MaskedImages) -> tuple[tuple[PaperRow, float], ...]:
    """Return the published rows if the number of test images is that of the paper."""
    if config.ade20k is not None and len(test) == _ADE_IMAGES:
        return tuple((row, row.ade20k) for row in ROWS if row.ade20k is not None)
    if config.voc is not None and len(test) == _VOC_IMAGES:
        return tuple((row, row.voc) for row in ROWS if row.voc is not None)
    return ()


def _notes(
    train: MaskedImages, test: MaskedImages, rows: Sequence[SegmentRow], config: SegmentConfig
) -> tuple[str, ...]:
    """Return the limits of the figures: unpaired images, unlabelled pixels, absent classes, differing windows."""
    notes: list[str] = []
    for pairs in (train, test):
        if pairs.left_out:
            notes.append(f"{counted(pairs.left_out, 'image', 'images')} of {pairs.location} without a mask left out.")
    if unlabelled := test.unlabelled_share():
        below = f", or below {test.format.first_id}" if test.format.first_id > 0 else ""
        notes.append(
            f"{unlabelled:.1%} of the pixels of the test masks have no class ({test.format.ignore}{below}), and are not scored."
        )
    names = train.format.class_names
    # A teacher of a cache saw only a part of each image: its scores cover fewer pixels.
    num_pixels_of = {row.name: sum(row.scores.pixels) for row in rows}
    # The encoder that was scored on most pixels shows which classes occur at all.
    widest_name = max(num_pixels_of, key=num_pixels_of.__getitem__)
    widest = next(row.scores.pixels for row in rows if row.name == widest_name)
    absent = [name for name, pixels in zip(names, widest, strict=True) if not pixels]
    if absent:
        listed = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        notes.append(
            f"{counted(len(absent), 'class is', 'classes are')} in no test image ({listed}), and counted only for those that "
            "predict it."
        )
    if narrower := [
        f"{name} {pixels / num_pixels_of[widest_name]:.0%}"
        for name, pixels in num_pixels_of.items()
        if pixels < num_pixels_of[widest_name]
    ]:
        notes.append(f"Not all were scored on all pixels, but on those in their windows: {', '.join(narrower)}.")
    if other_sizes := [
        f"{row.name} {row.window_px} px" for row in rows if row.window_px != config.crop_px and row.kind != "teacher"
    ]:
        notes.append(
            f"Windows of another size than {config.crop_px} px, the nearest that the network takes: {', '.join(other_sizes)}."
        )
    if config.ade20k is not None or config.voc is not None:
        notes.append(
            "The papers train on randomly scaled, flipped and recoloured crops, for which features cannot be kept; expect "
            "somewhat lower figures here, for all rows alike."
        )
    return tuple(notes)
