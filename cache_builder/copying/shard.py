"""The unit of work of a copy: one shard of the images or of a teacher.

A shard that keeps its rows and its codec is copied file by file, compared with its receipt on the way, and gets the same
receipt. Otherwise it is put together from rows: codes as they are stored, or encoded again for the other packing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.copying.transcode import tokens_on_images, transcode
from radio_cache.checks.verify import file_difference
from radio_cache.codecs import Half
from radio_cache.errors import CorruptShardError
from radio_cache.format.documents import PIXELS
from radio_cache.format.schema import IMAGES_UNIT, Failure, Receipt, StoredFile, unit_group
from radio_cache.images.stored import chunk_of
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.statistics.fidelity import PERFECT, Fidelity, combine_fidelity, fidelity_from_cosines
from radio_cache.statistics.moments import power_sums
from radio_cache.writer import ShardWriter


@dataclass(frozen=True, eq=False)
class Copying:
    """One unit on its way from one cache to another. rows (n,): for every row of the target, that of the source.

    transcoded: whether the teacher's codec in the target is another one than in the source.
    """

    source: Cache
    target: Cache
    unit: str
    rows: NDArray[np.int64]
    transcoded: bool = False

    @cached_property
    def receipts(self) -> list[Receipt | None]:
        """The source's."""
        return self.source.receipts(self.unit)

    @cached_property
    def failures(self) -> dict[int, Failure]:
        """Row of the source -> why its image cannot be used."""
        return {failure.row: failure for receipt in self.receipts if receipt for failure in receipt.failures}

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Return rows of the source that make a shard of the target."""
        target_rows = self.target.meta.shard_rows(shard)
        return self.rows[target_rows.start : target_rows.stop]

    def keeps_rows(self, shard: int) -> bool:
        """Return whether a shard has the rows of the same shard of the source, all of them."""
        return np.array_equal(self.rows_of(shard), np.array(self.source.meta.shard_rows(shard)))

    def is_kept(self, shard: int) -> bool:
        """Return whether a shard has the very files of the source's, and its receipt."""
        return self.keeps_rows(shard) and not self.transcoded


def copy_shard(copying: Copying, shard: int) -> Receipt:
    """Write one shard of the target, whole, its receipt last. Repeated or concurrent calls write the same bytes.

    Raises:
        CorruptShardError: naming the file of the source that differs from its receipt, and the cure.
    """
    writer = ShardWriter(copying.target.storage, copying.unit, shard)
    if copying.is_kept(shard):
        receipt = _copy_files(copying, shard, writer, lambda file: True)
        return writer.commit(_fields(copying, shard, receipt.num_tokens, receipt.fidelity))
    if copying.unit == IMAGES_UNIT:
        return _images_shard(copying, shard, writer)
    return _teacher_shard(copying, shard, writer)


def _copy_files(
    copying: Copying, shard: int, writer: ShardWriter, is_selected: Callable[[StoredFile], bool]
) -> Receipt:
    """Copy the files of the same shard of the source, bytes unchanged; return the source's receipt."""
    source, receipt = copying.source, copying.receipts[shard]
    assert receipt is not None, "rows were asked for before"
    for file in filter(is_selected, receipt.files):
        path = f"{unit_group(copying.unit)}/{file.path}"
        try:
            data = source.storage.read(path)
            difference = file_difference(file, data, source.meta.shard_images)
        except FileNotFoundError:
            data, difference = b"", "gone, although there is a receipt for it"
        if difference:
            raise CorruptShardError(
                f"{source.storage.at(path)}: {difference}: radio-cache repair {source.url}, run the build again, then this copy"
            )
        writer.write_stored(file.path, data)
    return receipt


def _images_shard(copying: Copying, shard: int, writer: ShardWriter) -> Receipt:
    source, rows, shard_images = copying.source, copying.rows_of(shard), copying.target.meta.shard_images
    for name, column in (("status", source.statuses), ("size_hw", source.sizes_hw), ("digest", source.digests)):
        chunk = np.zeros((shard_images, *column.shape[1:]), column.dtype)
        chunk[: len(rows)] = column[rows]
        writer.write_plain(name, chunk, grid=(shard, *(0 for _ in column.shape[1:])))
    if source.pixels is not None:
        unusable = copying.failures
        pixel_chunks = [None if row in unusable else chunk_of(source.pixels.file(row)) for row in rows.tolist()]
        writer.write_sharded(PIXELS, pixel_chunks, grid=(shard,), chunks_per_shard=shard_images)
    return writer.commit(_fields(copying, shard, 0, None))


