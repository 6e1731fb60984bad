"""A ViT student that starts from a ViT of timm (DINOv2, CLIP, supervised): every weight that has a place is taken over.

What differs is folded in exactly: layer scale into the matrices before it, the positions of class tokens into these, and
the colours timm standardises with into the patch embedding. Another patch size or position table is reached by bicubic
resizing. The final norm, heads and poolings have no place in a student.
"""

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import is_model, load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.utils import parametrize

from radio_cache.errors import ConfigError, RadioCacheError
from trainer.students.vit import ViT


@torch.no_grad()
def initialise_from_timm(student: ViT, model_name: str, weights_file: str | None = None) -> None:
    """Copy the weights of a timm model into `student`, in place; the student's own extra tokens keep their values.

    Args:
        student: receives the weights.
        model_name: with its tag, such as "vit_small_patch14_dinov2.lvd142m".
        weights_file: a checkpoint of that model, for machines without a network; None lets timm download it.

    Raises:
        ConfigError: for a model that timm does not have, that is no ViT, or whose blocks differ from the student's.
    """
    if not is_model(model_name.partition(".")[0]):
        raise ConfigError(f"init_from: timm {timm.__version__} has no model '{model_name}'.")
    with naming_the_weights(model_name):
        source: Any = timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay=weights_overlay(weights_file), num_classes=0
        )
    if not isinstance(source, VisionTransformer):
        raise ConfigError(f"init_from: '{model_name}' is a {type(source).__name__}, not a ViT.")
    _check(student, model_name, source)
    weights = source.state_dict()
    _copy_blocks(student, weights)
    if student.config.pre_norm:
        _put(student, "norm_pre.weight", weights["norm_pre.weight"])
        _put(student, "norm_pre.bias", weights["norm_pre.bias"])
    _copy_patches(student, weights, source, model_name)
    first = _copy_positions(student, weights, source)
    classes = student.num_summary_tokens
    if "cls_token" in weights:
        student.tokens[:classes] = weights["cls_token"][0] + first
    if "reg_token" in weights:
        registers = weights["reg_token"][0][: len(student.tokens) - classes]
        student.tokens[classes : classes + len(registers)] = registers


def weights_overlay(weights_file: str | None) -> dict[str, Any] | None:
    """Return the `pretrained_cfg_overlay` with which timm reads this file; None, for timm's own weights, without one.

    The name may come from an untrusted student, so the file is read as tensors first: older versions of timm unpickle.

    Raises:
        ConfigError: there is no such file, or it is no file of tensors.
    """
    if weights_file is None:
        return None
    if not Path(weights_file).is_file():
        raise ConfigError(f"init_file: there is no file {weights_file}.")
    if not weights_file.endswith(".npz"):  # numpy reads those without pickle
        try:
            load_state_dict(weights_file, weights_only=True)
        except Exception as exc:  # torch and safetensors raise many kinds
            raise ConfigError(f"init_file: {weights_file} is no file of weights: {type(exc).__name__}.") from exc
    return {"file": weights_file}


@contextlib.contextmanager
def naming_the_weights(model_name: str) -> Generator[None]:
    """Turn timm's errors for weights that are unavailable, or do not fit, into a ConfigError with the cure."""
    try:
        yield
    except RadioCacheError:
        raise
    except Exception as exc:  # of the hub, of the network below it, of torch
        line = next((line.strip() for line in str(exc).splitlines() if line.strip()), "")
        raise ConfigError(
            f"the pretrained weights of timm's '{model_name}' are not available: {type(exc).__name__}: {line:.200} - timm "
            "downloads them from the Hugging Face Hub. Without a network, copy the file here and pass it by "
            "--set student_overrides.init_file=FILE"
        ) from exc


def _check(student: ViT, model_name: str, source: Any) -> None:
    config = student.config
    block = source.blocks[0]
    gated = type(block.mlp).__name__ in ("GluMlp", "SwiGLU", "SwiGLUPacked")
    theirs = {
        "width": source.embed_dim,
        "depth": len(source.blocks),
        "heads": block.attn.num_heads,
        "mlp_hidden": block.mlp.fc2.in_features,
        "gated_mlp": gated,
        "pre_norm": not isinstance(source.norm_pre, torch.nn.Identity),
    }
    ours = {
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "mlp_hidden": config.hidden,
        "gated_mlp": config.gated_mlp,
        "pre_norm": config.pre_norm,
    }
    differing = [f"{key}={theirs[key]!r} (here {ours[key]!r})" for key in theirs if theirs[key] != ours[key]]
    if differing:
        raise ConfigError(
            f"init_from: '{model_name}' does not fit student '{student.name}': it has {', '.join(differing)}. "
            "Choose the student or the settings that fit."
        )
    activation = type(block.mlp.act).__name__
    if activation not in ("GELU", "SiLU"):
        raise ConfigError(
            f"init_from: the blocks of '{model_name}' use {activation}, those of '{student.name}' GELU: "
            "take another model, such as those of CLIP without 'quickgelu' in their name."
        )


