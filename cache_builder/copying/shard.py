"""The unit of work of a copy: one shard of the images or of a teacher.

A shard that keeps its rows and its codec is copied file by file, compared with its receipt on the way, and gets the same
receipt. Otherwise it is assembled from rows: codes as they are stored, or transcoded to another packing.
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
    """The copy of one unit, the images or a teacher, from one cache to another.

    Attributes:
        unit: name of the teacher's group, or `IMAGES_UNIT`.
        rows: (n,) row of the source for each row of the target.
        transcoded: whether the teacher's codec in the target differs from that in the source.
    """

    source: Cache
    target: Cache
    unit: str
    rows: NDArray[np.int64]
    transcoded: bool = False

    @cached_property
    def receipts(self) -> list[Receipt | None]:
        """Receipts of the source by shard; None for unfinished shards."""
        return self.source.receipts(self.unit)

    @cached_property
    def failures(self) -> dict[int, Failure]:
        """Failures by row of the source."""
        return {failure.row: failure for receipt in self.receipts if receipt for failure in receipt.failures}

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Return the rows of the source (n,) that make up a shard of the target."""
        target_rows = self.target.meta.shard_rows(shard)
        return self.rows[target_rows.start : target_rows.stop]

    def keeps_rows(self, shard: int) -> bool:
        """Return whether a shard holds exactly the rows of the same shard of the source."""
        return np.array_equal(self.rows_of(shard), np.array(self.source.meta.shard_rows(shard)))

    def is_kept(self, shard: int) -> bool:
        """Return whether a shard is copied file by file, with the receipt of the source."""
        return self.keeps_rows(shard) and not self.transcoded


def copy_shard(copying: Copying, shard: int) -> Receipt:
    """Write one shard of the target, its receipt last.

    Repeated or concurrent calls write the same bytes.

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
    """Copy the selected files of the same shard of the source, bytes unchanged, and return the source's receipt."""
    source, receipt = copying.source, copying.receipts[shard]
    assert receipt is not None, "unfinished shards are refused before the copy starts"
    for file in filter(is_selected, receipt.files):
        path = f"{unit_group(copying.unit)}/{file.path}"
        # Compared on the way, at no further read: a copy must not give damage a fresh receipt.
        try:
            data = source.storage.read(path)
            difference = file_difference(file, data, source.meta.shard_images)
        except FileNotFoundError:
            data, difference = b"", "missing, although a receipt lists it"
        if difference:
            raise CorruptShardError(
                f"{source.storage.at(path)}: {difference}: run radio-cache repair {source.url}, then the build, then this copy"
            )
        writer.write_stored(file.path, data)
    return receipt


def _images_shard(copying: Copying, shard: int, writer: ShardWriter) -> Receipt:
    source, rows, shard_images = copying.source, copying.rows_of(shard), copying.target.meta.shard_images
    for name, column in (("status", source.statuses), ("size_hw", source.sizes_hw), ("digest", source.digests)):
        # (shard_images, ...): the last shard is padded with zeros to the size of a chunk
        chunk = np.zeros((shard_images, *column.shape[1:]), column.dtype)
        chunk[: len(rows)] = column[rows]
        writer.write_plain(name, chunk, grid=(shard, *(0 for _ in column.shape[1:])))
    if source.pixels is not None:
        unusable = copying.failures
        pixel_chunks = [None if row in unusable else chunk_of(source.pixels.file(row)) for row in rows.tolist()]
        writer.write_sharded(PIXELS, pixel_chunks, grid=(shard,), chunks_per_shard=shard_images)
    return writer.commit(_fields(copying, shard, 0, None))


