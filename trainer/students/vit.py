"""ViT with cropped position embeddings: the student of AM-RADIO (arXiv 2312.06709) that takes any resolution.

One position table, far larger than any one grid, is learned by showing each training image a random crop of it; at
evaluation the top-left part of the resized table is used. There is one class token per summary teacher, registers, and
no final norm. Attention may be windowed in most blocks, with windows drawn anew in every training step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import ConfigError
from trainer.students.base import Encoded, FeatureFormat, Student, StudentOutput
from trainer.students.positions import CroppedPositions
from trainer.students.reparametrised import plain_state, reparametrise
from trainer.students.transformer_block import Block
from trainer.students.windows import draw_window, global_blocks, to_row_order, to_window_order


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """One ViT.

    Attributes:
        registers: None fills class tokens and registers up to a multiple of 8, as RADIOv2.5 does.
        mlp_hidden: width inside the MLPs; None is four times the width.
        gated_mlp: SwiGLU instead of GELU.
        window: side in tokens of the attention windows in all but the global blocks; None for no windows.
        train_windows: candidates for the window of a training step, used with `window_probability`.
        num_global: number of global blocks, see `windows.global_blocks`.
        num_windowed: windowed blocks between global ones, instead of `num_global`.
        spectral_reparam: training only, see `reparametrised`.
        damp_sigma: training only, see `reparametrised`.
        patch_bias: a bias in the patch embedding, as in DINOv2.
        pre_norm: a norm before the blocks, as in CLIP.
        init_from: a timm model whose weights to start from.
        init_file: file of these weights; None downloads them.
    """

    name: str
    width: int
    depth: int
    heads: int
    patch_size: int = 16  # pixels
    mlp_hidden: int | None = None
    gated_mlp: bool = False
    num_summary_tokens: int = 1  # class tokens, one per summary teacher
    registers: int | None = None
    max_resolution: int = 2048  # pixels; the position table covers this square
    position_drop: float = 0.1  # share of training images shown without any position
    preferred_resolution: tuple[int, int] = (432, 432)  # height, width in pixels
    window: int | None = None
    train_windows: Sequence[int] = ()
    window_probability: float = 0.0
    num_global: int = 4
    num_windowed: int | None = None
    spectral_reparam: bool = False
    damp_sigma: float = 0.0
    patch_bias: bool = False
    pre_norm: bool = False
    init_from: str | None = None
    init_file: str | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"{self.name}: width {self.width} is not divisible by {self.heads} heads.")
        if self.num_summary_tokens < 1:
            raise ConfigError(f"{self.name}: num_summary_tokens is at least 1, got {self.num_summary_tokens}.")
        if not 0 <= self.position_drop < 1:
            raise ConfigError(f"{self.name}: position_drop is in [0, 1), got {self.position_drop}.")
        if self.damp_sigma < 0:
            raise ConfigError(f"{self.name}: damp_sigma is a standard deviation, at least 0, got {self.damp_sigma}.")
        if self.num_global < 1:
            raise ConfigError(f"{self.name}: num_global is at least 1, got {self.num_global}.")
        if any(window < 1 for window in (*self.train_windows, 1 if self.window is None else self.window)):
            raise ConfigError(
                f"{self.name}: windows are at least 1 token wide, got window={self.window}, "
                f"train_windows={list(self.train_windows)}."
            )
        if not 0 <= self.window_probability <= 1:
            raise ConfigError(f"{self.name}: window_probability is in [0, 1], got {self.window_probability}.")
        if bool(self.train_windows) != (self.window_probability > 0):
            raise ConfigError(
                f"{self.name}: train_windows and window_probability go together, got {list(self.train_windows)} and "
                f"{self.window_probability}."
            )
        if self.init_file is not None and self.init_from is None:
            raise ConfigError(f"{self.name}: init_file needs init_from, the timm model whose weights it holds.")

    @property
    def num_registers(self) -> int:
        """Number of registers."""
        return 8 - self.num_summary_tokens % 8 if self.registers is None else self.registers

    @property
    def table_side(self) -> int:
        """Side of the position table, in tokens."""
        return round(self.max_resolution / self.patch_size)

    @property
    def hidden(self) -> int:
        """Width inside the MLPs."""
        return 4 * self.width if self.mlp_hidden is None else self.mlp_hidden


TRAINING_SETTINGS = frozenset({"spectral_reparam", "damp_sigma", "train_windows", "window_probability"})
"""Settings without effect on a student's weights once it is trained."""

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(ViTConfig)}


def _versions() -> dict[str, ViTConfig]:
    # For a CPU at 64 to 128 px: a smaller table, because few images are seen per position.
    tiny = ViTConfig(name="vit-tiny-16", width=192, depth=6, heads=3, max_resolution=512, preferred_resolution=(96, 96))
    configs = [tiny]
    for patch_size, side in ((16, 432), (14, 378)):
        for size, width, depth, heads, hidden, gated in (
            ("s", 384, 12, 6, None, False),
            ("b", 768, 12, 12, None, False),
            ("l", 1024, 24, 16, None, False),
            ("h", 1280, 32, 16, None, False),
            ("so400m", 1152, 27, 16, 4304, False),
            ("g", 1536, 40, 24, 4096, True),
        ):
            configs.append(
                ViTConfig(
                    name=f"vit-{size}-{patch_size}",
                    width=width,
                    depth=depth,
                    heads=heads,
                    mlp_hidden=hidden,
                    gated_mlp=gated,
                    patch_size=patch_size,
                    preferred_resolution=(side, side),
                )
            )
    return {config.name: config for config in configs}


VERSIONS: dict[str, ViTConfig] = _versions()


