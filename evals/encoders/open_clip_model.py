"""Models of open_clip: the image tower, in the space of the text tower, with the library's preprocessing."""

import contextlib
import logging
from collections.abc import Generator
from typing import Any

import open_clip
import torch
from torch import Tensor

from cache_builder.teachers.clip_tower import trained_with_quick_gelu
from cache_builder.teachers.preprocessing import open_clip_preprocessing
from cache_builder.teachers.weights import first_line
from evals.encoders.library import Weights, no_weights, seeded, tiling_network
from evals.encoders.network import Network, NetworkOutput
from radio_cache.errors import ConfigError, TeacherWeightsError, unknown_name


def open_clip_network(model: str, weights: Weights, *, size_px: int | None, device: torch.device) -> Network:
    """Load the image tower of a model: the summary is the image embedding, the map the patch tokens after the final norm.

    Args:
        model: "ViT-B-32/laion2b_s34b_b79k", or the name alone if weights are given.
        weights: see `Weights`.
        size_px: side of the input; None for the model's own.
        device: of the network.

    Raises:
        ConfigError: for an unknown name or size.
        TeacherWeightsError: if the weights cannot be downloaded or do not fit.
    """
    net = load_open_clip(model, weights, size_px=size_px)
    config: dict[str, Any] = open_clip.get_model_preprocess_cfg(net)
    net = net.to(device)
    # Some image towers lack the method: they have a summary alone.
    has_map = hasattr(net.visual, "forward_intermediates")

    def call(images: Tensor) -> NetworkOutput:
        if not has_map:
            return NetworkOutput(net.encode_image(images), None)
        # The final norm is applied, the projection into the text space is not: (b, c, h, w) -> (b, h, w, c).
        out = net.visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NCHW")
        return NetworkOutput(out["image_features"], out["image_intermediates"][0].permute(0, 2, 3, 1))

    return tiling_network(
        "open_clip",
        model,
        weights,
        net.visual,
        call,
        open_clip_preprocessing(f"open_clip model '{model}'", config),
        device=device,
        at_size=lambda px: open_clip_network(model, weights, size_px=px, device=device),
    )


@contextlib.contextmanager
def _no_warning_of_random_weights(published: str | None) -> Generator[None]:
    """Silence open_clip's warning of random weights where they are intended, or replaced by a file afterwards."""
    before = logging.root.manager.disable
    if published is None:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


LISTS_MODELS = "python -c 'import open_clip; print(*open_clip.list_models())'"


def load_open_clip(model: str, weights: Weights, *, size_px: int | None = None) -> Any:
    """Load both towers, in eval mode, on the CPU. Raises as `open_clip_network` does."""
    # The tag of the weights follows the last slash.
    name, slash, tag = model.rpartition("/") if "/" in model else (model, "", "")
    if name not in open_clip.list_models():
        raise ConfigError(unknown_name("open_clip model", name, open_clip.list_models(), listed_by=LISTS_MODELS))
    published = tag if weights is None else None
    if weights is None and not slash:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"open_clip:{name} needs the name of its weights, as in open_clip:{name}/{tags[0] if tags else 'TAG'} "
            f"(there are {', '.join(tags) or 'none'}), or --weights FILE, or --weights random"
        )
    try:
        # The text tower is initialised as well, so that random image and text weights are reproducible.
        with seeded(), _no_warning_of_random_weights(published):
            net: Any = open_clip.create_model(
                name,
                pretrained=published,
                force_image_size=size_px,
                force_quick_gelu=trained_with_quick_gelu(name, tag),
            )
    except Exception as exc:  # the hub client and open_clip raise many kinds
        if published is None:
            raise ConfigError(f"open_clip model '{name}' cannot be made for {size_px} px: {exc}") from exc
        raise TeacherWeightsError(no_weights(f"open_clip model '{model}'", exc)) from exc
    if weights is not None and weights != "random":
        try:
            open_clip.load_checkpoint(net, str(weights))
        except Exception as exc:  # torch, safetensors and open_clip raise many kinds for a file that does not fit
            raise TeacherWeightsError(
                f"open_clip model '{name}': {weights} does not fit it: {first_line(exc)}"
            ) from exc
    return net.eval()
