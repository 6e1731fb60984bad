"""Adaptor heads: from a student's features to each teacher's (AM-RADIO, arXiv 2312.06709, section 3).

One MLP per teacher for the summary and one for the spatial features: the paper's two layers, or the later one with
residual blocks, which may also predict a finer grid than the student's. They are trained with the student, which can be
used with or without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import ConfigError
from trainer.model.head_config import HeadConfig
from trainer.students.base import Student, StudentOutput


@dataclass(frozen=True, kw_only=True)
class TeacherWidths:
    """Widths of one teacher's features; `summary_dim` is None for a teacher without a summary, such as SAM."""

    name: str
    summary_dim: int | None
    spatial_dim: int


class AdaptorOutput(NamedTuple):
    """A student's prediction of one teacher, in float32: summary (b, summary_dim) or None, spatial (b, n, spatial_dim)."""

    summary: Tensor | None
    spatial: Tensor


@final
class MlpHead(nn.Sequential):
    """Linear, LayerNorm, GELU, Linear."""

    def __init__(self, width_in: int, hidden_dim: int, width_out: int) -> None:
        super().__init__(
            nn.Linear(width_in, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, width_out)
        )

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        linear = self[-1]
        assert isinstance(linear, nn.Linear)
        return linear


@final
class ResidualHead(nn.Module):
    """Linear, `blocks` times x + Linear(GELU(LayerNorm(x))), LayerNorm, GELU, Linear: RADIOv2.5's second kind of MLP.

    copies: how many times `width_out` the output is wide; copy i holds the channels [i * width_out, (i + 1) * width_out).
    """

    def __init__(self, width_in: int, hidden_dim: int, width_out: int, *, blocks: int, copies: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(width_in, hidden_dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim)) for _ in range(blocks)
        )
        self.end = nn.Sequential(nn.LayerNorm(hidden_dim), nn.GELU())
        self.last = nn.Linear(hidden_dim, copies * width_out)
        # Normalised targets have a mean of 0, so a head starts without an offset.
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        # (..., width_in) -> (..., hidden_dim), which blocks keep -> (..., copies * width_out)
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.end(x))


Head = MlpHead | ResidualHead


@torch.no_grad()
def fold_into_last(head: Head, factor: Float[Tensor, " c"] | Float[Tensor, "c c"], shift: Float[Tensor, " c"]) -> None:
    """Change a head's last Linear so that it returns factor * y + shift (or factor @ y + shift) instead of y.

    A head that upsamples returns several copies of y. All are changed alike.
    """
    # y = W x + b, so factor * y + shift has the weight factor * W and the bias factor * b + shift.
    last, channels = head.last, len(shift)
    factor, shift = factor.to(last.weight), shift.to(last.bias)
    # (copies * c, hidden) -> (copies, c, hidden), and (copies * c,) -> (copies, c)
    weight = last.weight.unflatten(0, (-1, channels))
    bias = last.bias.unflatten(0, (-1, channels))
    if factor.ndim == 1:
        weight, bias = weight * factor[:, None], bias * factor
    else:
        # (c, c) @ (copies, c, hidden), and (copies, c) @ (c, c)
        weight, bias = factor @ weight, bias @ factor.T
    last.weight.copy_(weight.flatten(0, 1))
    last.bias.copy_((bias + shift).flatten())


