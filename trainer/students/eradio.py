"""E-RADIO: the fast convolution-then-attention student of AM-RADIO (arXiv 2312.06709, section 4 and appendix).

Strides 4 and 8 are convolutions (C2f, from YOLOv8), strides 16 and 32 windowed attention at two resolutions, and a
neck joins both attention maps at stride 16. Differs from the paper's code: the windows of a map that no whole number of
windows covers are evened out (16 tokens under a window of 7 are 3 windows of 6, not of 7), so small and odd maps carry
little padding, and a map smaller than the window is one window. At 224 px, and for e-radio-l-512 at 512 px, nothing
changes. The other differences, in neck biases, drop path and windows at larger sizes, are in docs/students.md.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from radio_cache.errors import ConfigError
from trainer.students.base import Encoded, Student

Neck = Literal["none", "shuffle", "depthwise"]


@dataclass(frozen=True, kw_only=True)
class ERadioConfig:
    """One E-RADIO. Stage i (0..3) is width * 2**i wide, at stride 4 * 2**i; stages 2 and 3 use attention."""

    name: str
    width: int
    stem_width: int = 64
    depths: tuple[int, int, int, int] = (3, 3, 5, 5)
    heads: tuple[int, int] = (8, 16)  # of stages 2 and 3
    windows: tuple[int, int] = (7, 7)  # sides in tokens, of stages 2 and 3
    bias_hidden: int = 512  # hidden width of the position-bias MLPs
    local_conv: bool = False  # a dense 3x3 residual convolution in every full-resolution attention block
    neck: Neck = "shuffle"  # "none" leaves the stride-32 map of the last stage
    drop_path: float = 0.0  # of the last block; rises linearly from 0 at the first attention block
    preferred_resolution: tuple[int, int] = (224, 224)  # height, width in pixels

    def __post_init__(self) -> None:
        for name, least, count in (("depths", 0, 4), ("heads", 1, 2), ("windows", 2, 2)):
            numbers: Any = getattr(self, name)
            if (
                not isinstance(numbers, list | tuple)
                or len(numbers) != count
                or any(type(number) is not int or number < least for number in numbers)
            ):
                raise ConfigError(
                    f"{self.name}: {name} are {count} whole numbers of at least {least}, got {numbers!r}."
                )
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"{self.name}: drop_path is in [0, 1), got {self.drop_path}.")
        for stage, heads, window in zip((2, 3), self.heads, self.windows, strict=True):
            if self.width * 2**stage % heads:
                raise ConfigError(
                    f"{self.name}: stage {stage} is {self.width * 2**stage} wide, not divisible by {heads} heads."
                )
            if window < 2:
                raise ConfigError(f"{self.name}: windows are at least 2 tokens wide, got {window}.")
        if self.width % 2:
            raise ConfigError(f"{self.name}: width is even, because C2f splits it in halves; got {self.width}.")

    @property
    def output_width(self) -> int:
        return 8 * self.width


VERSIONS: dict[str, ERadioConfig] = {
    config.name: config
    for config in (
        # For two CPU cores at 64 to 128 px. Width pays more than depth there: a training step of 64 images at 96 px
        # takes half a second of one core (AMD EPYC with AVX2, float32), 1.7 times less than with depths (1, 2, 3, 3).
        ERadioConfig(
            name="e-radio-tiny",
            width=32,
            stem_width=16,
            depths=(1, 1, 1, 2),
            heads=(4, 8),
            windows=(8, 8),
            bias_hidden=64,
            neck="depthwise",
            preferred_resolution=(96, 96),
        ),
        ERadioConfig(name="e-radio-t", width=80, depths=(1, 3, 4, 5), drop_path=0.2),
        ERadioConfig(name="e-radio-s", width=96, drop_path=0.2),
        ERadioConfig(name="e-radio-b", width=128, drop_path=0.2),
        ERadioConfig(name="e-radio-b-no-upsample", width=128, neck="none", drop_path=0.2),
        ERadioConfig(name="e-radio-l", width=192),
        ERadioConfig(
            name="e-radio-l-512",
            width=192,
            windows=(16, 16),
            local_conv=True,
            neck="depthwise",
            preferred_resolution=(512, 512),
        ),
    )
}


@final
class ERadio(Student):
    """E-RADIO; the summary is the mean of the map (its own BN, pool and linear head are of no use to a student)."""

    def __init__(self, config: ERadioConfig) -> None:
        super().__init__(
            name=config.name,
            patch_size=32 if config.neck == "none" else 16,
            embed_dim=config.output_width,
            summary_dim=config.output_width,
            min_resolution_step=32,  # 16 would leave an odd map at stride 16, which the stride-2 blocks cannot halve
            preferred_resolution=config.preferred_resolution,
        )
        self.config = config
        w0, w1, w2, w3 = (config.width * 2**stage for stage in range(4))
        self.stem = nn.Sequential(
            ConvNorm(3, config.stem_width, kernel=3, stride=2, act=nn.ReLU()),
            ConvNorm(config.stem_width, w0, kernel=3, stride=2, act=nn.ReLU()),
        )
        self.conv_stages = nn.Sequential(
            C2f(w0, depth=config.depths[0]),
            ConvNorm(w0, w1, kernel=3, stride=2),
            C2f(w1, depth=config.depths[1]),
            ConvNorm(w1, w2, kernel=3, stride=2),
        )
        # A block of stage 2 is a pair: attention on the halved map, then on the full one.
        drop = iter(torch.linspace(0, config.drop_path, 2 * config.depths[2] + config.depths[3], device="cpu").tolist())
        self.stage2 = nn.Sequential(
            *(
                WindowBlock(w2, config.heads[0], config.windows[0], config, halve=halve, drop_path=next(drop))
                for _ in range(config.depths[2])
                for halve in (True, False)
            )
        )
        self.downsample = ConvNorm(w2, w3, kernel=3, stride=2)
        self.stage3 = nn.Sequential(
            *(
                WindowBlock(w3, config.heads[1], config.windows[1], config, halve=False, drop_path=next(drop))
                for _ in range(config.depths[3])
            )
        )
        match config.neck:
            case "none":
                self.neck: NoNeck | SumNeck = NoNeck(w3)
            case "shuffle":
                self.neck = SumNeck(ShuffleLevel(w2, config.output_width, 1), ShuffleLevel(w3, config.output_width, 2))
            case "depthwise":
                self.neck = SumNeck(
                    DepthwiseLevel(w2, config.output_width, 1), DepthwiseLevel(w3, config.output_width, 2)
                )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]  # the stubs forget bias=False
                    nn.init.zeros_(module.bias)

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        # Channels last makes cutting windows free of copies when one window covers the map.
        x = self.conv_stages(self.stem(images.contiguous(memory_format=torch.channels_last)))
        stride16 = self.stage2(x)
        stride32 = self.stage3(self.downsample(stride16))
        out = self.neck(stride16, stride32)
        return Encoded(out.mean((2, 3)), out)

    @property
    def stage_widths(self) -> tuple[int, int, int, int]:
        """Channels of `stages`."""
        w0, w1, w2, w3 = (self.config.width * 2**stage for stage in range(4))
        return (w0, w1, w2, w3) if self.config.neck == "none" else (w0, w1, self.embed_dim, w3)

    def stages(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c h2 w2"]]:
        """Return maps of stride 4, 8, 16 and 32, as detectors need them.

        With a neck, the map of stride 16 is its output, which `forward` returns, too. Raises the errors of `forward`.
        """
        x = self.stem(self._condition(images, "NCHW").contiguous(memory_format=torch.channels_last))
        conv0, down1, conv1, down2 = self.conv_stages
        stride4 = conv0(x)
        stride8 = conv1(down1(stride4))
        stride16 = self.stage2(down2(stride8))
        stride32 = self.stage3(self.downsample(stride16))
        if self.config.neck == "none":
            return [stride4, stride8, stride16, self.neck(stride16, stride32)]
        return [stride4, stride8, self.neck(stride16, stride32), stride32]

    def deploy(self) -> Self:
        """Return a frozen copy for inference, with the same outputs up to rounding.

        Batch norms are folded into convolutions, position biases into tables, and weights are channels-last. The copy cannot be
        trained, and its state dict differs from the original's.
        """
        deployed = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(deployed.modules()):
            if isinstance(module, ConvNorm | PositionBias | ShuffleLevel):
                module.fold()
        return deployed.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # the stub lacks this overload


@final
class ConvNorm(nn.Module):
    """Convolution, batch norm, activation; padded so that only the stride changes the size of the map."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(width_out)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.act(self.norm(self.conv(x)))

    def fold(self) -> None:
        """Move the batch norm into the convolution. For evaluation only."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


@final
class Bottleneck(nn.Module):
    """Two 3x3 convolutions and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, width, kernel=3, act=nn.SiLU())
        self.conv2 = ConvNorm(width, width, kernel=3, act=nn.SiLU())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(self.conv1(x))


