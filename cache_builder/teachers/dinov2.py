"""DINOv2 through timm, with and without registers: the dense-feature teacher (arXiv 2304.07193, 2309.16588)."""

import math
import re
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
from cache_builder.teachers.state_dict import (
    DINOV2_SETS,
    LEGACY_SETS,
    extract_network,
    load_exactly,
    read_weights_file,
)
from cache_builder.teachers.weights import describe_source, file_sha256
from cache_builder.teachers.wrong_weights import first_differences, likely_origin, published_twin
from radio_cache.errors import TeacherWeightsError
from radio_cache.format.schema import IMAGENET_PIXELS, TeacherSpec
from radio_cache.geometry.crops import patch_geometry

_HEAD_WIDTH = 64  # of every DINOv2
_PATCH_PX = 14  # of the published models
_OFFSET = 0.1  # Meta's `interpolate_offset`


@final
class DinoV2(Teacher):
    """Summary: the class token. Spatial: the patch tokens. Both after the final norm. Meta's and timm's files both load."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        sets = LEGACY_SETS if options.legacy_loading else DINOV2_SETS
        file = read_weights_file(path, teacher=preset.name, sets=sets)
        origin = likely_origin(file.tensors)
        file = extract_network(file, ("patch_embed.proj.weight",), teacher=preset.name, path=path)
        self.notes = file.notes
        loaded = {"tensors": file.chosen} if file.chosen else {}
        state = _without_chunks(file.tensors)
        architecture = self._architecture(preset, state, path, options, origin)
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
        if not options.legacy_loading and "pos_embed" in state:
            has_registers = bool(self._net.num_reg_tokens)
            state, resizing = _with_metas_positions(state, geometry.grid_hw, registers=has_registers)
            loaded |= {"positions": resizing} if resizing else {}
        # timm's own conversion: Meta's names to timm's, and position embeddings to the input size.
        state = checkpoint_filter_fn(state, self._net)
        state = {key: value for key, value in state.items() if key != "mask_token"}
        load_exactly(self._net, state, teacher=preset.name, path=path, origin=origin)
        width = int(self._net.embed_dim)
        patches = "" if patch == _PATCH_PX else f", patches of {patch} px"
        sizes = f"{width} wide, {len(self._net.blocks)} deep{patches}"
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=f"{preset.model} ({sizes})",
            licence=preset.licence,
            weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path),
            geometry=geometry,
            normalisation=IMAGENET_PIXELS,
            summary_dim=width,
            spatial_dim=width,
            summary_note="class token after the final norm",
            spatial_note="patch tokens after the final norm",
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={"timm": timm.__version__, "torch": version("torch")},
            loaded=loaded,
        )

    def _architecture(
        self, preset: TeacherPreset, state: dict[str, Tensor], path: Path, options: TeacherOptions, origin: str
    ) -> dict[str, Any]:
        """Return timm's arguments for the sizes in the file; {} for those of the published model.

        Raises:
            TeacherWeightsError: the file is no DINOv2 ViT, or another published one.
        """
        if "patch_embed.proj.weight" not in state or "blocks.0.attn.qkv.weight" not in state:
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not a DINOv2 ViT in Meta's or timm's format: it has no "
                f"patch_embed.proj.weight or no blocks.0.attn.qkv.weight{origin}"
            )
        published = _published(preset.model)
        kernel = state["patch_embed.proj.weight"].shape
        if len(kernel) != 4 or kernel[2] != kernel[3]:  # timm would resample patches that are not square
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} has a patch_embed.proj.weight of {tuple(kernel)}, which is not one of square "
                f"patches{origin}"
            )
        width, _, patch, _ = kernel
        layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        registers = next((int(v.shape[1]) for k, v in state.items() if k in ("reg_token", "register_tokens")), 0)
        first = state.get("blocks.0.mlp.w12.weight", state.get("blocks.0.mlp.fc1.weight"))
        second = state.get("blocks.0.mlp.w3.weight", state.get("blocks.0.mlp.fc2.weight"))
        if first is None or second is None:
            raise TeacherWeightsError(f"teacher '{preset.name}': {path} has no MLP weights in block 0{origin}")
        gated = second.shape[1] * 2 == first.shape[0]
        sizes = (int(width), layers, registers, gated)
        _refuse_positions(preset, state, path, origin, prefix_tokens=0 if registers else 1)
        if _sizes(published) == sizes and (patch == _PATCH_PX or options.legacy_loading):
            return {}
        # Only presets of this width are built for the comparison: each takes a fraction of a second.
        same_width = [candidate for candidate in DINOV2S if candidate.output and candidate.output.spatial_dim == width]
        if patch == _PATCH_PX and (
            twin := published_twin(preset, same_width, lambda candidate: _sizes(_published(candidate.model)) == sizes)
        ):
            differences = first_differences(published.state_dict(), state)
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not {preset.model}: "
                f"{'; '.join(differences) or f'it has {registers} registers'}. "
                f"Its sizes are those of {twin.name}: use --teacher {twin.name}"
            )
        heads = max(1, width // _HEAD_WIDTH)
        patches = "" if patch == _PATCH_PX else f", patches of {patch} px"
        self.notes += (
            f"these weights are not the published {preset.model}: width {width}, {layers} layers, {registers} registers"
            f"{patches}; {heads} attention head{'s' if heads > 1 else ''} assumed, {_HEAD_WIDTH} wide as in every DINOv2",
        )
        arguments: dict[str, Any] = {
            "embed_dim": int(width),
            "depth": layers,
            "num_heads": heads,
            "patch_size": int(patch),
            "reg_tokens": registers,
            "no_embed_class": registers > 0,
            "mlp_ratio": first.shape[0] / width,
        }
        if gated != ("giant" in preset.model):
            from timm.layers.mlp import Mlp, SwiGLUPacked

            arguments |= {
                "mlp_layer": SwiGLUPacked if gated else Mlp,
                "act_layer": torch.nn.SiLU if gated else torch.nn.GELU,
            }
        if not any("ls1" in key for key in state):
            arguments["init_values"] = None
        return arguments

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the features of normalised images."""
        net = self._net
        tokens = net.forward_features(images)
        h, w = net.patch_embed.grid_size
        # tokens (b, prefix + h * w, c): the class token, registers, then patches in row-major order.
        return Features(tokens[:, 0], tokens[:, net.num_prefix_tokens :].unflatten(1, (h, w)))

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._net.to(device)


