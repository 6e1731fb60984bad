"""How near decoded features are to what the teacher said."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Of `num_tokens` tokens: mean cosine of decoded and true token, its first percentile, and the mean squared error
    relative to the variance (the squared distance from the tokens' own mean)."""

    num_tokens: int
    cosine: float
    cosine_worst: float
    relative_mse: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(features: NDArray[np.float32], decoded: NDArray[np.float32]) -> Fidelity:
    """Fidelity of decoded tokens (n, c), beside the true ones. Of no tokens at all it is perfect."""
    if len(features) == 0:
        return Fidelity(num_tokens=0, cosine=1.0, cosine_worst=1.0, relative_mse=0.0)
    true, found = features.astype(np.float64), decoded.astype(np.float64)
    lengths_true, lengths_found = np.linalg.norm(true, axis=-1), np.linalg.norm(found, axis=-1)
    products = np.einsum("nc,nc->n", true, found)
    lengths = lengths_true * lengths_found
    # Two zero vectors agree; one zero vector beside another agrees in nothing.
    both_zero = (lengths_true == 0) & (lengths_found == 0)
    cosines = np.where(lengths > 0, products / np.maximum(lengths, 1e-300), both_zero.astype(np.float64))
    squared_errors = float(np.square(true - found).sum())
    variance = float(np.square(true - true.mean(axis=0)).sum())
    return from_cosines(cosines, squared_errors, variance)


def from_cosines(cosines: NDArray[np.floating[Any]], squared_errors: float, variance: float) -> Fidelity:
    """From the cosines of all tokens (n,), n > 0, and their summed squared errors and squared distances from the mean."""
    return Fidelity(
        num_tokens=len(cosines),
        cosine=float(cosines.mean()),
        cosine_worst=float(np.percentile(cosines, 1)),
        relative_mse=squared_errors / variance if variance > 0 else 0.0,
    )


def combined(parts: Iterable[Fidelity]) -> Fidelity | None:
    """Of all the parts together: means by tokens; the worst of their worst percentiles. None of no parts."""
    known = [part for part in parts if part.num_tokens > 0]
    count = sum(part.num_tokens for part in known)
    if count == 0:
        return None
    return Fidelity(
        num_tokens=count,
        cosine=sum(part.cosine * part.num_tokens for part in known) / count,
        cosine_worst=min(part.cosine_worst for part in known),
        relative_mse=sum(part.relative_mse * part.num_tokens for part in known) / count,
    )