@final
class C2f(nn.Module):
    """Cross-stage partial bottlenecks: a chain on one half of the channels, every link of it kept for the last 1x1."""

    def __init__(self, width: int, *, depth: int) -> None:
        super().__init__()
        self.expand = ConvNorm(width, width, kernel=1, act=nn.SiLU())
        self.chain = nn.ModuleList(Bottleneck(width // 2) for _ in range(depth))
        self.join = ConvNorm((2 + depth) * width // 2, width, kernel=1, act=nn.SiLU())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        links = list(self.expand(x).chunk(2, dim=1))
        for bottleneck in self.chain:
            links.append(bottleneck(links[-1]))
        return self.join(torch.cat(links, dim=1))


@final
class PositionBias(nn.Module):
    """Attention bias from the offset between two tokens, through a small MLP (Swin V2, arXiv 2111.09883).

    bias = 16 * sigmoid(MLP(offset)), with offsets scaled by the window to [-8, 8] and then sign(x) log2(|x| + 1) / 3.
    A window smaller than the configured one reads a part of the same table: an offset of one token stays that.
    """

    def __init__(self, window: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.window = window
        self.mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, heads, bias=False))
        self.offsets: Tensor
        self.index: Tensor
        self.baked: Tensor | None
        reach = torch.arange(-(window - 1), window) * (8 / (window - 1))
        scaled = reach.sign() * torch.log2(reach.abs() + 1) / math.log2(8)
        offsets = torch.stack(torch.meshgrid(scaled, scaled, indexing="ij"), dim=-1).flatten(0, 1)
        # index[yq, xq, yk, xk] is the row of `offsets` for query (yq, xq) and key (yk, xk).
        step = torch.arange(window)
        delta = step[:, None] - step[None, :] + window - 1
        index = delta[:, None, :, None] * (2 * window - 1) + delta[None, :, None, :]
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("baked", None)

    def forward(self, window_hw: tuple[int, int]) -> Float[Tensor, "heads n n"]:
        h, w = window_hw
        table = self._table() if self.baked is None else self.baked
        index = self.index[:h, :w, :h, :w].reshape(h * w, h * w)
        return table[index].permute(2, 0, 1)

    def _table(self) -> Float[Tensor, "offsets heads"]:
        return 16 * torch.sigmoid(self.mlp(self.offsets))

    def fold(self) -> None:
        """Replace the MLP by its values at every offset. For evaluation only."""
        self.baked = self._table().detach()
        self.mlp = nn.Sequential()


@final
class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window, with a position bias and without linear biases."""

    def __init__(self, width: int, heads: int, window: int, bias_hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.position_bias = PositionBias(window, heads, bias_hidden)

    def forward(self, x: Float[Tensor, "b n c"], window_hw: tuple[int, int]) -> Float[Tensor, "b n c"]:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.position_bias(window_hw).to(q.dtype).unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


@final
class WindowBlock(nn.Module):
    """Transformer block on the windows of a map, or of the map reduced to half its sides; averaged with its input."""

    def __init__(
        self, width: int, heads: int, window: int, config: ERadioConfig, *, halve: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.window = window
        self.reduce = nn.Conv2d(width, width, 2, 2) if halve else nn.Identity()
        self.restore = nn.ConvTranspose2d(width, width, 2, 2) if halve else nn.Identity()
        self.local = ConvNorm(width, width, kernel=3) if config.local_conv and not halve else None
        self.norm1 = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window, config.bias_hidden)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.reduce(x)
        if self.local is not None:
            y = y + self.local(y)
        h, w = int(y.shape[-2]), int(y.shape[-1])
        window_hw = even_window(h, self.window), even_window(w, self.window)
        tokens = cut_windows(y, window_hw)
        tokens = tokens + self.drop_path(self.attention(self.norm1(tokens), window_hw))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return 0.5 * x + 0.5 * self.restore(join_windows(tokens, (h, w), window_hw))


def even_window(tokens: int, window: int) -> int:
    """Side of equal windows over `tokens` tokens: as few windows as sides of at most `window` allow."""
    return math.ceil(tokens / math.ceil(tokens / window))


def cut_windows(x: Float[Tensor, "b c h w"], window_hw: tuple[int, int]) -> Float[Tensor, "b_windows n c"]:
    """Cut a map into windows of row-major tokens; zeros pad the bottom and the right where a window sticks out."""
    b, c, h, w = x.shape
    wh, ww = window_hw
    x = F.pad(x, (0, -w % ww, 0, -h % wh)) if h % wh or w % ww else x
    rows, columns = x.shape[-2] // wh, x.shape[-1] // ww
    return x.permute(0, 2, 3, 1).reshape(b, rows, wh, columns, ww, c).transpose(2, 3).reshape(-1, wh * ww, c)


def join_windows(
    tokens: Float[Tensor, "b_windows n c"], map_hw: tuple[int, int], window_hw: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Invert `cut_windows` and remove its padding."""
    (h, w), (wh, ww) = map_hw, window_hw
    rows, columns = math.ceil(h / wh), math.ceil(w / ww)
    x = tokens.view(-1, rows, columns, wh, ww, tokens.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * wh, columns * ww, tokens.shape[-1])[:, :h, :w].permute(0, 3, 1, 2)


@final
class NoNeck(nn.Module):
    """The stride-32 map alone, batch-normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)

    def forward(self, stride16: Float[Tensor, "b c h w"], stride32: Float[Tensor, "b d h2 w2"]) -> Tensor:
        return self.norm(stride32)


@final
class SumNeck(nn.Module):
    """Both attention maps brought to stride 16 and to one width, and added."""

    def __init__(self, level16: "ShuffleLevel | DepthwiseLevel", level32: "ShuffleLevel | DepthwiseLevel") -> None:
        super().__init__()
        self.level16 = level16
        self.level32 = level32

    def forward(self, stride16: Float[Tensor, "b c h w"], stride32: Float[Tensor, "b d h2 w2"]) -> Tensor:
        return self.level16(stride16) + self.level32(stride32)


@final
class ShuffleLevel(nn.Module):
    """Batch norm, a 1x1 convolution to r * r times the width, pixel shuffle by r: the neck of the first paper."""

    def __init__(self, width_in: int, width_out: int, factor: int) -> None:
        super().__init__()
        self.norm: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(width_in)
        self.conv = nn.Conv2d(width_in, width_out * factor**2, 1, bias=False)
        self.shuffle = nn.PixelShuffle(factor)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.shuffle(self.conv(self.norm(x)))

    def fold(self) -> None:
        """Move the batch norm into the 1x1 convolution after it. For evaluation only."""
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d):
            return
        assert norm.running_mean is not None  # the batch norms here keep statistics
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        conv = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 1).to(scale)
        conv.weight = nn.Parameter(self.conv.weight * scale[None, :, None, None], requires_grad=False)
        conv.bias = nn.Parameter(self.conv.weight[:, :, 0, 0] @ shift, requires_grad=False)
        self.conv, self.norm = conv, nn.Identity()


@final
class DepthwiseLevel(nn.Module):
    """Nearest upsampling by r, a depthwise 3x3 convolution, batch norm, a 1x1 convolution: the CVPR model's neck."""

    def __init__(self, width_in: int, width_out: int, factor: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=factor, mode="nearest") if factor > 1 else nn.Identity()
        self.depthwise = ConvNorm(width_in, width_in, kernel=3, groups=width_in, bias=True)
        self.conv = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.conv(self.depthwise(self.upsample(x)))
