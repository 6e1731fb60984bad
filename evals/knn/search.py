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
"""Fills `Neighbours.rows` where the bank has fewer than k rows; the similarity there is -inf."""

_BORDER = 16
"""Candidates kept beyond the k-th, so that ties at the border are broken by row number, not by FAISS."""

_TIE_STEP = 2.0**-20
"""Similarities that agree to about six digits are equal: the float32 product of a pair varies as much by batch."""

_BLOCK_BYTES = 1 << 28
"""Bytes of the bank compared at once: large enough that merging costs nothing, small beside any model."""

# 256 rows of 1,280 float32 values are 1.3 MB.
_STRIP_ROWS = 256
# FAISS holds queries x candidates of results: 65,536 queries keep that below 100 MB.
_QUERY_BATCH = 1 << 16
# A limit of FAISS's GPU kernels.
_GPU_LARGEST_K = 2048


@dataclass(frozen=True)
class Neighbours:
    """The most similar rows of a bank for every query, best first.

    Attributes:
        similarity: (n, k) cosines, float64, rounded to steps of 2^-20; -inf beyond the bank.
        rows: (n, k) row numbers; of equally similar ones the lowest first (exact for up to 16 ties at the border);
            NO_ROW beyond the bank.
    """

    similarity: NDArray[np.float64]
    rows: NDArray[np.int64]

    def first(self, k: int) -> "Neighbours":
        """Return the k nearest."""
        return Neighbours(self.similarity[:, :k], self.rows[:, :k])


@final
class NeighbourSearch:
    """Exact search in a bank that is added in any pieces and order by `add`; `result` returns the neighbours.

    Memory: the queries twice, a block of 256 MB of the bank, and k + 17 candidates a query.

    Args:
        queries: (n, c), need not be normalised; a row of zeros has similarity 0 with everything.
        k: neighbours of each query, at least 1.
        excluded_rows: (n,), one row of the bank that each query must not find (itself); None for none.
        device: "auto" takes all GPUs that FAISS sees, or the CPU where it sees none.

    Raises:
        ConfigError: for k < 1, or a GPU where there is none.
        EvalError: for queries that are not finite.
        ShapeError: if there is not one excluded row per query.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        excluded_rows: NDArray[np.int64] | None = None,
        device: Device = "auto",
    ) -> None:
        if k < 1:
            raise ConfigError(f"k-NN needs at least one neighbour, got k = {k}")
        if excluded_rows is not None and excluded_rows.shape != (len(queries),):
            raise ShapeError(
                f"leave-one-out queries are the bank itself: {len(excluded_rows)} rows, got {len(queries)} queries"
            )
        self.k, self._excluded_rows = k, excluded_rows
        # The excluded row may be among the nearest, so one more candidate is kept.
        self._num_candidates = k + _BORDER + (excluded_rows is not None)
        self._queries = unit_rows(queries, "queries")
        self._gpus = _gpus(device, self._num_candidates)
        # Inner products: the largest are kept.
        self._heap: Any = faiss.ResultHeap(len(queries), self._num_candidates, keep_max=True)
        block_rows = max(1, _BLOCK_BYTES // (4 * max(1, queries.shape[1])))
        # One buffer for all blocks: allocating a new one for each costs as much as the copying.
        self._block = np.empty((block_rows, queries.shape[1]), np.float32)
        self._block_rows = np.empty(block_rows, np.int64)
        self._num_waiting = self.num_rows = 0

    def add(self, rows: NDArray[np.int64], features: NDArray[np.floating[Any]]) -> None:
        """Add a piece of the bank.

        Args:
            rows: (b,) row numbers, each added once.
            features: (b, c), need not be normalised.

        Raises:
            ShapeError: if the features have another width than the queries.
            EvalError: for features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self._queries.shape[1] or len(rows) != len(features):
            raise ShapeError(
                f"k-NN compares rows of one width: the bank is {features.shape}, the queries are {self._queries.shape}"
            )
        num_done = 0
        while num_done < len(rows):
            # Blocks are searched when full, whatever the size of the pieces, so that the speed does not depend on it.
            if self._num_waiting == len(self._block):
                self._flush()
            num_rows = min(len(rows) - num_done, len(self._block) - self._num_waiting)
            free = slice(self._num_waiting, self._num_waiting + num_rows)
            _write_unit_rows(features[num_done : num_done + num_rows], self._block[free], "bank")
            self._block_rows[free] = rows[num_done : num_done + num_rows]
            self._num_waiting += num_rows
            num_done += num_rows
        self.num_rows += len(rows)

    def result(self) -> Neighbours:
        """Return the nearest of all rows added."""
        self._flush()
        similarity, rows = self._heap.D.astype(np.float64), self._heap.I.copy()
        if self._excluded_rows is not None:
            # By row number, not by rank: the nearest neighbour of an image with a copy may be the copy.
            rows[rows == self._excluded_rows[:, None]] = NO_ROW
        return _sorted(similarity, rows, self.k)

    def _flush(self) -> None:
        if not self._num_waiting:
            return
        # The last block may be partly filled.
        rows, block = self._block_rows[: self._num_waiting], self._block[: self._num_waiting]
        self._num_waiting = 0
        num_candidates = min(self._num_candidates, len(block))
        similarity = np.empty((len(self._queries), num_candidates), np.float32)
        positions = np.empty((len(self._queries), num_candidates), np.int64)
        for first in range(0, len(self._queries), _QUERY_BATCH):
            batch = slice(first, first + _QUERY_BATCH)
            similarity[batch], positions[batch] = _search(self._queries[batch], block, num_candidates, self._gpus)
        # FAISS returns positions in the block, and -1 where it has none; the heap keeps row numbers of the bank.
        self._heap.add_result(similarity, np.where(positions < 0, NO_ROW, rows[positions]))


