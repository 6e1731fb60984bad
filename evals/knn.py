"""k-nearest-neighbour classification of frozen summaries: the evaluation that trains nothing.

Protocol of DINO and RADIO (arXiv 2104.14294, 2312.06709): L2-normalised summaries, cosine similarity, the k = 20
nearest images of a labelled bank vote for their class with weight exp(similarity / 0.07).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from evals.errors import EvalError
from radio_cache.errors import ConfigError, ShapeError

Device = Literal["auto", "cpu", "cuda"]

PAPER_K = 20
PAPER_TEMPERATURE = 0.07
NOBODY = -1
"""Stands in `KnnResult.ranked` where fewer classes got a vote than there are places."""

_PLACES = 5
_BORDER = 16
"""Neighbours fetched beyond the k-th, so that equal similarities at the border are broken by row, not by FAISS."""

_TIE_STEP = 2.0**-20
"""Similarities that agree to about six digits are equal: the float32 product of a pair varies as much by batch."""

_QUERY_BATCH = 1024
_GPU_LARGEST_K = 2048


@dataclass(frozen=True)
class KnnResult:
    """What the neighbours voted for.

    ranked (n, 5): classes by falling vote, ties to the lower class number, NOBODY where no class got a vote.
    k: neighbours that voted; fewer than asked for where the bank is smaller.
    """

    ranked: NDArray[np.int64]
    k: int


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] of the queries whose class got the most votes, or is among the five with the most votes."""

    top1: float
    top5: float


