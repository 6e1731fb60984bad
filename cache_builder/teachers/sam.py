"""SAM's image encoder through segment-anything (arXiv 2304.02643).

Its features are maps only: exactly those that its mask decoder reads, or the wide ones before the neck.
"""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast, final

import torch
from jaxtyping import Float
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset
from cache_builder.teachers.presets import SAMS
from cache_builder.teachers.state_dict import (
    LEGACY_SETS,
    TIMM_SETS,
    extract_network,
    load_exactly,
    read_weights_file,
    refuse_adapters,
)
from cache_builder.teachers.weights import describe_source, file_sha256
from cache_builder.teachers.wrong_weights import first_differences, likely_origin, published_twin
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.format.schema import Normalisation, TeacherSpec
from radio_cache.geometry.crops import patch_geometry

# Width and depth, from segment_anything/build_sam.py.
_PUBLISHED = {
    "vit_h": (1280, 32),
    "vit_l": (1024, 24),
    "vit_b": (768, 12),
}
_PREFIX = "image_encoder."
_NECK_NOTE, _TRUNK_NOTE = "after the neck, as the mask decoder reads it", "after the last block, before the neck"


@final
class Sam(Teacher):
    """Spatial: the map after the neck, (b, 64, 64, 256) for the published models. No summary.

    The map of a trunk is the input of the neck, as wide as the network. The whole architecture is read from the file: the
    relative position tables give the width of heads, the windows and the global blocks.
    """

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        if options.fit not in (None, "pad"):
            raise ConfigError(
                f"teacher '{preset.name}': SAM knows images padded on the right and bottom; --fit must be pad"
            )
        sets = LEGACY_SETS if options.legacy_loading else TIMM_SETS
        weights = extract_network(
            read_weights_file(path, teacher=preset.name, sets=sets), (_PREFIX,), teacher=preset.name, path=path
        )
        file = weights.tensors
        refuse_adapters((key for key in file if not key.startswith(_PREFIX)), teacher=preset.name, path=path)
        state = {key.removeprefix(_PREFIX): value for key, value in file.items() if key.startswith(_PREFIX)}
        if "pos_embed" not in state or "neck.0.weight" not in state:
            raise TeacherWeightsError(
                f"teacher '{preset.name}': {path} is not in segment-anything's format: it has no image_encoder.pos_embed "
                f"or no image_encoder.neck{likely_origin(file)}"
            )
        _refuse_other_layouts(preset, state, path)
        self.notes = weights.notes
        _refuse_twin(preset, state, path)
        self._net = _encoder(state).eval()
        load_exactly(self._net, state, teacher=preset.name, path=path)
        # All weights are loaded, the neck's too: a file without them is not a whole SAM.
        if preset.trunk:
            self._net.neck = torch.nn.Sequential()
        size, patch = int(self._net.img_size), int(state["patch_embed.proj.weight"].shape[-1])
        if options.size_px not in (None, size):
            raise ConfigError(
                f"teacher '{preset.name}': these weights take {size} px, --size {options.size_px} is not possible"
            )
        width, depth = int(state["pos_embed"].shape[-1]), len(self._net.blocks)
        if (width, depth) != _PUBLISHED.get(preset.model):
            self.notes += (f"these weights are not the published SAM {preset.model}: width {width}, {depth} blocks",)
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=f"{preset.model} ({width} wide, {depth} deep)",
            licence=preset.licence,
            weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path),
            geometry=patch_geometry(size, patch, fit="pad", interpolation="bilinear"),
            # segment_anything/build_sam.py works on 0 to 255; dividing by 255 first would round differently.
            normalisation=Normalisation(scale=1.0, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
            summary_dim=None,
            spatial_dim=width if preset.trunk else int(state["neck.0.weight"].shape[0]),
            summary_note="SAM has none",
            spatial_note=_TRUNK_NOTE if preset.trunk else _NECK_NOTE,
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={"segment_anything": version("segment_anything"), "torch": version("torch")},
            loaded={"tensors": weights.chosen} if weights.chosen else {},
        )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the features of normalised images."""
        # (b, c, h, w) -> (b, h, w, c)
        return Features(None, self._maps(images).permute(0, 2, 3, 1))

    def _maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Return the maps of normalised images."""
        if images.device.type != "cpu":
            return self._net(images)
        # segment-anything stores the whole attention matrix of a global block, a gigabyte per image and copy for SAM-H. On a
        # CPU a lack of memory kills the process, and larger batches are no faster, so images go one by one.
        return torch.cat([self._net(image) for image in images.split(1)])

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._net.to(device)