def _put(student: ViT, name: str, value: Tensor) -> None:
    """Set a parameter; a reparametrised weight is assigned, so that its scale follows."""
    path, _, kind = name.rpartition(".")
    module = student.get_submodule(path)
    if parametrize.is_parametrized(module, kind):
        setattr(module, kind, value)
    else:
        module.get_parameter(kind).copy_(value)


def _copy_blocks(student: ViT, weights: Mapping[str, Tensor]) -> None:
    for number in range(student.config.depth):
        for ours, theirs, layer_scale in (
            ("norm1", "norm1", None),
            ("qkv", "attn.qkv", None),
            ("proj", "attn.proj", "ls1"),
            ("norm2", "norm2", None),
            ("mlp.0", "mlp.fc1", None),
            ("mlp.2", "mlp.fc2", "ls2"),
        ):
            weight = weights[f"blocks.{number}.{theirs}.weight"]
            bias = weights.get(f"blocks.{number}.{theirs}.bias")
            bias = torch.zeros(len(weight)) if bias is None else bias  # some models leave those of qkv out
            gamma = weights.get(f"blocks.{number}.{layer_scale}.gamma")
            # Layer scale multiplies the output: (o, i) * (o, 1), and (o,) * (o,)
            if gamma is not None:
                weight, bias = weight * gamma[:, None], bias * gamma
            _put(student, f"blocks.{number}.{ours}.weight", weight)
            _put(student, f"blocks.{number}.{ours}.bias", bias)


def _copy_patches(student: ViT, weights: Mapping[str, Tensor], source: Any, model_name: str) -> None:
    """Copy the patch embedding, changed so that it takes the student's colours: (x - m1) / s1 = ((x - m2) / s2) s2/s1 + ..."""
    kernel, p = weights["patch_embed.proj.weight"].float(), student.patch_size
    if kernel.shape[-1] != p:
        # Bigger patches sum over more pixels; the mean response stays the same.
        kernel = _resized(kernel, p) * (kernel.shape[-1] / p) ** 2
    cfg: dict[str, Any] = source.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    ours_mean, ours_std = student.input_mean.cpu(), student.input_std.cpu()
    # (o, 3, p, p) -> (o,): what the difference of the means adds to each output
    shift = (kernel * ((ours_mean - mean) / std)).sum((1, 2, 3))
    bias = weights.get("patch_embed.proj.bias")
    bias = shift if bias is None else bias + shift
    _put(student, "embed.weight", (kernel * (ours_std / std)).flatten(1))
    if student.config.patch_bias:
        _put(student, "embed.bias", bias)
    elif bias.abs().max() > 1e-6:
        raise ConfigError(
            f"init_from: the patches of '{model_name}' need a bias: create '{student.name}' with patch_bias=true."
        )


def _copy_positions(student: ViT, weights: Mapping[str, Tensor], source: Any) -> Float[Tensor, " c"] | float:
    """Copy the position table and return the position that timm adds to the class token."""
    positions = weights["pos_embed"][0].float()
    rows, columns = source.patch_embed.grid_size
    extra = len(positions) - rows * columns
    # (rows * columns, c) -> (1, c, rows, columns)
    grid = positions[extra:].T.reshape(1, -1, rows, columns)
    side = student.positions.side
    if (rows, columns) != (side, side):
        # The corners that `CroppedPositions.top_left` reads the table by: at the model's own grid, its own positions come back.
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    student.positions.table.copy_(grid[0].flatten(1).T)
    return positions[0] if extra else 0.0


def _resized(x: Float[Tensor, "a c h w"], side: int) -> Float[Tensor, "a c side side"]:
    return x if x.shape[-2:] == (side, side) else F.interpolate(x, (side, side), mode="bicubic", align_corners=True)
