"""Instances of a COCO-format file: their images, boxes and masks, and what is broken about some."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as run_length

from evals.errors import EvalError
from evals.sam.coco_file import CocoFile, checked_outline, read_coco
from evals.sam.protocol import PROTOCOLS, Protocol
from evals.shared.published import is_coco_validation


@dataclass(frozen=True)
class Instance:
    """An annotated object.

    Attributes:
        annotation, category: their numbers in the renumbered file.
        box_xyxy: pixels.
        mask: (h, w).
        file_area_px: the area that the file states, or that of the mask where it states none.
    """

    annotation: int
    category: int
    box_xyxy: tuple[float, float, float, float]
    mask: NDArray[np.bool_]
    file_area_px: float


@dataclass
class Instances:
    """The instances of a COCO file.

    Attributes:
        left_out: reason -> how many instances were left out, as far as they were met.
        broken: annotations that cannot be drawn.
        misplaced: instances whose box and outline hardly overlap, as far as they were met; one of the two is wrong.
    """

    file: Path
    contents: CocoFile
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    broken: set[int] = field(default_factory=set[int])
    misplaced: int = 0

    @classmethod
    def opened(cls, file: Path) -> "Instances":
        """Raises EvalError for what is no COCO file with instances."""
        contents = read_coco(file)
        return cls(file, contents, dict(contents.skipped))

    @property
    def coco(self) -> Any:
        """The index of pycocotools."""
        return self.contents.coco

    def image_ids(self, limit: int | None, seed: int, *, empty: bool = False) -> list[int]:
        """Return the numbers of images with instances, in order; at most `limit`, drawn at random.

        Args:
            empty: images without instances as well: a detector's boxes there are false ones, which AP counts.
        """
        ids = sorted(self.coco.imgs if empty else {int(known["image_id"]) for known in self.coco.anns.values()})
        if limit is None or limit >= len(ids):
            return ids
        chosen = np.random.default_rng(seed).choice(len(ids), limit, replace=False)
        return [ids[number] for number in sorted(chosen.tolist())]

    def is_coco_validation(self) -> bool:
        """Return whether this is the file that the paper's figures are on, by its counts."""
        return is_coco_validation(categories=len(self.coco.getCatIds()), images=len(self.coco.getImgIds()))

    def file_name(self, image: int) -> str:
        return str(self.coco.imgs[image]["file_name"])

    def of(
        self, image: int, image_hw: tuple[int, int], protocol: Protocol = PROTOCOLS["single-mask"]
    ) -> Iterator[Instance]:
        """Yield the instances of an image that the protocol counts; the others are counted in `left_out`.

        Raises EvalError if the file says that the image has another size.
        """
        known = self.coco.imgs[image]
        if (int(known["height"]), int(known["width"])) != image_hw:
            raise EvalError(
                f"{self.file}: {known['file_name']} is listed as {known['width']} x {known['height']}, and the file has "
                f"{image_hw[1]} x {image_hw[0]} pixels: are these the annotations of these images?"
            )
        for annotation in self.coco.imgToAnns[image]:
            try:
                annotation["segmentation"] = checked_outline(annotation["segmentation"], image_hw)
                with warnings.catch_warnings():
                    # pycocotools hands over arrays in a way that newer numpys deprecate.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    mask = np.asarray(self.coco.annToMask(annotation), np.bool_)
                if mask.shape != image_hw:  # a run-length code has a size of its own
                    raise ValueError("the mask is of another size than the image")
                area_px = annotation["area"] = _area_px(annotation.get("area"), mask)
                annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
                x, y, w, h = _box_xywh(annotation, mask)
            except Exception:  # pycocotools raises whatever its C code meets in a broken polygon or run-length code
                self._leave("instances whose outline or box is broken")
                self.broken.add(int(annotation["id"]))
                continue
            if annotation["iscrowd"] and not protocol.crowds:
                self._leave("crowd regions")
                continue
            if area_px < 1 if protocol.file_area else not mask.any() or w <= 0 or h <= 0:
                self._leave("instances of no pixel")
                continue
            if not annotation["iscrowd"] and _far_from_its_box(mask, (x, y, w, h)):
                self.misplaced += 1
            yield Instance(int(annotation["id"]), int(annotation["category_id"]), (x, y, x + w, y + h), mask, area_px)

    def drop_broken(self) -> None:
        """Take those that cannot be drawn out of the index in memory: COCO's evaluation would stop at them."""
        sound = [known for known in self.coco.dataset["annotations"] if int(known["id"]) not in self.broken]
        self.coco.dataset["annotations"] = sound
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()

    def _leave(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


_ROUNDED_PX = 4
"""Side in pixels below which boxes of one object may differ by half from rounding alone."""


def _area_px(stated: Any, mask: NDArray[np.bool_]) -> float:
    """Return the area by which COCO's evaluation sorts: the file's, or that of the mask where the file states none.

    Some writers leave it out, or write null, NaN, 0 or -1 for it.
    """
    area_px = float("nan") if stated is None else float(stated)
    return area_px if np.isfinite(area_px) and area_px > 0 else float(mask.sum())


def _far_from_its_box(mask: NDArray[np.bool_], box_xywh: tuple[float, float, float, float]) -> bool:
    """Return whether a box overlaps less than half with the box of the mask; tiny masks are left to rounding."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    drawn = np.zeros(4)
    if len(rows):
        drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
    x, y, w, h = box_xywh
    stated = np.array([x, y, x + max(0.0, w), y + max(0.0, h)])
    if max(float((box[2:] - box[:2]).min()) for box in (drawn, stated)) < _ROUNDED_PX:
        return False
    sides = np.maximum(0, np.minimum(drawn, stated)[2:] - np.maximum(drawn, stated)[:2])
    both = float(np.prod(sides))
    either = float(np.prod(drawn[2:] - drawn[:2]) + np.prod(stated[2:] - stated[:2]))
    return both < 0.5 * (either - both)


def _box_xywh(annotation: dict[str, Any], mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return an annotation's box in pixels, or that of its mask where the file has none.

    Raises:
        ValueError, TypeError: if the file's box is not four finite numbers.
    """
    if annotation.get("bbox"):
        x, y, w, h = (float(value) for value in annotation["bbox"])
        if not np.isfinite([x, y, w, h]).all():
            raise ValueError("the box is not finite")
        return x, y, w, h
    x, y, w, h = (float(value) for value in run_length.toBbox(run_length.encode(np.asfortranarray(mask, np.uint8))))
    return x, y, w, h


def inner_points(mask: NDArray[np.bool_], count: int) -> NDArray[np.float32]:
    """(count, 2) points x, y inside a mask: the deepest one, then always the deepest that is far from those before."""
    depth = _depth(mask)
    ys, xs = np.mgrid[: mask.shape[0], : mask.shape[1]]
    points: list[tuple[float, float]] = []
    weight = depth.copy()
    for _ in range(count):
        y, x = np.unravel_index(int(weight.argmax()), weight.shape)
        points.append((float(x), float(y)))
        weight = depth * np.min([np.hypot(xs - px, ys - py) for px, py in points], axis=0)
        if weight.max() == 0:
            weight = depth
    return np.array(points, np.float32)


def next_point(
    truth: NDArray[np.bool_], mask: NDArray[np.bool_], placed_xy: Sequence[tuple[float, float]]
) -> tuple[tuple[float, float], bool]:
    """Place the next click of an interactive session: the pixel deepest within the larger error of the last mask.

    Args:
        truth: (h, w), the true mask.
        mask: (h, w), the last answer; all False before the first.
        placed_xy: clicks so far; no pixel is clicked twice.

    Returns:
        The point x, y, and whether it is positive (the mask lacks it) or negative (the mask has it too much).

    Source: the click simulation of RITM (arXiv 2102.06583), which EfficientViT-SAM's script uses.
    """
    missing, extra = _depth(truth & ~mask), _depth(mask & ~truth)
    for x, y in placed_xy:
        missing[int(y), int(x)] = extra[int(y), int(x)] = 0
    positive = bool(missing.max() > extra.max())
    depth = missing if positive else extra
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return (float(x), float(y)), positive


def _depth(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (h, w): the distance in pixels of every pixel of the mask to the nearest outside it, or outside the image."""
    from scipy.ndimage import distance_transform_edt

    return np.asarray(distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
