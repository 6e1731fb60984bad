"""Any backbone of timm as a student: "timm:convnext_base", "timm:vit_small_patch16_224", ...

The summary is the mean of the map. timm's pooled features before its classifier would come from the last stage, which
is cut off here: students learn features of stride 16, and layers behind those would get no gradient. Several stages may
be fused: their maps are brought to the finest of them, and stand side by side.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import is_model, list_models
from torch import Tensor

from radio_cache.errors import ConfigError, RadioCacheError, nearest_names
from trainer.students.base import Encoded, Student, UnsupportedResolutionError, has_free_size
from trainer.students.timm_weights import naming_the_weights, weights_overlay

WEIGHTS_OPTIONS = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})
"""Options of `timm.create_model` that name files and addresses, which a student's file could choose for its reader."""

MAX_STRIDE = 16  # pixels: the token size of the other students, and of SAM


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """A backbone of timm under a name of its own, at 224 px.

    Attributes:
        settings: as for `TimmBackbone`.
    """

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


WHOLE = "-whole"
"""Ending of the names of whole networks, to their last stage; without it, they end at a stride of 16."""


def _versions() -> dict[str, TimmConfig]:
    """Return the efficient students of AM-RADIO's table (arXiv 2312.06709). timm has no FasterViT, the eleventh of its list.

    Each is listed twice: up to a stride of 16, as the other students, and whole, as the table counts it.
    """
    configs: list[TimmConfig] = []
    for name, model, last_stage, settings in (
        ("efficientnetv2-s", "tf_efficientnetv2_s", 4, {}),
        ("resnetv2-101", "resnetv2_101", 4, {}),
        ("regnety-064", "regnety_064", 4, {}),
        ("efficientvit-l1", "efficientvit_l1", 3, {}),
        ("convnext-b", "convnext_base", 3, {}),
        ("nfnet-f3", "dm_nfnet_f3", 4, {}),
        # timm lays it out for 256 px; windows of 7 fit 224.
        ("swinv2-s", "swinv2_small_window8_256", 3, {"img_size": 224, "window_size": 7, "strict_img_size": False}),
        ("maxvit-b", "maxvit_base_tf_224", 4, {}),
        ("poolformerv2-m36", "poolformerv2_m36", 3, {}),
        ("mvitv2-b", "mvitv2_base", 3, {"any_resolution": True}),
    ):
        configs.append(TimmConfig(name=name, model=model, settings=settings))
        configs.append(TimmConfig(name=f"{name}{WHOLE}", model=model, settings={**settings, "out_index": last_stage}))
    return {config.name: config for config in configs}


VERSIONS: dict[str, TimmConfig] = _versions()


