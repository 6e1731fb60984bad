"""Any model of open_clip: its image tower, in the space of its text tower, with its own preprocessing."""

from typing import Any, cast

import open_clip
import torch
from torch import Tensor

from evals.encoders.network import Network, NetworkOutput
from evals.encoders.timm_model import Weights, no_weights
from radio_cache.crops import Fit, ViewGeometry
from radio_cache.errors import ConfigError, TeacherWeightsError, unknown_name
from radio_cache.schema import Normalisation

_FITS: dict[str, Fit] = {"shortest": "crop", "squash": "squash"}


def open_clip_network(model: str, weights: Weights, *, size_px: int | None, device: torch.device) -> Network:
    """Summary: the image embedding, not normalised. Map: patch tokens after the final norm.

    model: "ViT-B-32/laion2b_s34b_b79k", or the name alone where weights are given.
    Raises ConfigError for a name or a size that is not there, TeacherWeightsError for weights that cannot be had.
    """
    net = load_open_clip(model, weights, size_px=size_px)
    config: dict[str, Any] = open_clip.get_model_preprocess_cfg(net)
    size = config["size"]
    h, w = (size, size) if isinstance(size, int) else cast(tuple[int, int], size)
    if config["resize_mode"] not in _FITS or config["interpolation"] not in ("bilinear", "bicubic"):
        raise ConfigError(
            f"open_clip model '{model}' wants its images resized by '{config['resize_mode']}', '{config['interpolation']}', "
            f"which is not known here; known are {', '.join(_FITS)}; bilinear, bicubic"
        )
    net = net.to(device)
    has_map = hasattr(net.visual, "forward_intermediates")

    def call(images: Tensor) -> NetworkOutput:
        if not has_map:
            return NetworkOutput(net.encode_image(images), None)
        out = net.visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NCHW")
        return NetworkOutput(out["image_features"], out["image_intermediates"][0].permute(0, 2, 3, 1))

    with torch.inference_mode():
        probe = call(torch.zeros(1, 3, h, w, device=device)).spatial
    grid_hw = (1, 1) if probe is None else (int(probe.shape[1]), int(probe.shape[2]))
    stride = h / grid_hw[0]
    geometry = ViewGeometry(
        fit=_FITS[config["resize_mode"]], input_hw=(h, w), resize_px=min(h, w),
        interpolation=config["interpolation"], grid_hw=grid_hw, stride_px=stride, offset_px=stride / 2,
    )  # fmt: skip
    return Network(
        about=f"open_clip {model}" + (", random weights" if weights == "random" else ""), geometry=geometry,
        normalisation=Normalisation(scale=255.0, mean=tuple(config["mean"]), std=tuple(config["std"])),
        has_summary=True, has_map=has_map, call=call,
        at_size=lambda px: open_clip_network(model, weights, size_px=px, device=device),
    )  # fmt: skip


def load_open_clip(model: str, weights: Weights, *, size_px: int | None = None) -> Any:
    """Both towers, in eval mode, on the CPU. Raises as `open_clip_network` does."""
    name, slash, tag = model.rpartition("/") if "/" in model else (model, "", "")
    if name not in open_clip.list_models():
        raise ConfigError(unknown_name("open_clip model", name, open_clip.list_models()))
    published = tag if weights is None else None
    if weights is None and not slash:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"open_clip:{name} needs the name of its weights, as in open_clip:{name}/{tags[0] if tags else 'TAG'} "
            f"(there are {', '.join(tags) or 'none'}), or --weights FILE, or --weights random"
        )
    rng = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        net: Any = open_clip.create_model(name, pretrained=published, force_image_size=size_px)
    except Exception as exc:  # the hub client and open_clip raise many kinds
        if published is None:
            raise ConfigError(f"open_clip model '{name}' cannot be made for {size_px} px: {exc}") from exc
        raise TeacherWeightsError(no_weights(f"open_clip model '{model}'", exc)) from exc
    finally:
        torch.set_rng_state(rng)
    if weights is not None and weights != "random":
        try:
            open_clip.load_checkpoint(net, str(weights))
        except Exception as exc:  # torch, safetensors and open_clip raise many kinds for a file that does not fit
            reason = str(exc).strip().split("\n", 1)[0]
            raise TeacherWeightsError(f"open_clip model '{name}': {weights} does not fit it: {reason}") from exc
    return net.eval()