@final
class Adaptors(nn.Module):
    """The heads of all teachers, in order.

    If a student has several class tokens, each teacher with a summary uses one, in order. Otherwise all teachers use the
    student's one summary.

    Raises:
        ConfigError: for no teachers, duplicate names, or another number of class tokens than of teachers with a summary.
    """

    def __init__(self, student: Student, teachers: Sequence[TeacherWidths], config: HeadConfig | None = None) -> None:
        super().__init__()
        config = HeadConfig() if config is None else config
        names = [teacher.name for teacher in teachers]
        if not names:
            raise ConfigError("adaptors need at least one teacher.")
        if len(set(names)) < len(names):
            raise ConfigError(f"adaptors need teachers of different names, got: {', '.join(names)}.")
        if BACKBONE in names:
            raise ConfigError(f"no teacher may be called '{BACKBONE}': the student's own features have that name.")
        with_summary = [teacher for teacher in teachers if teacher.summary_dim is not None]
        if student.num_summary_tokens not in (1, len(with_summary)):
            raise ConfigError(
                f"student '{student.name}' has {student.num_summary_tokens} class tokens for {len(with_summary)} "
                f"teachers with a summary ({', '.join(t.name for t in with_summary) or 'none'}): "
                f"create it with num_summary_tokens={max(1, len(with_summary))}, or 1 for all of them."
            )
        width = config.width
        if width is None:
            width = max(max(teacher.spatial_dim, teacher.summary_dim or 0) for teacher in teachers)
        self.teachers = tuple(teachers)
        self.upsample = config.upsample
        self.num_summary_tokens = student.num_summary_tokens
        # The summary is the concatenation of equal class tokens.
        token_dim = student.summary_dim // student.num_summary_tokens
        # Lists and not dicts: torch refuses module names with dots, which names of teachers may have.
        self.summary_heads = nn.ModuleList(
            _head(config, token_dim, width, teacher.summary_dim, copies=1)
            for teacher in with_summary
            if teacher.summary_dim is not None
        )
        self.spatial_heads = nn.ModuleList(
            _head(config, student.embed_dim, width, teacher.spatial_dim, copies=config.upsample**2)
            for teacher in teachers
        )

    def forward(
        self, features: StudentOutput, grid_hw: tuple[int, int], names: Sequence[str] | None = None
    ) -> dict[str, AdaptorOutput]:
        """Predict the features of the named teachers, or of all.

        Args:
            features: of the student, in the format "NLC".
            grid_hw: (h, w) of its tokens.
            names: of teachers; None for all.

        Returns:
            Name -> prediction, with spatial features row-major on (upsample * h, upsample * w) tokens.
        """
        # (b, k * c) -> k times (b, c)
        tokens: list[Float[Tensor, "b c"]] = list(features.summary.chunk(self.num_summary_tokens, dim=1))
        # Teachers without a summary have no entry in `summary_heads`, so the two lists are walked at their own pace.
        summary_heads = iter(self.summary_heads)
        predictions: dict[str, AdaptorOutput] = {}
        slot = 0
        for teacher, spatial_head in zip(self.teachers, self.spatial_heads, strict=True):
            is_used = names is None or teacher.name in names
            summary = None
            if teacher.summary_dim is not None:
                head = next(summary_heads)
                # With one token all teachers use it; else the slot is the teacher's own.
                summary = head(tokens[slot % len(tokens)]).float() if is_used else None
                slot += 1
            if is_used:
                spatial = spread_copies(spatial_head(features.spatial), grid_hw, self.upsample)
                predictions[teacher.name] = AdaptorOutput(summary, spatial.float())
        return predictions


BACKBONE: Final = "backbone"
"""Name of the student's own features beside those of its teachers."""


def spread_copies(tokens: Float[Tensor, "b n d"], grid_hw: tuple[int, int], factor: int) -> Float[Tensor, "b m c"]:
    """Rearrange tokens that hold factor * factor finer ones, copy by copy, into these finer tokens, all row-major."""
    if factor == 1:
        return tokens
    (h, w), b = grid_hw, tokens.shape[0]
    # (b, h * w, factor * factor * c) -> (b, h * factor, w * factor, c)
    fine = tokens.reshape(b, h, w, factor, factor, -1).transpose(2, 3)
    return fine.reshape(b, h * factor * w * factor, -1)


def _head(config: HeadConfig, width_in: int, width: int, width_out: int, *, copies: int) -> Head:
    if config.kind == "mlp":
        return MlpHead(width_in, width, width_out)
    return ResidualHead(width_in, width, width_out, blocks=config.blocks, copies=copies)