def _teacher_shard(copying: Copying, shard: int, writer: ShardWriter) -> Receipt:
    assembled = _AssembledShard(copying, shard)
    new = copying.target.teachers[copying.unit]
    # (view, row, *row_shape): teachers with several views are refused before, so that the first axis is 0
    writer.write_sharded(
        "spatial",
        assembled.chunks,
        grid=(0, shard, *(0 for _ in new.row_shape)),
        chunks_per_shard=copying.target.meta.shard_images,
        zstd_level=new.codec.zstd_level,
    )
    if copying.keeps_rows(shard):
        # Sums over the teacher's own output are exact; those over decoded maps carry the codec's error.
        receipt = _copy_files(copying, shard, writer, lambda file: not file.path.startswith("spatial/"))
        return writer.commit(_fields(copying, shard, receipt.num_tokens, assembled.fidelity()))
    # (2, c) -> (1, 2, c), one row of the statistics per shard
    writer.write_plain("stats/spatial", assembled.sums[None], grid=(shard, 0, 0))
    if new.spec.summary_dim is not None:
        rows = copying.rows_of(shard)
        usable = [number for number, row in enumerate(rows.tolist()) if row not in copying.failures]
        # (1, shard_images, d); rows of unusable images stay NaN
        summary = np.full((1, copying.target.meta.shard_images, new.spec.summary_dim), np.nan, np.float16)
        stored = copying.source.teachers[copying.unit].summaries(rows[usable])
        # Stored in half precision already, so that encoding changes nothing.
        summary[0, usable] = Half().encode(stored)
        writer.write_plain("summary", summary, grid=(0, shard, 0))
        writer.write_plain("stats/summary", power_sums(stored)[None], grid=(shard, 0, 0))
    return writer.commit(_fields(copying, shard, assembled.num_tokens, assembled.fidelity()))


class _AssembledShard:
    """A teacher's shard assembled from rows.

    Attributes:
        chunks: codes by row of the shard; None for unusable images.
        sums: (2, c) sums and sums of squares over the decoded valid tokens.
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
            # codes (m, *row_shape), on_image (m, h, w): padding is excluded from sums and cosines
            codes = teacher.codes(batch_rows)
            on_image = tokens_on_images(copying.source, teacher, list(batch_rows))
            # (m, h, w, c) -> (tokens, c) -> (2, c)
            self.sums += power_sums(teacher.codec.decode(codes)[on_image])
            self._tokens_of |= dict(zip(batch_rows, on_image.sum(axis=(1, 2)).tolist(), strict=True))
            if copying.transcoded:
                codes = self._transcode(teacher, codes, on_image)
            # Batches hold only usable images, so that a position in a batch is not one in the shard.
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
        """Number of valid tokens of the usable images."""
        return sum(self._tokens_of.values())

    def fidelity(self) -> Fidelity | None:
        """Return the fidelity of the shard; None if the source recorded none.

        A transcoded shard is measured against the stored maps. Otherwise the result is the mean of the source shards'
        fidelity, weighted by the number of tokens taken from each.
        """
        count = self.num_tokens
        # Sum over channels of the squared deviations from the mean: E[x^2] - E[x]^2, times the count.
        variance = float((self.sums[1] - np.square(self.sums[0]) / max(1, count)).sum())
        if self._copying.transcoded:
            cosines = np.concatenate(self._cosines)
            return fidelity_from_cosines(cosines, self._squared_errors, variance) if count else PERFECT
        fidelities: list[Fidelity] = []
        for row, tokens in self._tokens_of.items():
            receipt = self._copying.receipts[row // self._copying.source.meta.shard_images]
            if receipt and receipt.fidelity:
                fidelities.append(replace(receipt.fidelity, num_tokens=tokens))
        combined = combine_fidelity(fidelities)
        return combined and replace(combined, variance=variance / max(1, count))


def _fields(copying: Copying, shard: int, num_tokens: int, fidelity: Fidelity | None) -> dict[str, Any]:
    """Return the fields of a receipt.

    Failures keep their reasons and get the row numbers of the target.
    """
    target_rows = copying.target.meta.shard_rows(shard)
    failures = tuple(
        replace(copying.failures[source_row], row=row)
        for row, source_row in zip(target_rows, copying.rows_of(shard).tolist(), strict=True)
        if source_row in copying.failures
    )
    return {
        "first_row": target_rows.start,
        "num_rows": len(target_rows),
        "num_tokens": num_tokens,
        "failures": failures,
        "fidelity": fidelity,
    }
