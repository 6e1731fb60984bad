"""Masks from prompts, by SAM itself and with a student for its encoder, against COCO's: mIoU by size, and AP."""

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
"""Masks of a category in an image that COCO's evaluation looks at."""


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """annotations: COCO instances. images: the folder that their file names are below. sam: a teacher's name; weights: its file.

    runs: students with a head for that teacher. detections: COCO result JSON whose boxes prompt. pictures: images to draw.
    protocol: how masks are asked for and counted (`evals.sam.protocol`).
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
    """Shares in [0, 1], None where nothing could be measured. miou: over instances, by COCO's sizes too; ap: COCO's mask AP."""

    name: str
    instances: int
    miou: float | None
    small: float | None
    medium: float | None
    large: float | None
    ap: float | None


@dataclass(frozen=True, kw_only=True)
class SamTable:
    """What was measured and how. annotations_sha256: of their file. paper: rows to compare with, where they apply."""

    protocol: str
    images: int
    annotations_sha256: str
    rows: tuple[SamRow, ...]
    notes: tuple[str, ...]
    paper: tuple[PaperRow, ...] = ()
    pictures: tuple[tuple[Pane, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"pictures": []}


@dataclass
class _Judged:
    """What one predictor did so far. ious: IoU and size classes of every true instance; results: COCO's records of all masks."""

    ious: list[tuple[float, tuple[str, ...]]] = field(default_factory=list[tuple[float, tuple[str, ...]]])
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def run_sam(config: SamConfig, *, progress: Progress | None = None) -> SamTable:
    """Every predictor on the same prompts. Raises RadioCacheError with what is wrong."""
    protocol = PROTOCOLS[config.protocol]
    instances = Instances.opened(config.annotations)
    boxes = None if config.detections is None else _detections(config.detections, instances)
    ids = instances.image_ids(config.limit, config.seed, empty=boxes is not None)
    predictors = _predictors(config)
    judged = {name: _Judged() for name in predictors}
    drawn: list[tuple[Pane, ...]] = []
    turned = 0
    for number, image_id in enumerate(ids):
        path = image_path(config.images, instances.file_name(image_id))
        image = _image(path)
        turned += _turned(path)
        truth = list(instances.of(image_id, (image.height, image.width), protocol))
        prompts: Sequence[Instance | Detection] = truth if boxes is None else boxes.get(image_id, [])
        masks = {
            name: _judge(predictor, image, image_id, prompts, config.prompt, protocol, judged[name])
            for name, predictor in predictors.items()
        }
        if number < config.pictures:
            columns = {"annotated": [instance.mask for instance in truth], **masks}
            drawn.append((("image", thumbnail(image)), *((name, _overlay(of, image)) for name, of in columns.items())))
        if progress is not None:
            progress("SAM", number + 1, len(ids))
    instances.drop_broken()
    rows = tuple(_row(name, judgement, instances, ids) for name, judgement in judged.items())
    images = f"{len(ids):,} images of {config.annotations}, prompted by {config.prompt}"
    is_paper = _is_paper(config, instances)
    return SamTable(
        protocol=f"{images}; {config.protocol}: {protocol.description}",
        images=len(ids),
        annotations_sha256=file_sha256(config.annotations),
        rows=rows,
        notes=tuple(_notes(config, instances, judged, turned)),
        paper=SAM_ROWS if is_paper else (),
        pictures=tuple(drawn),
    )


def _is_paper(config: SamConfig, instances: Instances) -> bool:
    """Return whether the paper's rows, true boxes by the script of EfficientViT-SAM on all of COCO, are comparable with ours."""
    return (
        config.protocol == "efficientvit-sam"
        and config.prompt == "box"
        and config.limit is None
        and instances.is_coco_validation()
    )


def _notes(config: SamConfig, instances: Instances, judged: dict[str, _Judged], turned: int) -> Iterator[str]:
    """Yield what a reader of the table has to know."""
    for what, count in instances.left_out.items():
        yield f"Left out: {what} ({count:,})."
    if instances.misplaced:
        yield (
            f"The box and the outline of {counted(instances.misplaced, 'instance overlaps', 'instances overlap')} by less than "
            "half, so that one of the two is wrong, and so are the figures: boxes are x, y, width, height, and all are pixels "
            "of the upright image."
        )
    if turned:
        yield (
            f"{counted(turned, 'image is', 'images are')} turned by an orientation tag: annotations are taken to be of the "
            "upright image, as viewers show it."
        )
    if config.protocol == "single-mask" and instances.is_coco_validation():
        yield (
            "The papers' rows follow EfficientViT-SAM's script (best of three masks, crowd regions included): "
            "--protocol efficientvit-sam gives figures that are comparable with them."
        )
    per_image: Counter[tuple[int, int]] = Counter()
    for record in next(iter(judged.values())).results:
        per_image[record["image_id"], record["category_id"]] += 1
    crowded = sum(count > _MAX_DETECTIONS for count in per_image.values())
    if crowded:
        yield (
            f"COCO's AP looks at the {_MAX_DETECTIONS} surest masks of a category in an image; there are more in {crowded:,} "
            "cases, and even true masks stay below an AP of 100 % there. The mIoU counts all of them."
        )


def _predictors(config: SamConfig) -> dict[str, SamPredictor]:
    """SAM itself, then the same SAM with every run's student in front of its decoder."""
    device = torch.device(pick_device(config.device))
    sam = load_sam(config.sam, config.weights).to(device)
    made = {config.sam: SamPredictor(sam)}
    for run, name in zip(config.runs, run_names(config.runs), strict=True):
        student = load_student(run, adaptors="all").to(device)
        made[name] = SamPredictor(sam_with_student(sam, student, config.sam))
    return made


