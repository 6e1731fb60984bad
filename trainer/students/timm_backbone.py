"""Any backbone of timm as a student: "timm:convnext_base", "timm:vit_small_patch16_224", ...

The summary is the mean of the map. timm's pooled features before its classifier would come from the last stage, which
is cut off here: students learn features of stride 16, and layers behind those would get no gradient.
"""

import difflib
from typing import Any, final

import timm
import torch
from jaxtyping import Float
from timm.models import is_model, list_models
from torch import Tensor

from radio_cache.errors import ConfigError
from trainer.students.base import Encoded, Student

MAX_STRIDE = 16  # pixels: the token size of the other students, and of SAM


@final
class TimmBackbone(Student):
    """The layers of a timm model up to one stage, by default the last of a stride of 16 or less.

    out_index picks another stage, counted as `timm.create_model(..., features_only=True)` counts. Everything else, such
    as img_size, dynamic_img_size or drop_path_rate, goes to timm as it is.
    Raises: ConfigError for a model or a stage timm does not have, with the nearest names or the stages it has.
    """

    def __init__(
        self, model_name: str, *, out_index: int | None = None, pretrained: bool = False, **timm_options: Any
    ) -> None:
        if not is_model(model_name):
            near = difflib.get_close_matches(model_name, list_models(), n=5, cutoff=0.4)
            raise ConfigError(
                f"timm {timm.__version__} has no model '{model_name}'. Nearest: {', '.join(near) or 'none'}. "
                f"timm.list_models('*part of a name*') finds others."
            )
        strides = _stage_strides(model_name, timm_options)
        if out_index is None:
            out_index = max((i for i, stride in enumerate(strides) if stride <= MAX_STRIDE), default=0)
        if not 0 <= out_index < len(strides):
            listed = ", ".join(f"{i} (stride {stride})" for i, stride in enumerate(strides))
            raise ConfigError(f"timm model '{model_name}' has no stage {out_index}. Stages: {listed}.")
        net = _feature_model(model_name, out_index, {"pretrained": pretrained, **timm_options})
        stride, width = int(net.feature_info.reduction()[-1]), int(net.feature_info.channels()[-1])
        native_hw, fixed = _native_resolution(net.pretrained_cfg, timm_options)
        super().__init__(
            name=f"timm:{model_name}",
            patch_size=stride,
            embed_dim=width,
            summary_dim=width,
            min_resolution_step=stride,
            preferred_resolution=native_hw,
            fixed_resolution=native_hw if fixed else None,
        )
        self.net = net
        self._channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        out = self.net(images)[-1]
        if self._channels_last:
            out = out.permute(0, 3, 1, 2)
        return Encoded(out.mean((2, 3)), out)


def _stage_strides(model_name: str, timm_options: dict[str, Any]) -> list[int]:
    """Stride in pixels of every stage. Built on the meta device, because timm knows them only of a built model."""
    with torch.device("meta"):
        net = _feature_model(model_name, 0, timm_options)
    return [int(stage["reduction"]) for stage in net.feature_info.info]


def _feature_model(model_name: str, out_index: int, timm_options: dict[str, Any]) -> Any:
    """The layers up to one stage. `Any`, because its `feature_info` and `pretrained_cfg` are unknown to nn.Module."""
    return timm.create_model(model_name, features_only=True, out_indices=(out_index,), **timm_options)


def _native_resolution(pretrained_cfg: dict[str, Any], timm_options: dict[str, Any]) -> tuple[tuple[int, int], bool]:
    """(height, width) in pixels a model was laid out for, and whether it takes no other."""
    _, height, width = pretrained_cfg["input_size"]
    match timm_options.get("img_size"):
        case None:
            native_hw = int(height), int(width)
        case int(side):
            native_hw = side, side
        case (int(h), int(w)):
            native_hw = h, w
        case other:
            raise ConfigError(f"img_size is a number of pixels or (height, width), got {other!r}.")
    adapts = timm_options.get("dynamic_img_size") is True or timm_options.get("strict_img_size") is False
    return native_hw, bool(pretrained_cfg.get("fixed_input_size", False)) and not adapts
