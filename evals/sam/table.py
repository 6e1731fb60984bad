"""Masks from prompts, by SAM itself and with a student for its encoder, against COCO's: mIoU by size, and AP."""

import contextlib
import io
import json
import warnings
from collections.abc import Sequence
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
from cache_builder.teachers.state_dict import load_exactly, read_state_dict
from cache_builder.teachers.weights import file_sha256
from evals.encoders.named import run_names
from evals.errors import EvalError
from evals.neighbours import Device
from evals.paper import SAM_ROWS, PaperRow
from evals.progress import Progress
from evals.sam.instances import Instance, Instances, inner_points
from evals.segmentation.pictures import overlay, thumbnail
from radio_cache.errors import ConfigError, ImageError
from radio_cache.images import decode_image
from radio_cache.torch import pick_device
from radio_cache.view.picture_grid import Pane
from trainer import load_student
from trainer.dropins.sam import sam_with_student

Prompt = Literal["box", "1-point", "3-points", "detections"]


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """annotations: COCO instances. images: the folder that their file names are below. sam: a teacher's name; weights: its file.

    runs: students with a head for that teacher. detections: COCO result JSON whose boxes prompt. pictures: images to draw.
    """

    annotations: Path
    images: Path
    sam: str = "sam"
    weights: Path | None = None
    runs: tuple[Path, ...] = ()
    prompt: Prompt = "box"
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
    """Shares in [0, 1]. miou: over instances, and by COCO's sizes, None where there are none. ap: COCO's mask AP."""

    name: str
    instances: int
    miou: float | None
    small: float | None
    medium: float | None
    large: float | None
    ap: float


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
    """What one predictor did so far. found: IoU and COCO's size of every true instance; results: COCO's records of all masks."""

    found: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def run_sam(config: SamConfig, *, progress: Progress | None = None) -> SamTable:
    """Every predictor on the same prompts. Raises RadioCacheError with what is wrong."""
    instances = Instances.opened(config.annotations)
    ids = instances.image_ids(config.limit, config.seed)
    boxes = None if config.detections is None else _detections(config.detections)
    predictors = _predictors(config)
    judged = {name: _Judged() for name in predictors}
    drawn: list[tuple[Pane, ...]] = []
    for number, image_id in enumerate(ids):
        image = _image(config.images / instances.file_name(image_id))
        truth = list(instances.of(image_id, (image.height, image.width)))
        asked: Sequence[Instance | Detection] = truth if boxes is None else boxes.get(image_id, [])
        masks = {
            name: _judge(one, image, image_id, asked, config.prompt, judged[name]) for name, one in predictors.items()
        }
        if number < config.pictures:
            shown = {"annotated": [one.mask for one in truth], **masks}
            drawn.append((("image", thumbnail(image)), *((name, _overlay(one, image)) for name, one in shown.items())))
        if progress is not None:
            progress("SAM", number + 1, len(ids))
    is_paper = config.prompt == "box" and config.limit is None and instances.is_coco_validation()
    instances.drop_broken()
    rows = tuple(_row(name, one.found, one.results, instances, ids) for name, one in judged.items())
    notes = [f"Left out: {what} ({count:,})." for what, count in instances.left_out.items()]
    protocol = (
        f"{len(ids):,} images of {config.annotations}, prompted by {config.prompt}; one mask a prompt, no refinement"
    )
    return SamTable(
        protocol=protocol, images=len(ids), annotations_sha256=file_sha256(config.annotations), rows=rows, notes=tuple(notes),
        paper=SAM_ROWS if is_paper else (), pictures=tuple(drawn),
    )  # fmt: skip


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
    predictor: SamPredictor, image: Image.Image, image_id: int, asked: Sequence[Instance | Detection], prompt: Prompt,
    judged: _Judged,
) -> list[NDArray[np.bool_]]:  # fmt: skip
    """The masks of one image, which are noted in `judged`."""
    predictor.set_image(np.asarray(image))
    masks: list[NDArray[np.bool_]] = []
    for one in asked:
        mask, score = _mask(predictor, one, prompt)
        if isinstance(one, Instance):
            judged.found.append((iou(mask, one.mask), one.size))
        sure = score if isinstance(one, Instance) else one.score
        judged.results.append(_result(image_id, one.category, mask, sure))
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
    load_exactly(sam, read_state_dict(path, teacher=name), teacher=name, path=path)
    return sam.eval()


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = int((one | other).sum())
    return 1.0 if union == 0 else float((one & other).sum() / union)


def _mask(predictor: SamPredictor, one: Instance | Detection, prompt: Prompt) -> tuple[NDArray[np.bool_], float]:
    """One mask and SAM's own estimate of its quality."""
    if prompt == "box" or not isinstance(one, Instance):
        masks, scores, _ = predictor.predict(box=np.array(one.box_xyxy), multimask_output=False)
    else:
        points = inner_points(one.mask, 1 if prompt == "1-point" else 3)
        masks, scores, _ = predictor.predict(
            point_coords=points, point_labels=np.ones(len(points), np.int64), multimask_output=False
        )
    return np.asarray(masks[0], np.bool_), float(scores[0])


def _result(image: int, category: int, mask: NDArray[np.bool_], score: float) -> dict[str, Any]:
    code: Any = run_length.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"image_id": image, "category_id": category, "segmentation": code, "score": score}


def _row(
    name: str,
    found: Sequence[tuple[float, str]],
    results: Sequence[dict[str, Any]],
    instances: Instances,
    ids: Sequence[int],
) -> SamRow:
    def mean(size: str | None) -> float | None:
        values = [value for value, of in found if size in (None, of)]
        return float(np.mean(values)) if values else None

    ap = 0.0
    if results:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # pycocotools prints as it goes
            warnings.simplefilter("ignore", DeprecationWarning)
            judge: Any = COCOeval(instances.coco, instances.coco.loadRes(list(results)), "segm")
            judge.params.imgIds = list(ids)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        ap = max(0.0, float(judge.stats[0]))
    return SamRow(
        name=name, instances=len(results), miou=mean(None), small=mean("small"), medium=mean("medium"), large=mean("large"), ap=ap
    )  # fmt: skip


def _detections(file: Path) -> dict[int, list[Detection]]:
    """Image -> boxes, from COCO's result format. Raises EvalError."""
    try:
        boxes: dict[int, list[Detection]] = {}
        for one in json.loads(file.read_text(encoding="utf-8")):
            x, y, w, h = (float(value) for value in one["bbox"])
            made = Detection(int(one["category_id"]), (x, y, x + w, y + h), float(one["score"]))
            boxes.setdefault(int(one["image_id"]), []).append(made)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise EvalError(
            f"--detections {file} is no list of image_id, category_id, bbox (x, y, w, h) and score: {exc!r}"
        ) from exc
    return boxes


def _image(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes())
    except (ImageError, OSError) as exc:
        raise EvalError(f"{path}: {exc}; --images is the folder that the annotations' file names are below") from exc


def _overlay(masks: Sequence[NDArray[np.bool_]], image: Image.Image) -> NDArray[np.uint8]:
    """(h, w, 3): every mask in a colour of its own, later ones on top, and the rest dark."""
    numbers = np.zeros((image.height, image.width), np.int16)
    for number, mask in enumerate(masks, start=1):
        numbers[mask] = number
    return overlay(image, numbers, len(masks) + 1)
