"""The maps of all windows of a set of images: computed once, stored, and read for every step of a probe.

They are stored in caches of our own format, one row per window, shard by shard: an interrupted run continues where it
stopped. For a teacher of a cache, the cached maps are used.
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
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import IMAGENET_PIXELS, IMAGES_UNIT, CacheMeta, Container, ImageStatus, TeacherSpec
from radio_cache.geometry.crops import ViewGeometry, crop_weights
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache, CachedTeacher, digest, is_cache
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache

# An interruption loses at most one shard: 32 windows of 37 x 37 x 1024 are 90 MB in half precision.
_SHARD_WINDOWS = 32
_BATCH_WINDOWS = 8


class WindowMaps(ABC):
    """Maps of windows.

    Attributes:
        name, kind, description: of the encoder.
        windows: all of them, in order of their images.
        window_hw: frame pixels that a map covers.
        grid_hw: tokens, which tile the window evenly.
        width: channels.
    """

    name: str
    kind: str
    description: str
    windows: tuple[Window, ...]
    window_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    width: int

    @abstractmethod
    def read(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return (n, h, w, c) maps of these windows."""


@final
class StoredMaps(WindowMaps):
    """Maps of a live encoder's windows, in a cache below `folder` that is created, or finished, if necessary.

    Args:
        encoder: with maps and a square input.
        images: with their masks.
        sizes_hw: of the images, upright.
        folder: of all stored maps.
        progress: receives the number of windows.

    Raises:
        EvalError: if the input of the encoder is not square.
        CodecError: for maps that half precision cannot hold.
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
            raise EvalError(f"{encoder.name} takes {size_phrase((h, w))}: windows are square, set their side by --crop")
        self.name, self.kind, self.description = encoder.name, encoder.kind, encoder.description
        # One row of the cache per window; the order is fixed by the images.
        self.windows = tuple(window for p, hw in enumerate(sizes_hw) for window in sliding_windows(p, hw, h))
        self.window_hw, self.grid_hw = (h, w), encoder.geometry.grid_hw
        self._encoder, self._images = encoder, images
        # The file name holds a hash of everything the maps depend on, so a stale cache is never read.
        fingerprint, self.width = self._fingerprint()
        digests = b"".join(images.image_digests)
        content = hashlib.sha256(fingerprint + digests + repr((h, self.windows)).encode()).hexdigest()
        # Names of encoders may hold slashes and spaces; a teacher's name in a cache may not.
        slug = re.sub(r"[^a-z0-9.-]+", "-", encoder.name.lower()).strip("-.") or "encoder"
        self._teacher = f"{slug:.40}"
        cache_path = folder / f"{slug:.40}-{content[:16]}.zarr"
        if not is_cache(cache_path):
            self._create(cache_path, content)
        self._cache = Cache(cache_path)
        # Also for a finished cache, where no shard is missing.
        self._compute(progress)
        # Opened again, so that it sees the shards that were written just now.
        self._maps = Cache(cache_path).teachers[self._teacher]

    def read(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the stored maps, decoded from half precision."""
        return self._maps.maps(rows)

    def _fingerprint(self) -> tuple[bytes, int]:
        """Return a hash of the map of one fixed picture, and the width: they differ for other weights or another size."""
        h, w = self.window_hw
        # Noise has all frequencies and colours, so that any change of the network shows.
        noise = np.random.default_rng(0).integers(0, 256, (1, h, w, 3), dtype=np.uint8)
        maps = self._run(noise)
        return digest(np.ascontiguousarray(maps).tobytes()), int(maps.shape[-1])

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (n, h, w, c) maps of (n, H, W, 3) pixels."""
        with torch.inference_mode():
            maps = self._encoder.outputs(torch.from_numpy(pixels)).maps
        return _tiled(maps[OWN].float().cpu().numpy(), self._encoder.geometry)

    def _create(self, cache_path: Path, content: str) -> None:
        """Create the cache: an image index with one entry per window, and the encoder as its only teacher."""
        count = len(self.windows)
        # The cache names the images for people; maps are found by window, never by path.
        folder = Path(os.path.commonpath([path.resolve().parent for path in self._images.images]))
        meta = CacheMeta(
            num_images=count,
            shard_images=_SHARD_WINDOWS,
            creator="radio-eval segment",
            class_names=(),
            max_pixels=max(1, int(np.prod(self.window_hw))),
            containers=(Container(kind="folder", path=str(folder), prefix=""),),
        )
        no_value = np.full(count, -1, np.int64)
        # Image, then the upper left corner of the window in the resized frame.
        keys = [f"{self._images.keys[w.position]}#{w.top},{w.left}" for w in self.windows]
        create_cache(
            cache_path, meta, ImageIndex(keys, no_value.astype(np.int32), np.zeros(count, np.int32), no_value, no_value)
        )
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
            model=self.description,
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
            # Half precision needs no calibration, and its error is far below that of a probe.
            codec=CodecRecord(parameters=Half().to_json()),
            views=1,
            software={},
        )
        add_teacher(cache_path, meta, spec)

    def _compute(self, progress: Progress | None) -> None:
        """Compute the shards that have no receipt yet: reading and cutting in threads, ahead of the model."""
        meta = self._cache.meta
        receipts = {unit: self._cache.receipts(unit) for unit in (IMAGES_UNIT, self._teacher)}
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="pixels") as pool:
            missing = [
                shard for shard in range(meta.num_shards) if any(receipts[unit][shard] is None for unit in receipts)
            ]
            num_done = meta.num_images - sum(len(meta.shard_rows(shard)) for shard in missing)
            # Three shards of pixels ahead keep the model busy and memory small.
            shards = prefetch_map(pool, self._shard_pixels, missing, depth=3)
            for shard, pixels in zip(missing, shards, strict=True):
                self._write(shard, pixels)
                num_done += len(pixels)
                if progress is not None:
                    progress(f"{self.name}: maps", num_done, meta.num_images, unit="windows")

    def _shard_pixels(self, shard: int) -> NDArray[np.uint8]:
        """Return (n, side, side, 3) pixels of the windows of a shard."""
        rows = self._cache.meta.shard_rows(shard)
        parts: list[NDArray[np.uint8]] = []
        # Windows are in order of their images, so every image is decoded once per shard.
        for position, group in groupby((self.windows[row] for row in rows), key=lambda window: window.position):
            parts.append(window_pixels(self._images.image(position), list(group), self.window_hw[0]))
        return np.concatenate(parts)

    def _write(self, shard: int, pixels: NDArray[np.uint8]) -> None:
        """Run the encoder on the windows of a shard and commit them: first as images, then as a teacher's maps."""
        meta, codec = self._cache.meta, Half()
        rows, size = meta.shard_rows(shard), meta.shard_images
        maps = np.concatenate(
            [self._run(pixels[n : n + _BATCH_WINDOWS]) for n in range(0, len(pixels), _BATCH_WINDOWS)]
        )
        # Arrays of a shard have their full size, also in the last one, which is filled up with zeros.
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
        # (n, h, w, c) -> (tokens, c): the statistics that every teacher of a cache has.
        tokens = maps.reshape(-1, self.width).astype(np.float64)
        writer.write_plain("stats/spatial", np.stack([tokens.sum(0), (tokens**2).sum(0)])[None], grid=(shard, 0, 0))
        writer.commit({**receipt, "num_tokens": len(tokens)})


