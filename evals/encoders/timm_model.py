"""Any model of timm, with the preprocessing that its configuration asks for."""

import difflib
import math
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import is_model, list_models
from torch import Tensor

from cache_builder.teachers.state_dict import load_exactly, read_state_dict
from evals.encoders.network import Network, NetworkOutput
from radio_cache.crops import Fit, Interpolation, ViewGeometry
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.schema import Normalisation

Weights = Path | Literal["random"] | None
"""A local file in the library's own format, random weights with seed 0, or None for the published ones."""

_FITS: dict[str, Fit] = {"center": "crop", "squash": "squash"}


def timm_network(model: str, weights: Weights, *, size_px: int | None, device: torch.device) -> Network:
    """Summary: the features before the classifier. Map: the last stage's, after the final norm of a transformer.

    Tokens are taken to tile the input evenly. Raises ConfigError for a name, a size or a preprocessing that is not
    there, TeacherWeightsError for weights that cannot be had or do not fit.
    """
    net = _load(model, weights)
    config: dict[str, Any] = resolve_model_data_config(net)
    native = int(config["input_size"][1])
    size = size_px or native
    if size != native:
        _resize(net, model, native, size)
    if config["crop_mode"] not in _FITS or config["interpolation"] not in ("bilinear", "bicubic"):
        raise ConfigError(
            f"timm model '{model}' wants its images cut by '{config['crop_mode']}' and resized '{config['interpolation']}', "
            f"which is not known here; known are {', '.join(_FITS)}; bilinear, bicubic"
        )
    net = net.eval().to(device)
    has_map = hasattr(net, "forward_intermediates")

    def call(images: Tensor) -> NetworkOutput:
        if not has_map:
            return NetworkOutput(net.forward_head(net.forward_features(images), pre_logits=True), None)
        final, (last,) = net.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
        return NetworkOutput(net.forward_head(final, pre_logits=True), last.permute(0, 2, 3, 1))

    grid_hw = _grid_hw(call, model, size, device) if has_map else (1, 1)
    fit = _FITS[config["crop_mode"]]
    stride = size / grid_hw[0]
    geometry = ViewGeometry(
        fit=fit, input_hw=(size, size), resize_px=math.floor(size / config["crop_pct"]) if fit == "crop" else size,
        interpolation=cast(Interpolation, config["interpolation"]), grid_hw=grid_hw, stride_px=stride, offset_px=stride / 2,
    )  # fmt: skip
    return Network(
        about=f"timm {model}" + (", random weights" if weights == "random" else ""), geometry=geometry,
        normalisation=Normalisation(scale=255.0, mean=tuple(config["mean"]), std=tuple(config["std"])),
        has_summary=True, has_map=has_map, call=call,
        at_size=lambda px: timm_network(model, weights, size_px=px, device=device),
    )  # fmt: skip


def _load(model: str, weights: Weights) -> Any:
    if not is_model(model):
        near = difflib.get_close_matches(model, list_models(), n=5, cutoff=0.4)
        raise ConfigError(
            f"timm {timm.__version__} has no model '{model}'. Nearest: {', '.join(near) or 'none'}. "
            "timm.list_models('*part of a name*') finds others."
        )
    if weights is None:
        try:
            return timm.create_model(model, pretrained=True)
        except Exception as exc:  # the hub client raises dozens of kinds; the cure is the same for all
            raise TeacherWeightsError(no_weights(f"timm model '{model}'", exc)) from exc
    rng = torch.get_rng_state()
    torch.manual_seed(0)
    net = timm.create_model(model, pretrained=False)
    torch.set_rng_state(rng)
    if weights != "random":
        load_exactly(net, read_state_dict(weights, teacher=model), teacher=model, path=weights)
    return net


def no_weights(what: str, exc: Exception) -> str:
    """The sentence for published weights that could not be fetched."""
    reason = str(exc).strip().split("\n", 1)[0] or type(exc).__name__
    return (
        f"{what} has no weights here, and they could not be downloaded ({reason}). Fetch them on a machine with a network "
        "and give them by --weights FILE; --weights random measures the untrained network"
    )


def _resize(net: Any, model: str, native: int, size: int) -> None:
    try:
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(size, size))
            return
    except Exception as exc:  # timm asserts, or fails in the middle of a reshape
        raise ConfigError(f"timm model '{model}' cannot take {size} px ({exc}): its own size is {native} px") from exc
    if net.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(f"timm model '{model}' takes {native} px and nothing else, not {size} px")


def _grid_hw(call: Any, model: str, size: int, device: torch.device) -> tuple[int, int]:
    try:
        with torch.inference_mode():
            out: NetworkOutput = call(torch.zeros(1, 3, size, size, device=device))
    except Exception as exc:  # as above
        raise ConfigError(f"timm model '{model}' cannot take {size} px: {exc}") from exc
    assert out.spatial is not None, "asked only of models that have a map"
    return int(out.spatial.shape[1]), int(out.spatial.shape[2])
