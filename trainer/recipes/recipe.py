"""A recipe: all settings that determine a training run, as one frozen value that is saved with the run.

A run is a sequence of stages. A step of a stage trains one or several groups of teachers, each at its own student resolution and
batch size. The recipes with names are in `trainer.recipes.presets`.
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
    """The part of a step that trains some of the teachers, at one student resolution.

    Attributes:
        teachers: patterns of names of cached teachers; "sam*" includes, "!sam*" excludes.
        image_px: side of the student's square input, in pixels.
        batch_images: images of one step, over all processes.
        rate: frequency or weight, relative to the stage's other groups (`Recipe.groups`).
        mosaic: images along each side of the student's input, each a crop of image_px / mosaic pixels with its own target
            (`trainer.model.mosaic`). A mosaic has no summary loss, since a summary describes one image. 1 for one image.
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
    """A stage of a run: linear warm-up, then half a cosine down to zero at the stage's end.

    Attributes:
        name: name of the stage, for messages.
        steps: optimiser steps.
        lr: peak learning rate.
        warmup_steps: steps of the warm-up.
        groups: groups that a step trains.
    """

    name: str
    steps: int
    lr: float
    warmup_steps: int
    groups: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that determine a training run.

    Attributes:
        name: name of the recipe.
        student: name of the student, as for `trainer.students.create_student`.
        student_overrides: settings of the student that differ from its own.
        stages: stages, one after the other.
        groups: how a step uses the groups of its stage. "together": every step trains all groups; each counts by its share of the
            rates, and many processes are divided among them, as AM-RADIO does. "sampled": every step trains one, drawn at these
            rates.
        weight_decay: weight decay of AdamW.
        clip_grad_norm: largest norm of all gradients together.
        crop_area: range of a crop's area, as a share of the area that every teacher's view covers.
        crop_ratio: range of a crop's aspect ratio.
        match: which of a teacher's levels (cached input sizes) is the target of a crop. "off": always the level nearest to the
            student's input size. "nearest": the level whose magnification is nearest to the crop's (`trainer.data.levels`).
            "draw": the same, with crops drawn to match a level up to mild jitter, instead of by `crop_area`, whose lower end
            still holds.
        views: share of the images for which a stored view is used (`radio-cache build --views`), whose features the teacher made
            of exactly these pixels, mirrored ones included. The others are fresh crops. 0 to 1.
        shift_tokens: standard deviation, in whole tokens along each axis, of the student's crop relative to the target's; the
            loss is over the overlap (C-RADIOv4: 0.5). 0 for no shift.
        colour_jitter: largest change of brightness, contrast and saturation of the student's input, as a share; targets are
            unchanged. 0 for none.
        summary_loss: name of the summary loss, see `trainer.objective.losses`; "angle" is C-RADIOv4's.
        spatial_loss: name of the spatial loss; "match" is `cos_weight` times cosine plus `l1_weight` times smooth-L1.
        cos_weight: weight of the cosine in "match".
        l1_weight: weight of smooth-L1 in "match".
        summary_weight: weight of all summary losses.
        spatial_weight: weight of all spatial losses.
        teacher_weights: teacher -> weight of its losses; 1 if not named.
        teacher_summary_weights: teacher -> further weight of its summary loss; 1 if not named.
        balancing: name of the balancing of all losses, see `trainer.objective.balancing`.
        normalise: normalisation of the spatial targets. "none" leaves them, "standardise" gives mean 0 and deviation 1 per
            channel by the statistics in the cache; for the others see `radio_cache.statistics.phi_s`. Exported heads predict in
            the teacher's units either way.
        normalise_summary: normalisation of the summary targets, likewise.
        target_grid: grid of the spatial loss: "student", or "larger", the larger of the student's and the teacher's, as in
            AM-RADIO.
        adaptor: kind of the heads (`trainer.model.head_config.HeadConfig`): "mlp" is AM-RADIO's, "residual-mlp" that of the later
            papers.
        adaptor_width: width between the layers of the heads; None takes the largest width of any teacher, as AM-RADIO does.
        adaptor_blocks: residual blocks of "residual-mlp".
        adaptor_upsample: factor of the student's tokens along each side in the output of "residual-mlp".
        channels_last: memory layout, faster for convolutions. On a CPU for E-RADIO alone (`trainer.run.layout`).
        shuffle: order of the images. "full": a shuffle of all images. "blocks": a shuffle of the shards and of the images of
            `shuffle_shards` shards at a time, so that an object store is read a shard at a time. "auto": full on a local disk,
            blocks in a bucket.
        shuffle_shards: shards whose images are shuffled together.
        accumulate: passes that a process cuts its share of a batch into: less memory, the same sum.
        precision: precision of the student's passes; "auto" is bfloat16 on a GPU and float32 on a CPU. Weights, losses and
            targets are float32.
        compile: whether torch compiles the student.
        checkpoint_activations: whether blocks compute their activations again in the backward pass, to save memory.
        ema: decay of a moving average of the weights, which is then saved as the student; None for none.
        keep_checkpoints: number of the last checkpoints to keep, beside the best.
        seed: seed of the weights, the order of images and the crops.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two log lines.
        knn_every: steps between two evaluations by k-NN on a few labelled images (`trainer.monitoring.online_knn`); the best is
            kept as `checkpoints/best.pt`. 0 for none.
        picture_every: steps between two pictures of crops, cached features and predictions; 0 for none.
        not_from_paper: paths of settings, such as "lr", that the paper does not give; marked in the summary of a recipe.
        fsdp: whether the student's weights are sharded among the processes, for one that does not fit on a device
            (`trainer.distributed.fsdp`). The sums are the same.
        centre_share: side of the finished student's centre crop, as a share of an image's shorter side, where its teachers take
            a centre crop; None takes the smallest of the teachers'.
        holdout: share of the images to hold out of training, for evaluations. Chosen by the digests of the files, so that copies
            stay together and other runs and caches hold out the same images (`trainer.data.holdout`). 0 for none.
        init: folder of a finished student, a run or an export, whose weights the student starts with; heads start anew.
    """

    name: str
    # The network. A recipe may run with any other student, so this is only a default.
    student: str = "e-radio-tiny"
    student_overrides: dict[str, Any]
    # The schedule and the optimiser.
    stages: tuple[Stage, ...]
    groups: GroupMode
    weight_decay: float
    clip_grad_norm: float
    # Crops, of which pixels and targets are taken alike.
    crop_area: tuple[float, float]
    crop_ratio: tuple[float, float]
    match: Match
    views: float
    shift_tokens: float
    colour_jitter: float
    # Losses and their weights.
    summary_loss: SummaryLoss
    spatial_loss: SpatialLoss
    cos_weight: float
    l1_weight: float
    summary_weight: float
    spatial_weight: float
    teacher_weights: dict[str, float]
    teacher_summary_weights: dict[str, float]
    balancing: BalancingName
    # Targets, in whose units losses are computed.
    normalise: Normalise
    normalise_summary: Normalise
    target_grid: TargetGrid
    # Heads: flat fields, so that `--set adaptor_width=` needs no path; `HeadConfig` checks them together.
    adaptor: HeadKind
    adaptor_width: int | None
    adaptor_blocks: int
    adaptor_upsample: int
    # Execution: these change speed and memory, and the sums up to rounding.
    channels_last: bool
    shuffle: Shuffle
    shuffle_shards: int
    accumulate: int
    precision: Precision
    compile: bool
    checkpoint_activations: bool
    # The run's output.
    ema: float | None
    keep_checkpoints: int
    seed: int
    checkpoint_every: int
    log_every: int
    knn_every: int
    picture_every: int
    not_from_paper: tuple[str, ...]
    # Later fields have defaults: recipes that were saved before them still load.
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
        # The largest integer that the strict JSON of saved files allows.
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
        # A recipe made in Python is not checked against its Literals, as one from a file is.
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"recipe '{self.name}': " + unknown_name(name, str(getattr(self, name)), known))
        # The heads' configuration checks its own values; only the recipe's name is added to its message.
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
        # Written as a range, so that NaN, which is not at least anything, is refused, too.
        if not least <= value < math.inf:
            raise ConfigError(f"recipe '{self.name}': {name} must be at least {least} and finite, not {value}")

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def images_seen(self) -> int:
        """Crops that the student is trained on in the whole run; for sampled groups, the expected number."""
        total = 0.0
        for stage in self.stages:
            shares = group_shares(stage) if self.groups == "sampled" else [1.0] * len(stage.groups)
            crops = sum(share * group.batch_images for share, group in zip(shares, stage.groups, strict=True))
            total += stage.steps * crops
        return round(total)

    @property
    def final_group(self) -> tuple[int, int]:
        """Stage and group whose input size the finished student has: the last stage's group with the most images."""
        groups = self.stages[-1].groups
        return len(self.stages) - 1, max(range(len(groups)), key=lambda number: groups[number].batch_images)

    @property
    def final_px(self) -> int:
        """Input side of the finished student, in pixels."""
        stage, group = self.final_group
        return self.stages[stage].groups[group].image_px

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
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
        # Fields with a default were added later: older files lack them.
        missing = sorted({item.name for item in fields(cls) if item.default is MISSING} - data.keys())
        if missing:
            raise ConfigError(f"the recipe lacks {', '.join(missing)}")
        try:
            return from_json(cls, json.loads(json.dumps(data)))  # tuples become lists, as in a file
        except ValueError as exc:
            raise ConfigError(f"the recipe has an impossible setting: {exc}") from exc


