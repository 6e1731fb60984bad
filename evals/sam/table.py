"""Prompted masks of SAM, and of SAM with a student as its encoder, against COCO's instances: mIoU by size, and AP."""

import contextlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.cocoeval import COCOeval
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam

from cache_builder.teachers import find_teacher, find_weights
from cache_builder.teachers.state_dict import extract_network, load_exactly, read_weights_file
from cache_builder.teachers.weights import file_sha256
from evals.encoders.named import run_names
from evals.errors import EvalError
from evals.sam.coco_file import identifier, image_path
from evals.sam.instances import Instance, Instances, inner_points, next_point
from evals.sam.protocol import PROTOCOLS, Protocol, ProtocolName
from evals.segmentation.pictures import overlay, thumbnail
from evals.shared.devices import Device
from evals.shared.notes import counted
from evals.shared.progress import Progress
from evals.shared.published import SAM_ROWS, PaperRow
from radio_cache.errors import ConfigError, ImageError
from radio_cache.images.decode import decode_image, is_turned, open_image
from radio_cache.torch import pick_device
from radio_cache.view.picture_grid import Pane
from trainer import load_student
from trainer.dropins.sam import sam_with_student

Prompt = Literal["box", "1-point", "3-points", "detections"]

_MAX_DETECTIONS = 100
"""Masks of a category in an image that COCO's evaluation considers."""


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """Settings of an evaluation in the place of SAM's image encoder.

    Attributes:
        annotations: COCO instances.
        images: the folder that their file names are relative to.
        sam: name of a SAM teacher, whose decoder is used.
        weights: its file; None for the published one.
        runs: students with a head for that teacher.
        prompt: true boxes, points inside the true mask, or boxes of a detector.
        protocol: see `evals.sam.protocol`.
        detections: COCO result file with the boxes of a detector.
        limit: images at most, drawn by `seed`.
        pictures: number of images to draw.
        device: where SAM and students run.
    """

    annotations: Path
    images: Path
    sam: str = "sam"
    weights: Path | None = None
    runs: tuple[Path, ...] = ()
    prompt: Prompt = "box"
    protocol: ProtocolName = "efficientvit-sam"
    detections: Path | None = None
    limit: int | None = None
    pictures: int = 0
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if (self.prompt == "detections") != (self.detections is not None):
            raise ConfigError("--prompt detections and --detections FILE.json go together")


@dataclass(frozen=True)
class Detection:
    """A detector's box; score in [0, 1]."""

    category: int
    box_xyxy: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, kw_only=True)
class SamRow:
    """One predictor. Figures lie in [0, 1]; None where there was nothing to measure.

    Attributes:
        instances: number of masks.
        miou: mean IoU over instances.
        small, medium, large: the same by COCO's size classes.
        ap: COCO's mask AP.
    """

    name: str
    instances: int
    miou: float | None
    small: float | None
    medium: float | None
    large: float | None
    ap: float | None


