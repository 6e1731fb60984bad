"""COCO files as other tools write them, brought into the form that pycocotools scores without a slip.

pycocotools takes an annotation id of 0 for "no match" and looks annotations up by id, so ids that start at 0 or repeat
score true masks as wrong. Identifiers are therefore renumbered in memory; the file is never changed.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pycocotools.coco import COCO

from evals.errors import EvalError


@dataclass(frozen=True)
class CocoFile:
    """A COCO file with its identifiers renumbered from 1.

    Attributes:
        coco: the index of pycocotools over the renumbered annotations.
        image_numbers, category_numbers: identifier in the file, as `identifier` writes it -> number in `coco`.
        skipped: reason -> number of annotations that refer to nothing in the file.
    """

    coco: Any
    image_numbers: dict[str, int]
    category_numbers: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict[str, int])


def identifier(value: Any) -> str:
    """Return the text by which an identifier is compared: 7, 7.0 and "7" are one identifier.

    Raises:
        TypeError: for anything but text and whole numbers.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r:.50} is not an identifier")
    # JSON of some writers has 7.0 where others have 7.
    if isinstance(value, float):
        if not value.is_integer():
            raise TypeError(f"{value!r} is not an identifier")
        value = int(value)
    return str(value)


def image_path(images: Path, name: str) -> Path:
    """Return the path of an image of a COCO file, without following links.

    Args:
        images: the folder that the user named.
        name: `file_name` of the image, from a file that may not be trustworthy.

    Raises:
        EvalError: the name leads out of the folder.
    """
    folder = Path(os.path.abspath(images))  # noqa: PTH100  # resolve() would follow links, which are the user's own
    path = Path(os.path.abspath(folder / name)) if "\0" not in name else folder  # noqa: PTH100
    if folder not in path.parents:
        raise EvalError(
            f"the annotations name the image {name!r:.120}, which leads out of --images {images}: file names have to be those of "
            "files below that folder"
        )
    return path


def read_coco(file: Path) -> CocoFile:
    """Read a file of COCO instances and renumber its images, categories and annotations.

    Raises:
        EvalError: if the file cannot be read, holds no instances, or lists an image or a category twice.
    """
    try:
        # Bytes, not text: json recognises UTF-8, UTF-16 and UTF-32 by itself.
        dataset = json.loads(file.read_bytes())
        images: list[dict[str, Any]] = [dict(image) for image in dataset["images"]]
        annotations: list[dict[str, Any]] = [dict(annotation) for annotation in dataset["annotations"]]
        if not images or not annotations:
            raise EvalError(f"{file} lists no images, or no instances")
        for image in images:
            # pycocotools would fail much later, in the middle of the evaluation.
            if missing := [name for name in ("file_name", "height", "width") if image.get(name) is None]:
                raise EvalError(f"{file}: image {image.get('id')!r:.80} has no {missing[0]}; every image states it")
            for side in ("height", "width"):  # some writers use floats or text, which pycocotools cannot draw by
                if (value := float(image[side])) < 1 or not value.is_integer():
                    raise EvalError(
                        f"{file}: {image['file_name']!r:.80} has the {side} {image[side]!r:.30}: no number of pixels"
                    )
                image[side] = int(value)
        image_numbers = _numbers((image["id"] for image in images), "image", file)
        categories = [dict(category) for category in dataset.get("categories") or ()]
        category_numbers = _numbers((category["id"] for category in categories), "category", file)
        # Classes without an entry in the file would not be scored at all.
        for annotation in annotations:
            # Files of class-agnostic masks have no category.
            annotation.setdefault("category_id", "object")
            name = identifier(annotation["category_id"])
            if name not in category_numbers:
                category_numbers[name] = len(category_numbers) + 1
                categories.append({"id": name, "name": name})
        # Subsets of COCO often list fewer images than their annotations name.
        matched = [annotation for annotation in annotations if identifier(annotation["image_id"]) in image_numbers]
        dataset = {
            "info": {},
            "images": [image | {"id": number} for number, image in enumerate(images, start=1)],
            "categories": [category | {"id": number} for number, category in enumerate(categories, start=1)],
            "annotations": [
                annotation
                | {
                    "id": number,
                    "image_id": image_numbers[identifier(annotation["image_id"])],
                    "category_id": category_numbers[identifier(annotation["category_id"])],
                }
                for number, annotation in enumerate(matched, start=1)
            ],
        }
        # Set in memory, so that pycocotools sees the renumbered file.
        coco: Any = COCO()
        coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
            coco.createIndex()
    except EvalError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise EvalError(f"{file} is no file of COCO instances: {exc!r:.200}") from exc
    if not matched:
        raise EvalError(
            f"{file}: no instance belongs to an image that the file lists; the first one names image "
            f"{annotations[0]['image_id']!r:.80}, the first image is {images[0]['id']!r:.80}"
        )
    # Counted and reported, because a wrong file looks like this, too.
    strays = len(annotations) - len(matched)
    skipped = {"instances of images that the file does not list": strays} if strays else {}
    return CocoFile(coco, image_numbers, category_numbers, skipped)


