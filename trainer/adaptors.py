"""Adaptor heads: from a student's features to each teacher's (AM-RADIO, arXiv 2312.06709, section 3).

One two-layer MLP per teacher for the summary and one for the spatial features. They are trained with the student; a
student is used with or without them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import ConfigError
from trainer.students.base import Student, StudentOutput


@dataclass(frozen=True, kw_only=True)
class TeacherWidths:
    """Widths of what one teacher gives; `summary_dim` is None for a teacher without a summary, such as SAM."""

    name: str
    summary_dim: int | None
    spatial_dim: int


class AdaptorOutput(NamedTuple):
    """A student's guess at one teacher, in float32: summary (B, summary_dim) or None, spatial (B, n, spatial_dim)."""

    summary: Tensor | None
    spatial: Tensor


@final
class Head(nn.Sequential):
    """Linear, LayerNorm, GELU, Linear."""

    def __init__(self, width_in: int, hidden_dim: int, width_out: int) -> None:
        super().__init__(
            nn.Linear(width_in, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, width_out)
        )


@final
class Adaptors(nn.Module):
    """The heads of all teachers, in the order given.

    hidden_dim: width between the two layers; None takes the largest width of any teacher, as the paper does.
    A student with several class tokens lends one to each teacher with a summary, in order; any other student lends its
    one summary to all of them.
    Raises: ConfigError for no teachers, a name given twice, or another number of class tokens than of summary teachers.
    """

    def __init__(self, student: Student, teachers: Sequence[TeacherWidths], hidden_dim: int | None = None) -> None:
        super().__init__()
        names = [teacher.name for teacher in teachers]
        if not names:
            raise ConfigError("adaptors need at least one teacher.")
        if len(set(names)) < len(names):
            raise ConfigError(f"adaptors need teachers of different names, got: {', '.join(names)}.")
        with_summary = [teacher for teacher in teachers if teacher.summary_dim is not None]
        if student.num_summary_tokens not in (1, len(with_summary)):
            raise ConfigError(
                f"student '{student.name}' has {student.num_summary_tokens} class tokens for {len(with_summary)} "
                f"teachers with a summary ({', '.join(t.name for t in with_summary) or 'none'}): "
                f"create it with num_summary_tokens={max(1, len(with_summary))}, or 1 for all of them."
            )
        if hidden_dim is None:
            hidden_dim = max(max(teacher.spatial_dim, teacher.summary_dim or 0) for teacher in teachers)
        self.teachers = tuple(teachers)
        self.num_summary_tokens = student.num_summary_tokens
        token_dim = student.summary_dim // student.num_summary_tokens
        # Lists and not dicts: torch refuses module names with dots, which names of teachers may have.
        self.summary_heads = nn.ModuleList(
            Head(token_dim, hidden_dim, teacher.summary_dim)
            for teacher in with_summary
            if teacher.summary_dim is not None
        )
        self.spatial_heads = nn.ModuleList(Head(student.embed_dim, hidden_dim, t.spatial_dim) for t in teachers)

    def forward(self, features: StudentOutput) -> dict[str, AdaptorOutput]:
        """Each teacher's features as the student sees them, by name. `features` has the spatial format "NLC"."""
        tokens: list[Float[Tensor, "b c"]] = list(features.summary.chunk(self.num_summary_tokens, dim=1))
        summary_heads = iter(self.summary_heads)
        guesses: dict[str, AdaptorOutput] = {}
        slot = 0
        for teacher, spatial_head in zip(self.teachers, self.spatial_heads, strict=True):
            summary = None
            if teacher.summary_dim is not None:
                summary = next(summary_heads)(tokens[slot % len(tokens)]).float()
                slot += 1
            guesses[teacher.name] = AdaptorOutput(summary, spatial_head(features.spatial).float())
        return guesses