def classify(
    bank: NDArray[np.float32], bank_labels: NDArray[np.integer[Any]], queries: NDArray[np.float32],
    *, k: int, temperature: float, leave_one_out: bool = False, device: Device = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> KnnResult:  # fmt: skip
    """Let the k nearest rows of the bank vote for the class of every query.

    Shapes: bank (m, c), bank_labels (m,), queries (n, c). Rows need not be normalised; a row of zeros has similarity 0
        with everything. Computed in float32; votes are summed in float64.
    leave_one_out: `queries` is the bank itself, and row i never votes for query i (its duplicates do).
    k is clamped to the rows that can vote. Of equally similar rows at the border the lowest row numbers vote (exactly
        so for up to 16 of them). temperature > 0 scales the votes. device "auto": a GPU where FAISS sees one.
    on_batch is told the number of queries done since it was last told.
    Raises: ShapeError if widths or lengths do not agree; EvalError for an empty or non-finite bank or query set;
        ConfigError for k < 1, temperature <= 0, or a GPU where there is none.
    """
    _check(bank, bank_labels, queries, k=k, temperature=temperature, leave_one_out=leave_one_out)
    can_vote = len(bank) - int(leave_one_out)
    k = min(k, can_vote)
    fetched = min(k + int(leave_one_out) + _BORDER, len(bank))
    classes, class_of_row = np.unique(bank_labels, return_inverse=True)
    index = _index(_normalised(bank, "bank"), device=device, fetched=fetched)
    ranked = np.full((len(queries), _PLACES), NOBODY, dtype=np.int64)
    for start in range(0, len(queries), _QUERY_BATCH):
        batch = _normalised(queries[start : start + _QUERY_BATCH], "queries")
        similarity, rows = index.search(batch, fetched)
        own = np.arange(start, start + len(batch)) if leave_one_out else np.full(len(batch), -1)
        similarity, rows = _nearest(similarity, rows, own, k)
        ranked[start : start + len(batch)] = _vote(similarity, class_of_row[rows], classes, temperature)
        if on_batch is not None:
            on_batch(len(batch))
    return KnnResult(ranked, k)


def accuracy(ranked: NDArray[np.int64], labels: NDArray[np.integer[Any]]) -> Accuracy:
    """Top-1 and top-5 accuracy of `KnnResult.ranked` (n, 5) against the true classes (n,), n > 0."""
    if len(ranked) != len(labels) or len(labels) == 0:
        raise ShapeError(f"{len(ranked)} predictions cannot be compared with {len(labels)} labels")
    right = ranked == labels[:, None]
    return Accuracy(top1=float(right[:, 0].mean()), top5=float(right.any(axis=1).mean()))


def lone_classes(labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Classes with a single image: with that image left out nobody votes for them, so it is never right."""
    classes, counts = np.unique(labels, return_counts=True)
    return classes[counts == 1]


def _check(
    bank: NDArray[np.float32], bank_labels: NDArray[np.integer[Any]], queries: NDArray[np.float32],
    *, k: int, temperature: float, leave_one_out: bool,
) -> None:  # fmt: skip
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ShapeError(f"k-NN compares rows of one width: the bank is {bank.shape}, the queries are {queries.shape}")
    if bank_labels.shape != (len(bank),):
        raise ShapeError(f"k-NN needs one label per bank row: {len(bank)} rows, labels {bank_labels.shape}")
    if leave_one_out and queries.shape != bank.shape:
        raise ShapeError(f"leave-one-out queries are the bank itself: {len(bank)} rows, got {len(queries)} queries")
    if len(bank) < 1 + int(leave_one_out) or len(queries) == 0:
        raise EvalError(
            f"k-NN needs images to compare: the bank has {len(bank)}, the queries {len(queries)}"
            + (" (with one left out, the bank needs two)" if leave_one_out else "")
        )
    if k < 1:
        raise ConfigError(f"k-NN needs at least one neighbour, got k = {k}")
    if not temperature > 0:
        raise ConfigError(f"the temperature of the k-NN votes is positive, got {temperature}")


def _normalised(rows: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows.astype(np.float32, copy=False), axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise EvalError(f"{int((~np.isfinite(norms)).sum())} summaries of the {what} hold NaN or infinity")
    return np.ascontiguousarray(rows / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)


def _index(bank: NDArray[np.float32], *, device: Device, fetched: int) -> Any:
    # FAISS has no type stubs; the seam is this function's three calls and `search`.
    gpus = faiss.get_num_gpus() if device != "cpu" else 0
    if device == "cuda" and gpus == 0:
        raise ConfigError("k-NN was asked for on a GPU, and FAISS sees none: use --device cpu, or install faiss-gpu")
    index: Any = faiss.IndexFlatIP(bank.shape[1])
    if gpus and fetched <= _GPU_LARGEST_K:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(bank)
    return index


def _nearest(
    similarity: NDArray[np.float32], rows: NDArray[np.int64], own: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(n, k) similarities and rows of the nearest that are not the query's own row, from (n, fetched) unordered ones.

    Dropping by row number, not by position: the first neighbour of an image with a duplicate may be the duplicate.
    """
    rounded = np.round(similarity.astype(np.float64) / _TIE_STEP) * _TIE_STEP
    rounded[rows == own[:, None]] = -np.inf
    order = np.lexsort((rows, -rounded), axis=1)[:, :k]
    return np.take_along_axis(rounded, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _vote(
    similarity: NDArray[np.float64], voters: NDArray[np.int64], classes: NDArray[np.integer[Any]], temperature: float
) -> NDArray[np.int64]:
    """(n, 5) class numbers by falling vote; `voters` (n, k) are positions in `classes`."""
    # Relative to the nearest neighbour: the ranking is the same, and no temperature overflows.
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    n, num_classes = len(voters), len(classes)
    cells = (np.arange(n)[:, None] * num_classes + voters).ravel()
    votes = np.bincount(cells, weights=weights.ravel(), minlength=n * num_classes).reshape(n, num_classes)
    order = np.argsort(-votes, axis=1, kind="stable")[:, :_PLACES]
    ranked = np.full((n, _PLACES), NOBODY, dtype=np.int64)
    ranked[:, : order.shape[1]] = np.where(np.take_along_axis(votes, order, axis=1) > 0, classes[order], NOBODY)
    return ranked
