"""k-nearest-neighbour classification of frozen summaries, which trains nothing: the vote, and the accuracy of its outcome.

Protocol of DINO and RADIO (arXiv 2104.14294, 2312.06709): L2-normalised summaries, cosine similarity, the k = 20
nearest images of a labelled bank vote for their class with weight exp(similarity / 0.07).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.errors import EvalError
from evals.knn.search import NO_ROW, Neighbours
from radio_cache.errors import ConfigError, ShapeError

NO_CLASS = -1
"""Fills the last ranks where fewer than five classes got a vote."""

_NUM_RANKS = 5
_VOTE_CELLS = 1 << 25
"""Queries x classes counted at once: 256 MB of votes."""


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] of the queries whose class got the most votes, or is among the five with the most votes."""

    top1: float
    top5: float


def num_voters(bank_rows: int, num_queries: int, k: int, *, leave_one_out: bool) -> int:
    """Return how many of the k neighbours can vote: fewer than k where the bank is smaller.

    Args:
        bank_rows: images of the bank.
        num_queries: images to classify.
        k: neighbours that should vote.
        leave_one_out: the queries are the bank, and none votes for itself.

    Raises:
        EvalError: if no row of the bank can vote, or if there are no queries.
    """
    can_vote = bank_rows - int(leave_one_out)  # every query leaves its own row out
    if can_vote < 1 or num_queries == 0:
        raise EvalError(
            f"k-NN needs images to compare: the bank has {bank_rows}, the queries {num_queries}"
            + (" (with one left out, the bank needs two)" if leave_one_out else "")
        )
    return min(k, can_vote)


def vote(neighbours: Neighbours, labels_of_row: NDArray[np.integer[Any]], *, temperature: float) -> NDArray[np.int64]:
    """Rank the classes of every query by the votes of its neighbours, each of weight exp(similarity / temperature).

    Args:
        neighbours: n queries with their nearest rows of the bank.
        labels_of_row: (m,), the class of every row of the bank.
        temperature: above 0; the smaller, the more the nearest neighbours count.

    Returns:
        (n, 5) classes by falling vote; ties go to the lower class number, and NO_CLASS fills the last ranks.

    Raises:
        ConfigError: if the temperature is not positive.
        ShapeError: if a neighbour is a row without a label.
    """
    if not temperature > 0:
        raise ConfigError(f"the temperature of the k-NN votes is positive, got {temperature}")
    if neighbours.rows.size and (last_row := int(neighbours.rows.max())) >= len(labels_of_row):
        raise ShapeError(f"k-NN needs one label per bank row: row {last_row}, labels {labels_of_row.shape}")
    # Labels may be sparse (4, 11, 30): votes are counted over the classes that occur, not over all numbers.
    classes, class_of_row = np.unique(labels_of_row, return_inverse=True)
    ranked = np.full((len(neighbours.rows), _NUM_RANKS), NO_CLASS, dtype=np.int64)
    batch_queries = max(1, _VOTE_CELLS // max(1, len(classes)))
    for first in range(0, len(ranked), batch_queries):
        batch = slice(first, first + batch_queries)
        rows, similarity = neighbours.rows[batch], neighbours.similarity[batch]  # both (b, k)
        voting = rows != NO_ROW
        # Relative to the nearest neighbour: the ranking is the same, and no temperature overflows.
        best = np.where(voting[:, :1], similarity[:, :1], 0.0)
        weights = np.where(voting, np.exp((np.where(voting, similarity, best) - best) / temperature), 0.0)
        # One bincount for the whole batch: the cell of query q and class c is q * num_classes + c.
        cells = np.arange(len(rows))[:, None] * len(classes) + class_of_row[rows]
        votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(rows) * len(classes))
        votes = votes.reshape(len(rows), len(classes))
        # A stable sort of ascending classes gives ties to the lower class number.
        order = np.argsort(-votes, axis=1, kind="stable")[:, :_NUM_RANKS]
        has_votes = np.take_along_axis(votes, order, axis=1) > 0
        ranked[batch, : order.shape[1]] = np.where(has_votes, classes[order], NO_CLASS)
    return ranked


def accuracy(ranked: NDArray[np.int64], labels: NDArray[np.integer[Any]]) -> Accuracy:
    """Return the top-1 and top-5 accuracy of ranked classes (n, 5) against the true classes (n,), n > 0.

    Raises:
        ShapeError: if the two differ in length, or are empty.
    """
    if len(ranked) != len(labels) or len(labels) == 0:
        raise ShapeError(f"{len(ranked)} predictions cannot be compared with {len(labels)} labels")
    # (n, 5) against (n, 1); NO_CLASS equals no label, so an empty rank is never correct.
    correct = ranked == labels[:, None]
    return Accuracy(top1=float(correct[:, 0].mean()), top5=float(correct.any(axis=1).mean()))


def lone_classes(labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Return the classes with a single image: with that image left out they get no vote, so it is never right."""
    classes, counts = np.unique(labels, return_counts=True)
    return classes[counts == 1]
