"""Instances of a COCO-format file: their images, boxes and masks, and what is broken about some."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from evals.errors import EvalError
from evals.paper import is_coco_validation

SMALL_PX, MEDIUM_PX = 32**2, 96**2
"""Areas below which COCO calls an instance small, and medium."""


@dataclass(frozen=True)
class Instance:
    """box_xyxy: pixels. mask (h, w). area: of the mask, pixels."""

    annotation: int
    category: int
    box_xyxy: tuple[float, float, float, float]
    mask: NDArray[np.bool_]

    @property
    def size(self) -> str:
        area = int(self.mask.sum())
        return "small" if area < SMALL_PX else "medium" if area < MEDIUM_PX else "large"


@dataclass
class Instances:
    """The file, opened. left_out: reason -> how many instances were left out, as far as they were met.

    broken: annotations that cannot be drawn."""

    file: Path
    coco: Any
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    broken: set[int] = field(default_factory=set[int])

    @classmethod
    def opened(cls, file: Path) -> "Instances":
        """Raises EvalError for what is no COCO file with instances."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells how long it took
                coco: Any = COCO(str(file))
            if not coco.getImgIds() or not coco.getAnnIds():
                raise EvalError(f"{file} lists no images, or no instances")
            for image in coco.imgs.values():
                _ = image["file_name"], image["height"], image["width"]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as exc:
            raise EvalError(f"{file} is no file of COCO instances: {exc!r:.200}") from exc
        return cls(file, coco)

    def image_ids(self, limit: int | None, seed: int) -> list[int]:
        """Images with instances, in order; at most so many, drawn at random."""
        ids = sorted({int(one["image_id"]) for one in self.coco.dataset["annotations"]} & set(self.coco.imgs))
        if limit is None or limit >= len(ids):
            return ids
        chosen = np.random.default_rng(seed).choice(len(ids), limit, replace=False)
        return [ids[number] for number in sorted(chosen.tolist())]

    def is_coco_validation(self) -> bool:
        """Whether this is the file that the paper's figures are on, by its counts."""
        return is_coco_validation(categories=len(self.coco.getCatIds()), images=len(self.coco.getImgIds()))

    def file_name(self, image: int) -> str:
        return str(self.coco.imgs[image]["file_name"])

    def of(self, image: int, image_hw: tuple[int, int]) -> Iterator[Instance]:
        """The usable instances of an image. Crowd regions and masks that cannot be drawn are counted and left out.

        Raises EvalError if the file says that the image has another size.
        """
        known = self.coco.imgs[image]
        if (known["height"], known["width"]) != image_hw:
            raise EvalError(
                f"{self.file}: {known['file_name']} is listed as {known['width']} x {known['height']}, and the file has "
                f"{image_hw[1]} x {image_hw[0]} pixels: are these the annotations of these images?"
            )
        for one in self.coco.imgToAnns[image]:
            try:
                with warnings.catch_warnings():
                    # pycocotools hands over arrays in a way that newer numpys deprecate.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    mask = np.asarray(self.coco.annToMask(one), np.bool_)
                if mask.shape != image_hw:  # a run-length code has a size of its own
                    raise ValueError("the mask is of another size than the image")
                one.setdefault("area", float(mask.sum()))  # by which COCO's evaluation sorts; some writers leave it out
                x, y, w, h = (float(value) for value in one["bbox"])
            except Exception:  # pycocotools raises whatever its C code meets in a broken polygon or run-length code
                self._leave("instances whose outline or box is broken")
                self.broken.add(int(one["id"]))
                continue
            if one.setdefault("iscrowd", 0):
                self._leave("crowd regions")
                continue
            if not mask.any() or w <= 0 or h <= 0:
                self._leave("instances of no pixel")
                continue
            yield Instance(int(one["id"]), int(one["category_id"]), (x, y, x + w, y + h), mask)

    def drop_broken(self) -> None:
        """Take those that cannot be drawn out of the file in memory: COCO's evaluation would stop at them."""
        kept = [one for one in self.coco.dataset["annotations"] if int(one["id"]) not in self.broken]
        self.coco.dataset["annotations"] = kept
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()

    def _leave(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def inner_points(mask: NDArray[np.bool_], count: int) -> NDArray[np.float32]:
    """(count, 2) points x, y inside a mask: the deepest one, then always the deepest that is far from those before."""
    from scipy.ndimage import distance_transform_edt

    depth = np.asarray(distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
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
