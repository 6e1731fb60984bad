"""How many directions features use (RankMe), and how alike two spaces are (linear CKA); no labels, nothing trained."""

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

DEFAULT_IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """images: any place; None takes the first run's cache. limit: images at most, drawn at random by seed."""

    images: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    limit: int | None = DEFAULT_IMAGES
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One feature space. rank: RankMe, between 1 and the width. cka: name of a teacher -> likeness in [0, 1]."""

    name: str
    kind: str
    about: str
    width: int
    rank: float
    cka: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RankTable:
    """What was measured and how."""

    protocol: str
    images: dict[str, str | int]
    teachers: tuple[str, ...]
    rows: tuple[RankRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_rank(config: RankConfig, *, progress: Progress | None = None) -> RankTable:
    """Summaries of all encoders on the same images, their RankMe, and their CKA with every teacher."""
    if config.limit is not None and config.limit < 2:
        raise ConfigError(f"--limit needs at least 2 images, got {config.limit}")
    device = torch.device(pick_device(config.device))
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    fallback = learned_from(live)
    images, encoders, held_out = images_and_encoders(
        config.images, live, fallback, limit=config.limit, seed=config.seed
    )
    found: dict[str, tuple[Any, NDArray[np.float64]]] = {}
    seen = np.arange(len(images))
    for encoder in encoders:
        block = encoder.summaries(images, on_images=CountedImages(encoder, len(images), progress))
        seen = block.positions
        for space in encoder.spaces if encoder.kind != "untrained" else (OWN,):
            name = encoder.name if space == OWN else f"{encoder.name} → {space}"
            found[name] = (encoder, block.summaries[space].astype(np.float64))
    if len(seen) < 2:
        raise EvalError(f"{images.place}: it takes two images that can be read, and there is {len(seen)}")
    teachers = tuple(name for name, (encoder, _) in found.items() if encoder.kind == "teacher")
    rows = tuple(
        RankRow(
            name=name,
            kind=encoder.kind,
            about=encoder.about if "→" not in name else "what it makes of that teacher",
            width=features.shape[1],
            rank=rank_me(features),
            cka={teacher: linear_cka(features, found[teacher][1]) for teacher in teachers},
        )
        for name, (encoder, features) in found.items()
    )
    notes = [*held_out, *left_out_notes(images)]
    narrow = [row.name for row in rows if row.width > len(seen)]
    if narrow:
        notes.append(
            f"{counted(len(seen), 'image', 'images')} bound the rank of {', '.join(narrow)}: more images, higher ranks."
        )
    protocol = f"summaries of {len(seen):,} images: RankMe (effective rank), linear CKA with every teacher"
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
    values = np.linalg.svd(features, compute_uv=False)
    if values.sum() == 0:
        raise EvalError("all features are zero: they have no rank")
    shares = values[values > 0] / values.sum()
    rank = float(np.exp(-(shares * np.log(shares)).sum()))
    return min(max(rank, 1.0), float(len(values)))  # rounding must not leave the range


def linear_cka(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Likeness in [0, 1] of two sets of features (n, c) and (n, d) of the same images; 1 up to rotation and scale.

    Source: Kornblith et al., arXiv 1905.00414, Eq. 4 with linear kernels. Columns are centred here.
    """
    if len(first) != len(second):
        raise ShapeError(f"CKA compares features of the same images: {len(first)} and {len(second)}")
    one, other = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.linalg.norm(one.T @ one) * np.linalg.norm(other.T @ other)
    return float(np.linalg.norm(other.T @ one) ** 2 / scale) if scale > 0 else 0.0