def checked_outline(outline: Any, image_hw: tuple[int, int]) -> Any:
    """Return an annotation's `segmentation` in a form that pycocotools draws as meant.

    Parts of fewer than three corners are dropped: they enclose nothing, and pycocotools takes four numbers for a box.
    A single part may stand without its outer list, and corners as pairs.

    Args:
        outline: polygons, or a run-length code.
        image_hw: of the image, pixels.

    Raises:
        ValueError, TypeError: for half a corner, no part, or a run-length code that is not of exactly the image's pixels,
            which pycocotools may read for ever.
    """
    if isinstance(outline, dict):
        code = cast(dict[str, Any], outline)
        height, width = (int(side) for side in code["size"])
        counts: Any = code["counts"]
        # Compressed codes are text, plain ones are lists of lengths.
        lengths = run_lengths(counts) if isinstance(counts, str) else [int(length) for length in counts]
        # pycocotools draws the lengths as they are: a wrong sum would run beyond the mask.
        if (height, width) != image_hw or min(lengths) < 0 or sum(lengths) != height * width:
            raise ValueError("the run-length code is not of the image's pixels")
        return {"size": [height, width], "counts": counts if isinstance(counts, str) else lengths}
    if not isinstance(outline, list):
        raise TypeError("an outline is a list of polygons, or a run-length code")
    # A list of polygons x, y, x, y, ...; or one polygon without its outer list; or corners as pairs.
    parts = cast(list[Any], outline)
    if parts and not isinstance(parts[0], list):
        parts = [parts]
    polygons: list[list[float]] = []
    for part in parts:
        corners = [value for pair in part for value in pair] if part and isinstance(part[0], list) else part
        polygon = [float(value) for value in corners]
        if len(polygon) % 2 or not all(map(math.isfinite, polygon)):
            raise ValueError("a polygon has an x without its y, or a corner that is no number")
        # Three corners enclose an area.
        if len(polygon) >= 6:
            polygons.append(polygon)
    if not polygons:
        raise ValueError("no polygon has three corners")
    return polygons


def run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run-length code into lengths: five bits a character; differences from the third length on.

    Raises:
        ValueError: for text that is no such code.

    Source: rleToString and rleFrString of the COCO API.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        # The code uses the 64 characters from "0" on: five bits of value, one for continuation.
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is in no run-length code")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            # Bit 4 of the last character is the sign.
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift or not lengths:
        raise ValueError("the run-length code ends in the middle")
    return lengths


def _numbers(identifiers: Iterable[Any], noun: str, file: Path) -> dict[str, int]:
    """Return identifier -> number from 1. Raises EvalError for a repeated one: annotations would be ambiguous."""
    numbers: dict[str, int] = {}
    for value in identifiers:
        name = identifier(value)
        if name in numbers:
            raise EvalError(
                f"{file} lists {noun} id {value!r:.80} twice; give every {noun} an id of its own, annotations follow it"
            )
        numbers[name] = len(numbers) + 1
    return numbers
