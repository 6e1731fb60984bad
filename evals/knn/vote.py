"""k-nearest-neighbour classification of frozen summaries: the evaluation that trains nothing.

Protocol of DINO and RADIO (arXiv 2104.14294, 2312.06709): L2-normalised summaries, cosine similarity, the k = 20
nearest images of a labelled bank vote for their class with weight exp(similarity / 0.07).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.errors import EvalError
from evals.knn.search import NO_ROW, Neighbours, NeighbourSearch
from evals.shared.devices import Device
from radio_cache.errors import ConfigError, ShapeError

NOBODY = -1
"""Stands in `KnnResult.ranked` where fewer classes got a vote than there are places."""

_PLACES = 5
_VOTE_CELLS = 1 << 25
"""Queries x classes counted at once: 256 MB of votes."""


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
    bank: NDArray[np.float32],
    bank_labels: NDArray[np.integer[Any]],
    queries: NDArray[np.float32],
    *,
    k: int,
    temperature: float,
    leave_one_out: bool = False,
    device: Device = "auto",
) -> KnnResult:
    """Let the k nearest rows of the bank vote for the class of every query.

    Shapes: bank (m, c), bank_labels (m,), queries (n, c). Rows need not be normalised. Computed in float32; votes are
        summed in float64.
    leave_one_out: `queries` is the bank itself, and row i never votes for query i (its duplicates do).
    k is clamped to the rows that can vote. temperature > 0 scales the votes.
    Raises: ShapeError if widths or lengths do not agree; EvalError for an empty or non-finite bank or query set;
        ConfigError for k < 1, temperature <= 0, or a GPU where there is none.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ShapeError(f"k-NN compares rows of one width: the bank is {bank.shape}, the queries are {queries.shape}")
    if bank_labels.shape != (len(bank),):
        raise ShapeError(f"k-NN needs one label per bank row: {len(bank)} rows, labels {bank_labels.shape}")
    if leave_one_out and queries.shape != bank.shape:
        raise ShapeError(f"leave-one-out queries are the bank itself: {len(bank)} rows, got {len(queries)} queries")
    if k < 1:
        raise ConfigError(f"k-NN needs at least one neighbour, got k = {k}")
    used_k = voters(len(bank), len(queries), k, leave_one_out=leave_one_out)
    own_rows = np.arange(len(bank)) if leave_one_out else None
    search = NeighbourSearch(queries, used_k, own_rows=own_rows, device=device)
    search.add(np.arange(len(bank)), bank)
    return KnnResult(vote(search.result(), bank_labels, temperature=temperature), used_k)


def voters(bank_rows: int, num_queries: int, k: int, *, leave_one_out: bool) -> int:
    """How many neighbours can vote when k are asked for. Raises EvalError where nobody can, or nobody asks."""
    can_vote = bank_rows - int(leave_one_out)
    if can_vote < 1 or num_queries == 0:
        raise EvalError(
            f"k-NN needs images to compare: the bank has {bank_rows}, the queries {num_queries}"
            + (" (with one left out, the bank needs two)" if leave_one_out else "")
        )
    return min(k, can_vote)


def vote(neighbours: Neighbours, labels_of_row: NDArray[np.integer[Any]], *, temperature: float) -> NDArray[np.int64]:
    """(n, 5) classes by falling vote, weight exp(similarity / temperature); ties to the lower class, NOBODY behind.

    labels_of_row: the class of every row of the bank. Raises ConfigError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"the temperature of the k-NN votes is positive, got {temperature}")
    classes, class_of_row = np.unique(labels_of_row, return_inverse=True)
    ranked = np.full((len(neighbours.rows), _PLACES), NOBODY, dtype=np.int64)
    batch = max(1, _VOTE_CELLS // max(1, len(classes)))
    for first in range(0, len(ranked), batch):
        here = slice(first, first + batch)
        rows, similarity = neighbours.rows[here], neighbours.similarity[here]
        voting = rows != NO_ROW
        # Relative to the nearest neighbour: the ranking is the same, and no temperature overflows.
        best = np.where(voting[:, :1], similarity[:, :1], 0.0)
        weights = np.where(voting, np.exp((np.where(voting, similarity, best) - best) / temperature), 0.0)
        cells = np.arange(len(rows))[:, None] * len(classes) + class_of_row[rows]
        votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(rows) * len(classes))
        votes = votes.reshape(len(rows), len(classes))
        order = np.argsort(-votes, axis=1, kind="stable")[:, :_PLACES]
        got_some = np.take_along_axis(votes, order, axis=1) > 0
        ranked[here, : order.shape[1]] = np.where(got_some, classes[order], NOBODY)
    return ranked


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
