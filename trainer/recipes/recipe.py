"""A recipe: everything that decides a training run, as one frozen value, saved with the run.

A run is stages, one after the other; a step of a stage asks one or several groups of teachers, each at its own student
resolution and batch size. The recipes with names are in `trainer.recipes.presets`.
"""

import json
import math
import typing
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Final, Literal

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.format.strict_json import MAX_INTEGER, from_json
from trainer.model.head_config import HeadConfig, HeadKind

Normalise = Literal["none", "global", "standardise", "pca", "zca", "hadamard", "phi-s"]
SummaryLoss = Literal["cosine", "l1", "mse", "smooth-l1", "angle"]
SpatialLoss = Literal["match", "cosine", "l1", "mse", "smooth-l1"]
BalancingName = Literal["naive", "uncertainty", "adaloss", "amtml-kd"]
TargetGrid = Literal["student", "larger"]
GroupMode = Literal["together", "sampled"]
Match = Literal["off", "nearest", "draw"]
Shuffle = Literal["auto", "full", "blocks"]
Precision = Literal["auto", "float32", "bfloat16"]

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "normalise": typing.get_args(Normalise),
    "normalise_summary": typing.get_args(Normalise),
    "summary_loss": typing.get_args(SummaryLoss),
    "spatial_loss": typing.get_args(SpatialLoss),
    "balancing": typing.get_args(BalancingName),
    "target_grid": typing.get_args(TargetGrid),
    "groups": typing.get_args(GroupMode),
    "match": typing.get_args(Match),
    "shuffle": typing.get_args(Shuffle),
    "precision": typing.get_args(Precision),
}


_RENAMED_FIELDS: Final = {"ours": "not_from_paper"}
"""Earlier name of a field, as saved recipes have it -> present name."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """What part of a step asks: which teachers, at which student resolution, of how many images.

    teachers: patterns of cached names, all of which by default; "sam*" takes them in, "!sam*" leaves them out.
    image_px: side of the square crop the student sees. batch_images: of one step, over all processes.
    rate: how often, or how strongly, against the stage's other groups (`Recipe.groups`).
    mosaic: images along each side of what the student sees, each a crop of image_px / mosaic pixels with a target of its own
        (`trainer.model.mosaic`); summaries, which speak of one image, are not asked there. 1 for one image.
    """

    teachers: tuple[str, ...] = ("*",)
    image_px: int
    batch_images: int
    rate: float = 1.0
    mosaic: int = 1

    @property
    def crop_px(self) -> int:
        """Side of each image's crop."""
        return self.image_px // self.mosaic