def _without_chunks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by names without chunks of blocks: Meta's trainings write block 7 as `blocks.1.7.`."""
    chunked = re.compile(r"^blocks\.\d+\.(\d+)\.")
    names = {key: chunked.sub(r"blocks.\1.", key) for key in state}
    return {names[key]: value for key, value in state.items()} if len(set(names.values())) == len(state) else state


def _refuse_positions(
    preset: TeacherPreset, state: dict[str, Tensor], path: Path, origin: str, *, prefix_tokens: int
) -> None:
    """Raise TeacherWeightsError unless the table of positions is that of a square of tokens, as in every DINOv2."""
    table = state.get("pos_embed")
    if table is None:
        return  # load_exactly reports it
    # With registers timm leaves out the position of the class token, and Meta's files have it.
    counts = [table.shape[1] - prefix for prefix in {prefix_tokens, 1}] if table.ndim == 3 else []
    if not any(count > 0 and math.isqrt(count) ** 2 == count for count in counts):
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} has a table of positions, pos_embed, of shape {tuple(table.shape)}, which is not "
            f"one for a class token and a square of patches: such a network cannot be this teacher{origin}"
        )


def _with_metas_positions(
    state: dict[str, Tensor], grid_hw: tuple[int, int], *, registers: bool
) -> tuple[dict[str, Tensor], str]:
    """Resize the positions of a network without registers as Meta's code does; with registers timm does the same as Meta.

    Without registers they differ: Meta gives the scale with an offset of 0.1 tokens, and does not antialias.

    Args:
        state: tensors by Meta's or timm's names; `pos_embed` is (1, tokens, c).
        grid_hw: tokens of the input along each side.
        registers: whether the network has registers.

    Returns:
        The state, and a description of the resizing for the spec; "" if the table has the size already.

    Source:
        facebookresearch/dinov2, `interpolate_pos_encoding` with its default arguments for these models.
    """
    table = state["pos_embed"]
    side = math.isqrt(table.shape[1])  # of side² tokens, or one more: the class token's
    if (side, side) == grid_hw:
        return state, ""
    sizes = f"{side} x {side} -> {grid_hw[0]} x {grid_hw[1]}"
    if registers:
        return state, f"{sizes} as timm and Meta: bicubic, antialiased"
    patches = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, n, c) -> (1, c, h, w)
    scales = tuple((tokens + _OFFSET) / side for tokens in grid_hw)
    resized = torch.nn.functional.interpolate(patches, scale_factor=scales, mode="bicubic", antialias=False)
    assert resized.shape[2:] == grid_hw, "an offset of a tenth of a token does not change how many there are"
    # (1, c, h, w) -> (1, h * w, c), in float32 as in Meta's network, whatever the precision of the file.
    rows = resized.permute(0, 2, 3, 1).flatten(1, 2)
    resizing = f"{sizes} as Meta: bicubic, offset {_OFFSET}, not antialiased"
    return {**state, "pos_embed": torch.cat([table[:, :1].float(), rows], dim=1)}, resizing


def _published(model: str) -> Any:
    """Return timm's network of that name on the meta device: shapes without values."""
    with torch.device("meta"):
        return timm.create_model(model, pretrained=False, num_classes=0)


def _sizes(net: Any) -> tuple[int, int, int, bool]:
    """Return the sizes that distinguish published networks: width, layers, registers, and whether the MLP is gated."""
    mlp = net.blocks[0].mlp
    gated = mlp.fc2.in_features * 2 == mlp.fc1.out_features
    return int(net.embed_dim), len(net.blocks), int(net.num_reg_tokens), gated
