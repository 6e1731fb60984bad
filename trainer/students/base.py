"""The interface of all students: images in [0, 1] -> one summary and one map of spatial features.

StudentInputError(RadioCacheError, ValueError)    the images handed to a student cannot be used
└── UnsupportedResolutionError                    their height or width is not a size this student takes
"""

import warnings
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.jit._trace import is_tracing

from radio_cache.errors import RadioCacheError

FeatureFormat = Literal["NLC", "NCHW"]

# OpenAI CLIP's statistics; every student of the family conditions its input with them, whatever its teachers use.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class StudentInputError(RadioCacheError, ValueError):
    """The images handed to a student cannot be used."""


class UnsupportedResolutionError(StudentInputError):
    """Height or width is not a size this student takes; the message names the nearest one it does."""


class StudentOutput(NamedTuple):
    """Summary (B, Cs), and spatial features (B, h*w, C), row-major from the top left, or (B, C, h, w) for "NCHW"."""

    summary: Tensor
    spatial: Tensor


class Encoded(NamedTuple):
    """The output of a student's own network for `Student.forward`: the summary, and the map as NCHW."""

    summary: Float[Tensor, "b s"]
    map: Float[Tensor, "b c h w"]


class Student(nn.Module, ABC):
    """A backbone that learns from several teachers. Subclasses implement `_encode` and no other part of `forward`.

    Attributes:
        name: as for `create_student`.
        patch_size: side of one spatial token, pixels.
        embed_dim: width of a spatial token.
        summary_dim: width of the summary, of which each teacher with a summary uses one of `num_summary_tokens` equal parts.
        num_summary_tokens: 1, except for ViTs with several class tokens.
        min_resolution_step: both sides of the images are multiples of it, pixels.
        preferred_resolution: (height, width) that the student was designed for, pixels.
        fixed_resolution: the only accepted (height, width), pixels; None if all multiples of the step are accepted.
        no_weight_decay: names of parameters with two or more axes that must not decay (position tables, tokens).
    """

    def __init__(
        self,
        *,
        name: str,
        patch_size: int,
        embed_dim: int,
        summary_dim: int,
        preferred_resolution: tuple[int, int],
        min_resolution_step: int,
        num_summary_tokens: int = 1,
        fixed_resolution: tuple[int, int] | None = None,
        no_weight_decay: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.name = name
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.summary_dim = summary_dim
        self.num_summary_tokens = num_summary_tokens
        self.min_resolution_step = min_resolution_step
        self.preferred_resolution = preferred_resolution
        self.fixed_resolution = fixed_resolution
        self.no_weight_decay = no_weight_decay
        self.range_checked = False  # whether the values of its first images were checked
        # Not in the state dict: they are constants of the family, not something a run learns.
        self.input_mean: Tensor
        self.input_std: Tensor
        self.register_buffer("input_mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("input_std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)

    @abstractmethod
    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        """Return summary and map of images whose size was checked and whose colours were standardised."""

    @final
    def forward(self, images: Float[Tensor, "b 3 h w"], *, feature_fmt: FeatureFormat = "NLC") -> StudentOutput:
        """Return summary and spatial features of a batch.

        Args:
            images: (b, 3, h, w), RGB in [0, 1]. The student standardises colours itself.
            feature_fmt: "NLC" for tokens (b, n, embed_dim), n = (h / patch_size) * (w / patch_size), row-major from the top
                left. "NCHW" for maps (b, embed_dim, h / patch_size, w / patch_size).

        Returns:
            Summary (b, summary_dim) and spatial features.

        Raises:
            StudentInputError: for inputs that are not float RGB images, or another format.
            UnsupportedResolutionError: for another size, with the nearest legal one.
        """
        return self._formatted(self._encode(self._condition(images, feature_fmt)), feature_fmt)

    @final
    def _condition(self, images: Float[Tensor, "b 3 h w"], feature_fmt: FeatureFormat) -> Float[Tensor, "b 3 h w"]:
        """Check the input and return the images with standardised colours."""
        if feature_fmt not in ("NLC", "NCHW"):
            raise StudentInputError(f"feature_fmt is 'NLC' (tokens) or 'NCHW' (a map), got {feature_fmt!r}.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise StudentInputError(
                f"student '{self.name}' takes RGB images (batch, 3, height, width), got {tuple(images.shape)}."
            )
        if not images.is_floating_point():
            raise StudentInputError(
                f"student '{self.name}' takes float images in [0, 1], got {images.dtype}: divide by 255."
            )
        if not has_free_size(images):  # a graph of free size contains its own check
            self._refuse_size(int(images.shape[-2]), int(images.shape[-1]))
        if not self.range_checked and _holds_values(images):
            self.range_checked = True
            _warn_of_other_values(self.name, images)
        # The cast lets a half-precision student take the float32 images a loader hands out.
        return (images.to(self.input_mean.dtype) - self.input_mean) / self.input_std

    @final
    def _refuse_size(self, h: int, w: int) -> None:
        nearest = self.nearest_supported_resolution(h, w)
        if nearest != (h, w):
            rule = (
                f"multiples of {self.min_resolution_step} pixels"
                if self.fixed_resolution is None
                else f"exactly {self.fixed_resolution[0]} x {self.fixed_resolution[1]} pixels"
            )
            raise UnsupportedResolutionError(
                f"student '{self.name}' takes {rule} (height x width), got {h} x {w}: "
                f"resize to {nearest[0]} x {nearest[1]}, the nearest."
            )

    @final
    def _formatted(self, out: Encoded, feature_fmt: FeatureFormat) -> StudentOutput:
        if feature_fmt == "NCHW":
            return StudentOutput(out.summary, out.map)
        # (b, c, h, w) -> (b, h * w, c)
        return StudentOutput(out.summary, out.map.flatten(2).transpose(1, 2))

    @final
    def nearest_supported_resolution(self, h: int, w: int) -> tuple[int, int]:
        """Return the legal (height, width) nearest to h x w pixels. Halves round up, and the least side is one step."""
        if self.fixed_resolution is not None:
            return self.fixed_resolution
        step = self.min_resolution_step
        return max(step, (2 * h + step) // (2 * step) * step), max(step, (2 * w + step) // (2 * step) * step)


def has_free_size(images: Tensor) -> bool:
    """Return whether a graph for images of any size is being traced."""
    return isinstance(images.shape[-1], torch.SymInt) or isinstance(images.shape[-2], torch.SymInt)


_SLACK = 0.25
"""Accepted distance of values from [0, 1], because bicubic resizing overshoots."""


def _holds_values(images: Tensor) -> bool:
    """Return whether the values of a tensor can be read: not while it is traced or captured, and not without data."""
    traced = torch.compiler.is_compiling() or is_tracing() or type(images) is not Tensor or images.is_meta
    captured = images.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (traced or captured or images.numel() == 0)


def _warn_of_other_values(name: str, images: Tensor) -> None:
    """Warn if values are far outside of [0, 1]: of 0 to 255, or standardised already."""
    try:
        lowest, highest = (float(value) for value in images.detach().aminmax())
    except RuntimeError:  # inside torch.vmap there are no values
        return
    if lowest >= -_SLACK and highest <= 1 + _SLACK:
        return
    cause = "divide by 255" if lowest >= 0 else "leave out the normalisation, which the student does itself"
    warnings.warn(
        f"student '{name}' takes RGB images in [0, 1], and its first images hold values from {lowest:.3g} to {highest:.3g}, so "
        f"that its features will be wrong: {cause}",
        stacklevel=6,
    )
