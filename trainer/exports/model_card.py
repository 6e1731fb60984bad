"""The model card of an exported student, written from its run and its cache: teachers, licences, recipe, results, a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from radio_cache import __version__
from radio_cache.errors import ConfigError, ImageError, RadioCacheError
from radio_cache.format.schema import TeacherSpec
from radio_cache.format.strict_json import parse_json
from radio_cache.images.decode import decode_image
from radio_cache.reader import Cache
from radio_cache.storage.local import write_atomically
from radio_cache.view import PcaColours, png_bytes
from trainer.exports.written import PLACE
from trainer.model.eval_view import eval_pixels
from trainer.model.student import DistilledStudent, backbone_and_heads

CARD_FILE, PICTURE_FILE = "README.md", "features.png"
_CELL_PX, _GAP_PX = 192, 4
_LIBRARIES = {"hf": "transformers", "timm": "timm", "onnx": "onnx"}
_SHOWN = (
    "student",
    "student_overrides",
    "image_px",
    "steps",
    "batch_images",
    "lr",
    "weight_decay",
    "crop_area",
    "summary_loss",
    "spatial_loss",
    "balancing",
    "normalise",
    "normalise_summary",
    "adaptor",
    "adaptor_width",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The contents of a model card.

    Attributes:
        pictures: image files; "cache" uses the first two images of the run's cache, () none.
        results: JSON files of `radio-eval ... --json`.
    """

    pictures: Sequence[Path] | Literal["cache"] = "cache"
    results: Sequence[Path] = ()


@dataclass(frozen=True)
class CardDocument:
    """The parts of a card that all formats share.

    Attributes:
        from_cache: keys of the cache's images in its picture.
    """

    title: str
    body: str
    picture: bytes | None
    from_cache: tuple[str, ...] = ()

    def write(self, folder: Path, file_format: str, use: Sequence[str], notes: Sequence[str]) -> None:
        """Write README.md, and the picture beside it."""
        library = _LIBRARIES.get(file_format, "pytorch")
        front = (
            f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\n"
            "tags:\n- distillation\n- radio-cache\n---\n"
        )
        code = "\n".join(line.replace(PLACE, ".") for line in use)
        notes_text = "".join(f"\nNote: {note}.\n" for note in notes)
        text = f"{front}\n# {self.title}\n\n## Use\n\n```python\n{code}\n```\n{notes_text}\n{self.body}"
        if self.picture is not None:
            write_atomically(folder / PICTURE_FILE, self.picture)
        write_atomically(folder / CARD_FILE, text.encode())


def model_card(model: DistilledStudent, run: Path, card: Card) -> CardDocument:
    """Build the card of a student. If its cache is missing, the card notes it.

    Raises:
        ConfigError: for a picture or a file of results that cannot be read.
    """
    config = model.config
    # A student is often exported on a machine without its cache: the card then has fewer facts, and is written.
    cache, why = _open(config.cache)
    millions = sum(p.numel() for p in model.student.parameters()) / 1e6
    h, w = config.image_hw
    parts = [
        f"`{config.student}`, {millions:.1f} M parameters, {h} x {w} pixels, distilled with radio-cache {__version__} from "
        f"{len(config.teachers)} teacher{'s' if len(config.teachers) > 1 else ''}. Images are RGB in [0, 1]; it gives a summary "
        f"of {model.summary_dim} values and, every {model.patch_size} pixels, features of {model.embed_dim}.\n",
        _teachers(model, cache, why),
        _training(config.steps, config.images_seen, run),
        *(_results(path) for path in card.results),
    ]
    picture = None
    images, keys = _images(card, cache)
    if images:
        picture = png_bytes(_picture(model, images))
        parts.append(
            f"## What it sees\n\n![Features as colours]({PICTURE_FILE})\n\nEach row: an image, the student's own features, and "
            "its heads' for each teacher, as three principal components fitted on these images.\n"
        )
    title = f"{config.student} distilled from {', '.join(teacher.name for teacher in config.teachers)}"
    return CardDocument(title, "\n".join(parts), picture, keys)


def _open(path_or_url: str) -> tuple[Cache | None, str]:
    try:
        return Cache(path_or_url), ""
    except RadioCacheError as exc:
        return None, str(exc).splitlines()[0]