def merged(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """Merge the neighbours in the parts of a bank into the k nearest of the whole.

    Args:
        parts: each searched for the same queries in the same order.
        k: neighbours of each query.
    """
    return _sorted(
        np.concatenate([part.similarity for part in parts], axis=1),
        np.concatenate([part.rows for part in parts], axis=1),
        k,
    )


def unit_rows(rows: NDArray[np.floating[Any]], role: str) -> NDArray[np.float32]:
    """Return the rows scaled to length 1, contiguous float32; rows of zeros stay.

    Args:
        rows: (n, c).
        role: "queries" or "bank", for the message.

    Raises:
        EvalError: for NaN or infinity.
    """
    unit = np.empty(rows.shape, np.float32)
    _write_unit_rows(rows, unit, role)
    return unit


def _write_unit_rows(rows: NDArray[np.floating[Any]], out: NDArray[np.float32], role: str) -> None:
    """Write the rows, scaled to length 1, into `out`; see `unit_rows`."""
    unusable = 0
    for first in range(0, len(rows), _STRIP_ROWS):  # a strip stays in the processor's cache between the passes
        strip = out[first : first + _STRIP_ROWS]
        strip[...] = rows[first : first + _STRIP_ROWS]
        # A NaN or infinity in a row makes its norm NaN or infinite: one check covers both.
        norms = np.sqrt(np.einsum("nc,nc->n", strip, strip, dtype=np.float32))
        finite = np.isfinite(norms)
        unusable += int((~finite).sum())
        # A row of zeros stays zero: the smallest normal float avoids 0 / 0.
        strip /= np.where(finite, np.maximum(norms, np.finfo(np.float32).tiny), 1)[:, None]
    if unusable:
        raise EvalError(f"{unusable} summaries of the {role} hold NaN or infinity")


def _sorted(similarity: NDArray[np.float64], rows: NDArray[np.int64], k: int) -> Neighbours:
    """Return the k best of (n, candidates), ties by row number."""
    rounded = np.round(similarity / _TIE_STEP) * _TIE_STEP
    rounded[rows == NO_ROW] = -np.inf
    # The last key of lexsort is the first to sort by: similarity falling, then row rising.
    order = np.lexsort((rows, -rounded), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(rounded, order, axis=1), np.take_along_axis(rows, order, axis=1))


def _gpus(device: Device, num_candidates: int) -> list[Any]:
    """Return the scratch memory of each GPU to use; empty for the CPU. FAISS has no type stubs."""
    count = faiss.get_num_gpus() if device != "cpu" else 0
    if device == "cuda" and count == 0:
        raise ConfigError("k-NN is to run on a GPU, and FAISS sees none: use --device cpu, or install faiss-gpu")
    if device == "cuda" and num_candidates > _GPU_LARGEST_K:
        raise ConfigError(
            f"on a GPU FAISS finds at most {_GPU_LARGEST_K} neighbours, {num_candidates} are needed: use --device cpu"
        )
    return [faiss.StandardGpuResources() for _ in range(count)] if num_candidates <= _GPU_LARGEST_K else []


def _search(
    queries: NDArray[np.float32], block: NDArray[np.float32], k: int, gpus: list[Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return (n, k) similarities and positions in the block. Several GPUs share the queries."""
    if not gpus:
        return faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    # Each GPU searches the whole block for a part of the queries.
    shares = [share for share in np.array_split(queries, len(gpus)) if len(share)]

    def on_gpu(number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return faiss.knn_gpu(gpus[number], shares[number], block, k, metric=faiss.METRIC_INNER_PRODUCT, device=number)

    with ThreadPoolExecutor(len(shares)) as pool:  # FAISS lets other threads run while a GPU works
        results = list(pool.map(on_gpu, range(len(shares))))
    return np.concatenate([similarity for similarity, _ in results]), np.concatenate([rows for _, rows in results])
