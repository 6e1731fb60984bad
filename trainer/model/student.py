"""A student with the heads of its teachers, as it is trained, saved, loaded and exported."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, cast, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.format.strict_json import from_json
from trainer.model.adaptors import BACKBONE, AdaptorOutput, Adaptors, TeacherWidths
from trainer.model.eval_view import StudentFit, prepare
from trainer.model.head_config import HeadConfig, HeadKind
from trainer.model.image_split import ImageSplit
from trainer.students import create_student, refuse_foreign_code
from trainer.students.base import FeatureFormat, Student, StudentOutput
from trainer.students.timm_backbone import WEIGHTS_OPTIONS

EXPORT_VERSION = 1
WEIGHTS_SHA256 = "weights_sha256"
"""The key in `student.json` of the SHA-256 of the weights file beside it."""

_MAX_PIXELS = 1 << 26
"""Most pixels of a student's input: 8192 x 8192."""

STARTING_SETTINGS = frozenset({"init_from", "init_file", "pretrained", *WEIGHTS_OPTIONS})
"""Overrides of a student that name the source of its first weights."""

UNRECORDED_CENTRE_SHARE = 0.875
"""The share for students saved before `centre_share` was recorded; their published figures used it."""

Heads = Sequence[str] | Literal["all"]
"""Names of teachers whose heads are used; none of them, or all."""

Features = StudentOutput | dict[str, StudentOutput | AdaptorOutput]
"""Output of a model: the student's own features, or, with heads, a dict of these as "backbone" and of each teacher's."""


_Pair = TypeVar("_Pair", StudentOutput, AdaptorOutput)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The description of a saved student, stored beside its weights as `student.json`.

    Attributes:
        image_hw: input size of training, pixels.
        fit: part of an image that the student takes, with `centre_share`; see `trainer.model.eval_view.eval_pixels`.
        adaptor: kind of its heads; with `adaptor_width`, `adaptor_blocks` and `adaptor_upsample` see `HeadConfig`.
        seed: of its initial weights, so that the untrained student can be built again.
        init: folder of the finished student that it started from; None for fresh weights, or those of `overrides`.
        images: trained-on and held-out images of its cache (`trainer.data.holdout`); None if not recorded.
    """

    student: str
    overrides: dict[str, Any]
    image_hw: tuple[int, int]
    fit: StudentFit
    teachers: tuple[TeacherWidths, ...]
    adaptor_width: int | None
    seed: int
    steps: int
    images_seen: int
    cache: str
    run: str
    recipe: str
    adaptor: HeadKind = "mlp"
    adaptor_blocks: int = 0
    adaptor_upsample: int = 1
    centre_share: float = 1.0
    images: ImageSplit | None = None
    init: str | None = None

    def __post_init__(self) -> None:
        h, w = self.image_hw
        if h < 1 or w < 1 or h * w > _MAX_PIXELS:
            raise ConfigError(f"image_hw is a height and a width of at most {_MAX_PIXELS} pixels in all, not {h} x {w}")
        if not 0 < self.centre_share <= 1:
            raise ConfigError(
                f"centre_share is the share of an image's shorter side, above 0 and at most 1, not {self.centre_share}"
            )

    @property
    def heads(self) -> HeadConfig:
        """The configuration of the heads."""
        return HeadConfig(
            kind=self.adaptor, width=self.adaptor_width, blocks=self.adaptor_blocks, upsample=self.adaptor_upsample
        )

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `student.json`."""
        return {"export_version": EXPORT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, allow_modules: Iterable[str] = ()) -> "StudentConfig":
        """Parse what `to_json` returned.

        Args:
            data: untrusted.
            allow_modules: modules that a student of the sender's own code may be imported from; none by default.

        Raises:
            ConfigError: another version wrote it, or its student is code of a module that is not allowed.
            ValueError: a field is lacking, or has an impossible value.
        """
        fields = {key: value for key, value in data.items() if key not in ("export_version", WEIGHTS_SHA256)}
        if data.get("export_version") != EXPORT_VERSION:
            raise ConfigError(
                f"this student was saved in version {data.get('export_version')}, this radio-cache reads {EXPORT_VERSION}: "
                "install the radio-cache that saved it, or a newer one"
            )
        # Earlier versions did not record the share.
        fields.setdefault("centre_share", UNRECORDED_CENTRE_SHARE)
        config = from_json(cls, json.loads(json.dumps(fields)))  # lists, as they are in a file
        # Before anything is imported: the file is untrusted, and importing a module runs it.
        refuse_foreign_code(config.student, allow_modules)
        return config


