"""Instances of a COCO-format file: their images, boxes and masks; broken ones are counted and left out."""

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
        file: of the annotations.
        contents: of the file, renumbered.
        left_out: reason -> number of instances left out, in the images read so far.
        broken: annotations that cannot be drawn.
        misplaced: instances whose box and outline hardly overlap, in the images read so far; one of the two is wrong.
    """

    file: Path
    contents: CocoFile
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    broken: set[int] = field(default_factory=set[int])
    misplaced: int = 0

    @classmethod
    def opened(cls, file: Path) -> "Instances":
        """Read a file.

        Raises:
            EvalError: if it is not a COCO file with instances.
        """
        contents = read_coco(file)
        return cls(file, contents, dict(contents.skipped))

    @property
    def coco(self) -> Any:
        """The index of pycocotools."""
        return self.contents.coco

    def image_ids(self, limit: int | None, seed: int, *, empty: bool = False) -> list[int]:
        """Return the numbers of images with instances, in order; at most `limit`, drawn at random.

        Args:
            limit: images at most; None for all.
            seed: of the draw.
            empty: include images without instances: a detector's boxes there are false positives, which AP counts.
        """
        # Sorted, so that the seeded draw does not depend on the order in the file.
        ids = sorted(
            self.coco.imgs if empty else {int(annotation["image_id"]) for annotation in self.coco.anns.values()}
        )
        if limit is None or limit >= len(ids):
            return ids
        chosen = np.random.default_rng(seed).choice(len(ids), limit, replace=False)
        return [ids[number] for number in sorted(chosen.tolist())]

    def is_coco_validation(self) -> bool:
        """Return whether the file is COCO's validation set, which the paper's figures are on, by its counts."""
        return is_coco_validation(categories=len(self.coco.getCatIds()), images=len(self.coco.getImgIds()))

    def file_name(self, image: int) -> str:
        """Return the file name of an image, relative to the folder of images."""
        return str(self.coco.imgs[image]["file_name"])

    def of(
        self, image: int, image_hw: tuple[int, int], protocol: Protocol = PROTOCOLS["single-mask"]
    ) -> Iterator[Instance]:
        """Yield the instances of an image that the protocol counts; the others are counted in `left_out`.

        Args:
            image: its number.
            image_hw: its size, upright.
            protocol: decides which instances count.

        Raises:
            EvalError: if the annotations state another size for the image.
        """
        image_record = self.coco.imgs[image]
        if (int(image_record["height"]), int(image_record["width"])) != image_hw:
            raise EvalError(
                f"{self.file}: {image_record['file_name']} is listed as {image_record['width']} x {image_record['height']}, "
                f"and the file has {image_hw[1]} x {image_hw[0]} pixels: are these the annotations of these images?"
            )
        # Any single annotation may be broken; the others still count.
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
                # Some writers omit it, or write null.
                annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
                x, y, w, h = _box_xywh(annotation, mask)
            except Exception:  # pycocotools raises whatever its C code meets in a broken polygon or run-length code
                self._count_left_out("instances whose outline or box is broken")
                self.broken.add(int(annotation["id"]))
                continue
            # A crowd region outlines many objects, for which one box is no fair prompt.
            if annotation["iscrowd"] and not protocol.crowds:
                self._count_left_out("crowd regions")
                continue
            if area_px < 1 if protocol.file_area else not mask.any() or w <= 0 or h <= 0:
                self._count_left_out("instances of no pixel")
                continue
            # Crowd regions are outlined roughly.
            if not annotation["iscrowd"] and _far_from_its_box(mask, (x, y, w, h)):
                self.misplaced += 1
            yield Instance(int(annotation["id"]), int(annotation["category_id"]), (x, y, x + w, y + h), mask, area_px)

    def drop_broken(self) -> None:
        """Remove annotations that cannot be drawn from the index in memory: COCO's evaluation would stop at them."""
        sound = [
            annotation for annotation in self.coco.dataset["annotations"] if int(annotation["id"]) not in self.broken
        ]
        # The index refers to the old list, so it is built again.
        self.coco.dataset["annotations"] = sound
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()

    def _count_left_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


