"""DINOv2 through timm, with and without registers: the dense-feature teacher (arXiv 2304.07193, 2309.16588)."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset
from cache_builder.teachers.presets import DINOV2S
from cache_builder.teachers.state_dict import load_exactly, read_state_dict
from cache_builder.teachers.weights import describe_source, file_sha256
from cache_builder.teachers.wrong_weights import first_differences, looks_like, published_twin
from radio_cache.crops import patch_geometry
from radio_cache.errors import TeacherWeightsError
from radio_cache.schema import IMAGENET_PIXELS, TeacherSpec

_HEAD_WIDTH = 64  # of every DINOv2


@final
class DinoV2(Teacher):
    """Summary: the class token. Spatial: the patch tokens. Both after the final norm. Meta's and timm's files both load."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        state = read_state_dict(path, teacher=preset.name)
        whose = looks_like(state)
        architecture = self._architecture(preset, state, path)
        patch = int(architecture.get("patch_size", 14))
        geometry = patch_geometry(
            options.size_px or preset.input_px // patch * patch,
            patch,
            fit=options.fit or preset.fit,
            interpolation="bicubic",
        )
        self._net: Any = timm.create_model(
            preset.model, pretrained=False, img_size=geometry.input_hw[0], num_classes=0, **architecture
        ).eval()
        # timm's own conversion: Meta's names to timm's, and position embeddings to the input size.
        state = checkpoint_filter_fn(state, self._net)
        state = {key: value for key, value in state.items() if key != "mask_token"}
        load_exactly(self._net, state, teacher=preset.name, path=path, whose=whose)
        width = int(self._net.embed_dim)
        self.spec = TeacherSpec(
            name=preset.name, family=preset.family, model=f"{preset.model} ({width} wide, {len(self._net.blocks)} deep)",
            licence=preset.licence, weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path), geometry=geometry, normalisation=IMAGENET_PIXELS,
            summary_dim=width, spatial_dim=width,
            summary_note="class token after the final norm", spatial_note="patch tokens after the final norm",
            compute_dtype=options.dtype, codec=options.codec, views=1,
            software={"timm": timm.__version__, "torch": version("torch")},
        )  # fmt: skip

    def _architecture(self, preset: TeacherPreset, state: dict[str, Tensor], path: Path) -> dict[str, Any]:
        """timm arguments for sizes in the file that are not the published model's; empty if they are."""
        if "patch_embed.proj.weight" not in state or "blocks.0.attn.qkv.weight" not in state:
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not a DINOv2 ViT in Meta's or timm's format: it has no "
                f"patch_embed.proj.weight or no blocks.0.attn.qkv.weight{looks_like(state)}"
            )
        published = _published(preset.model)
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        registers = next((int(v.shape[1]) for k, v in state.items() if k in ("reg_token", "register_tokens")), 0)
        first = state.get("blocks.0.mlp.w12.weight", state.get("blocks.0.mlp.fc1.weight"))
        second = state.get("blocks.0.mlp.w3.weight", state.get("blocks.0.mlp.fc2.weight"))
        if first is None or second is None:
            raise TeacherWeightsError(f"teacher '{preset.name}': {path}: block 0 has no MLP weights")
        gated = second.shape[1] * 2 == first.shape[0]
        sizes = (int(width), layers, registers, gated)
        if _sizes(published) == sizes:
            return {}
        same_width = [one for one in DINOV2S if one.output is not None and one.output.spatial_dim == width]
        if twin := published_twin(preset, same_width, lambda one: _sizes(_published(one.model)) == sizes):
            differences = first_differences(published.state_dict(), state)
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not {preset.model}: "
                f"{'; '.join(differences) or f'it has {registers} registers'}. "
                f"Its sizes are those of {twin.name}: ask for --teacher {twin.name}"
            )
        heads = max(1, width // _HEAD_WIDTH)
        self.notes = (
            f"these weights are not the published {preset.model}: width {width}, {layers} layers, {registers} registers; "
            f"{heads} attention head{'s' if heads > 1 else ''} assumed, {_HEAD_WIDTH} wide as in every DINOv2",
        )
        arguments: dict[str, Any] = {
            "embed_dim": int(width), "depth": layers, "num_heads": heads, "patch_size": int(patch),
            "reg_tokens": registers, "no_embed_class": registers > 0, "mlp_ratio": first.shape[0] / width,
        }  # fmt: skip
        if gated != ("giant" in preset.model):
            from timm.layers.mlp import Mlp, SwiGLUPacked

            arguments |= {
                "mlp_layer": SwiGLUPacked if gated else Mlp, "act_layer": torch.nn.SiLU if gated else torch.nn.GELU
            }  # fmt: skip
        if not any("ls1" in key for key in state):
            arguments["init_values"] = None
        return arguments

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        net = self._net
        tokens = net.forward_features(images)
        h, w = net.patch_embed.grid_size
        return Features(tokens[:, 0], tokens[:, net.num_prefix_tokens :].unflatten(1, (h, w)))

    def to(self, device: torch.device) -> None:
        self._net.to(device)


def _published(model: str) -> Any:
    """The network of that name, of shapes only."""
    with torch.device("meta"):
        return timm.create_model(model, pretrained=False, num_classes=0)


def _sizes(net: Any) -> tuple[int, int, int, bool]:
    """What tells the published networks apart: width, layers, registers, and whether the MLP is gated."""
    mlp = net.blocks[0].mlp
    gated = mlp.fc2.in_features * 2 == mlp.fc1.out_features
    return int(net.embed_dim), len(net.blocks), int(net.num_reg_tokens), gated