def _refuse_other_layouts(preset: TeacherPreset, state: dict[str, Tensor], path: Path) -> None:
    """Raise TeacherWeightsError for encoders that only resemble SAM's, whose architecture cannot be read from the file."""
    table, patches = state["pos_embed"], state.get("patch_embed.proj.weight")
    misshapen = [name for name, value in state.items() if name.endswith(".attn.rel_pos_h") and value.ndim != 2]
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    problem = ""
    if table.ndim != 4 or table.shape[1] != table.shape[2]:
        problem = f"pos_embed is {tuple(table.shape)}, needed is (1, tokens, tokens, width)"
        if table.ndim == 3:
            problem += "; EfficientSAM has such a table, and is no teacher of this package"
    elif patches is None or patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        problem = "patch_embed.proj.weight is missing, or not one of square patches"
    elif not blocks or blocks != {str(block) for block in range(len(blocks))}:
        problem = "it has no complete row of blocks"
    elif missing := next((name for name in _tables_of_blocks(len(blocks)) if name not in state), ""):
        problem = (
            f"{missing} is missing; without relative positions (use_rel_pos=False) the file determines neither the number of "
            "heads nor the global blocks"
        )
    elif misshapen:
        problem = f"{misshapen[0]} is {tuple(state[misshapen[0]].shape)}, needed is (offsets, head width)"
    elif beyond := _resized_by_half(state, len(blocks)):
        problem = (
            f"the relative positions of its global blocks are those of a map of {beyond} tokens a side, and pos_embed is that of "
            f"{table.shape[1]}: a fine-tuning at another size that resized one and not the other"
        )
    elif (
        len({(int(state[name].shape[0]) + 1) // 2 for name in _tables_of_blocks(len(blocks))} - {int(table.shape[1])})
        > 1
    ):
        problem = "its blocks have windows of several sizes, which segment-anything's encoder cannot have"
    elif "blocks.0.mlp.lin1.weight" not in state:
        problem = "blocks.0.mlp.lin1.weight is missing"
    if problem:
        raise TeacherWeightsError(
            f"teacher '{preset.name}': {path} is not an image encoder of segment-anything: {problem}. "
            "Pass a file of facebookresearch/segment-anything, or of a network of its class"
        )


def _resized_by_half(state: dict[str, Tensor], depth: int) -> int:
    """Return the tokens along a side that global blocks were made for if these exceed the network's map, else 0.

    Windows may exceed the map, too. But then most blocks have them, as in every SAM, and the others have the map's size.
    """
    grid = int(state["pos_embed"].shape[1])
    sides = [(int(state[name].shape[0]) + 1) // 2 for name in _tables_of_blocks(depth)]
    larger = [side for side in sides if side > grid]
    return max(larger) if larger and (grid not in sides or 2 * len(larger) <= depth) else 0


def _tables_of_blocks(depth: int) -> list[str]:
    """Return the names of the vertical relative position tables, one per block."""
    return [f"blocks.{block}.attn.rel_pos_h" for block in range(depth)]


def _refuse_twin(preset: TeacherPreset, state: dict[str, Tensor], path: Path) -> None:
    """Raise TeacherWeightsError if these are the weights of another published SAM."""
    width, depth = (
        int(state["pos_embed"].shape[-1]),
        1 + max(int(key.split(".")[1]) for key in state if key[:7] == "blocks."),
    )
    # Every SAM is two presets, with and without neck: a twin gives the same kind of map.
    candidates = [candidate for candidate in SAMS if candidate.trunk == preset.trunk]
    twin = published_twin(preset, candidates, lambda candidate: _PUBLISHED[candidate.model] == (width, depth))
    if twin is None or (width, depth) == _PUBLISHED[preset.model]:
        return
    with torch.device("meta"):
        published = sam_model_registry[preset.model]().image_encoder.state_dict()
    raise TeacherWeightsError(
        f"teacher '{preset.name}': {path} is not SAM {preset.model}: {'; '.join(first_differences(published, state))}. Its "
        f"sizes are those of {twin.name}: use --teacher {twin.name}"
    )


def _encoder(state: dict[str, Tensor]) -> ImageEncoderViT:
    """Return the image encoder for these tensors, with its sizes from their shapes."""
    # pos_embed is (1, tokens, tokens, width).
    grid, width = int(state["pos_embed"].shape[1]), int(state["pos_embed"].shape[3])
    patch = int(state["patch_embed.proj.weight"].shape[-1])
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    tables = [state[name] for name in _tables_of_blocks(depth)]
    # A table covers every offset between two tokens of a window: 2 * side - 1 rows of one head's width.
    sides = [(int(table.shape[0]) + 1) // 2 for table in tables]
    windows = {side for side in sides if side != grid}
    return ImageEncoderViT(
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=width // int(tables[0].shape[1]),
        mlp_ratio=state["blocks.0.mlp.lin1.weight"].shape[0] / width,
        out_chans=int(state["neck.0.weight"].shape[0]),
        norm_layer=cast(type[torch.nn.Module], partial(torch.nn.LayerNorm, eps=1e-6)),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        use_rel_pos=True,
        window_size=windows.pop() if windows else 0,
        global_attn_indexes=tuple(block for block, side in enumerate(sides) if side == grid),
    )