@dataclass(frozen=True, kw_only=True)
class Stage:
    """steps: optimiser steps. lr: the peak rate; linear warm-up, then half a cosine down to zero at the stage's end."""

    name: str
    steps: int
    lr: float
    warmup_steps: int
    groups: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does.

    student, student_overrides: as for `trainer.students.create_student`.
    groups: "together": every step asks all groups of its stage; each counts by its share of the rates, and many processes
        are divided among them, as AM-RADIO does. "sampled": every step asks one, drawn at these rates.
    crop_area: range of the share of what the teachers saw that a crop covers. crop_ratio: range of its aspect ratio.
    match: of a teacher kept at several input sizes, which one is a crop's target. "off": the one whose size is nearest to the
        student's, always. "nearest": the one that saw the image at most nearly the scale of the crop (`trainer.data.levels`).
        "draw": the same, and crops are drawn so that one fits, with mild jitter, instead of by `crop_area`, whose lower end
        still holds.
    views: share of the images that are shown as one of their stored views (`radio-cache build --views`), whose maps and
        summaries the teacher made of just these pixels, mirrored ones among them; the others are fresh crops. 0 to 1.
    shift_tokens: the student's crop lies whole tokens beside the target's, round(N(0, shift_tokens)) along each axis, and
        the loss is over the overlap (C-RADIOv4: 0.5); 0 for no shift.
    colour_jitter: most that brightness, contrast and saturation of the student's pixels are changed by, as a share; the
        targets stay what they are. 0 for none.
    summary_loss, spatial_loss: by name, see `trainer.objective.losses`. "match" is `cos_weight` times cosine and
    `l1_weight` times
        smooth-L1; "angle" is C-RADIOv4's.
    summary_weight, spatial_weight: of the two kinds of loss. teacher_weights: teacher -> weight of all its losses, 1 where
        not named; teacher_summary_weights: the same, of its summary loss alone, on top.
    balancing: of all losses, see `trainer.objective.balancing`.
    normalise, normalise_summary: what targets are brought to, maps and summaries: "none" leaves them, "standardise" gives
        mean 0 and deviation 1 per channel by the statistics in the cache, the others see `radio_cache.statistics.phi_s`. Exported
        heads speak the teacher's own units either way.
    target_grid: where maps of different size meet: on the student's grid, or on the larger of the two, as in the paper.
    adaptor, adaptor_width, adaptor_blocks, adaptor_upsample: the heads, see `trainer.model.adaptors.HeadConfig`. "mlp"
    is the first
        paper's; "residual-mlp" the later one, with `adaptor_blocks` residual blocks, and `adaptor_upsample` times the student's
        tokens along each side. adaptor_width None takes the widest teacher's, as the paper does.
    channels_last: memory layout; faster for convolutions. On a CPU for E-RADIO alone (`trainer.run.layout`).
    shuffle: "full": every order of the images is possible. "blocks": `shuffle_shards` shards at a time, whose images are
        shuffled, so that an object store is read a shard at a time. "auto": full on a disk, blocks in a bucket.
    accumulate: passes that a process cuts its share of a batch into; less memory, the same sum.
    precision: of the student's passes; "auto" is bfloat16 on a GPU and float32 on a CPU. Weights, losses and targets are float32.
    compile: let torch compile the student. checkpoint_activations: compute blocks twice instead of keeping what they made.
    fsdp: divide the student's weights among the processes that torchrun started, for one that does not fit on each
        (`trainer.distributed.fsdp`); the same sums.
    ema: decay of a moving average of the weights, which is then what leaves the run; None for none.
    keep_checkpoints: of the last ones, beside the best.
    knn_every: steps between two measurements by k-NN on a few labelled training images
    (`trainer.monitoring.online_knn`), whose best step
        is kept as `checkpoints/best.pt`; 0 for none.
    picture_every: steps between two pictures of image, cached maps and student's maps; 0 for none.
    centre_share: share of an image's shorter side that the finished student is shown, where its teachers see a centre crop;
        None takes the teachers' own, the least of them.
    init: folder of a finished student, a run or an export, whose weights the student starts with; its heads start anew.
    holdout: share of the images that is held out of training, for evaluations; chosen by the digests of the files, so that
        copies stay together and other runs and caches hold out the same (`trainer.data.holdout`). 0 for none.
    ours: settings, such as "lr", that the papers do not give and that we chose; told when the recipe is printed.
    """

    name: str
    student: str = "e-radio-tiny"
    student_overrides: dict[str, Any]
    stages: tuple[Stage, ...]
    groups: GroupMode
    weight_decay: float
    clip_grad_norm: float
    crop_area: tuple[float, float]
    crop_ratio: tuple[float, float]
    match: Match
    views: float
    shift_tokens: float
    colour_jitter: float
    summary_loss: SummaryLoss
    spatial_loss: SpatialLoss
    cos_weight: float
    l1_weight: float
    summary_weight: float
    spatial_weight: float
    teacher_weights: dict[str, float]
    teacher_summary_weights: dict[str, float]
    balancing: BalancingName
    normalise: Normalise
    normalise_summary: Normalise
    target_grid: TargetGrid
    adaptor: HeadKind
    adaptor_width: int | None
    adaptor_blocks: int
    adaptor_upsample: int
    channels_last: bool
    shuffle: Shuffle
    shuffle_shards: int
    accumulate: int
    precision: Precision
    compile: bool
    checkpoint_activations: bool
    ema: float | None
    keep_checkpoints: int
    seed: int
    checkpoint_every: int
    log_every: int
    knn_every: int
    picture_every: int
    not_from_paper: tuple[str, ...]
    fsdp: bool = False
    centre_share: float | None = None
    holdout: float = 0.0
    init: str | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "log_every", "shuffle_shards", "accumulate", "keep_checkpoints"):
            self._at_least(name, getattr(self, name), 1)
        if not self.stages:
            raise ConfigError(f"recipe '{self.name}' has no stage")
        for number, stage in enumerate(self.stages):
            self._check_stage(f"stages.{number}", stage)
        if self.fsdp and self.compile:
            raise ConfigError(
                f"recipe '{self.name}': fsdp and compile do not go together yet: --set compile=false, or --set fsdp=false"
            )
        if not 0 <= self.views <= 1:
            raise ConfigError(f"recipe '{self.name}': views must be between 0 and 1, not {self.views}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"recipe '{self.name}': ema must be between 0 and 1, or none, not {self.ema}")
        if self.centre_share is not None and not 0 < self.centre_share <= 1:
            raise ConfigError(
                f"recipe '{self.name}': centre_share must be above 0 and at most 1, or none, not {self.centre_share}"
            )
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"recipe '{self.name}': holdout must be at least 0 and below 1, not {self.holdout}")
        if not self.clip_grad_norm > 0:
            raise ConfigError(f"recipe '{self.name}': clip_grad_norm must be above 0, not {self.clip_grad_norm}")
        for name, low, high in (("crop_area", 0.0, 1.0), ("crop_ratio", 0.0, float("inf"))):
            first, last = getattr(self, name)
            if not low < first <= last <= high:
                raise ConfigError(
                    f"recipe '{self.name}': {name} must be two rising numbers above {low:g} and at most "
                    f"{high:g}, not {first}, {last}"
                )
        for name in ("knn_every", "picture_every", "seed"):
            self._at_least(name, getattr(self, name), 0)
        if self.seed > MAX_INTEGER:
            raise ConfigError(f"recipe '{self.name}': seed must be at most {MAX_INTEGER}, not {self.seed}")
        for name in ("teacher_weights", "teacher_summary_weights"):
            for teacher, weight in getattr(self, name).items():
                self._at_least(f"{name}.{teacher}", weight, 0)
        weights = ("cos_weight", "l1_weight", "summary_weight", "spatial_weight")
        for name in ("weight_decay", "shift_tokens", "colour_jitter", *weights):
            self._at_least(name, getattr(self, name), 0)
        if self.colour_jitter > 1:
            raise ConfigError(
                f"recipe '{self.name}': colour_jitter must be at most 1, not {self.colour_jitter}: it is a share, and colours "
                "are multiplied by 1 - colour_jitter at least"
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"recipe '{self.name}': " + unknown_name(name, str(getattr(self, name)), known))
        try:
            HeadConfig(
                kind=self.adaptor, width=self.adaptor_width, blocks=self.adaptor_blocks, upsample=self.adaptor_upsample
            )
        except ConfigError as exc:
            raise ConfigError(f"recipe '{self.name}': {exc}") from exc

    def _check_stage(self, path: str, stage: Stage) -> None:
        self._at_least(f"{path}.steps", stage.steps, 1)
        self._at_least(f"{path}.warmup_steps", stage.warmup_steps, 0)
        if not stage.groups:
            raise ConfigError(f"recipe '{self.name}': {path} has no group")
        positive = [(f"{path}.lr", stage.lr)]
        for number, group in enumerate(stage.groups):
            inner = f"{path}.groups.{number}"
            self._at_least(f"{inner}.image_px", group.image_px, 1)
            self._at_least(f"{inner}.batch_images", group.batch_images, 1)
            self._at_least(f"{inner}.mosaic", group.mosaic, 1)
            positive.append((f"{inner}.rate", group.rate))
        for name, value in positive:
            if not 0 < value < math.inf:
                raise ConfigError(f"recipe '{self.name}': {name} must be above 0 and finite, not {value}")

    def _at_least(self, name: str, value: float, least: float) -> None:
        if not least <= value < math.inf:
            raise ConfigError(f"recipe '{self.name}': {name} must be at least {least} and finite, not {value}")

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def images_seen(self) -> int:
        """Crops shown to the student in the whole run; with sampled groups, as many as are expected."""
        total = 0.0
        for stage in self.stages:
            shares = group_shares(stage) if self.groups == "sampled" else [1.0] * len(stage.groups)
            crops = sum(share * group.batch_images for share, group in zip(shares, stage.groups, strict=True))
            total += stage.steps * crops
        return round(total)

    @property
    def final_group(self) -> tuple[int, int]:
        """Stage and group as which the trained student is used: the last stage's group with most images."""
        groups = self.stages[-1].groups
        return len(self.stages) - 1, max(range(len(groups)), key=lambda number: groups[number].batch_images)

    @property
    def final_px(self) -> int:
        """Side at which the trained student is used."""
        stage, group = self.final_group
        return self.stages[stage].groups[group].image_px

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Recipe":
        """Return the recipe of a file.

        Raises:
            ConfigError: a setting is unknown, and the message names the nearest, or one is missing.
        """
        # Recipes were saved with the earlier names of fields, too.
        data = {_RENAMED_FIELDS.get(name, name): value for name, value in data.items()}
        known = {item.name for item in fields(cls)}
        for name in data:
            if name not in known:
                raise ConfigError(unknown_name("recipe setting", name, known))
        missing = sorted({item.name for item in fields(cls) if item.default is MISSING} - data.keys())
        if missing:
            raise ConfigError(f"the recipe lacks {', '.join(missing)}")
        try:
            return from_json(cls, json.loads(json.dumps(data)))  # lists, as they are in a file
        except ValueError as exc:
            raise ConfigError(f"the recipe has an impossible setting: {exc}") from exc