def _teacher_shard(copying: Copying, shard: int, writer: ShardWriter) -> Receipt:
    assembled = _Made(copying, shard)
    new = copying.target.teachers[copying.unit]
    writer.write_sharded(
        "spatial",
        assembled.chunks,
        grid=(0, shard, *(0 for _ in new.row_shape)),
        chunks_per_shard=copying.target.meta.shard_images,
        zstd_level=new.codec.zstd_level,
    )
    if copying.keeps_rows(shard):
        # Sums of what the teacher said are better than sums of what was decoded.
        receipt = _copy_files(copying, shard, writer, lambda file: not file.path.startswith("spatial/"))
        return writer.commit(_fields(copying, shard, receipt.num_tokens, assembled.fidelity()))
    writer.write_plain("stats/spatial", assembled.sums[None], grid=(shard, 0, 0))
    if new.spec.summary_dim is not None:
        rows = copying.rows_of(shard)
        usable = [number for number, row in enumerate(rows.tolist()) if row not in copying.failures]
        summary = np.full((1, copying.target.meta.shard_images, new.spec.summary_dim), np.nan, np.float16)
        stored = copying.source.teachers[copying.unit].summaries(rows[usable])
        summary[0, usable] = Half().encode(stored)  # which they are already
        writer.write_plain("summary", summary, grid=(0, shard, 0))
        writer.write_plain("stats/summary", power_sums(stored)[None], grid=(shard, 0, 0))
    return writer.commit(_fields(copying, shard, assembled.num_tokens, assembled.fidelity()))


class _Made:
    """A teacher's shard assembled from rows.

    Attributes:
        chunks: codes by row of the shard; None for unusable images.
        sums: (2, c) sums and sums of squares over the decoded valid tokens.
        num_tokens: number of these tokens.
    """

    def __init__(self, copying: Copying, shard: int) -> None:
        self._copying, self._shard = copying, shard
        teacher: CachedTeacher = copying.source.teachers[copying.unit]
        rows = copying.rows_of(shard).tolist()
        position_of_row = {row: number for number, row in enumerate(rows)}
        self.chunks: list[NDArray[Any] | None] = [None] * len(rows)
        self.sums = np.zeros((2, teacher.spec.spatial_dim))
        self._tokens_of: dict[int, int] = {}
        self._cosines = [np.zeros(0)]
        self._squared_errors = 0.0
        for batch_rows in teacher.batches([row for row in rows if row not in copying.failures]):
            codes = teacher.codes(batch_rows)
            on_image = tokens_on_images(copying.source, teacher, list(batch_rows))
            self.sums += power_sums(teacher.codec.decode(codes)[on_image])
            self._tokens_of |= dict(zip(batch_rows, on_image.sum(axis=(1, 2)).tolist(), strict=True))
            if copying.transcoded:
                codes = self._transcode(teacher, codes, on_image)
            for row, chunk in zip(batch_rows, codes, strict=True):
                self.chunks[position_of_row[row]] = chunk

    def _transcode(self, teacher: CachedTeacher, codes: NDArray[Any], on_image: NDArray[np.bool_]) -> NDArray[Any]:
        old, new = teacher.codec.transcodable, self._copying.target.teachers[teacher.name].codec.transcodable
        assert old is not None, "`transcoded` is true only for transcodable codecs"
        assert new is not None, "the copy has another packing of the same codec"
        transcoded = transcode(old, new, codes, on_image)
        self._cosines.append(transcoded.cosines)
        self._squared_errors += float(transcoded.squared_errors.sum())
        return transcoded.codes

    @property
    def num_tokens(self) -> int:
        return sum(self._tokens_of.values())

    def fidelity(self) -> Fidelity | None:
        """Measured where the shard was encoded again; otherwise that of the shards its rows come from, by their tokens."""
        count = self.num_tokens
        variance = float((self.sums[1] - np.square(self.sums[0]) / max(1, count)).sum())
        if self._copying.transcoded:
            cosines = np.concatenate(self._cosines)
            return fidelity_from_cosines(cosines, self._squared_errors, variance) if count else PERFECT
        parts: list[Fidelity] = []
        for row, tokens in self._tokens_of.items():
            receipt = self._copying.receipts[row // self._copying.source.meta.shard_images]
            if receipt and receipt.fidelity:
                parts.append(replace(receipt.fidelity, num_tokens=tokens))
        combined = combine_fidelity(parts)
        return combined and replace(combined, variance=variance / max(1, count))


def _fields(copying: Copying, shard: int, num_tokens: int, fidelity: Fidelity | None) -> dict[str, Any]:
    """Return the fields of a receipt. Failures keep their reasons and get their new row numbers."""
    target_rows = copying.target.meta.shard_rows(shard)
    failures = tuple(
        replace(copying.failures[old], row=row)
        for row, old in zip(target_rows, copying.rows_of(shard).tolist(), strict=True)
        if old in copying.failures
    )
    return {
        "first_row": target_rows.start,
        "num_rows": len(target_rows),
        "num_tokens": num_tokens,
        "failures": failures,
        "fidelity": fidelity,
    }