@final
class ViT(Student):
    """A ViT whose summary is the concatenation of its class tokens: (b, num_summary_tokens * width)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(
            name=config.name,
            patch_size=config.patch_size,
            embed_dim=config.width,
            summary_dim=config.num_summary_tokens * config.width,
            num_summary_tokens=config.num_summary_tokens,
            min_resolution_step=config.patch_size * (config.window or 1),
            preferred_resolution=config.preferred_resolution,
            no_weight_decay=frozenset({"positions.table", "tokens"}),
        )
        self.preferred_resolution = self.nearest_supported_resolution(*config.preferred_resolution)
        self.config = config
        self.embed = nn.Linear(3 * config.patch_size**2, config.width, bias=config.patch_bias)
        self.positions = CroppedPositions(config.table_side, config.width, drop=config.position_drop)
        # Class tokens first, then registers; neither gets a position.
        self.tokens = nn.Parameter(
            torch.randn(config.num_summary_tokens + config.num_registers, config.width) * config.width**-0.5
        )
        self.norm_pre = nn.LayerNorm(config.width, eps=1e-5) if config.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(config.width, config.heads, hidden=config.hidden, gated=config.gated_mlp)
                for _ in range(config.depth)
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]  # the stubs forget bias=False
                    nn.init.zeros_(module.bias)
        reparametrise(self.blocks, spectral=config.spectral_reparam, damp_sigma=config.damp_sigma)
        self._global = global_blocks(config.depth, num_global=config.num_global, num_windowed=config.num_windowed)
        if config.train_windows:
            # In the state dict, so that a resumed run continues its draws.
            self.window_draws: Tensor
            self.register_buffer("window_draws", torch.zeros((), dtype=torch.int64))

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        last = self.config.depth - 1
        return self._run(images, [last])[last]

    def intermediates(
        self, images: Float[Tensor, "b 3 h w"], blocks: Sequence[int], *, feature_fmt: FeatureFormat = "NLC"
    ) -> list[StudentOutput]:
        """Return summary and spatial features after each of `blocks`, in their order.

        Blocks after the last of them do not run. The output of the last block is that of `forward`.

        Args:
            images: (b, 3, h, w), RGB in [0, 1].
            blocks: indices, 0 for the first and -1 for the last block.
            feature_fmt: as for `forward`.

        Raises:
            ConfigError: for an index without a block. Errors of `forward` are raised as well.
        """
        depth = self.config.depth
        for block in blocks:
            if not -depth <= block < depth:
                raise ConfigError(f"student '{self.name}' has blocks 0 to {depth - 1}, not {block}.")
        conditioned = self._condition(images, feature_fmt)
        taps = self._run(conditioned, [block % depth for block in blocks])
        return [self._formatted(taps[block % depth], feature_fmt) for block in blocks]

    def materialised(self) -> "ViT":
        """Return a copy in evaluation mode with the same features and plain weights, without the parts of training."""
        off = {key: value for key, value in _DEFAULTS.items() if key in TRAINING_SETTINGS}
        state = plain_state(self)
        state.pop("window_draws", None)
        with torch.random.fork_rng(devices=[]):  # its first weights are overwritten
            plain = ViT(replace(self.config, **off))
        plain.to(self.tokens).load_state_dict(state)
        return plain.eval()

    def _run(self, images: Float[Tensor, "b 3 h w"], taps: Sequence[int]) -> dict[int, Encoded]:
        """Return the outputs after each block of `taps`. Later blocks do not run."""
        b, _, h, w = images.shape
        grid_hw = h // self.patch_size, w // self.patch_size
        prefix_len = int(self.tokens.shape[0])
        # (b, 3, h, w) -> (b, n, 3 * p * p) -> (b, n, c)
        patches = self.positions(self.embed(cut_patches(images, self.patch_size)), grid_hw)
        window = self._window(grid_hw)
        if window is not None:
            patches = to_window_order(patches, grid_hw, window)
        # (b, prefix + n, c)
        x = self.norm_pre(torch.cat([self.tokens.to(patches.dtype).expand(b, -1, -1), patches], dim=1))
        out: dict[int, Encoded] = {}
        for number in range(max(taps, default=-1) + 1):
            block = self.blocks[number]
            if window is None or number in self._global:
                x = block(x)
            else:
                # (b, n, c) -> (b * windows, window * window, c): class tokens and registers skip windowed blocks
                windows = x[:, prefix_len:].reshape(-1, window**2, x.shape[-1])
                x = torch.cat([x[:, :prefix_len], block(windows).reshape(b, -1, x.shape[-1])], dim=1)
            if number in taps:
                spatial = x[:, prefix_len:]
                if window is not None:
                    spatial = to_row_order(spatial, grid_hw, window)
                # (b, k, c) -> (b, k * c); registers, which follow the class tokens, are dropped here
                summary = x[:, : self.num_summary_tokens].flatten(1)
                # (b, n, c) -> (b, c, h, w)
                out[number] = Encoded(summary, spatial.transpose(1, 2).unflatten(2, grid_hw))
        return out

    def _window(self, grid_hw: tuple[int, int]) -> int | None:
        config = self.config
        if not self.training or not config.train_windows:
            return config.window
        draw = int(self.window_draws)
        self.window_draws += 1
        # The compiler must see the result as a number, because it decides shapes.
        drawn = cast(Callable[..., int | None], torch.compiler.disable(draw_window))
        return drawn(config.train_windows, grid_hw, config.window_probability, draw)


def cut_patches(images: Float[Tensor, "b 3 h w"], patch_size: int) -> Float[Tensor, "b n p"]:
    """Split images into square patches, row-major from the top left, each flattened as (channel, y, x)."""
    b, c, h, w = images.shape
    p = patch_size
    # (b, c, rows, p, columns, p) -> (b, rows * columns, c * p * p)
    return images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
