"""Records of written exports, with a function that runs them for a check, and features as flat tables."""

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
    """A student cannot be written in this format, or the written file gives other features."""


TOLERANCE = 1e-3
"""Largest accepted change of features. Usual changes are below 1e-5."""

PLACE = "PLACE"
"""Placeholder of the folder in lines of use, until its final name is known."""

FlatFeatures = dict[str, Tensor]
"""Output name -> tensor: "summary", "features", "<teacher>.summary" (if there is one), "<teacher>.features"."""


@dataclass(frozen=True)
class Written:
    """One written format.

    Attributes:
        use: lines of Python that show its use.
        run: images -> outputs by the names of `flat_features`; perhaps fewer than the student's.
        notes: for the user.
    """

    use: tuple[str, ...]
    run: Callable[[Float[Tensor, "b 3 h w"]], FlatFeatures]
    notes: tuple[str, ...] = ()


class FlatStudent(nn.Module):
    """A student whose outputs are one tuple of tensors, in the order of `names`, as graph formats need it."""

    def __init__(self, model: DistilledStudent) -> None:
        super().__init__()
        self.model = model
        with_summary = {teacher.name for teacher in model.config.teachers if teacher.summary_dim is not None}
        # Known before the first run: graph formats need the names of outputs when they are written.
        kinds = [
            (f"{name}.", ("summary", "features") if name in with_summary else ("features",)) for name in model.heads
        ]
        self.names = tuple(prefix + kind for prefix, parts in [("", ("summary", "features")), *kinds] for kind in parts)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
        return tuple(flat_features(self.model(images)).values())


def flat_features(out: Features) -> FlatFeatures:
    """Return a model's output as a flat table."""
    backbone, heads = backbone_and_heads(out)
    flat: FlatFeatures = {"summary": backbone.summary, "features": backbone.spatial}
    for name, output in heads.items():
        flat |= {f"{name}.{kind}": value for kind, value in _parts(output).items()}
    return flat


def _parts(output: AdaptorOutput | StudentOutput) -> FlatFeatures:
    spatial = {"features": output.spatial}
    return spatial if output.summary is None else {"summary": output.summary, **spatial}


def largest_change(exported: FlatFeatures, expected: FlatFeatures) -> float:
    """Return the largest difference of any value, in units of the largest value of its output (at least 1)."""
    changes = [0.0]
    for name, value in exported.items():
        reference = expected[name]
        if value.shape != reference.shape:
            raise ExportError(
                f"output '{name}' came back as {tuple(value.shape)}, the student returns {tuple(reference.shape)}"
            )
        # At least 1 in the denominator, so that an output near zero is compared in absolute terms.
        difference = (value.float() - reference.float()).abs().max() / reference.float().abs().max().clamp(min=1)
        # NaN compares false with everything, and `max` could drop it.
        changes.append(float("inf") if torch.isnan(difference) else float(difference))
    return max(changes)
