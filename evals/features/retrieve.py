"""Image retrieval as pictures: the nearest images of a few queries, by every encoder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from evals.encoders import OWN
from evals.encoders.counted import CountedImages
from evals.encoders.gathered import images_and_encoders, learned_from, live_encoders
from evals.errors import EvalError
from evals.knn.search import NO_ROW, NeighbourSearch
from evals.shared.devices import Device
from evals.shared.image_set import ImageSet
from evals.shared.progress import Progress
from radio_cache.errors import ConfigError
from radio_cache.torch import pick_device
from radio_cache.view.picture_grid import Pane

_SIDE_PX, _BORDER_PX = 112, 4
_RIGHT, _WRONG, _PLAIN = (60, 150, 80), (200, 80, 70), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """Settings of a retrieval picture.

    Attributes:
        images: a cache, folder or tars; None takes the cache of the first run.
        runs, models, weights: as for k-NN.
        num_queries: number of query images.
        k: neighbours of each query.
        limit: images to search at most, drawn by `seed`, as the queries are.
        device: where models run.
    """

    images: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    num_queries: int = 4
    k: int = 6
    seed: int = 0
    limit: int | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.num_queries < 1 or self.k < 1:
            raise ConfigError(f"--num-queries and -k are at least 1, not {self.num_queries} and {self.k}")


def run_retrieve(config: RetrieveConfig, *, progress: Progress | None = None) -> list[list[Pane]]:
    """Return a row of pictures per query and encoder: the query, then its nearest images by cosine of summaries.

    Neighbours of the query's class have a green border, others a red one. There is no border if images have no classes, or
    if the query is the only image of its class.

    Raises:
        RadioCacheError: if something cannot be opened, or there are fewer than two images.
    """
    device = torch.device(pick_device(config.device))
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    fallback = learned_from(live)
    images, encoders, _ = images_and_encoders(config.images, live, fallback, limit=config.limit, seed=config.seed)
    grids: dict[str, list[list[Pane]]] = {}
    for encoder in encoders:
        block = encoder.summaries(images, on_images=CountedImages(encoder, len(images), progress))
        # A query needs at least one other image.
        if len(block.positions) < 2:
            raise EvalError(f"{images.location}: retrieval needs at least two images that can be read")
        # The same seed for every encoder: all rows of a query show the same image first.
        order = np.random.default_rng(config.seed).permutation(len(block.positions))
        query_positions = np.sort(order[: config.num_queries])
        features = block.summaries[OWN]
        # Queries are rows of the bank: each excludes itself.
        search = NeighbourSearch(
            features[query_positions], config.k, excluded_rows=query_positions, device=config.device
        )
        search.add(np.arange(len(features)), features)
        neighbours = search.result()
        grids[encoder.name] = [
            _row(images, encoder.name, int(block.positions[query]), block.positions[rows[rows != NO_ROW]])
            for query, rows in zip(query_positions, neighbours.rows, strict=True)
        ]
    # By query first, so that the encoders' answers to one query stand below each other.
    return [rows[number] for number in range(len(next(iter(grids.values())))) for rows in grids.values()]


def _row(images: ImageSet, name: str, query: int, rows: NDArray[np.int64]) -> list[Pane]:
    """Return the pictures of a query and its neighbours."""
    label = int(images.labels[query])
    # With no other image of its class, every neighbour would be marked as wrong.
    is_lone = (images.labels == label).sum() < 2
    panes: list[Pane] = [(name, _square(images, query, _PLAIN))]
    for position in rows.tolist():
        neighbour_label = int(images.labels[position])
        # Without a class there is no right and wrong.
        colour = _PLAIN if label < 0 or is_lone else _RIGHT if neighbour_label == label else _WRONG
        panes.append(
            (images.name_of(neighbour_label) if neighbour_label >= 0 else "", _square(images, position, colour))
        )
    return panes


def _square(images: ImageSet, position: int, border: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return the centre of an image as a small square with a border of this colour."""
    image = images.decoded(position)
    assert image is not None, "it was decoded before, for its summary, or lies in a cache"
    # A centred square, so that pictures fill the grid without distortion.
    side = min(image.width, image.height)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    small = image.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    framed = np.full((_SIDE_PX + 2 * _BORDER_PX, _SIDE_PX + 2 * _BORDER_PX, 3), border, np.uint8)
    framed[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = np.asarray(small)
    return framed
