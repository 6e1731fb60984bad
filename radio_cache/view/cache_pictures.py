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
_MAX_TOKENS = 256
"""Largest side of a map over a whole image, which exceeds the teacher's grid where the teacher saw only a part."""

_OUTSIDE_VIEW = np.uint8(255)
"""White, for what the teacher did not see."""


def cache_pictures(
    cache: Cache, names: Sequence[str], *, count: int, seed: int = 0, pane_px: int = PANE_PX
) -> list[list[Pane]]:
    """Return a row of panes for each image of a sample.

    The first pane is the image, the others are its maps, one per group named, stretched over the whole image. Parts that
    the teacher did not see, such as the margins of a centre crop, are white. Equal colours in a column are equal features;
    levels of one teacher share their colours.

    Args:
        cache: to sample from.
        names: of teachers' groups, in the order of the columns.
        count: number of images, or all if there are fewer.
        seed: of the sample, among images that every group has finished.
        pane_px: longer side of a pane.

    Raises:
        MissingRowsError: if no image is finished for all of `names`.
    """
    usable = cache.usable_rows(names)
    if not len(usable):
        raise MissingRowsError(f"{cache.url} has no image yet that {', '.join(names)} finished: run the build again")
    rows = np.sort(np.random.default_rng(seed).choice(usable, size=min(count, len(usable)), replace=False))
    columns = [_image_panes(cache, rows, pane_px)]
    # One basis per family, since levels of one teacher have the same channels.
    for levels in _families(cache, names):
        columns += _map_panes(cache, levels, rows, pane_px)
    return [
        [(title, _padded_to_width(picture, pane_px)) for title, picture in panes]
        for panes in zip(*columns, strict=True)
    ]


def _padded_to_width(picture: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Return the picture (h, w, 3) padded with white on the right, so that panes of upright images stay in columns."""
    # (h, w, 3) -> (h, width, 3)
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=_OUTSIDE_VIEW)


def _families(cache: Cache, names: Sequence[str]) -> list[list[CachedTeacher]]:
    """Return the teachers named, grouped so that levels of one teacher are together."""
    families: dict[str, list[CachedTeacher]] = {}
    for name in names:
        teacher = cache.teachers[name]
        families.setdefault(teacher.spec.level_of or name, []).append(teacher)
    return list(families.values())


def _image_panes(cache: Cache, rows: NDArray[np.int64], pane_px: int) -> list[Pane]:
    return [(cache.index.key(int(row)), _image(cache, int(row), pane_px)) for row in rows]


def _image(cache: Cache, row: int, pane_px: int) -> NDArray[np.uint8]:
    """Return the image (h, w, 3), or a white pane if its file is missing, since its maps can still be shown."""
    hw = _pane_hw(_image_hw(cache, row), pane_px)
    try:
        file, _ = cache.read_original_or_kept(row)
        # JPEG decodes at a fraction of its size, as long as that is not below the pane's.
        image = cache.decode(file, least_px=pane_px)
    except ImageError:
        return np.full((*hw, 3), _OUTSIDE_VIEW)
    return as_array(image.resize((hw[1], hw[0]), Image.Resampling.LANCZOS))


def _map_panes(
    cache: Cache, teachers: Sequence[CachedTeacher], rows: NDArray[np.int64], pane_px: int
) -> list[list[Pane]]:
    """Return a column of panes for each teacher, all in the same colours."""
    maps = [[_over_image(cache, teacher, int(row)) for row in rows] for teacher in teachers]
    # (tokens of all images and levels, c); padding and unseen parts are left out
    basis = PcaColours.fit(np.concatenate([tokens[valid_tokens] for column in maps for tokens, valid_tokens in column]))
    columns: list[list[Pane]] = []
    for teacher, column in zip(teachers, maps, strict=True):
        panes: list[Pane] = []
        for row, (tokens, valid_tokens) in zip(rows, column, strict=True):
            h, w = _pane_hw(_image_hw(cache, int(row)), pane_px)
            # (h, w, c) -> (h, w, 3)
            picture = Image.fromarray(np.where(valid_tokens[:, :, None], basis.colours(tokens), _OUTSIDE_VIEW))
            # Nearest: a token stays one square of one colour, as it is stored.
            panes.append((teacher.name, as_array(picture.resize((w, h), Image.Resampling.NEAREST))))
        columns.append(panes)
    return columns


def _over_image(cache: Cache, teacher: CachedTeacher, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a teacher's map (h, w, c) sampled over a whole image, at about its own resolution, and the valid mask (h, w)."""
    hw, geometry = _image_hw(cache, row), teacher.spec.geometry
    whole: BoxXYXY = (0.0, 0.0, float(hw[1]), float(hw[0]))
    x0, y0, x1, y1 = box_to_grid(whole, hw, geometry)
    out_hw = tuple(min(_MAX_TOKENS, max(1, round(side))) for side in (y1 - y0, x1 - x0))
    weights = crop_weights([whole], [hw], geometry, out_hw=(out_hw[0], out_hw[1]))
    # (1, grid_h, grid_w, c) -> (h, w, c)
    return weights.sample(teacher.maps([row]))[0], weights.valid[0]


def _image_hw(cache: Cache, row: int) -> tuple[int, int]:
    height, width = cache.sizes_hw[row]
    return int(height), int(width)


def _pane_hw(image_hw: tuple[int, int], pane_px: int) -> tuple[int, int]:
    scale = pane_px / max(image_hw)
    return max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale))
