"""Token similarity as heat maps: cosine of all tokens of an image with a few anchors, which are chosen automatically."""

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
# Dark blue to pale yellow, rising in brightness, so that it also reads in grey.
_HEAT = np.array([[20, 20, 60], [70, 60, 140], [190, 80, 110], [250, 170, 80], [255, 250, 210]], np.float64)


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """Settings of a similarity picture.

    Attributes:
        images: a cache, folder or tars; None takes the cache of the first run.
        runs, models, weights: as for k-NN.
        num_images: images to draw, chosen by `seed`.
        anchors: tokens of each image that all others are compared with.
        device: where models run.
    """

    images: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    num_images: int = 3
    anchors: int = 3
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.anchors < 1:
            raise ConfigError(f"--num-images and --anchors are at least 1, not {self.num_images} and {self.anchors}")


def run_similarity(config: SimilarityConfig, *, progress: Progress | None = None) -> list[list[Pane]]:
    """Return a row of pictures per image and encoder: the image, then one heat map per anchor, which a ring marks.

    Anchors are chosen by the features of the first encoder, as unlike each other as possible, and are the same for all.

    Raises:
        RadioCacheError: if something cannot be opened, or no encoder has maps.
    """
    device = torch.device(pick_device(config.device))
    # A summary alone has no tokens to compare.
    encoders = [
        encoder
        for encoder in live_encoders(config.runs, config.models, config.weights, device=device)
        if encoder.map_spaces
    ]
    if not encoders:
        raise EvalError("no encoder has feature maps: name a --run, or a --model that has more than a summary")
    fallback = learned_from(encoders)
    location = config.images if config.images is not None else fallback
    if location is None:
        raise ConfigError("similarity needs images: give --images PATH_OR_URL, or --run FOLDER")
    # A student has memorised its training images, so held-out ones are drawn if there are any.
    images, _ = held_out_of(image_set(open_source(location)), encoders)
    order = np.random.default_rng(config.seed).permutation(len(images))
    rows: list[list[Pane]] = []
    chosen = np.sort(order[: config.num_images]).tolist()
    for number, position in enumerate(chosen):
        image = images.decoded(position)
        # A file that cannot be decoded costs one picture.
        if image is None:
            continue
        anchors_yx: list[tuple[float, float]] = []
        for encoder in encoders:
            tokens, thumbnail = token_map(encoder, image)
            # Chosen once per image, by the first encoder; relative positions fit the grids of all others.
            anchors_yx = anchors_yx or distinct_tokens(tokens, config.anchors)
            rows.append(
                [
                    (encoder.name, thumbnail),
                    *(("", _heat(similarity_to(tokens, anchor_yx), thumbnail, anchor_yx)) for anchor_yx in anchors_yx),
                ]
            )
        if progress is not None:
            progress("similarity", number + 1, len(chosen))
    if not rows:
        raise EvalError(f"{images.location}: none of the images drawn could be read")
    return rows


def token_map(encoder: LiveEncoder, image: Image.Image) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return (h, w, c) tokens of an image, centred and of length 1, and the image as the encoder sees it."""
    pixels = encoder.pixels_of(image)
    with torch.inference_mode():
        out = encoder.outputs(torch.from_numpy(np.stack([pixels])), [(image.height, image.width)])
    tokens = out.maps[OWN][0].float().cpu().numpy()
    # The mean token is common to the whole image: with it, all tokens would look alike.
    tokens = tokens - tokens.mean(axis=(0, 1))
    tokens /= np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    return tokens, np.asarray(Image.fromarray(pixels).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC))


def distinct_tokens(tokens: NDArray[np.float32], count: int) -> list[tuple[float, float]]:
    """Choose tokens far apart in features: the centre, then always the one most unlike those before.

    Args:
        tokens: (h, w, c) of length 1.
        count: tokens to choose.

    Returns:
        (y, x) in [0, 1] of each, so that they fit grids of other sizes.
    """
    h, w, _ = tokens.shape
    flat = tokens.reshape(h * w, -1)
    # Farthest-point sampling, which begins at the centre: most photos have their subject there.
    chosen = [(h // 2) * w + w // 2]
    while len(chosen) < min(count, h * w):
        # (n, c) @ (c, m): for every token its highest cosine with a chosen one; the lowest of these is farthest.
        chosen.append(int((flat @ flat[chosen].T).max(axis=1).argmin()))
    return [((token // w + 0.5) / h, (token % w + 0.5) / w) for token in chosen]


def similarity_to(tokens: NDArray[np.float32], anchor_yx: tuple[float, float]) -> NDArray[np.float32]:
    """Return (h, w) cosine of every token with the one at (y, x) in [0, 1]."""
    h, w, _ = tokens.shape
    # The minimum guards against a coordinate of exactly 1.
    return tokens @ tokens[min(h - 1, int(anchor_yx[0] * h)), min(w - 1, int(anchor_yx[1] * w))]


def _heat(cosines: NDArray[np.float32], thumbnail: NDArray[np.uint8], anchor_yx: Sequence[float]) -> NDArray[np.uint8]:
    """Return a heat map over the greyed image, with a ring around the anchor."""
    # Position on the colour scale, then linear between the two nearest colours.
    share = np.clip(cosines, 0.0, 1.0) * (len(_HEAT) - 1)
    low = np.minimum(share.astype(np.int64), len(_HEAT) - 2)
    colours = _HEAT[low] + (share - low)[..., None] * (_HEAT[low + 1] - _HEAT[low])
    # Nearest neighbour, so that tokens remain visible as squares.
    large = np.asarray(Image.fromarray(colours.astype(np.uint8)).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.NEAREST))
    # A quarter of the image in grey gives orientation without changing the colours of the map.
    grey = thumbnail.mean(axis=-1, keepdims=True)
    mixed = (0.75 * large + 0.25 * grey).astype(np.uint8)
    ys, xs = np.mgrid[:_SIDE_PX, :_SIDE_PX] + 0.5
    # A circle of radius 5 px and 3 px line around the centre of the anchor.
    ring = np.abs(np.hypot(ys - anchor_yx[0] * _SIDE_PX, xs - anchor_yx[1] * _SIDE_PX) - 5) < 1.5
    mixed[ring] = (255, 255, 255)
    return mixed
