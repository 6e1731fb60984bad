"""Which parts of an image are alike to an encoder? Cosine of all tokens with a few of them, as heat maps; nobody clicks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from evals.encoders import OWN, LiveEncoder
from evals.encoders.gathered import learned_from, live_encoders
from evals.encoders.trained_on import held_out_of
from evals.errors import EvalError
from evals.shared.devices import Device
from evals.shared.image_set import image_set, open_source
from evals.shared.progress import Progress
from radio_cache.errors import ConfigError
from radio_cache.torch import pick_device
from radio_cache.view.picture_grid import Pane

_SIDE_PX = 176
_HEAT = np.array([[20, 20, 60], [70, 60, 140], [190, 80, 110], [250, 170, 80], [255, 250, 210]], np.float64)


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """images: any place; None takes the first run's cache. shown: how many images. anchors: tokens of each compared with all."""

    images: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    shown: int = 3
    anchors: int = 3
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.shown < 1 or self.anchors < 1:
            raise ConfigError(f"--shown and --anchors are at least 1, not {self.shown} and {self.anchors}")


def run_similarity(config: SimilarityConfig, *, progress: Progress | None = None) -> list[list[Pane]]:
    """A row of pictures per image and encoder: the image, then one heat map per anchor, which a ring marks.

    Anchors are chosen by the first encoder, as far apart in its features as can be, and are the same places for all.
    """
    device = torch.device(pick_device(config.device))
    encoders = [
        one for one in live_encoders(config.runs, config.models, config.weights, device=device) if one.map_spaces
    ]
    if not encoders:
        raise EvalError("no encoder has feature maps: name a --run, or a --model that has more than a summary")
    fallback = learned_from(encoders)
    place = config.images if config.images is not None else fallback
    if place is None:
        raise ConfigError("similarity needs images: give --images PLACE, or --run RUN")
    images, _ = held_out_of(image_set(open_source(place)), encoders)
    order = np.random.default_rng(config.seed).permutation(len(images))
    rows: list[list[Pane]] = []
    chosen = np.sort(order[: config.shown]).tolist()
    for number, position in enumerate(chosen):
        image = images.decoded(position)
        if image is None:
            continue
        places: list[tuple[float, float]] = []
        for encoder in encoders:
            tokens, shown = token_map(encoder, image)
            places = places or distinct_places(tokens, config.anchors)
            rows.append([(encoder.name, shown), *(("", _heat(similarity_to(tokens, at), shown, at)) for at in places)])
        if progress is not None:
            progress("similarity", number + 1, len(chosen))
    if not rows:
        raise EvalError(f"{images.place}: none of the images drawn could be read")
    return rows


def token_map(encoder: LiveEncoder, image: Image.Image) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(h, w, c) its tokens less their mean, of length 1; and what it is shown, as a picture."""
    pixels = encoder.pixels_of(image)
    with torch.inference_mode():
        out = encoder.outputs(torch.from_numpy(np.stack([pixels])), [(image.height, image.width)])
    tokens = out.maps[OWN][0].float().cpu().numpy()
    tokens = tokens - tokens.mean(axis=(0, 1))
    tokens /= np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    return tokens, np.asarray(Image.fromarray(pixels).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC))


def distinct_places(tokens: NDArray[np.float32], count: int) -> list[tuple[float, float]]:
    """(y, x) in [0, 1] of tokens far apart in features: the centre's, then always the one most unlike those before."""
    h, w, _ = tokens.shape
    flat = tokens.reshape(h * w, -1)
    chosen = [(h // 2) * w + w // 2]
    while len(chosen) < min(count, h * w):
        chosen.append(int((flat @ flat[chosen].T).max(axis=1).argmin()))
    return [((one // w + 0.5) / h, (one % w + 0.5) / w) for one in chosen]


def similarity_to(tokens: NDArray[np.float32], place: tuple[float, float]) -> NDArray[np.float32]:
    """(h, w) cosine of every token with the one at a place."""
    h, w, _ = tokens.shape
    return tokens @ tokens[min(h - 1, int(place[0] * h)), min(w - 1, int(place[1] * w))]


def _heat(cosines: NDArray[np.float32], shown: NDArray[np.uint8], place: Sequence[float]) -> NDArray[np.uint8]:
    share = np.clip(cosines, 0.0, 1.0) * (len(_HEAT) - 1)
    low = np.minimum(share.astype(np.int64), len(_HEAT) - 2)
    colours = _HEAT[low] + (share - low)[..., None] * (_HEAT[low + 1] - _HEAT[low])
    large = np.asarray(Image.fromarray(colours.astype(np.uint8)).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.NEAREST))
    grey = shown.mean(axis=-1, keepdims=True)
    made = (0.75 * large + 0.25 * grey).astype(np.uint8)
    ys, xs = np.mgrid[:_SIDE_PX, :_SIDE_PX] + 0.5
    ring = np.abs(np.hypot(ys - place[0] * _SIDE_PX, xs - place[1] * _SIDE_PX) - 5) < 1.5
    made[ring] = (255, 255, 255)
    return made
