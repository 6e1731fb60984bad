"""The maps of all windows of a set of images, from a store: computed once, read as often as a probe likes.

They lie in caches of our own format, a row per window, one shard after the other: a run that was stopped goes on where
it was. A teacher of a cache brings its maps along.
"""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from evals.encoders import OWN, LiveEncoder
from evals.encoders.base import size_phrase
from evals.errors import EvalError
from evals.segmentation.masks import MaskedImages
from evals.segmentation.windows import Window, sliding_windows, teacher_window, window_pixels
from evals.shared.progress import Progress
from radio_cache.codecs import Half
from radio_cache.errors import ConfigError
from radio_cache.format.schema import IMAGENET_PIXELS, IMAGES_UNIT, CacheMeta, Container, ImageStatus, TeacherSpec
from radio_cache.geometry.crops import ViewGeometry, crop_weights
from radio_cache.prefetch.ordered import ahead
from radio_cache.reader import Cache, CachedTeacher, digest, is_cache
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache

_SHARD_WINDOWS = 32
_BATCH_WINDOWS = 8


class WindowMaps(ABC):
    """Maps of windows. windows: all of them, in order of their images. window_hw: frame pixels that a map shows.

    grid_hw: tokens, which tile the window evenly. width: channels.
    """

    name: str
    kind: str
    about: str
    windows: tuple[Window, ...]
    window_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    width: int

    @abstractmethod
    def read(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """(n, h, w, c) maps of these windows."""


@final
class StoredMaps(WindowMaps):
    """Maps of a live encoder's windows, in a cache below `folder` that is made if it is not there or not finished.

    Raises EvalError for an encoder without maps, CodecError for maps that half precision cannot hold.
    """

    def __init__(
        self,
        encoder: LiveEncoder,
        images: MaskedImages,
        sizes_hw: Sequence[tuple[int, int]],
        folder: Path,
        *,
        progress: Progress | None,
    ) -> None:
        h, w = encoder.geometry.input_hw
        if h != w:
            raise EvalError(f"{encoder.name} takes {size_phrase((h, w))}: windows are square, name a side by --crop")
        self.name, self.kind, self.about = encoder.name, encoder.kind, encoder.about
        self.windows = tuple(one for p, hw in enumerate(sizes_hw) for one in sliding_windows(p, hw, h))
        self.window_hw, self.grid_hw = (h, w), encoder.geometry.grid_hw
        self._encoder, self._images = encoder, images
        probe, self.width = self._fingerprint()
        digests = b"".join(images.image_digests)
        content = hashlib.sha256(probe + digests + repr((h, self.windows)).encode()).hexdigest()
        slug = re.sub(r"[^a-z0-9.-]+", "-", encoder.name.lower()).strip("-.") or "encoder"
        self._teacher = f"{slug:.40}"
        place = folder / f"{slug:.40}-{content[:16]}.zarr"
        if not is_cache(place):
            self._create(place, content)
        self._cache = Cache(place)
        self._compute(progress)
        self._maps = Cache(place).teachers[self._teacher]

    def read(self, rows: Sequence[int]) -> NDArray[np.float32]:
        return self._maps.maps(rows)

    def _fingerprint(self) -> tuple[bytes, int]:
        """What the encoder makes of one fixed picture: another network, other weights or another size differ in it."""
        h, w = self.window_hw
        noise = np.random.default_rng(0).integers(0, 256, (1, h, w, 3), dtype=np.uint8)
        made = self._run(noise)
        return digest(np.ascontiguousarray(made).tobytes()), int(made.shape[-1])

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            maps = self._encoder.outputs(torch.from_numpy(pixels)).maps
        return _tiled(maps[OWN].float().cpu().numpy(), self._encoder.geometry)

    def _create(self, place: Path, content: str) -> None:
        count = len(self.windows)
        folder = Path(os.path.commonpath([path.resolve().parent for path in self._images.images]))
        meta = CacheMeta(
            num_images=count,
            shard_images=_SHARD_WINDOWS,
            creator="radio-eval segment",
            class_names=(),
            max_pixels=max(1, int(np.prod(self.window_hw))),
            containers=(Container(kind="folder", path=str(folder), prefix=""),),
        )
        none = np.full(count, -1, np.int64)
        keys = [f"{self._images.keys[w.position]}#{w.top},{w.left}" for w in self.windows]
        create_cache(place, meta, ImageIndex(keys, none.astype(np.int32), np.zeros(count, np.int32), none, none))
        h, w = self.window_hw
        geometry = ViewGeometry(
            fit="squash",
            input_hw=(h, w),
            resize_px=h,
            interpolation="bicubic",
            grid_hw=self.grid_hw,
            stride_px=h / self.grid_hw[0],
            offset_px=h / self.grid_hw[0] / 2,
        )
        spec = TeacherSpec(
            name=self._teacher,
            family="evaluated",
            model=self.about,
            licence="that of the model",
            weights=self.name,
            weights_sha256=content,
            geometry=geometry,
            normalisation=IMAGENET_PIXELS,
            summary_dim=None,
            spatial_dim=self.width,
            summary_note="not kept",
            spatial_note="windows of images, for radio-eval segment",
            compute_dtype="float32",
            codec=Half().to_json(),
            views=1,
            software={},
        )
        add_teacher(place, meta, spec)

    def _compute(self, progress: Progress | None) -> None:
        meta = self._cache.meta
        made = {unit: self._cache.receipts(unit) for unit in (IMAGES_UNIT, self._teacher)}
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="pixels") as pool:
            missing = [shard for shard in range(meta.num_shards) if any(made[unit][shard] is None for unit in made)]
            done = meta.num_images - sum(len(meta.shard_rows(shard)) for shard in missing)
            shards = ahead(pool, self._shard_pixels, missing, depth=3)
            for shard, pixels in zip(missing, shards, strict=True):
                self._write(shard, pixels)
                done += len(pixels)
                if progress is not None:
                    progress(f"{self.name}: maps", done, meta.num_images, unit="windows")

    def _shard_pixels(self, shard: int) -> NDArray[np.uint8]:
        rows = self._cache.meta.shard_rows(shard)
        parts: list[NDArray[np.uint8]] = []
        for position, group in groupby((self.windows[row] for row in rows), key=lambda window: window.position):
            parts.append(window_pixels(self._images.image(position), list(group), self.window_hw[0]))
        return np.concatenate(parts)

    def _write(self, shard: int, pixels: NDArray[np.uint8]) -> None:
        meta, codec = self._cache.meta, Half()
        rows, size = meta.shard_rows(shard), meta.shard_images
        maps = np.concatenate(
            [self._run(pixels[n : n + _BATCH_WINDOWS]) for n in range(0, len(pixels), _BATCH_WINDOWS)]
        )
        status, sizes, digests = np.zeros(size, np.uint8), np.zeros((size, 2), np.int32), np.zeros((size, 16), np.uint8)
        status[: len(rows)], sizes[: len(rows)] = ImageStatus.OK, self.window_hw
        receipt = {"first_row": rows[0], "num_rows": len(rows), "failures": ()}
        writer = ShardWriter(self._cache.storage, IMAGES_UNIT, shard)
        writer.write_plain("status", status, grid=(shard,))
        writer.write_plain("size_hw", sizes, grid=(shard, 0))
        writer.write_plain("digest", digests, grid=(shard, 0))
        writer.commit({**receipt, "num_tokens": 0})
        writer = ShardWriter(self._cache.storage, self._teacher, shard)
        writer.write_sharded("spatial", list(codec.encode(maps)), grid=(0, shard, 0, 0, 0), chunks_per_shard=size)
        tokens = maps.reshape(-1, self.width).astype(np.float64)
        writer.write_plain("stats/spatial", np.stack([tokens.sum(0), (tokens**2).sum(0)])[None], grid=(shard, 0, 0))
        writer.commit({**receipt, "num_tokens": len(tokens)})


