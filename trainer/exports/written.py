"""What writing a format hands back: how to use it, and a way to run it for a check. Beside it, features as flat tables."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import RadioCacheError
from trainer.model.adaptors import AdaptorOutput
from trainer.model.student import DistilledStudent, Features, backbone_and_heads
from trainer.students import StudentOutput


class ExportError(RadioCacheError):
    """A student cannot be written in this format, or what was written does not give its features."""


TOLERANCE = 1e-3
"""Above this a file does not hold the student; what is usual is below 1e-5."""

PLACE = "PLACE"
"""Stands for the folder in lines of use, until it has its name."""

FlatFeatures = dict[str, Tensor]
"""Output name -> tensor: "summary", "features", "<teacher>.summary" (where there is one), "<teacher>.features"."""


@dataclass(frozen=True)
class Written:
    """use: lines of Python that show how it is used. run: images -> what it gives, by the names of `flat_features`; it
    may give less than the student does, never more. notes: what the user should know."""

    use: tuple[str, ...]
    run: Callable[[Float[Tensor, "b 3 h w"]], FlatFeatures]
    notes: tuple[str, ...] = ()


class FlatStudent(nn.Module):
    """A student whose outputs are one tuple of tensors, in the order of `names`: what graph formats can hold."""

    def __init__(self, model: DistilledStudent) -> None:
        super().__init__()
        self.model = model
        with_summary = {teacher.name for teacher in model.config.teachers if teacher.summary_dim is not None}
        kinds = [
            (f"{name}.", ("summary", "features") if name in with_summary else ("features",)) for name in model.heads
        ]
        self.names = tuple(prefix + kind for prefix, parts in [("", ("summary", "features")), *kinds] for kind in parts)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
        return tuple(flat_features(self.model(images)).values())


def flat_features(out: Features) -> FlatFeatures:
    """A model's output as a flat table."""
    own, guesses = backbone_and_heads(out)
    flat: FlatFeatures = {"summary": own.summary, "features": own.spatial}
    for name, guess in guesses.items():
        flat |= {f"{name}.{kind}": value for kind, value in _parts(guess).items()}
    return flat


def _parts(guess: AdaptorOutput | StudentOutput) -> FlatFeatures:
    return (
        {"features": guess.spatial} if guess.summary is None else {"summary": guess.summary, "features": guess.spatial}
    )


def largest_change(found: FlatFeatures, expected: FlatFeatures) -> float:
    """The largest difference of any value, in units of the largest value of its output (at least 1)."""
    changes = [0.0]
    for name, value in found.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            raise ExportError(
                f"output '{name}' came back as {tuple(value.shape)}, the student gives {tuple(wanted.shape)}"
            )
        difference = (value.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1)
        changes.append(float("inf") if torch.isnan(difference) else float(difference))
    return max(changes)
