"""Models of timm, with the preprocessing of their configuration."""

import difflib
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import is_model, list_models
from torch import Tensor

from cache_builder.teachers.preprocessing import timm_preprocessing
from cache_builder.teachers.state_dict import load_exactly, read_state_dict
from evals.encoders.library import Weights, no_weights, seeded, tiling_network
from evals.encoders.network import Network, NetworkOutput
from radio_cache.errors import ConfigError, TeacherWeightsError


def timm_network(model: str, weights: Weights, *, size_px: int | None, device: torch.device) -> Network:
    """Load a model: the summary is the input of the classifier, the map the last stage, after the final norm of a transformer.

    Tokens are assumed to tile the input evenly.

    Args:
        model: name in timm.
        weights: see `Weights`.
        size_px: side of the input; None for the model's own.
        device: of the network.

    Raises:
        ConfigError: for an unknown name, size or preprocessing.
        TeacherWeightsError: if the weights cannot be downloaded or do not fit.
    """
    net = _load(model, weights)
    config: dict[str, Any] = resolve_model_data_config(net)
    native = int(config["input_size"][1])
    # The size is applied to the network before the preprocessing is derived from it.
    size = size_px or native
    if size != native:
        _resize(net, model, native, size)
    net = net.eval().to(device)
    has_map = hasattr(net, "forward_intermediates")

    def call(images: Tensor) -> NetworkOutput:
        if not has_map:
            return NetworkOutput(net.forward_head(net.forward_features(images), pre_logits=True), None)
        # norm=True normalises the map as the classifier's input is; convolutional networks ignore it.
        final, (last,) = net.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
        # (b, c, h, w) -> (b, h, w, c)
        return NetworkOutput(net.forward_head(final, pre_logits=True), last.permute(0, 2, 3, 1))

    return tiling_network(
        "timm",
        model,
        weights,
        net,
        call,
        timm_preprocessing(f"timm model '{model}'", config, size_px=size),
        device=device,
        at_size=lambda px: timm_network(model, weights, size_px=px, device=device),
    )


def _load(model: str, weights: Weights) -> Any:
    if not is_model(model):
        # timm has over a thousand names: a list of all would hide the near ones.
        similar_names = difflib.get_close_matches(model, list_models(), n=5, cutoff=0.4)
        raise ConfigError(
            f"timm {timm.__version__} has no model '{model}'. Nearest: {', '.join(similar_names) or 'none'}. "
            "timm.list_models('*part of a name*') finds others."
        )
    if weights is None:
        try:
            return timm.create_model(model, pretrained=True)
        except Exception as exc:  # the hub client raises dozens of kinds; the cure is the same for all
            raise TeacherWeightsError(no_weights(f"timm model '{model}'", exc)) from exc
    with seeded():
        net = timm.create_model(model, pretrained=False)
    if weights != "random":
        load_exactly(net, read_state_dict(weights, teacher=model), teacher=model, path=weights)
    return net


def _resize(net: Any, model: str, native: int, size: int) -> None:
    """Prepare the network for another input size; only transformers need it."""
    try:
        # Transformers resample their position embedding; convolutional networks take any size as they are.
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(size, size))
            return
    except Exception as exc:  # timm asserts, or fails in the middle of a reshape
        raise ConfigError(f"timm model '{model}' cannot take {size} px ({exc}): its own size is {native} px") from exc
    if net.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(f"timm model '{model}' takes {native} px and nothing else, not {size} px")
