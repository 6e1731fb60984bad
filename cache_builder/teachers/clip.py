"""CLIP image towers through open_clip: summary in the text-aligned space, spatial features after the final norm.

Papers: CLIP 2103.00020, DFN 2309.17425, MetaCLIP 2309.16671, OpenCLIP 2212.07143.
"""

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

import open_clip
import torch
from jaxtyping import Float
from open_clip.model import (
    CLIPVisionCfg,
    _build_vision_tower,  # pyright: ignore[reportPrivateUsage]  # the public CLIP class would also build the text tower
    resize_pos_embed,
)
from torch import Tensor

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset
from cache_builder.teachers.state_dict import load_exactly, read_state_dict
from cache_builder.teachers.weights import describe_source, file_sha256
from radio_cache.crops import patch_geometry
from radio_cache.errors import TeacherWeightsError
from radio_cache.schema import Normalisation, TeacherSpec

_PREFIX = "visual."


@final
class Clip(Teacher):
    """Summary: the image embedding, before its normalisation. Spatial: patch tokens after the final LayerNorm."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        state = read_state_dict(path, teacher=preset.name)
        state = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
        config, embed_dim, quick_gelu = self._architecture(preset, state, path)
        grid_px = config.image_size
        size = options.size_px or (grid_px if isinstance(grid_px, int) else grid_px[0])
        fit = options.fit or preset.fit
        patch = int(config.patch_size)
        geometry = patch_geometry(size, patch, fit=fit, interpolation="bicubic")
        config.image_size = size
        self._net: Any = _build_vision_tower(embed_dim, config, quick_gelu).eval()
        # open_clip resizes position embeddings of a whole model; ours is the image tower alone.
        prefixed = {_PREFIX + key: value for key, value in state.items()}
        resize_pos_embed(prefixed, SimpleNamespace(visual=self._net))
        state = {key.removeprefix(_PREFIX): value for key, value in prefixed.items()}
        load_exactly(self._net, state, teacher=preset.name, path=path)
        self.spec = TeacherSpec(
            name=preset.name, family=preset.family, model=f"{preset.model} ({config.width} wide, {config.layers} deep)",
            licence=preset.licence, weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path), geometry=geometry,
            normalisation=Normalisation(
                scale=255.0, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
            ),
            summary_dim=embed_dim, spatial_dim=int(config.width),
            summary_note="image embedding (text-aligned), not normalised", spatial_note="patch tokens after ln_post",
            compute_dtype=options.dtype, codec=options.codec, views=1,
            software={"open_clip": version("open_clip_torch"), "torch": version("torch")},
        )  # fmt: skip

    def _architecture(
        self, preset: TeacherPreset, state: dict[str, Tensor], path: Path
    ) -> tuple[CLIPVisionCfg, int, bool]:
        """The published configuration, or, for other shapes in the file, that with the file's own sizes."""
        if "conv1.weight" not in state or "proj" not in state:
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not a CLIP ViT in open_clip's format: it has no visual.conv1.weight "
                "or no visual.proj"
            )
        published: dict[str, Any] = dict(open_clip.get_model_config(preset.model) or {})
        known = {item.name for item in fields(CLIPVisionCfg)}
        config = CLIPVisionCfg(**{key: value for key, value in published["vision_cfg"].items() if key in known})
        width, _, patch, _ = state["conv1.weight"].shape
        layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks."))
        tokens = round((state["positional_embedding"].shape[0] - 1) ** 0.5)
        embed_dim = int(state["proj"].shape[1])
        own = (config.width, config.layers, config.patch_size, config.image_size, published["embed_dim"])
        if own != (width, layers, patch, tokens * patch, embed_dim):
            if config.width != width:
                config.head_width = CLIPVisionCfg.head_width if width % CLIPVisionCfg.head_width == 0 else int(width)
            config.width, config.layers, config.patch_size, config.image_size = width, layers, patch, tokens * patch
            self.notes = (
                f"these weights are not the published {preset.model}: width {width}, {layers} layers, "
                f"{tokens * patch} px; heads of {config.head_width} are assumed, as open_clip does",
            )
        return config, embed_dim, bool(published.get("quick_gelu", False))

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        out = self._net.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NCHW")
        return Features(out["image_features"], out["image_intermediates"][0].permute(0, 2, 3, 1))

    def to(self, device: torch.device) -> None:
        self._net.to(device)
