"""Online k-NN: a quick estimate of a student's quality during training, on a few labelled images.

Queries are held-out images, if there are any, and the bank is training images. For numbers to quote use `radio-eval knn`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from radio_cache.reader import Cache
from radio_cache.statistics.knn_protocol import PAPER_K, PAPER_TEMPERATURE
from trainer.data.crops import CropData
from trainer.model.eval_view import eval_pixels
from trainer.model.student import StudentConfig

# Small enough to hold in memory, and to encode between two steps.
_BANK, _QUERIES, _BATCH = 768, 256, 64
_LEAST_QUERIES = 8


def knn_predictions(
    bank: Float[Tensor, "n c"], labels: Int[Tensor, " n"], queries: Float[Tensor, "m c"]
) -> Int[Tensor, " m"]:
    """Return the label with the most votes of the nearest bank rows by cosine; exact, for banks of a few thousand.

    Args:
        bank: (n, c) summaries; they need not be normalised.
        labels: (n,) labels; any numbers, since votes are counted by the classes that occur.
        queries: (m, c) summaries.

    Returns:
        (m,) predicted labels.

    Source: DINO (arXiv 2104.14294) and AM-RADIO (arXiv 2312.06709): 20 neighbours, votes of exp(cosine / 0.07).
    """
    bank, queries = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (bank, queries))
    # (m, k): similarities, and rows of the bank
    neighbours = (queries @ bank.T).topk(min(PAPER_K, len(bank)))
    classes, numbers = labels.unique(return_inverse=True)
    # (m, classes): the sum of the votes for each class
    votes = torch.zeros(len(queries), len(classes), device=queries.device)
    votes.scatter_add_(1, numbers[neighbours.indices], torch.exp(neighbours.values / PAPER_TEMPERATURE))
    return classes[votes.argmax(1)]


@dataclass(frozen=True)
class OnlineKnn:
    """Pixels and labels of a bank and of queries, in memory, with the evaluation view of the finished student.

    Attributes:
        bank: (n, h, w, 3) pixels of training images.
        bank_labels: (n,) their labels.
        queries: (m, h, w, 3) pixels of held-out images, or of other training images.
        query_labels: (m,) their labels.
    """

    bank: UInt8[Tensor, "n h w 3"]
    bank_labels: Int[Tensor, " n"]
    queries: UInt8[Tensor, "m h w 3"]
    query_labels: Int[Tensor, " m"]

    @classmethod
    def of(
        cls, cache: Cache, data: CropData, rows: NDArray[np.int64], held_out: NDArray[np.int64], config: StudentConfig
    ) -> "OnlineKnn | None":
        """Take a seeded sample of the labelled images; return None if they are too few or have fewer than two classes.

        Args:
            cache: cache of the images.
            data: data of the run, which decodes images.
            rows: training rows, from which the bank is sampled.
            held_out: held-out rows. They are the queries, if enough of them have classes of the bank; otherwise the queries are
                training images.
            config: configuration of the student, for its evaluation view and the seed.
        """
        labels, rng = cache.index.labels, np.random.default_rng((config.seed, 4))
        labelled = rows[labels[rows] >= 0]
        candidates = held_out[np.isin(labels[held_out], labels[labelled])]
        if len(candidates) >= _LEAST_QUERIES and len(np.unique(labels[candidates])) > 1:
            bank, queries = rng.permutation(labelled)[:_BANK], rng.permutation(candidates)[:_QUERIES]
        else:
            # An image that is alone in its class cannot be classified correctly.
            classes, counts = np.unique(labels[labelled], return_counts=True)
            labelled = labelled[np.isin(labels[labelled], classes[counts > 1])]
            if np.count_nonzero(counts > 1) < 2 or len(labelled) < 8:
                return None
            sample = rng.permutation(labelled)[: _BANK + _QUERIES]
            num_queries = max(1, min(_QUERIES, len(sample) // 4))
            bank, queries = sample[num_queries:], sample[:num_queries]

        def pixels_of(sampled_rows: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(np.stack([_eval_pixels(data, int(row), config) for row in sampled_rows]))

        def labels_of(sampled_rows: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(labels[sampled_rows].astype(np.int64))

        return cls(pixels_of(bank), labels_of(bank), pixels_of(queries), labels_of(queries))

    def top1(self, summaries: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b c"]]) -> float:
        """Return the share of queries whose predicted label is correct.

        Args:
            summaries: function from a batch of pixels to the student's summaries.
        """
        # (n, c) and (m, c)
        bank, queries = (
            torch.cat([summaries(batch) for batch in pixels.split(_BATCH)]) for pixels in (self.bank, self.queries)
        )
        predicted = knn_predictions(bank, self.bank_labels.to(bank.device), queries)
        return float((predicted.cpu() == self.query_labels).float().mean())


def _eval_pixels(data: CropData, row: int, config: StudentConfig) -> NDArray[np.uint8]:
    image = data.image(row)
    return eval_pixels(image, image_hw=config.image_hw, fit=config.fit, centre_share=config.centre_share)


def top1_error(top1: float, queries: int) -> float:
    """Return the binomial standard error of an accuracy in [0, 1] over `queries` queries."""
    return math.sqrt(max(0.0, top1 * (1 - top1)) / queries)
