"""The exact nearest rows of a bank that is streamed past the queries: it never lies in memory as a whole.

Cosine similarity, float32 inner products by FAISS (arXiv 2401.08281), block by block of the bank. Parts of a bank may be
searched in different processes or on different GPUs; `merged` makes one answer of them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import faiss
import numpy as np
from numpy.typing import NDArray

from evals.errors import EvalError
from evals.shared.devices import Device
from radio_cache.errors import ConfigError, ShapeError

NO_ROW = -1
"""Stands in `Neighbours.rows` where the bank had fewer rows than were asked for; the similarity there is -inf."""

_BORDER = 16
"""Neighbours kept beyond the k-th, so that equal similarities at the border are broken by row, not by FAISS."""

_TIE_STEP = 2.0**-20
"""Similarities that agree to about six digits are equal: the float32 product of a pair varies as much by batch."""

_BLOCK_BYTES = 1 << 28
"""Of the bank compared at once: large enough that merging costs nothing, small enough to forget about."""

_STRIP_ROWS = 256
_QUERY_BATCH = 1 << 16
_GPU_LARGEST_K = 2048


@dataclass(frozen=True)
class Neighbours:
    """Per query the most similar rows of a bank, best first.

    similarity (n, k): cosines, float64, rounded to steps of 2^-20. rows (n, k): row numbers; of equally similar ones the
    lowest first (exactly so for up to 16 at the border). Places beyond the bank hold -inf and NO_ROW.
    """

    similarity: NDArray[np.float64]
    rows: NDArray[np.int64]

    def first(self, k: int) -> "Neighbours":
        """The k nearest of them."""
        return Neighbours(self.similarity[:, :k], self.rows[:, :k])


@final
class NeighbourSearch:
    """Hand over the bank by `add`, in any pieces and order, then ask `result`.

    queries (n, c): float32, need not be normalised; a row of zeros has similarity 0 with everything.
    own_rows (n,): a row number of the bank that each query must not find (itself); None for none.
    device "auto": all GPUs that FAISS sees, the CPU where it sees none.
    Memory: the queries twice, a block of 256 MB of the bank, and k + 17 candidates a query.
    Raises: ConfigError for k < 1 or a GPU where there is none, EvalError for queries that are not finite.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        own_rows: NDArray[np.int64] | None = None,
        device: Device = "auto",
    ) -> None:
        if k < 1:
            raise ConfigError(f"k-NN needs at least one neighbour, got k = {k}")
        self.k, self._own_rows = k, own_rows
        self._kept = k + _BORDER + (own_rows is not None)
        self._queries = unit_rows(queries, "queries")
        self._gpus = _gpus(device, self._kept)
        self._heap: Any = faiss.ResultHeap(len(queries), self._kept, keep_max=True)
        block_rows = max(1, _BLOCK_BYTES // (4 * max(1, queries.shape[1])))
        # Written over again for every block: memory that is asked for anew costs as much as the copying.
        self._block = np.empty((block_rows, queries.shape[1]), np.float32)
        self._rows_of_block = np.empty(block_rows, np.int64)
        self._num_waiting = self.num_rows = 0

    def add(self, rows: NDArray[np.int64], features: NDArray[np.floating[Any]]) -> None:
        """A piece of the bank: features (b, c) and their row numbers (b,), each given once.

        Raises: ShapeError for another width than the queries', EvalError for features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self._queries.shape[1] or len(rows) != len(features):
            raise ShapeError(
                f"k-NN compares rows of one width: the bank is {features.shape}, the queries are {self._queries.shape}"
            )
        done = 0
        while done < len(rows):
            if self._num_waiting == len(self._block):
                self._flush()
            taken = min(len(rows) - done, len(self._block) - self._num_waiting)
            free = slice(self._num_waiting, self._num_waiting + taken)
            _write_unit_rows(features[done : done + taken], self._block[free], "bank")
            self._rows_of_block[free] = rows[done : done + taken]
            self._num_waiting += taken
            done += taken
        self.num_rows += len(rows)

    def result(self) -> Neighbours:
        """The nearest of all rows added."""
        self._flush()
        similarity, rows = self._heap.D.astype(np.float64), self._heap.I.copy()
        if self._own_rows is not None:
            # By row number, not by position: the first neighbour of an image with a copy may be the copy.
            rows[rows == self._own_rows[:, None]] = NO_ROW
        return _sorted(similarity, rows, self.k)

    def _flush(self) -> None:
        if not self._num_waiting:
            return
        rows, block = self._rows_of_block[: self._num_waiting], self._block[: self._num_waiting]
        self._num_waiting = 0
        kept = min(self._kept, len(block))
        similarity = np.empty((len(self._queries), kept), np.float32)
        found = np.empty((len(self._queries), kept), np.int64)
        for first in range(0, len(self._queries), _QUERY_BATCH):
            here = slice(first, first + _QUERY_BATCH)
            similarity[here], found[here] = _search(self._queries[here], block, kept, self._gpus)
        self._heap.add_result(similarity, np.where(found < 0, NO_ROW, rows[found]))


def merged(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The nearest rows of a whole bank from those of its parts, each searched for the same queries in the same order."""
    return _sorted(
        np.concatenate([part.similarity for part in parts], axis=1),
        np.concatenate([part.rows for part in parts], axis=1),
        k,
    )


def unit_rows(rows: NDArray[np.floating[Any]], what: str) -> NDArray[np.float32]:
    """Rows of length 1, contiguous float32; rows of zeros stay. Raises EvalError naming `what` for NaN or infinity."""
    made = np.empty(rows.shape, np.float32)
    _write_unit_rows(rows, made, what)
    return made


def _write_unit_rows(rows: NDArray[np.floating[Any]], out: NDArray[np.float32], what: str) -> None:
    """As `unit_rows`, into `out`; a strip at a time, which stays in the processor's cache."""
    unusable = 0
    for first in range(0, len(rows), _STRIP_ROWS):
        strip = out[first : first + _STRIP_ROWS]
        strip[...] = rows[first : first + _STRIP_ROWS]
        norms = np.sqrt(np.einsum("nc,nc->n", strip, strip, dtype=np.float32))
        finite = np.isfinite(norms)
        unusable += int((~finite).sum())
        strip /= np.where(finite, np.maximum(norms, np.finfo(np.float32).tiny), 1)[:, None]
    if unusable:
        raise EvalError(f"{unusable} summaries of the {what} hold NaN or infinity")


def _sorted(similarity: NDArray[np.float64], rows: NDArray[np.int64], k: int) -> Neighbours:
    rounded = np.round(similarity / _TIE_STEP) * _TIE_STEP
    rounded[rows == NO_ROW] = -np.inf
    order = np.lexsort((rows, -rounded), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(rounded, order, axis=1), np.take_along_axis(rows, order, axis=1))


def _gpus(device: Device, kept: int) -> list[Any]:
    """Scratch memory on each GPU to use; empty for the CPU. FAISS has no type stubs."""
    count = faiss.get_num_gpus() if device != "cpu" else 0
    if device == "cuda" and count == 0:
        raise ConfigError("k-NN was asked for on a GPU, and FAISS sees none: use --device cpu, or install faiss-gpu")
    if device == "cuda" and kept > _GPU_LARGEST_K:
        raise ConfigError(
            f"on a GPU FAISS finds at most {_GPU_LARGEST_K} neighbours, {kept} are needed: use --device cpu"
        )
    return [faiss.StandardGpuResources() for _ in range(count)] if kept <= _GPU_LARGEST_K else []


def _search(
    queries: NDArray[np.float32], block: NDArray[np.float32], k: int, gpus: list[Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, k) similarities and positions in the block. Several GPUs share the queries."""
    if not gpus:
        return faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    shares = [share for share in np.array_split(queries, len(gpus)) if len(share)]

    def on_gpu(number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return faiss.knn_gpu(gpus[number], shares[number], block, k, metric=faiss.METRIC_INNER_PRODUCT, device=number)

    with ThreadPoolExecutor(len(shares)) as pool:  # FAISS lets other threads run while a GPU works
        found = list(pool.map(on_gpu, range(len(shares))))
    return np.concatenate([similarity for similarity, _ in found]), np.concatenate([rows for _, rows in found])