def with_centre_share(config: StudentConfig, share: float | None) -> StudentConfig:
    """Return the configuration with another `centre_share`; None keeps it.

    Raises:
        ConfigError: for an impossible share, or one that would change nothing because whole images are squashed.
    """
    if share is None:
        return config
    if config.fit == "squash" and share != 1:
        raise ConfigError(
            f"centre_share={share:g}: none of this student's teachers takes a centre crop ("
            f"{', '.join(teacher.name for teacher in config.teachers)}), so it takes whole images, squashed: leave it out"
        )
    return replace(config, centre_share=share)


@final
class DistilledStudent(nn.Module):
    """A student with the adaptor heads of its teachers. After training, heads predict in the teachers' own units.

    Attributes:
        heads: teachers whose features are returned beside the student's own. All else is the student's (`Student`).
    """

    def __init__(self, student: Student, adaptors: Adaptors, config: StudentConfig) -> None:
        super().__init__()
        self.student, self.adaptors, self.config = student, adaptors, config
        self.heads: tuple[str, ...] = ()
        # All heads, as training needs them. `load_student` chooses by its argument.
        self.use_heads("all")

    def use_heads(self, names: Heads) -> None:
        """Choose the teachers whose features `forward` returns.

        Raises:
            ConfigError: for a teacher without a head.
        """
        known = [teacher.name for teacher in self.config.teachers]
        for name in () if names == "all" else names:
            if name not in known:
                raise ConfigError(unknown_name("adaptor of this student", name, known))
        self.heads = tuple(known if names == "all" else names)

    def forward(self, images: Float[Tensor, "b 3 h w"], *, feature_fmt: FeatureFormat = "NLC") -> Features:
        """Return summary and spatial features, or a dict with these as "backbone" if heads are used.

        Args:
            images: RGB in [0, 1].
            feature_fmt: "NLC" for tokens (b, h * w, c), "NCHW" for maps. Heads that upsample return finer maps.
        """
        out = self.student(images)
        grid_hw = self.grid_hw(images)
        if not self.heads:
            return _formatted(out, grid_hw, feature_fmt)
        # Heads that upsample predict a finer grid than the student's own.
        fine_hw = grid_hw[0] * self.adaptors.upsample, grid_hw[1] * self.adaptors.upsample
        predictions = self.adaptors(out, grid_hw, self.heads)
        return {
            BACKBONE: _formatted(out, grid_hw, feature_fmt),
            **{name: _formatted(predictions[name], fine_hw, feature_fmt) for name in self.heads},
        }

    def preprocess(self, *photos: Image.Image) -> Float[Tensor, "b 3 h w"]:
        """Prepare photos as evaluations do: RGB in [0, 1], at the size the student was trained at, one batch of all of them."""
        config = self.config
        views = [
            torch.from_numpy(prepare(photo, image_hw=config.image_hw, fit=config.fit, centre_share=config.centre_share))
            for photo in photos
        ]
        return torch.cat(views)

    def grid_hw(self, images: Float[Tensor, "b 3 h w"]) -> tuple[int, int]:
        """Return rows and columns of the student's tokens for these images."""
        patch = self.student.patch_size
        return images.shape[-2] // patch, images.shape[-1] // patch

    @property
    def patch_size(self) -> int:
        return self.student.patch_size

    @property
    def embed_dim(self) -> int:
        return self.student.embed_dim

    @property
    def summary_dim(self) -> int:
        return self.student.summary_dim

    @property
    def min_resolution_step(self) -> int:
        return self.student.min_resolution_step

    @property
    def preferred_resolution(self) -> tuple[int, int]:
        return self.student.preferred_resolution

    def nearest_supported_resolution(self, h: int, w: int) -> tuple[int, int]:
        """Return the legal (height, width) nearest to h x w pixels."""
        return self.student.nearest_supported_resolution(h, w)


def backbone_and_heads(out: Features) -> tuple[StudentOutput, dict[str, AdaptorOutput]]:
    """Split a model's output into the student's own features and those of its heads, if any are used."""
    if isinstance(out, StudentOutput):
        return out, {}
    heads = {name: output for name, output in out.items() if isinstance(output, AdaptorOutput)}
    return cast(StudentOutput, out[BACKBONE]), heads


def build_distilled(config: StudentConfig) -> DistilledStudent:
    """Build the student and its heads as a run starts them: same seed, same weights."""
    # The student draws its weights before the heads. This order is part of what a seed means.
    torch.manual_seed(config.seed)
    student = create_student(config.student, **config.overrides)
    return DistilledStudent(student, Adaptors(student, config.teachers, config.heads), config)


def _formatted(out: _Pair, grid_hw: tuple[int, int], feature_fmt: FeatureFormat) -> _Pair:
    if feature_fmt == "NLC":
        return out
    # (b, h * w, c) -> (b, c, h, w)
    return out._replace(spatial=out.spatial.transpose(1, 2).unflatten(2, grid_hw))
