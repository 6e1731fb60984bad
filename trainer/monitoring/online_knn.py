"""How good a student is while it trains: k-NN of a few images, held-out ones if there are any, among those it is trained on.

For numbers to quote there is `radio-eval knn`.
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

_BANK, _QUERIES, _BATCH = 768, 256, 64
_LEAST_QUERIES = 8


def knn_predictions(
    bank: Float[Tensor, "n c"], labels: Int[Tensor, " n"], queries: Float[Tensor, "m c"]
) -> Int[Tensor, " m"]:
    """Return the label that the K nearest by cosine vote for; exact, all at once, for banks of a few thousand.

    Labels may be any numbers, as large as an identifier: votes are counted by class, not by number.
    """
    bank, queries = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (bank, queries))
    found = (queries @ bank.T).topk(min(PAPER_K, len(bank)))
    classes, numbers = labels.unique(return_inverse=True)
    votes = torch.zeros(len(queries), len(classes), device=queries.device)
    votes.scatter_add_(1, numbers[found.indices], torch.exp(found.values / PAPER_TEMPERATURE))
    return classes[votes.argmax(1)]


@dataclass(frozen=True)
class OnlineKnn:
    """Pixels (n, h, w, 3) and labels (n,) of a bank and of queries, in memory, as the student is shown images when it is used."""

    bank: UInt8[Tensor, "n h w 3"]
    bank_labels: Int[Tensor, " n"]
    queries: UInt8[Tensor, "m h w 3"]
    query_labels: Int[Tensor, " m"]

    @classmethod
    def of(
        cls, cache: Cache, data: CropData, rows: NDArray[np.int64], held_out: NDArray[np.int64], config: StudentConfig
    ) -> "OnlineKnn | None":
        """Take a seeded sample of the labelled images; None where there are very few, or fewer than two classes of several.

        Args:
            rows: images that are trained on, of which the bank is taken.
            held_out: images that are not; the queries, where enough of them have classes that the bank has, too. Else the
                queries are images that are trained on.
        """
        labels, rng = cache.index.labels, np.random.default_rng((config.seed, 4))
        labelled = rows[labels[rows] >= 0]
        unseen = held_out[np.isin(labels[held_out], labels[labelled])]
        if len(unseen) >= _LEAST_QUERIES and len(np.unique(labels[unseen])) > 1:
            bank, queries = rng.permutation(labelled)[:_BANK], rng.permutation(unseen)[:_QUERIES]
        else:
            # An image that is alone in its class has no neighbour to be found by.
            classes, counts = np.unique(labels[labelled], return_counts=True)
            labelled = labelled[np.isin(labels[labelled], classes[counts > 1])]
            if np.count_nonzero(counts > 1) < 2 or len(labelled) < 8:
                return None
            chosen = rng.permutation(labelled)[: _BANK + _QUERIES]
            count = max(1, min(_QUERIES, len(chosen) // 4))
            bank, queries = chosen[count:], chosen[:count]

        def pixels(of: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(np.stack([_seen(data, int(row), config) for row in of]))

        def truth(of: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(labels[of].astype(np.int64))

        return cls(pixels(bank), truth(bank), pixels(queries), truth(queries))

    def top1(self, summaries: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b c"]]) -> float:
        """The share of queries that get their own label. summaries: of a batch of pixels."""
        bank, queries = (
            torch.cat([summaries(batch) for batch in pixels.split(_BATCH)]) for pixels in (self.bank, self.queries)
        )
        found = knn_predictions(bank, self.bank_labels.to(bank.device), queries)
        return float((found.cpu() == self.query_labels).float().mean())


def _seen(data: CropData, row: int, config: StudentConfig) -> NDArray[np.uint8]:
    image = data.image(row)
    return eval_pixels(image, image_hw=config.image_hw, fit=config.fit, centre_share=config.centre_share)


def top1_error(top1: float, queries: int) -> float:
    """Return the standard error of a share of right answers (binomial), as a share."""
    return math.sqrt(max(0.0, top1 * (1 - top1)) / queries)