_ROUNDED_PX = 4
"""Side in pixels below which two boxes of one object may differ by half from rounding alone."""


def _area_px(file_area: Any, mask: NDArray[np.bool_]) -> float:
    """Return the area by which COCO's evaluation sorts instances: the file's, or that of the mask if the file states none.

    Some writers omit it, or write null, NaN, 0 or -1 for it.
    """
    area_px = float("nan") if file_area is None else float(file_area)
    return area_px if np.isfinite(area_px) and area_px > 0 else float(mask.sum())


def _far_from_its_box(mask: NDArray[np.bool_], box_xywh: tuple[float, float, float, float]) -> bool:
    """Return whether a box overlaps less than half with the box of the mask; False for tiny masks, because of rounding."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    # An empty mask has an empty box.
    mask_box = np.zeros(4)
    if len(rows):
        mask_box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
    x, y, w, h = box_xywh
    file_box = np.array([x, y, x + max(0.0, w), y + max(0.0, h)])
    if max(float((box[2:] - box[:2]).min()) for box in (mask_box, file_box)) < _ROUNDED_PX:
        return False
    # Of the two boxes: from the larger of the left upper corners to the smaller of the right lower ones.
    overlap_wh = np.maximum(0, np.minimum(mask_box, file_box)[2:] - np.maximum(mask_box, file_box)[:2])
    intersection = float(np.prod(overlap_wh))
    areas = float(np.prod(mask_box[2:] - mask_box[:2]) + np.prod(file_box[2:] - file_box[:2]))
    return intersection < 0.5 * (areas - intersection)


def _box_xywh(annotation: dict[str, Any], mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return an annotation's box in pixels, or that of its mask where the file has none.

    Raises:
        ValueError, TypeError: if the file's box is not four finite numbers.
    """
    # COCO's boxes are x, y, width, height.
    if annotation.get("bbox"):
        x, y, w, h = (float(value) for value in annotation["bbox"])
        if not np.isfinite([x, y, w, h]).all():
            raise ValueError("the box is not finite")
        return x, y, w, h
    x, y, w, h = (float(value) for value in run_length.toBbox(run_length.encode(np.asfortranarray(mask, np.uint8))))
    return x, y, w, h


def inner_points(mask: NDArray[np.bool_], count: int) -> NDArray[np.float32]:
    """Choose points inside a mask: the deepest one, then always the deepest far from those before.

    Args:
        mask: (h, w), not empty.
        count: number of points.

    Returns:
        (count, 2) points x, y.
    """
    depth = _depth(mask)
    ys, xs = np.mgrid[: mask.shape[0], : mask.shape[1]]
    points: list[tuple[float, float]] = []
    # The first point is the deepest; later ones weigh depth by their distance to the points so far.
    weight = depth.copy()
    for _ in range(count):
        y, x = np.unravel_index(int(weight.argmax()), weight.shape)
        points.append((float(x), float(y)))
        weight = depth * np.min([np.hypot(xs - px, ys - py) for px, py in points], axis=0)
        if weight.max() == 0:  # every pixel of the mask is a point already
            weight = depth
    return np.array(points, np.float32)


def next_point(
    truth: NDArray[np.bool_], mask: NDArray[np.bool_], placed_xy: Sequence[tuple[float, float]]
) -> tuple[tuple[float, float], bool]:
    """Place the next click of an interactive session: the pixel deepest within the larger error of the last mask.

    Args:
        truth: (h, w), the true mask.
        mask: (h, w), the last predicted mask; all False before the first.
        placed_xy: clicks so far; no pixel is clicked twice.

    Returns:
        The point x, y, and whether it is positive (missing from the mask) or negative (wrongly in the mask).

    Source: the click simulation of RITM (arXiv 2102.06583), which EfficientViT-SAM's script uses.
    """
    # Depth in both kinds of error: pixels missing from the mask, and pixels wrongly in it.
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

    # Padding makes the border of the image a border of the mask.
    return np.asarray(distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