def _teachers(model: DistilledStudent, cache: Cache | None, why: str) -> str:
    """Return the table of teachers and their licences, as the cache recorded them."""
    lines = ["## Teachers\n", "| teacher | model | licence of its weights | weights |", "|---|---|---|---|"]
    for teacher in model.config.teachers:
        spec = _spec(cache, teacher.name)
        known = ("not known here",) * 3 if spec is None else (spec.model, spec.licence, f"`{spec.weights_sha256[:12]}`")
        lines.append(f"| {teacher.name} | {' | '.join(known)} |")
    if cache is None:
        lines.append(f"\nThe cache could not be read when this card was written ({why}).")
    lines.append(
        "\nWhether a student may be used as its teachers may is for you to decide; their licences are above.\n"
    )
    return "\n".join(lines)


def _spec(cache: Cache | None, name: str) -> TeacherSpec | None:
    return cache.teachers[name].spec if cache is not None and name in cache.teachers else None


def _training(steps: int, images_seen: int, run: Path) -> str:
    text = f"## Training\n\n{steps:,} steps, {images_seen:,} images seen."
    recipe_file = run / "recipe.json"
    if not recipe_file.exists():
        return f"{text} The recipe is not beside the weights this was exported from.\n"
    try:
        recipe: Any = parse_json(recipe_file.read_bytes())
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):  # damaged, while the weights are whole
        return f"{text} The recipe beside the weights this was exported from cannot be read.\n"
    rows = [f"| {key} | `{json.dumps(recipe[key])}` |" for key in _SHOWN if key in recipe]
    return "\n".join([text, f"\n| {recipe.get('name', 'recipe')} | |", "|---|---|", *rows, ""])


def _results(path: Path) -> str:
    """Return the rows of one evaluation, with all their numbers."""
    try:
        evaluation: dict[str, Any] = json.loads(path.read_text())
        rows: list[dict[str, Any]] = evaluation["rows"]
        names = [str(row["name"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"--results {path} is no JSON file of radio-eval with rows: {exc}") from exc
    # Columns of numbers, some of them missing: lists and texts of an evaluation do not fit a table.
    keys = [key for key in rows[0] if all(isinstance(row.get(key), int | float | None) for row in rows)] if rows else []
    lines = [f"## Results\n\n{evaluation.get('protocol', path.name)}\n"]
    lines += [f"| features | {' | '.join(keys)} |", "|---" * (1 + len(keys)) + "|"]
    lines += [
        f"| {name} | {' | '.join(_number(row.get(key)) for key in keys)} |"
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join([*lines, ""])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _images(card: Card, cache: Cache | None) -> tuple[list[Image.Image], tuple[str, ...]]:
    """Return the images of the picture, and the keys of those from the cache."""
    if card.pictures != "cache":
        try:
            return [decode_image(path.read_bytes()) for path in card.pictures], ()
        except (OSError, ImageError) as exc:
            raise ConfigError(f"--picture: {exc}") from exc
    if cache is None:
        return [], ()
    try:
        rows = [int(row) for row in cache.usable_rows(tuple(cache.teachers))[:2]]
        images = [cache.decode(cache.read_original_or_kept(row)[0]) for row in rows]
    except RadioCacheError:  # the images have moved, so the card has no picture
        return [], ()
    return images, tuple(cache.index.key(row) for row in rows)


@torch.inference_mode()
def _picture(model: DistilledStudent, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """Draw a row per image: the student's view, and maps as colours."""
    config = model.config
    views = [
        eval_pixels(image, image_hw=config.image_hw, fit=config.fit, centre_share=config.centre_share)
        for image in images
    ]
    # (b, h, w, 3) -> (b, 3, h, w)
    batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    backbone, heads = backbone_and_heads(model(batch, feature_fmt="NCHW"))
    columns = [views]
    for spatial in (backbone.spatial, *(output.spatial for output in heads.values())):
        # (b, c, h, w) -> (b, h, w, c)
        maps = spatial.permute(0, 2, 3, 1).float().numpy()
        # One fit for all images of a column, so that a colour means the same in each.
        colours = PcaColours.fit(maps)
        columns.append([colours.colours(image_map) for image_map in maps])
    rows = [_strip([column[number] for column in columns]) for number in range(len(images))]
    gap = np.full((_GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    # Rows with a gap between them, and none after the last. (rows * (cell + gap) - gap, width, 3)
    return np.concatenate([part for row in rows for part in (row, gap)][:-1])


def _strip(cells: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    gap = np.full((_CELL_PX, _GAP_PX, 3), 255, np.uint8)
    sized = [np.asarray(Image.fromarray(cell).resize((_CELL_PX, _CELL_PX), Image.Resampling.NEAREST)) for cell in cells]
    return np.concatenate([part for cell in sized for part in (cell, gap)][:-1], axis=1)