@final
class CachedTeacherMaps(WindowMaps):
    """A teacher's maps of whole images as a cache holds them; images are found by the hash of their files.

    Raises EvalError if the cache lacks some of the images.
    """

    def __init__(
        self, cache: Cache, teacher: CachedTeacher, images: MaskedImages, sizes_hw: Sequence[tuple[int, int]]
    ) -> None:
        geometry = teacher.spec.geometry
        usable = cache.usable_rows((teacher.name,))
        row_of = {found.tobytes(): int(row) for row, found in zip(usable, cache.digests[usable], strict=True)}
        rows = [row_of.get(found) for found in images.image_digests]
        if (gone := rows.count(None)) > 0:
            first = images.images[rows.index(None)]
            raise EvalError(
                f"{cache.url} lacks {gone} of the {len(rows)} images of {images.place} for teacher '{teacher.name}', such as "
                f"{first}: build a cache of these very files, or leave --cache out and give --model teacher:{teacher.name}"
            )
        self.name, self.kind = teacher.name, "teacher"
        self.about = f"teacher, from the cache, {size_phrase(geometry.input_hw)}, whole image by {geometry.fit}"
        self.windows = tuple(teacher_window(p, hw, geometry) for p, hw in enumerate(sizes_hw))
        self.window_hw, self.grid_hw, self.width = geometry.input_hw, geometry.grid_hw, teacher.spec.spatial_dim
        self._teacher, self._rows, self._geometry = teacher, rows, geometry

    def read(self, rows: Sequence[int]) -> NDArray[np.float32]:
        return _tiled(self._teacher.maps([self._rows[row] or 0 for row in rows]), self._geometry)


def fitted(encoder: LiveEncoder, crop_px: int) -> LiveEncoder:
    """The encoder for windows of crop_px, or of the nearest size that its patches allow, or of its own size.

    Raises EvalError for an encoder without maps.
    """
    if not encoder.map_spaces:
        raise EvalError(f"{encoder.name} has no maps, only a summary: there is nothing to segment with")
    patch = encoder.geometry.stride_px
    sizes = (crop_px, max(1, round(crop_px / patch)) * round(patch), max(1, round(crop_px / 32)) * 32)
    for size in sizes:
        if encoder.geometry.input_hw == (size, size):
            return encoder
        try:
            return encoder.at_size(size)
        except ConfigError:
            continue
    return encoder


def _tiled(maps: NDArray[np.float32], geometry: ViewGeometry) -> NDArray[np.float32]:
    """Maps whose tokens tile the input evenly. Where convolutions pad unevenly they do not, and are sampled."""
    h, w = geometry.input_hw
    grid_h, grid_w = geometry.grid_hw
    even = geometry.stride_px * grid_h == h and geometry.stride_px * grid_w == w
    if even and geometry.offset_px == geometry.stride_px / 2:
        return maps
    whole = replace(geometry, fit="squash")
    weights = crop_weights([(0.0, 0.0, float(w), float(h))], [(h, w)], whole, out_hw=geometry.grid_hw)
    return np.einsum("yh,nhwc,xw->nyxc", weights.rows[0], maps, weights.columns[0], optimize=True).astype(np.float32)
