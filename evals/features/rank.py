"""Effective rank of features (RankMe) and similarity of feature spaces (linear CKA), without labels or training."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.encoders import OWN
from evals.encoders.counted import CountedImages
from evals.encoders.gathered import images_and_encoders, learned_from, live_encoders
from evals.errors import EvalError
from evals.shared.devices import Device
from evals.shared.notes import counted, left_out_notes
from evals.shared.progress import Progress
from radio_cache.errors import ConfigError, ShapeError
from radio_cache.torch import pick_device

# The SVD of (2000, c) takes seconds, and 2000 exceeds the width of common encoders.
DEFAULT_IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Settings of a rank evaluation.

    Attributes:
        images: a cache, folder or tars; None takes the cache of the first run.
        runs, models, weights: as for k-NN.
        limit: images at most, drawn by `seed`.
        device: where models run.
    """

    images: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    limit: int | None = DEFAULT_IMAGES
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One feature space.

    Attributes:
        about: a short description of the encoder.
        width: values of a summary.
        rank: RankMe, between 1 and the width.
        cka: name of a teacher -> similarity in [0, 1].
    """

    name: str
    kind: str
    about: str
    width: int
    rank: float
    cka: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RankTable:
    """The measurements, and how they were made."""

    protocol: str
    images: dict[str, str | int]
    teachers: tuple[str, ...]
    rows: tuple[RankRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table."""
        return asdict(self)


def run_rank(config: RankConfig, *, progress: Progress | None = None) -> RankTable:
    """Encode the same images by all encoders; compute RankMe, and CKA with every teacher.

    Raises:
        RadioCacheError: if something cannot be opened, or there are fewer than two images.
    """
    if config.limit is not None and config.limit < 2:
        raise ConfigError(f"--limit needs at least 2 images, got {config.limit}")
    device = torch.device(pick_device(config.device))
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    fallback = learned_from(live)
    images, encoders, held_out = images_and_encoders(
        config.images, live, fallback, limit=config.limit, seed=config.seed
    )
    features_of: dict[str, tuple[Any, NDArray[np.float64]]] = {}
    read_positions = np.arange(len(images))
    for encoder in encoders:
        block = encoder.summaries(images, on_images=CountedImages(encoder, len(images), progress))
        read_positions = block.positions
        # An untrained student's heads are random projections: only its own features mean something.
        for space in encoder.spaces if encoder.kind != "untrained" else (OWN,):
            name = encoder.name if space == OWN else f"{encoder.name} → {space}"
            # float64: the entropy depends on small singular values.
            features_of[name] = (encoder, block.summaries[space].astype(np.float64))
    if len(read_positions) < 2:
        raise EvalError(f"{images.location}: it takes two images that can be read, and there is {len(read_positions)}")
    # Rows without the arrow: a teacher has no other space than its own.
    teachers = tuple(name for name, (encoder, _) in features_of.items() if encoder.kind == "teacher")
    rows = tuple(
        RankRow(
            name=name,
            kind=encoder.kind,
            about=encoder.description if "→" not in name else "prediction of that teacher",
            width=features.shape[1],
            rank=rank_me(features),
            cka={teacher: linear_cka(features, features_of[teacher][1]) for teacher in teachers},
        )
        for name, (encoder, features) in features_of.items()
    )
    notes = [*held_out, *left_out_notes(images)]
    # A matrix of n images has a rank of at most n, whatever its width.
    bounded = [row.name for row in rows if row.width > len(read_positions)]
    if bounded:
        notes.append(
            f"{counted(len(read_positions), 'image', 'images')} bound the rank of {', '.join(bounded)}: more images, higher "
            "ranks."
        )
    protocol = f"summaries of {len(read_positions):,} images: RankMe (effective rank), linear CKA with every teacher"
    return RankTable(
        protocol=protocol, images=images.usable().identity(), teachers=teachers, rows=rows, notes=tuple(notes)
    )


def rank_me(features: NDArray[np.float64]) -> float:
    """Return exp of the entropy of the normalised singular values of (n, c) features, between 1 and min(n, c).

    Raises:
        EvalError: for features that are not finite or all zero.

    Source: RankMe, arXiv 2210.02885, Eq. 1-2. Differs: no epsilon is added to the shares, which made the rank of equal
        directions exceed the width (64.0013 of 64); a share of zero adds nothing, its limit.
    """
    if not np.isfinite(features).all():
        raise EvalError("features hold NaN or infinity: they have no rank")
    # Not centred: RankMe is defined on the features as they are.
    values = np.linalg.svd(features, compute_uv=False)
    if values.sum() == 0:
        raise EvalError("all features are zero: they have no rank")
    shares = values[values > 0] / values.sum()
    rank = float(np.exp(-(shares * np.log(shares)).sum()))
    return min(max(rank, 1.0), float(len(values)))  # rounding must not leave the range


def linear_cka(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the linear CKA of two sets of features of the same images; 1 if they differ by rotation and scale only.

    Args:
        first: (n, c).
        second: (n, d).

    Returns:
        Similarity in [0, 1].

    Raises:
        ShapeError: if the number of images differs.

    Source: Kornblith et al., arXiv 1905.00414, Eq. 4 with linear kernels. Columns are centred here.
    """
    if len(first) != len(second):
        raise ShapeError(f"CKA compares features of the same images: {len(first)} and {len(second)}")
    # The n x n kernels are never made: their products reduce to (c, c), (d, d) and (d, c).
    centred_first, centred_second = first - first.mean(axis=0), second - second.mean(axis=0)
    # Norms of the self-similarities; 0 if all images have the same features.
    scale = np.linalg.norm(centred_first.T @ centred_first) * np.linalg.norm(centred_second.T @ centred_second)
    return float(np.linalg.norm(centred_second.T @ centred_first) ** 2 / scale) if scale > 0 else 0.0
