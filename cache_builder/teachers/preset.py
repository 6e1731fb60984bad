"""A teacher before it is loaded: what it is called, where its weights come from, what a user may change. Needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from radio_cache.format.codec_record import CodecRecord
from radio_cache.geometry.crops import Fit
from radio_cache.geometry.views import ViewSampling

ComputeDtype = Literal["float32", "bfloat16", "float16"]

COMPILED = "torch.compile"
"""Key in a spec's `software` that says the teacher was compiled; it is there or not as long as the teacher is."""


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Where published weights come from when no `--weights FILE` is given. One of the four is set, none if there are none.

    package: a Python package that carries the file, as module name and file below it.
    hub: a Hugging Face repository and the files to try in it, in order. url: a plain download.
    folder: on this machine, and the files to try in it. size: what the user is told to expect; empty where nobody knows before.
    """

    size: str
    package: tuple[str, str] | None = None
    hub: tuple[str, tuple[str, ...]] | None = None
    url: str | None = None
    folder: tuple[str, tuple[str, ...]] | None = None

    def describe(self) -> str:
        """Where the file is, in words."""
        if self.package:
            return f"Python package {self.package[0].replace('_', '-')}"
        if self.hub:
            return f"huggingface.co/{self.hub[0]}, file {self.hub[1][0]}"
        if self.folder:
            return self.folder[0]
        return self.url or "nowhere: no weights are published"


@dataclass(frozen=True, kw_only=True)
class OutputShape:
    """What a published teacher says of an image at its own size; a test compares it with the real network.

    tokens: along each side of the map. summary_dim: None where there is no summary.
    """

    tokens: int
    summary_dim: int | None
    spatial_dim: int

    def image_bytes(self, map_bits: float) -> float:
        """Of one image: its map at so many bits a value, and its summary in float16."""
        return self.tokens**2 * self.spatial_dim * map_bits / 8 + 2 * (self.summary_dim or 0)


@dataclass(frozen=True, kw_only=True)
class TimmChoices:
    """What a preset takes from a model of timm where timm leaves a choice, or would choose otherwise than the authors.

    global_pool: instead of the model's own. summary_tokens: prefix tokens that make up the summary, side by side, instead
    of timm's pooled features. norm_map: whether the map gets the norm of the head, which timm keeps for the pooled features.
    """

    global_pool: str | None = None
    summary_tokens: tuple[int, ...] = ()
    norm_map: bool = False


@dataclass(frozen=True, kw_only=True)
class TeacherPreset:
    """A teacher that can be asked for. family picks the class; model is the library's own name for the architecture.

    name: of its group in a cache. tag: open_clip's name of the published weights, which decides the preprocessing.
    output: None where it is not known before loading (`timm:...` and `open_clip:...`); params is empty then.
    trunk: of SAM, whether the map is the wide one before the neck. crop_share: how much of the shorter side a `crop` keeps.
    """

    name: str
    family: str
    model: str
    params: str
    licence: str
    input_px: int
    fit: Fit
    weights: WeightsSource
    output: OutputShape | None = None
    tag: str = ""
    timm: TimmChoices = TimmChoices()
    trunk: bool = False
    crop_share: float = 1.0

    @property
    def photo_share(self) -> float:
        """The share of a 4:3 photo's area that the teacher sees, from 0 to 1."""
        return 3 / 4 * self.crop_share**2 if self.fit == "crop" else 1.0


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """What a user may change about a teacher; None keeps the preset's value.

    weights: a file in the family's own format. size_px: side of the square input. fit: how images reach the teacher.
    codec: what goes into the spec until the codec is calibrated (`CodecRecord.of_request`); empty leaves the choice to the
    build. level_of: the teacher of which this is a further input size, `size_px`, kept beside it.
    views: of each image, the whole one among them; extra ones are drawn as view_sampling says. compiled: by torch.compile.
    legacy_loading: load as it was done while specs did not say what was loaded, for a cache whose spec has no `loaded`.
    """

    weights: Path | None = None
    size_px: int | None = None
    fit: Fit | None = None
    dtype: ComputeDtype = "float32"
    codec: CodecRecord = field(default_factory=CodecRecord)
    level_of: str | None = None
    views: int = 1
    view_sampling: ViewSampling | None = None
    compiled: bool = False
    legacy_loading: bool = False


HUB, FOLDER = "hf-hub:", "local-dir:"
"""In front of what both libraries take in place of a model's name: a repository on huggingface.co, or a folder like one."""
