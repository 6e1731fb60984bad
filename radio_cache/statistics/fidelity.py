"""Fidelity: the difference between decoded features and the teacher's."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Errors of decoded tokens, averaged over `num_tokens` tokens.

    Args:
        num_tokens: number of tokens measured.
        cosine: mean cosine of decoded and true token.
        cosine_worst: first percentile of these cosines.
        squared_error: mean squared distance of decoded and true token, summed over channels.
        variance: mean squared distance of the true tokens from their mean.
    """

    num_tokens: int
    cosine: float
    cosine_worst: float
    squared_error: float
    variance: float

    @property
    def relative_mse(self) -> float:
        """Squared error relative to the variance; decoding every token to the mean token would give 1."""
        return self.squared_error / self.variance if self.variance > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, as receipts store them."""
        return asdict(self)


PERFECT = Fidelity(num_tokens=0, cosine=1.0, cosine_worst=1.0, squared_error=0.0, variance=0.0)
"""Fidelity of no tokens at all."""


def measure_fidelity(features: NDArray[np.float32], decoded: NDArray[np.float32]) -> Fidelity:
    """Return the fidelity of decoded tokens (n, c) to true ones (n, c); `PERFECT` for no tokens."""
    if len(features) == 0:
        return PERFECT
    cosines, squared_errors = token_errors(features, decoded)
    # float64: squares of float32 features are summed over up to millions of values.
    true = features.astype(np.float64)
    variance = float(np.square(true - true.mean(axis=0)).sum())
    return fidelity_from_cosines(cosines, float(squared_errors.sum()), variance)


def token_errors(
    features: NDArray[np.float32], decoded: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the cosines (n,) of decoded and true tokens (n, c), and their squared distances (n,)."""
    true, approximate = features.astype(np.float64), decoded.astype(np.float64)
    true_lengths, decoded_lengths = np.linalg.norm(true, axis=-1), np.linalg.norm(approximate, axis=-1)
    products = np.einsum("nc,nc->n", true, approximate)
    lengths = true_lengths * decoded_lengths
    # Two zero vectors agree, which is a cosine of 1. A zero vector and another one have a cosine of 0.
    both_zero = (true_lengths == 0) & (decoded_lengths == 0)
    cosines = np.where(lengths > 0, products / np.maximum(lengths, 1e-300), both_zero.astype(np.float64))
    return cosines, np.square(true - approximate).sum(axis=-1)


def chain_fidelity(first: Fidelity, second: Fidelity) -> Fidelity:
    """Estimate the fidelity of tokens that were encoded twice.

    The errors of the two encodings are taken to be independent, so that cosines multiply and squared errors add.

    Args:
        first: of the first encoding, compared with the teacher's tokens.
        second: of the second encoding, compared with the decoded tokens of the first.
    """
    return Fidelity(
        num_tokens=second.num_tokens,
        cosine=first.cosine * second.cosine,
        cosine_worst=first.cosine_worst * second.cosine_worst,
        squared_error=first.squared_error + second.squared_error,
        variance=second.variance,
    )


def fidelity_from_cosines(cosines: NDArray[np.floating[Any]], squared_errors: float, variance: float) -> Fidelity:
    """Return the fidelity of n > 0 tokens.

    Args:
        cosines: (n,) of decoded and true tokens.
        squared_errors: squared distances of decoded and true tokens, summed over tokens.
        variance: squared distances of true tokens from their mean, summed over tokens.
    """
    return Fidelity(
        num_tokens=len(cosines),
        cosine=float(cosines.mean()),
        cosine_worst=float(np.percentile(cosines, 1)),
        squared_error=squared_errors / len(cosines),
        variance=variance / len(cosines),
    )


def combine_fidelity(parts: Iterable[Fidelity]) -> Fidelity | None:
    """Return the fidelity of all parts together; None if there is no part with tokens.

    `cosine_worst` is the smallest of the parts. `variance` is the one within parts, and less than that of the whole
    wherever the means of parts differ: replace it where the whole's is known.
    """
    measured = [part for part in parts if part.num_tokens > 0]
    count = sum(part.num_tokens for part in measured)
    if count == 0:
        return None
    # Means weigh by tokens: shards and images have different numbers of them.
    return Fidelity(
        num_tokens=count,
        cosine=sum(part.cosine * part.num_tokens for part in measured) / count,
        cosine_worst=min(part.cosine_worst for part in measured),
        squared_error=sum(part.squared_error * part.num_tokens for part in measured) / count,
        variance=sum(part.variance * part.num_tokens for part in measured) / count,
    )