@dataclass(frozen=True, kw_only=True)
class SamTable:
    """The figures, and how they were measured.

    Attributes:
        images: number of images.
        annotations_sha256: of their file.
        notes: limits of the figures, one sentence each.
        paper: published rows, if they are comparable.
        pictures: rows of titled pictures; no part of the record.
    """

    protocol: str
    images: int
    annotations_sha256: str
    rows: tuple[SamRow, ...]
    notes: tuple[str, ...]
    paper: tuple[PaperRow, ...] = ()
    pictures: tuple[tuple[Pane, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table, without pictures."""
        return asdict(self) | {"pictures": []}


@dataclass
class _PredictorResults:
    """The results of one predictor so far.

    Attributes:
        ious: IoU and size classes of every true instance.
        records: all masks in COCO's result format.
    """

    ious: list[tuple[float, tuple[str, ...]]] = field(default_factory=list[tuple[float, tuple[str, ...]]])
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def run_sam(config: SamConfig, *, progress: Progress | None = None) -> SamTable:
    """Prompt every predictor in the same way and score its masks.

    Raises:
        RadioCacheError: if annotations, images, weights or runs cannot be used.
    """
    protocol = PROTOCOLS[config.protocol]
    instances = Instances.opened(config.annotations)
    boxes = None if config.detections is None else _detections(config.detections, instances)
    # A detector may fire on images without instances, and AP counts that.
    ids = instances.image_ids(config.limit, config.seed, empty=boxes is not None)
    predictors = _predictors(config)
    results_of = {name: _PredictorResults() for name in predictors}
    picture_rows: list[tuple[Pane, ...]] = []
    num_turned = 0
    for number, image_id in enumerate(ids):
        path = image_path(config.images, instances.file_name(image_id))
        # Decoded and encoded once for all prompts of the image.
        image = _image(path)
        num_turned += _is_turned_file(path)
        # Masks are drawn image by image: those of COCO's validation set would fill 11 GB at once.
        truth = list(instances.of(image_id, (image.height, image.width), protocol))
        prompts: Sequence[Instance | Detection] = truth if boxes is None else boxes.get(image_id, [])
        masks = {
            name: _add_image(predictor, image, image_id, prompts, config.prompt, protocol, results_of[name])
            for name, predictor in predictors.items()
        }
        # The first images of the draw, so that pictures do not depend on the results.
        if number < config.pictures:
            columns = {"annotated": [instance.mask for instance in truth], **masks}
            picture_rows.append(
                (
                    ("image", thumbnail(image)),
                    *((name, _overlay(prompt_masks, image)) for name, prompt_masks in columns.items()),
                )
            )
        if progress is not None:
            progress("SAM", number + 1, len(ids))
    # Only after all images: broken annotations are found while they are drawn.
    instances.drop_broken()
    rows = tuple(_row(name, judgement, instances, ids) for name, judgement in results_of.items())
    images = f"{len(ids):,} images of {config.annotations}, prompted by {config.prompt}"
    is_paper = _is_paper(config, instances)
    return SamTable(
        protocol=f"{images}; {config.protocol}: {protocol.description}",
        images=len(ids),
        annotations_sha256=file_sha256(config.annotations),
        rows=rows,
        notes=tuple(_notes(config, instances, results_of, num_turned)),
        paper=SAM_ROWS if is_paper else (),
        pictures=tuple(picture_rows),
    )


def _is_paper(config: SamConfig, instances: Instances) -> bool:
    """Return whether the paper's rows (true boxes, script of EfficientViT-SAM, all of COCO) are comparable with ours."""
    return (
        config.protocol == "efficientvit-sam"
        and config.prompt == "box"
        and config.limit is None
        and instances.is_coco_validation()
    )


def _notes(
    config: SamConfig, instances: Instances, results_of: dict[str, _PredictorResults], num_turned: int
) -> Iterator[str]:
    """Yield the limits of the figures, one sentence each."""
    for reason, count in instances.left_out.items():
        yield f"Left out: {reason} ({count:,})."
    if instances.misplaced:
        yield (
            f"The box and the outline of {counted(instances.misplaced, 'instance overlaps', 'instances overlap')} by less than "
            "half, so that one of the two is wrong, and so are the figures: boxes are x, y, width, height, and all are pixels "
            "of the upright image."
        )
    if num_turned:
        yield (
            f"{counted(num_turned, 'image is', 'images are')} turned by an orientation tag: annotations are taken to be of the "
            "upright image, as viewers show it."
        )
    if config.protocol == "single-mask" and instances.is_coco_validation():
        yield (
            "The papers' rows follow EfficientViT-SAM's script (best of three masks, crowd regions included): "
            "--protocol efficientvit-sam gives figures that are comparable with them."
        )
    # All predictors had the same prompts, so the first one's counts stand for all.
    per_image: Counter[tuple[int, int]] = Counter()
    for record in next(iter(results_of.values())).records:
        per_image[record["image_id"], record["category_id"]] += 1
    crowded = sum(count > _MAX_DETECTIONS for count in per_image.values())
    if crowded:
        yield (
            f"COCO's AP considers the {_MAX_DETECTIONS} surest masks of a category in an image; there are more in {crowded:,} "
            "cases, and even true masks stay below an AP of 100 % there. The mIoU counts all of them."
        )


def _predictors(config: SamConfig) -> dict[str, SamPredictor]:
    """Load SAM itself, then the same decoder behind every run's student."""
    device = torch.device(pick_device(config.device))
    sam = load_sam(config.sam, config.weights).to(device)
    # SAM itself is the upper reference of the table.
    predictors = {config.sam: SamPredictor(sam)}
    for run, name in zip(config.runs, run_names(config.runs), strict=True):
        # With all heads: the one for this SAM makes the decoder's input.
        student = load_student(run, adaptors="all").to(device)
        predictors[name] = SamPredictor(sam_with_student(sam, student, config.sam))
    return predictors


def _add_image(
    predictor: SamPredictor,
    image: Image.Image,
    image_id: int,
    prompts: Sequence[Instance | Detection],
    prompt: Prompt,
    protocol: Protocol,
    results: _PredictorResults,
) -> list[NDArray[np.bool_]]:
    """Prompt one image, add its masks to the results, and return them."""
    if not prompts:
        return []
    predictor.set_image(np.asarray(image))  # the encoder runs once per image, the decoder once per prompt
    masks: list[NDArray[np.bool_]] = []
    for source in prompts:
        mask, score = _mask(predictor, source, prompt, protocol)
        if isinstance(source, Instance):
            # COCO's own area is that of the polygon, not of its pixels; the two differ at borders.
            area_px = source.file_area_px if protocol.file_area else float(source.mask.sum())
            results.ious.append((iou(mask, source.mask), protocol.sizes(area_px)))
        # AP ranks masks: by the detector's score, or by SAM's own estimate for true boxes.
        confidence = score if isinstance(source, Instance) else source.score
        results.records.append(_result(image_id, source.category, mask, confidence))
        masks.append(mask)
    return masks


def load_sam(name: str, weights: Path | None) -> Sam:
    """Load encoder and decoder of SAM from a file in segment-anything's format.

    Args:
        name: of a SAM teacher.
        weights: its file; None for the published one.

    Raises:
        ConfigError: if the teacher is not a SAM.
        TeacherError: if the weights cannot be downloaded or do not fit.
    """
    preset = find_teacher(name)
    if preset.family != "sam":
        raise ConfigError(
            f"--sam {name} is of the family {preset.family}: this takes sam-vit-b, sam-vit-l or sam-vit-h"
        )
    # The whole file: the teacher of a build loads the encoder alone.
    path = find_weights(preset, weights)
    sam: Sam = sam_model_registry[preset.model]()
    file = extract_network(read_weights_file(path, teacher=name), ("image_encoder.",), teacher=name, path=path)
    load_exactly(sam, file.tensors, teacher=name, path=path)
    return sam.eval()


def iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the intersection over union of two masks; 1 for two empty ones."""
    # Two empty masks agree, and 0 / 0 would not show it.
    union = int((first | second).sum())
    return 1.0 if union == 0 else float((first & second).sum() / union)


def _mask(
    predictor: SamPredictor, source: Instance | Detection, prompt: Prompt, protocol: Protocol
) -> tuple[NDArray[np.bool_], float]:
    """Return one mask and SAM's own estimate of its IoU."""
    if prompt == "box" or not isinstance(source, Instance):
        return _predict_mask(predictor, protocol, box=np.array(source.box_xyxy))
    count = 1 if prompt == "1-point" else 3
    if not protocol.interactive_points:
        points = inner_points(source.mask, count)
        return _predict_mask(predictor, protocol, point_coords=points, point_labels=np.ones(len(points), np.int64))
    # One click after the other, each where the last mask is most wrong.
    mask, score = np.zeros_like(source.mask), 0.0
    placed_xy: list[tuple[float, float]] = []
    labels: list[int] = []
    for _ in range(count):
        point_xy, positive = next_point(source.mask, mask, placed_xy)
        placed_xy.append(point_xy)
        labels.append(int(positive))
        mask, score = _predict_mask(
            predictor, protocol, point_coords=np.array(placed_xy), point_labels=np.array(labels)
        )
    return mask, score


def _predict_mask(predictor: SamPredictor, protocol: Protocol, **prompts: Any) -> tuple[NDArray[np.bool_], float]:
    """Return the mask that the protocol counts among those that SAM predicts, and its predicted IoU."""
    masks, scores, _ = predictor.predict(**prompts, multimask_output=protocol.best_of_three)
    # With a single mask there is one score.
    best = int(np.argmax(scores))
    return np.asarray(masks[best], np.bool_), float(scores[best])


def _result(image: int, category: int, mask: NDArray[np.bool_], score: float) -> dict[str, Any]:
    """Return COCO's record of a mask."""
    # pycocotools encodes Fortran-ordered arrays only.
    code: Any = run_length.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"image_id": image, "category_id": category, "segmentation": code, "score": score}


def _row(name: str, results: _PredictorResults, instances: Instances, ids: Sequence[int]) -> SamRow:
    def mean(size: str | None) -> float | None:
        values = [value for value, sizes in results.ious if size is None or size in sizes]
        return float(np.mean(values)) if values else None

    return SamRow(
        name=name,
        instances=len(results.records),
        miou=mean(None),
        small=mean("small"),
        medium=mean("medium"),
        large=mean("large"),
        ap=_average_precision(results.records, instances, ids),
    )


def _average_precision(results: list[dict[str, Any]], instances: Instances, ids: Sequence[int]) -> float | None:
    """Return COCO's mask AP, or None if these images hold no instance that it counts."""
    # AP ignores crowd regions: without other instances it is undefined, not 0.
    has_countable = any(not annotation["iscrowd"] for image in ids for annotation in instances.coco.imgToAnns[image])
    if not has_countable or not results:
        return 0.0 if has_countable else None
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # pycocotools prints as it goes
        warnings.simplefilter("ignore", DeprecationWarning)
        evaluation: Any = COCOeval(instances.coco, instances.coco.loadRes(results), "segm")
        # Only these: images left out by --limit would count as missed.
        evaluation.params.imgIds = list(ids)
        # COCO's defaults, named because a note refers to the last one.
        evaluation.params.maxDets = [1, 10, _MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def _detections(file: Path, instances: Instances) -> dict[int, list[Detection]]:
    """Return image number -> boxes, from COCO's result format. Boxes of other images or categories are counted in `left_out`.

    Raises:
        EvalError: for another format, or if no box belongs to the annotations' images and categories.
    """
    images, categories = instances.contents.image_numbers, instances.contents.category_numbers
    boxes: dict[int, list[Detection]] = {}
    strays = 0
    try:
        records = json.loads(file.read_bytes())
        for record in records:
            # Detections of a subset's complement are common, and no error.
            image = images.get(identifier(record["image_id"]))
            category = categories.get(identifier(record["category_id"]))
            x, y, w, h, score = (float(value) for value in (*record["bbox"], record["score"]))
            if not np.isfinite([x, y, w, h, score]).all():
                raise ValueError(f"a box or score is not finite: {record!r:.100}")
            if image is None or category is None:
                strays += 1
            else:
                boxes.setdefault(image, []).append(Detection(category, (x, y, x + w, y + h), score))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise EvalError(
            f"--detections {file} is not a list of image_id, category_id, bbox (x, y, w, h) and score: {exc!r:.200}"
        ) from exc
    if not boxes:
        raise EvalError(
            f"--detections {file}: none of its {len(records):,} boxes is of an image and a category of "
            f"{instances.file}; detectors that number categories from 0 need their numbers mapped to the file's"
        )
    if strays:
        instances.left_out["detected boxes of other images or categories"] = strays
    return boxes


def _image(path: Path) -> Image.Image:
    """Return the image, upright. Raises EvalError if it cannot be read."""
    try:
        return decode_image(path.read_bytes())
    except (ImageError, OSError) as exc:
        raise EvalError(f"{path}: {exc}; --images is the folder that the annotations' file names are below") from exc


def _is_turned_file(path: Path) -> bool:
    with path.open("rb") as file, open_image(file) as image:
        return is_turned(image)


def _overlay(masks: Sequence[NDArray[np.bool_]], image: Image.Image) -> NDArray[np.uint8]:
    """Return (h, w, 3): every mask in its own colour, later ones on top, everything else dark."""
    # 0 is the background; later masks overwrite earlier ones.
    numbers = np.zeros((image.height, image.width), np.int16)
    for number, mask in enumerate(masks, start=1):
        numbers[mask] = number
    return overlay(image, numbers, len(masks) + 1)
