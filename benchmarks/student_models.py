"""What the student benchmarks compare: every student, the teachers' image encoders and timm's ViTs, all of random weights."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.students import STUDENTS, ERadio, create_student

_INITS = (
    "trunc_normal_",
    "normal_",
    "uniform_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """make: a network of random weights in evaluation, which takes (b, 3, image_px, image_px)."""

    name: str
    kind: str
    image_px: int
    make: Callable[[], nn.Module] = field(repr=False)


def student(name: str, image_px: int, **overrides: Any) -> Model:
    return Model(name=name, kind="student", image_px=image_px, make=partial(create_student, name, **overrides))


def timm_vit(model: str, image_px: int) -> Model:
    """timm's own ViT, of the shape of one of our students."""
    make = partial(timm.create_model, model, num_classes=0, img_size=image_px, weight_init="skip")
    return Model(name=f"timm {model}", kind="timm", image_px=image_px, make=make)


def openclip_h_14(image_px: int = 224) -> Model:
    def make() -> nn.Module:
        config: dict[str, Any] = dict(open_clip.get_model_config("ViT-H-14") or {})
        return _build_vision_tower(
            config["embed_dim"], CLIPVisionCfg(**{**config["vision_cfg"], "image_size": image_px})
        )

    return Model(name="OpenCLIP ViT-H/14", kind="teacher", image_px=image_px, make=make)


def dinov2_g_14(image_px: int = 224) -> Model:
    make = partial(
        timm.create_model, "vit_giant_patch14_reg4_dinov2", num_classes=0, img_size=image_px, weight_init="skip"
    )
    return Model(name="DINOv2 ViT-g/14-reg", kind="teacher", image_px=image_px, make=make)


def sam(letter: str) -> Model:
    """SAM's image encoder with its neck; width, depth, heads and global blocks from segment_anything/build_sam.py."""
    width, depth, heads, global_blocks = {
        "b": (768, 12, 12, (2, 5, 8, 11)),
        "l": (1024, 24, 16, (5, 11, 17, 23)),
        "h": (1280, 32, 16, (7, 15, 23, 31)),
    }[letter]
    make = partial(
        ImageEncoderViT,
        img_size=1024,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        global_attn_indexes=global_blocks,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        out_chans=256,
    )
    return Model(name=f"SAM ViT-{letter.upper()}", kind="teacher", image_px=1024, make=make)


def students_at(image_px: int) -> list[Model]:
    """Every student that has a name, at a size all of them take (a ViT of patch 14 takes 224, too)."""
    return [student(name, image_px) for name in STUDENTS]


def build(model: Model) -> nn.Module:
    """The network as it is used: E-RADIO deployed. Without the minutes that drawing first weights of a billion takes."""
    with _no_init():
        net = model.make().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.02, 0.02)
    return net.deploy() if isinstance(net, ERadio) else net


@contextlib.contextmanager
def _no_init() -> Generator[None]:
    originals = {name: getattr(nn.init, name) for name in _INITS}
    try:
        for name in _INITS:
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, function in originals.items():
            setattr(nn.init, name, function)


@dataclass(frozen=True)
class Size:
    """parameters; gflops: of one image, counting a multiplication and an addition as two."""

    parameters: int
    gflops: float


def size_of(model: Model) -> Size:
    """Counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        net = model.make().eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            net(torch.empty(1, 3, model.image_px, model.image_px))
    return Size(sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() / 1e9)