@final
class CachedTeacherMaps(WindowMaps):
    """A teacher's cached maps of whole images; images are identified by the hash of their files.

    Args:
        cache: of these images.
        teacher: of the cache.
        images: with their masks.
        sizes_hw: of the images, upright.

    Raises:
        EvalError: if the cache lacks some of the images.
    """

    def __init__(
        self, cache: Cache, teacher: CachedTeacher, images: MaskedImages, sizes_hw: Sequence[tuple[int, int]]
    ) -> None:
        geometry = teacher.spec.geometry
        # Copies of a file in the cache map to one of its rows: their features are equal.
        usable = cache.usable_rows((teacher.name,))
        row_of = {file.tobytes(): int(row) for row, file in zip(usable, cache.digests[usable], strict=True)}
        rows = [row_of.get(file) for file in images.image_digests]
        if (num_missing := rows.count(None)) > 0:
            first = images.images[rows.index(None)]
            raise EvalError(
                f"{cache.url} lacks {num_missing} of the {len(rows)} images of {images.location} for teacher '{teacher.name}', "
                f"such as {first}: build a cache of these very files, or leave --cache out and give --model "
                f"teacher:{teacher.name}"
            )
        self.name, self.kind = teacher.name, "teacher"
        self.description = f"teacher, from the cache, {size_phrase(geometry.input_hw)}, whole image by {geometry.fit}"
        # One window per image: a cache holds the whole-image view alone.
        self.windows = tuple(teacher_window(p, hw, geometry) for p, hw in enumerate(sizes_hw))
        self.window_hw, self.grid_hw, self.width = geometry.input_hw, geometry.grid_hw, teacher.spec.spatial_dim
        self._teacher, self._rows, self._geometry = teacher, rows, geometry

    def read(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the cached maps of the images of these windows."""
        # No row is None here: the constructor refuses missing images.
        return _tiled(self._teacher.maps([self._rows[row] or 0 for row in rows]), self._geometry)


def fitted(encoder: LiveEncoder, crop_px: int) -> LiveEncoder:
    """Return the encoder at input size crop_px, or at the nearest size that its patches allow, or at its own size.

    Args:
        encoder: with maps.
        crop_px: side of the windows, pixels.

    Raises:
        EvalError: for an encoder without maps.
    """
    if not encoder.map_spaces:
        raise EvalError(f"{encoder.name} has no maps, only a summary: there is nothing to segment with")
    patch = encoder.geometry.stride_px
    # A multiple of the patch suits transformers, a multiple of 32 networks that halve their input five times.
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
    """Resample maps so that their tokens tile the input evenly; those of convolutions that pad unevenly do not."""
    h, w = geometry.input_hw
    grid_h, grid_w = geometry.grid_hw
    # Tokens tile the input if they fill it, and the first centre is half a stride from the edge.
    even = geometry.stride_px * grid_h == h and geometry.stride_px * grid_w == w
    if even and geometry.offset_px == geometry.stride_px / 2:
        return maps
    # The map is sampled as if its whole input were one crop.
    full_input = replace(geometry, fit="squash")
    weights = crop_weights([(0.0, 0.0, float(w), float(h))], [(h, w)], full_input, out_hw=geometry.grid_hw)
    # (n, H, W, c) -> (n, h, w, c), separable in rows and columns.
    return np.einsum("yh,nhwc,xw->nyxc", weights.rows[0], maps, weights.columns[0], optimize=True).astype(np.float32)