def _judge(
    predictor: SamPredictor,
    image: Image.Image,
    image_id: int,
    prompts: Sequence[Instance | Detection],
    prompt: Prompt,
    protocol: Protocol,
    judged: _Judged,
) -> list[NDArray[np.bool_]]:
    """Return the masks of one image, and note them in `judged`."""
    if not prompts:
        return []
    predictor.set_image(np.asarray(image))
    masks: list[NDArray[np.bool_]] = []
    for source in prompts:
        mask, score = _mask(predictor, source, prompt, protocol)
        if isinstance(source, Instance):
            area_px = source.file_area_px if protocol.file_area else float(source.mask.sum())
            judged.ious.append((iou(mask, source.mask), protocol.sizes(area_px)))
        confidence = score if isinstance(source, Instance) else source.score
        judged.results.append(_result(image_id, source.category, mask, confidence))
        masks.append(mask)
    return masks


def load_sam(name: str, weights: Path | None) -> Sam:
    """All of SAM from a file in segment-anything's format. Raises TeacherError if it cannot be had or does not fit."""
    preset = find_teacher(name)
    if preset.family != "sam":
        raise ConfigError(
            f"--sam {name} is of the family {preset.family}: this takes sam-vit-b, sam-vit-l or sam-vit-h"
        )
    path = find_weights(preset, weights)
    sam: Sam = sam_model_registry[preset.model]()
    file = extract_network(read_weights_file(path, teacher=name), ("image_encoder.",), teacher=name, path=path)
    load_exactly(sam, file.tensors, teacher=name, path=path)
    return sam.eval()


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = int((one | other).sum())
    return 1.0 if union == 0 else float((one & other).sum() / union)


def _mask(
    predictor: SamPredictor, source: Instance | Detection, prompt: Prompt, protocol: Protocol
) -> tuple[NDArray[np.bool_], float]:
    """Return one mask and SAM's own estimate of its IoU."""
    if prompt == "box" or not isinstance(source, Instance):
        return _answer(predictor, protocol, box=np.array(source.box_xyxy))
    count = 1 if prompt == "1-point" else 3
    if not protocol.interactive_points:
        points = inner_points(source.mask, count)
        return _answer(predictor, protocol, point_coords=points, point_labels=np.ones(len(points), np.int64))
    mask, score = np.zeros_like(source.mask), 0.0
    placed_xy: list[tuple[float, float]] = []
    labels: list[int] = []
    for _ in range(count):
        point_xy, positive = next_point(source.mask, mask, placed_xy)
        placed_xy.append(point_xy)
        labels.append(int(positive))
        mask, score = _answer(predictor, protocol, point_coords=np.array(placed_xy), point_labels=np.array(labels))
    return mask, score


def _answer(predictor: SamPredictor, protocol: Protocol, **prompts: Any) -> tuple[NDArray[np.bool_], float]:
    """Return the mask that the protocol counts of those that SAM answers with, and its predicted IoU."""
    masks, scores, _ = predictor.predict(**prompts, multimask_output=protocol.best_of_three)
    best = int(np.argmax(scores))
    return np.asarray(masks[best], np.bool_), float(scores[best])


def _result(image: int, category: int, mask: NDArray[np.bool_], score: float) -> dict[str, Any]:
    code: Any = run_length.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"image_id": image, "category_id": category, "segmentation": code, "score": score}


def _row(name: str, judged: _Judged, instances: Instances, ids: Sequence[int]) -> SamRow:
    def mean(size: str | None) -> float | None:
        values = [value for value, sizes in judged.ious if size is None or size in sizes]
        return float(np.mean(values)) if values else None

    return SamRow(
        name=name,
        instances=len(judged.results),
        miou=mean(None),
        small=mean("small"),
        medium=mean("medium"),
        large=mean("large"),
        ap=_average_precision(judged.results, instances, ids),
    )


def _average_precision(results: list[dict[str, Any]], instances: Instances, ids: Sequence[int]) -> float | None:
    """Return COCO's mask AP, or None where these images hold no instance that it counts."""
    counted = any(not known["iscrowd"] for image in ids for known in instances.coco.imgToAnns[image])
    if not counted or not results:
        return 0.0 if counted else None
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # pycocotools prints as it goes
        warnings.simplefilter("ignore", DeprecationWarning)
        evaluation: Any = COCOeval(instances.coco, instances.coco.loadRes(results), "segm")
        evaluation.params.imgIds = list(ids)
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
            f"--detections {file} is no list of image_id, category_id, bbox (x, y, w, h) and score: {exc!r:.200}"
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
    try:
        return decode_image(path.read_bytes())
    except (ImageError, OSError) as exc:
        raise EvalError(f"{path}: {exc}; --images is the folder that the annotations' file names are below") from exc


def _turned(path: Path) -> bool:
    with path.open("rb") as file, open_image(file) as image:
        return is_turned(image)


def _overlay(masks: Sequence[NDArray[np.bool_]], image: Image.Image) -> NDArray[np.uint8]:
    """(h, w, 3): every mask in a colour of its own, later ones on top, and the rest dark."""
    numbers = np.zeros((image.height, image.width), np.int16)
    for number, mask in enumerate(masks, start=1):
        numbers[mask] = number
    return overlay(image, numbers, len(masks) + 1)
