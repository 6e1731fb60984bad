"""Images of a cache beside its teachers' cached maps, as a picture. No teacher runs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.cached_teacher import CachedTeacher
from radio_cache.errors import ImageError, MissingRowsError
from radio_cache.geometry.crops import BoxXYXY, box_to_grid, crop_weights
from radio_cache.images.decode import as_array
from radio_cache.reader import Cache
from radio_cache.view.pca import PcaColours
from radio_cache.view.picture_grid import Pane

PANE_PX = 224
_MOST_TOKENS = 256
_UNSEEN = np.uint8(255)


def cache_pictures(
    cache: Cache, names: Sequence[str], *, count: int, seed: int = 0, pane_px: int = PANE_PX
) -> list[list[Pane]]:
    """Return a row of panes for each of `count` images, drawn by seed among those that every teacher named has finished.

    The first pane is the image, each other one a teacher's map of it (a level is a teacher of its own here), stretched over the
    whole image: what the teacher did not see (a centre crop's margins) is white. Equal colours in a column are equal features;
    levels of one teacher share their colours. pane_px: the longer side of a pane.
    Raises MissingRowsError if there is no such image.
    """
    usable = cache.usable_rows(names)
    if not len(usable):
        raise MissingRowsError(f"{cache.url} has no image yet that {', '.join(names)} finished: run the build again")
    rows = np.sort(np.random.default_rng(seed).choice(usable, size=min(count, len(usable)), replace=False))
    columns = [_image_panes(cache, rows, pane_px)]
    for levels in _families(cache, names):
        columns += _map_panes(cache, levels, rows, pane_px)
    return [[(title, _as_wide(picture, pane_px)) for title, picture in panes] for panes in zip(*columns, strict=True)]


def _as_wide(picture: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """White to its right, so that panes below each other are columns, upright images or not."""
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=_UNSEEN)


def _families(cache: Cache, names: Sequence[str]) -> list[list[CachedTeacher]]:
    """Return the teachers named, those that are levels of one together."""
    families: dict[str, list[CachedTeacher]] = {}
    for name in names:
        teacher = cache.teachers[name]
        families.setdefault(teacher.spec.level_of or name, []).append(teacher)
    return list(families.values())


def _image_panes(cache: Cache, rows: NDArray[np.int64], pane_px: int) -> list[Pane]:
    return [(cache.index.key(int(row)), _image(cache, int(row), pane_px)) for row in rows]


def _image(cache: Cache, row: int, pane_px: int) -> NDArray[np.uint8]:
    """Return the image; a white pane where its file is gone, for its maps can be looked at all the same."""
    hw = _pane_hw(_image_hw(cache, row), pane_px)
    try:
        file, _ = cache.read_original_or_kept(row)
        image = cache.decode(file, least_px=pane_px)
    except ImageError:
        return np.full((*hw, 3), _UNSEEN)
    return as_array(image.resize((hw[1], hw[0]), Image.Resampling.LANCZOS))


def _map_panes(
    cache: Cache, teachers: Sequence[CachedTeacher], rows: NDArray[np.int64], pane_px: int
) -> list[list[Pane]]:
    """Return a column of panes for each of some teachers, in the same colours."""
    maps = [[_over_image(cache, teacher, int(row)) for row in rows] for teacher in teachers]
    basis = PcaColours.fit(np.concatenate([tokens[valid_tokens] for column in maps for tokens, valid_tokens in column]))
    columns: list[list[Pane]] = []
    for teacher, column in zip(teachers, maps, strict=True):
        panes: list[Pane] = []
        for row, (tokens, valid_tokens) in zip(rows, column, strict=True):
            h, w = _pane_hw(_image_hw(cache, int(row)), pane_px)
            picture = Image.fromarray(np.where(valid_tokens[:, :, None], basis.colours(tokens), _UNSEEN))
            panes.append((teacher.name, as_array(picture.resize((w, h), Image.Resampling.NEAREST))))
        columns.append(panes)
    return columns


def _over_image(cache: Cache, teacher: CachedTeacher, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a teacher's tokens (h, w, c) over a whole image, about as many as it has there, and which of them it saw (h, w)."""
    hw, geometry = _image_hw(cache, row), teacher.spec.geometry
    whole: BoxXYXY = (0.0, 0.0, float(hw[1]), float(hw[0]))
    x0, y0, x1, y1 = box_to_grid(whole, hw, geometry)
    out_hw = tuple(min(_MOST_TOKENS, max(1, round(side))) for side in (y1 - y0, x1 - x0))
    weights = crop_weights([whole], [hw], geometry, out_hw=(out_hw[0], out_hw[1]))
    return weights.sample(teacher.maps([row]))[0], weights.valid[0]


def _image_hw(cache: Cache, row: int) -> tuple[int, int]:
    height, width = cache.sizes_hw[row]
    return int(height), int(width)


def _pane_hw(image_hw: tuple[int, int], pane_px: int) -> tuple[int, int]:
    scale = pane_px / max(image_hw)
    return max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale))
