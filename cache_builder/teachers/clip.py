"""CLIP image towers through open_clip: summary in the text-aligned space, spatial features after the final norm.

Papers: CLIP 2103.00020, DFN 2309.17425, MetaCLIP 2309.16671, OpenCLIP 2212.07143, SigLIP 2 2502.14786.
"""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.clip_tower import (
    Tower,
    image_tensors,
    positions_resized,
    preprocessing_fields,
    read_clip_file,
    resize_built,
    tower_of_file,
    trained_with_quick_gelu,
)
from cache_builder.teachers.preprocessing import open_clip_preprocessing
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset
from cache_builder.teachers.probe import probe
from cache_builder.teachers.state_dict import load_exactly
from cache_builder.teachers.weights import describe_source, file_sha256
from cache_builder.teachers.wrong_weights import likely_origin
from radio_cache.format.schema import TeacherSpec
from radio_cache.geometry.crops import patch_geometry


@final
class Clip(Teacher):
    """Summary: the image embedding, before its normalisation. Spatial: patch tokens after the final LayerNorm."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        subject = f"teacher '{preset.name}', {preset.model} of open_clip,"
        file = read_clip_file(path, teacher=preset.name, legacy_loading=options.legacy_loading)
        state, origin = image_tensors(file.tensors), likely_origin(file.tensors)
        loaded = {"tensors": file.chosen} if file.chosen else {}
        tower = tower_of_file(preset, state, path, origin)
        self.notes = (*file.notes, *([tower.note] if tower.note else []))
        trained_with = trained_with_quick_gelu(preset.model, preset.tag)
        # Only open_clip's own ViT has this activation.
        if trained_with != tower.quick_gelu and tower.patch_px is not None and not options.legacy_loading:
            tower = replace(tower, quick_gelu=trained_with)
            activation = "QuickGELU" if trained_with else "GELU"
            loaded |= {"activation": activation}
            self.notes += (
                f"runs {activation}, which '{preset.tag}' was trained with by open_clip's table; {preset.model} has the other",
            )
        prepared = open_clip_preprocessing(
            subject,
            preprocessing_fields(preset.model, preset.tag, tower.size_px),
            size_px=options.size_px,
            fit=options.fit,
        )
        size = prepared.size_px
        if tower.patch_px is not None:
            patch_geometry(size, tower.patch_px, fit=prepared.fit, interpolation=prepared.interpolation)

        # On the meta device, before any weights: an impossible size fails within a second.
        def unweighted() -> Any:
            net = tower.at_size(size).build()
            resize_built(net, tower, size, subject)
            return net

        geometry, summary_dim, spatial_dim = probe(
            unweighted, _features, prepared, subject=subject, native_px=tower.size_px
        )
        self._net: Any = tower.at_size(size).build()
        if tower.patch_px is not None:
            file_shape = state["positional_embedding"].shape  # (tokens, width)
            state = positions_resized(self._net, state)
            if file_shape != (resized_shape := state["positional_embedding"].shape):
                positions = f"{file_shape[0]} -> {resized_shape[0]} tokens as open_clip: bicubic, antialiased"
                loaded |= {"positions": positions}
        load_exactly(self._net, state, teacher=preset.name, path=path, origin=origin)
        loaded |= resize_built(self._net, tower, size, subject)
        sizes = f" ({spatial_dim} wide, {tower.config.layers} deep)" if tower.patch_px is not None else ""
        # A model without a preset is recorded by the name that `find_teacher` loads it by.
        library_name = f"open_clip:{preset.model}" + (f"/{preset.tag}" if preset.tag else "")
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=f"{preset.model}{sizes}" if preset.output else library_name,
            licence=preset.licence,
            weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path),
            geometry=geometry,
            normalisation=prepared.normalisation,
            summary_dim=summary_dim,
            spatial_dim=spatial_dim,
            summary_note="image embedding (text-aligned), not normalised",
            spatial_note=_spatial_note(self._net, tower),
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={"open_clip": version("open_clip_torch"), "torch": version("torch")},
            loaded=loaded,
        )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the features of normalised images."""
        return _features(self._net, images)

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._net.to(device)


def _spatial_note(net: Any, tower: Tower) -> str:
    """Return the description of the spatial features for the spec."""
    if tower.patch_px is None:
        return "last map of the image tower"
    return (
        "patch tokens after ln_post" if _has_norm(net) else "patch tokens of the last block, before attentional pooling"
    )


def _has_norm(net: Any) -> bool:
    """Return whether the final norm applies to tokens. CoCa's comes after attentional pooling, at the width of the embedding."""
    return getattr(net, "attn_pool", None) is None


def _features(net: Any, images: Tensor) -> Features:
    """Run the image tower.

    Args:
        net: the tower.
        images: (b, 3, h, w).
    """
    out = net.forward_intermediates(images, indices=1, normalize_intermediates=_has_norm(net), output_fmt="NCHW")
    # (b, c, h, w) -> (b, h, w, c)
    return Features(out["image_features"], out["image_intermediates"][0].permute(0, 2, 3, 1))
