"""How near decoded features are to what the teacher said."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Of `num_tokens` tokens: mean cosine of decoded and true token, and its first percentile; squared distance of
    decoded and true token, and of the true token from the mean of all, both averaged over tokens."""

    num_tokens: int
    cosine: float
    cosine_worst: float
    squared_error: float
    variance: float

    @property
    def relative_mse(self) -> float:
        """Squared error relative to the variance: 1 is what the mean token alone would reach."""
        return self.squared_error / self.variance if self.variance > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


PERFECT = Fidelity(num_tokens=0, cosine=1.0, cosine_worst=1.0, squared_error=0.0, variance=0.0)
"""Of no tokens at all."""


def measure(features: NDArray[np.float32], decoded: NDArray[np.float32]) -> Fidelity:
    """Fidelity of decoded tokens (n, c), beside the true ones. Of no tokens at all it is perfect."""
    if len(features) == 0:
        return PERFECT
    cosines, squared_errors = token_errors(features, decoded)
    true = features.astype(np.float64)
    variance = float(np.square(true - true.mean(axis=0)).sum())
    return from_cosines(cosines, float(squared_errors.sum()), variance)


def token_errors(
    features: NDArray[np.float32], decoded: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) cosines of decoded tokens (n, c) and the true ones, and (n,) their squared distances."""
    true, found = features.astype(np.float64), decoded.astype(np.float64)
    lengths_true, lengths_found = np.linalg.norm(true, axis=-1), np.linalg.norm(found, axis=-1)
    products = np.einsum("nc,nc->n", true, found)
    lengths = lengths_true * lengths_found
    # Two zero vectors agree; one zero vector beside another agrees in nothing.
    both_zero = (lengths_true == 0) & (lengths_found == 0)
    cosines = np.where(lengths > 0, products / np.maximum(lengths, 1e-300), both_zero.astype(np.float64))
    return cosines, np.square(true - found).sum(axis=-1)


def after(first: Fidelity, second: Fidelity) -> Fidelity:
    """Of tokens encoded twice, `second` beside what `first` had left of them: an estimate.

    The errors are taken to have nothing to do with each other, so that cosines multiply and squared errors add.
    """
    return Fidelity(
        num_tokens=second.num_tokens,
        cosine=first.cosine * second.cosine,
        cosine_worst=first.cosine_worst * second.cosine_worst,
        squared_error=first.squared_error + second.squared_error,
        variance=second.variance,
    )


def from_cosines(cosines: NDArray[np.floating[Any]], squared_errors: float, variance: float) -> Fidelity:
    """From the cosines of all tokens (n,), n > 0, and their summed squared errors and squared distances from the mean."""
    return Fidelity(
        num_tokens=len(cosines),
        cosine=float(cosines.mean()),
        cosine_worst=float(np.percentile(cosines, 1)),
        squared_error=squared_errors / len(cosines),
        variance=variance / len(cosines),
    )


def combined(parts: Iterable[Fidelity]) -> Fidelity | None:
    """Of all the parts together: means by tokens; the worst of their worst percentiles. None of no parts.

    Its variance is the one within parts, less than that of the whole wherever parts differ: replace it where it is known.
    """
    known = [part for part in parts if part.num_tokens > 0]
    count = sum(part.num_tokens for part in known)
    if count == 0:
        return None
    return Fidelity(
        num_tokens=count,
        cosine=sum(part.cosine * part.num_tokens for part in known) / count,
        cosine_worst=min(part.cosine_worst for part in known),
        squared_error=sum(part.squared_error * part.num_tokens for part in known) / count,
        variance=sum(part.variance * part.num_tokens for part in known) / count,
    )