@final
class TimmBackbone(Student):
    """The layers of a timm model up to one stage, by default the last of a stride of 16 or less.

    Args:
        model_name: as timm lists it.
        name: of the student; by default "timm:" and the model's name.
        out_index: another stage, or several, counted as `timm.create_model(..., features_only=True)` counts.
        pretrained: start from timm's own weights, which timm downloads.
        init_file: start from this file of timm's weights instead.
        any_resolution: accept other sizes than the model's, which timm calls fixed although it is not.
        preferred_resolution: (height, width) in pixels; by default the model's own.
        timm_options: passed to timm as they are, such as img_size, dynamic_img_size or drop_path_rate.

    Raises:
        ConfigError: for a model or a stage that timm does not have, with the nearest names or the known stages.
    """

    def __init__(
        self,
        model_name: str,
        *,
        name: str | None = None,
        out_index: int | Sequence[int] | None = None,
        pretrained: bool = False,
        init_file: str | None = None,
        any_resolution: bool = False,
        preferred_resolution: tuple[int, int] | None = None,
        **timm_options: Any,
    ) -> None:
        if not is_model(model_name.partition(".")[0]):
            near = nearest_names(model_name, list_models(), count=5)
            raise ConfigError(
                f"timm {timm.__version__} has no model '{model_name}'. Nearest: {', '.join(near) or 'none'}. "
                f"timm.list_models('*part of a name*') finds others."
            )
        if refused := sorted(WEIGHTS_OPTIONS & timm_options.keys()):
            raise ConfigError(
                f"timm model '{model_name}': {refused[0]} is no setting of a student, because a file that names a student could "
                "read other files with it: pretrained=true takes timm's own weights, init_file=FILE a file of them"
            )
        strides = _stage_strides(model_name, timm_options)
        stages = _stages(model_name, out_index, strides)
        if pretrained or init_file is not None:
            timm_options = {**timm_options, "pretrained": True}
        with naming_the_weights(model_name) if pretrained or init_file is not None else contextlib.nullcontext():
            net = _feature_model(model_name, stages, timm_options, weights_overlay(init_file))
        # Fused stages stand side by side on the finest grid, so strides give a minimum and channels a sum.
        reductions = [int(stride) for stride in net.feature_info.reduction()]
        width = sum(int(channels) for channels in net.feature_info.channels())
        native_hw, fixed = _native_resolution(net.pretrained_cfg, timm_options)
        fixed = fixed and not any_resolution
        super().__init__(
            name=name or f"timm:{model_name}",
            patch_size=min(reductions),
            embed_dim=width,
            summary_dim=width,
            min_resolution_step=max(reductions),
            preferred_resolution=native_hw if fixed or preferred_resolution is None else preferred_resolution,
            fixed_resolution=native_hw if fixed else None,
        )
        self.net = net
        self._channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        if has_free_size(images):
            return self._encode_free(images)
        h, w = int(images.shape[-2]), int(images.shape[-1])
        try:
            maps: list[Tensor] = self.net(images)
        except AssertionError as exc:  # how timm's window attention refuses sizes
            raise UnsupportedResolutionError(
                f"student '{self.name}': the architecture cannot take {h} x {w} ({exc}); {self._known_size()}"
            ) from exc
        if self._channels_last:
            # (b, h, w, c) -> (b, c, h, w)
            maps = [stage_map.permute(0, 3, 1, 2) for stage_map in maps]
        grid_hw = h // self.patch_size, w // self.patch_size
        if not any(tuple(stage_map.shape[-2:]) == grid_hw for stage_map in maps):
            sizes = ", ".join(f"{stage_map.shape[-2]} x {stage_map.shape[-1]}" for stage_map in maps)
            raise UnsupportedResolutionError(
                f"student '{self.name}' returns maps of {sizes} for {h} x {w}, not of {grid_hw[0]} x {grid_hw[1]}; "
                f"{self._known_size()}"
            )
        # (b, c_i, h_i, w_i) -> (b, c_i, h, w) on the finest grid
        maps = [
            stage_map if tuple(stage_map.shape[-2:]) == grid_hw else F.interpolate(stage_map, grid_hw, mode="bilinear")
            for stage_map in maps
        ]
        # -> (b, sum of c_i, h, w)
        out = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        return Encoded(out.mean((2, 3)), out)

    def _encode_free(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        """Encode in a graph for images of any size, where sizes cannot be compared."""
        maps: list[Tensor] = self.net(images)
        if len(maps) > 1:
            raise ConfigError(f"student '{self.name}' fuses several stages, whose sizes have to be known")
        out = maps[0].permute(0, 3, 1, 2) if self._channels_last else maps[0]
        return Encoded(out.mean((2, 3)), out)

    def _known_size(self) -> str:
        h, w = self.preferred_resolution
        return f"{h} x {w} works, and other sizes may through `img_size`."


def _stages(model_name: str, out_index: int | Sequence[int] | None, strides: list[int]) -> tuple[int, ...]:
    """Return the requested stages in the order of the network."""
    if out_index is None:
        return (max((i for i, stride in enumerate(strides) if stride <= MAX_STRIDE), default=0),)
    stages = (out_index,) if isinstance(out_index, int) else tuple(sorted(set(out_index)))
    wrong = [stage for stage in stages if not 0 <= stage < len(strides)]
    if wrong or not stages:
        listed = ", ".join(f"{i} (stride {stride})" for i, stride in enumerate(strides))
        raise ConfigError(f"timm model '{model_name}' has no stage {wrong[0] if wrong else '()'}. Stages: {listed}.")
    return stages


def _stage_strides(model_name: str, timm_options: dict[str, Any]) -> list[int]:
    """Return the stride of every stage in pixels. Built on the meta device, because timm has them for built models only."""
    # The meta device allocates no memory, so a large network costs only its construction.
    with torch.device("meta"):
        try:
            net = _feature_model(model_name, (0,), timm_options)
        except RadioCacheError:
            raise
        except Exception as exc:  # of every architecture's own constructor
            line = next((line.strip() for line in str(exc).splitlines() if line.strip()), "")
            raise ConfigError(
                f"timm model '{model_name}' cannot be made with the settings {timm_options}: {type(exc).__name__}: {line:.200}"
            ) from exc
    return [int(stage["reduction"]) for stage in net.feature_info.info]


def _feature_model(
    model_name: str, stages: tuple[int, ...], timm_options: dict[str, Any], overlay: dict[str, Any] | None = None
) -> Any:
    """Build the layers up to the last of some stages. `Any`: nn.Module lacks `feature_info` and `pretrained_cfg`."""
    return timm.create_model(
        model_name, features_only=True, out_indices=stages, pretrained_cfg_overlay=overlay, **timm_options
    )


def _native_resolution(pretrained_cfg: dict[str, Any], timm_options: dict[str, Any]) -> tuple[tuple[int, int], bool]:
    """Return the (height, width) that a model was designed for, in pixels, and whether it accepts no other."""
    _, height, width = pretrained_cfg["input_size"]
    match timm_options.get("img_size"):
        case None:
            native_hw = int(height), int(width)
        case int(side):
            native_hw = side, side
        case (int(h), int(w)) | [int(h), int(w)]:
            native_hw = h, w
        case other:
            raise ConfigError(f"img_size is a number of pixels or (height, width), got {other!r}.")
    adapts = timm_options.get("dynamic_img_size") is True or timm_options.get("strict_img_size") is False
    return native_hw, bool(pretrained_cfg.get("fixed_input_size", False)) and not adapts