def group_shares(stage: Stage) -> list[float]:
    """Return each group's share of the rates; they sum to 1."""
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
    """Return the recipe with these values in all its stages and groups; None leaves a value.

    Args:
        recipe: recipe to change.
        steps: steps of the whole run. Stages keep their shares of it, and warm-ups their shares of a stage unless
            `warmup_steps` is given.
        lr: peak learning rate.
        warmup_steps: steps of the warm-up.
        image_px: side of the student's input.
        batch_images: images of one step.

    Raises:
        ConfigError: stages or groups differ in a value, so that one for all would be wrong; the message names the settings.
    """
    stages = recipe.stages
    # First the steps: a given `warmup_steps` then replaces the scaled one.
    if steps is not None:
        stages = _scaled_stages(recipe, steps)
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


def _scaled_stages(recipe: Recipe, steps: int) -> tuple[Stage, ...]:
    """Return the stages with `steps` in all, at least one each, in the proportions of the recipe."""
    if steps < len(recipe.stages):
        raise ConfigError(f"steps must be at least 1 for each of {len(recipe.stages)} stages, not {steps}")
    scale, stages, original_end, begin = steps / recipe.steps, list[Stage](), 0, 0
    for number, stage in enumerate(recipe.stages):
        # Ends are rounded, not lengths, so that they add up; each later stage keeps at least one step.
        original_end += stage.steps
        num_later = len(recipe.stages) - number - 1
        end = min(steps - num_later, max(begin + 1, round(original_end * scale)))
        stages.append(replace(stage, steps=end - begin, warmup_steps=round(stage.warmup_steps * scale)))
        begin = end
    return tuple(stages)


def _refuse_different(recipe: Recipe, name: str, values: dict[str, float]) -> None:
    if len(set(values.values())) > 1:
        listed = " ".join(f"--set {path}={value}" for path, value in values.items())
        raise ConfigError(
            f"recipe '{recipe.name}' has several {name}, so that one value for all is ambiguous: {listed}"
        )
