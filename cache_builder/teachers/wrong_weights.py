"""Hints at the origin of a weights file that is not the requested teacher's."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from cache_builder.teachers.preset import TeacherPreset

_TRANSFORMERS = "in the format of transformers, which is not read here; `radio-cache teachers` lists the files that are"

# Specific beginnings come before those that many networks share.
_SIGNS: tuple[tuple[str, str], ...] = (
    ("vision_encoder.layers.0.attn.", f"SAM {_TRANSFORMERS}"),
    (
        "embeddings.cls_register_token",
        "C-RADIO in the names inside transformers: save it with save_pretrained, and pass its model.safetensors",
    ),
    ("encoder.layer.0.layer_scale1.", f"DINOv2 {_TRANSFORMERS}"),
    ("layer.0.layer_scale1.", f"DINOv3 {_TRANSFORMERS}"),
    ("layers.0.self_attn.q_proj.", f"CLIP or SigLIP {_TRANSFORMERS}"),
    ("vision_model.", f"CLIP or SigLIP {_TRANSFORMERS}"),
    ("embeddings.patch_embeddings.", f"a ViT {_TRANSFORMERS}"),
    ("encoder.layer.0.", f"a network {_TRANSFORMERS}"),
    ("stages.0.downsample_layers.", f"a ConvNeXt {_TRANSFORMERS}"),
    ("encoder.stages.0.layers.", f"a network {_TRANSFORMERS}"),
    ("embedder.embedder.", f"a ResNet {_TRANSFORMERS}"),
    ("image_encoder.trunk.", "SAM 2 (no teacher of this package)"),
    ("image_encoder.patch_embed.seq.", "MobileSAM (no teacher of this package)"),
    ("image_encoder.stages.", "EdgeSAM or another SAM without a ViT (no teacher of this package)"),
    ("image_encoder.backbone.", "EfficientViT-SAM or another SAM without a ViT (no teacher of this package)"),
    ("image_encoder.", "SAM (sam-vit-b, -l, -h)"),
    ("radio_model.", "C-RADIO (c-radio-...)"),
    ("visual.trunk.", "an open_clip model with an image tower of timm (siglip2-g-384, open_clip:MODEL)"),
    ("visual.", "CLIP in open_clip's format (clip, open_clip:MODEL)"),
    ("storage_tokens", "DINOv3 in Meta's format (dinov3-...)"),
    ("_conv_stem.", "EfficientNet-Lite (efficientnet-lite0, 1, 2)"),
    ("register_tokens", "DINOv2 with registers in Meta's format (dinov2-vit-...-reg)"),
    ("blocks.0.ls1.gamma", "DINOv2 (dinov2-vit-...)"),
    ("blocks.0.0.ls1.gamma", "DINOv2 (dinov2-vit-...)"),
    ("blocks.0.attn.qkv.", "a ViT in timm's format (timm:MODEL)"),
    ("stages.0.blocks.0.conv_dw.", "a ConvNeXt in timm's format (dinov3-convnext-..., timm:MODEL)"),
    ("conv1.weight", "a ResNet (timm:MODEL)"),
)
"""Beginning of a tensor's name -> the network with such tensors, and its teacher. The first match is used."""


def likely_origin(state: Mapping[str, Tensor]) -> str:
    """Return a suffix for an error message naming the model these weights appear to belong to, or ''."""
    for sign, origin in _SIGNS:
        if any(key.startswith(sign) for key in state):
            return f". It looks like {origin}"
    # Only if no name begins so: the network may lie within another one.
    for sign, origin in _SIGNS:
        if any(f".{sign}" in key for key in state):
            return f". It looks like {origin}"
    return ""


def first_differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], *, limit: int = 3) -> list[str]:
    """Return the first tensors whose shapes differ, in the network's order: `x is (1, 7), needed is (1, 3)`.

    Args:
        expected: tensors of the network.
        state: tensors of the file.
        limit: number of differences to return.
    """
    wrong = (
        f"{key} is {tuple(state[key].shape)}, needed is {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and value.shape != state[key].shape
    )
    # `wrong` is lazy: only the differences that are shown are formatted.
    return [difference for difference, _ in zip(wrong, range(limit), strict=False)]


def published_twin(
    requested: TeacherPreset, presets: Iterable[TeacherPreset], has_these_sizes: Callable[[TeacherPreset], bool]
) -> TeacherPreset | None:
    """Return another published teacher with the sizes of the file: then it is the wrong file, not a user's own network.

    Args:
        requested: the requested teacher.
        presets: candidates.
        has_these_sizes: compares the published sizes of a preset with the file's.
    """
    candidates = (preset for preset in presets if preset.model != requested.model)
    return next((preset for preset in candidates if has_these_sizes(preset)), None)