def group_shares(stage: Stage) -> list[float]:
    """Each group's share of the rates; they sum to 1."""
    total = sum(group.rate for group in stage.groups)
    return [group.rate / total for group in stage.groups]


def override_stages(
    recipe: Recipe,
    *,
    steps: int | None = None,
    lr: float | None = None,
    warmup_steps: int | None = None,
    image_px: int | None = None,
    batch_images: int | None = None,
) -> Recipe:
    """The recipe with these values in all its stages and groups.

    steps: of the whole run; stages keep their shares of it, and warm-ups theirs of a stage unless they are given, too.
    Raises ConfigError for image_px, batch_images and lr where stages or groups differ in them, naming the settings.
    """
    stages = recipe.stages
    if steps is not None:
        stages = _stretched(recipe, steps)
    for name, value in (("lr", lr), ("warmup_steps", warmup_steps)):
        if value is not None:
            _refuse_different(
                recipe, name, {f"stages.{n}.{name}": getattr(s, name) for n, s in enumerate(recipe.stages)}
            )
            stages = tuple(replace(stage, **{name: value}) for stage in stages)
    for name, value in (("image_px", image_px), ("batch_images", batch_images)):
        if value is not None:
            _refuse_different(
                recipe,
                name,
                {
                    f"stages.{n}.groups.{m}.{name}": getattr(group, name)
                    for n, stage in enumerate(stages)
                    for m, group in enumerate(stage.groups)
                },
            )
            stages = tuple(
                replace(stage, groups=tuple(replace(group, **{name: value}) for group in stage.groups))
                for stage in stages
            )
    return replace(recipe, stages=stages)


def _stretched(recipe: Recipe, steps: int) -> tuple[Stage, ...]:
    if steps < len(recipe.stages):
        raise ConfigError(f"steps must be at least 1 for each of {len(recipe.stages)} stages, not {steps}")
    share, stages, before, done = steps / recipe.steps, list[Stage](), 0, 0
    for number, stage in enumerate(recipe.stages):
        before += stage.steps
        left = len(recipe.stages) - number - 1
        end = min(steps - left, max(done + 1, round(before * share)))
        stages.append(replace(stage, steps=end - done, warmup_steps=round(stage.warmup_steps * share)))
        done = end
    return tuple(stages)


def _refuse_different(recipe: Recipe, name: str, values: dict[str, float]) -> None:
    if len(set(values.values())) > 1:
        listed = " ".join(f"--set {path}={value}" for path, value in values.items())
        raise ConfigError(f"recipe '{recipe.name}' has several {name}, so that one value says nothing: {listed}")
