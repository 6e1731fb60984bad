"""Recipes: everything that decides a training run, as one frozen value, saved with the run.

A recipe is made by a function whose docstring says what it is for; `--set key=value` changes single fields.
"""

import json
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

from radio_cache.errors import ConfigError, unknown_name
from trainer.adaptors import HeadConfig, HeadKind

Normalise = Literal["none", "global", "standardise", "pca", "zca", "hadamard", "phi-s"]
SummaryLoss = Literal["cosine", "l1", "mse", "smooth-l1", "angle"]
SpatialLoss = Literal["match", "cosine", "l1", "mse", "smooth-l1"]
BalancingName = Literal["naive", "uncertainty", "adaloss", "amtml-kd"]
TargetGrid = Literal["student", "larger"]


_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "normalise": typing.get_args(Normalise),
    "normalise_summary": typing.get_args(Normalise),
    "summary_loss": typing.get_args(SummaryLoss),
    "spatial_loss": typing.get_args(SpatialLoss),
    "balancing": typing.get_args(BalancingName),
    "target_grid": typing.get_args(TargetGrid),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does.

    student, student_overrides: as for `trainer.students.create_student`.
    image_px: side of the square crop the student sees.
    steps, batch_images: optimiser steps, images in each. lr: peak rate; linear warm-up, then cosine down to zero.
    crop_area: range of the share of what the teachers saw that a crop covers. crop_ratio: range of its aspect ratio.
    shift_tokens: the student's crop lies whole tokens beside the target's, round(N(0, shift_tokens)) along each axis, and
        the loss is over the overlap (C-RADIOv4: 0.5); 0 for no shift.
    summary_loss, spatial_loss: by name, see `trainer.losses`. "match" is `cos_weight` times cosine and `l1_weight` times
        smooth-L1; "angle" is C-RADIOv4's.
    summary_weight, spatial_weight: of the two kinds of loss. teacher_weights: teacher -> weight of all its losses, 1 where
        not named; teacher_summary_weights: the same, of its summary loss alone, on top.
    balancing: of all losses, see `trainer.balancing`.
    normalise, normalise_summary: what targets are brought to, maps and summaries: "none" leaves them, "standardise" gives
        mean 0 and deviation 1 per channel by the statistics in the cache, the others see `radio_cache.phi_s`. Exported
        heads speak the teacher's own units either way.
    target_grid: where maps of different size meet: on the student's grid, or on the larger of the two, as in the paper.
    adaptor, adaptor_width, adaptor_blocks, adaptor_upsample: the heads, see `trainer.adaptors.HeadConfig`. "mlp" is the first
        paper's; "residual-mlp" the later one, with `adaptor_blocks` residual blocks, and `adaptor_upsample` times the student's
        tokens along each side. adaptor_width None takes the widest teacher's, as the paper does.
    channels_last: memory layout; faster for convolutions, on CPUs too.
    """

    name: str
    student: str = "e-radio-tiny"
    student_overrides: dict[str, Any]
    image_px: int
    steps: int
    batch_images: int
    lr: float
    warmup_steps: int
    weight_decay: float
    clip_grad_norm: float
    crop_area: tuple[float, float]
    crop_ratio: tuple[float, float]
    shift_tokens: float
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
    seed: int
    checkpoint_every: int
    log_every: int

    def __post_init__(self) -> None:
        for name in ("image_px", "steps", "batch_images", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"recipe '{self.name}': {name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "clip_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"recipe '{self.name}': {name} must be above 0, not {getattr(self, name)}")
        for name, low, high in (("crop_area", 0.0, 1.0), ("crop_ratio", 0.0, float("inf"))):
            first, last = getattr(self, name)
            if not low < first <= last <= high:
                raise ConfigError(f"recipe '{self.name}': {name} must be two rising numbers above {low:g} and at most "
                                  f"{high:g}, not {first}, {last}")  # fmt: skip
        weights = ("cos_weight", "l1_weight", "summary_weight", "spatial_weight")
        for name in ("warmup_steps", "weight_decay", "shift_tokens", *weights):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"recipe '{self.name}': {name} must be at least 0, not {getattr(self, name)}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"recipe '{self.name}': " + unknown_name(name, str(getattr(self, name)), known))
        try:
            HeadConfig(
                kind=self.adaptor, width=self.adaptor_width, blocks=self.adaptor_blocks, upsample=self.adaptor_upsample
            )
        except ConfigError as exc:
            raise ConfigError(f"recipe '{self.name}': {exc}") from exc

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Recipe":
        known = {item.name for item in fields(cls)}
        for name in data:
            if name not in known:
                raise ConfigError(unknown_name("recipe setting", name, known))
        missing = sorted(known - data.keys() - {"student"})
        if missing:
            raise ConfigError(f"the recipe lacks {', '.join(missing)}")
        ranges: dict[str, Any] = {key: tuple(data[key]) for key in ("crop_area", "crop_ratio")}
        return cls(**(data | ranges))


def quick() -> Recipe:
    """The default: thousands to a million images on one device. Rates chosen by us on CIFAR-10 crops (docs/results.md)."""
    return Recipe(
        name="quick", student_overrides={}, image_px=96, steps=5000, batch_images=64, lr=2e-3, warmup_steps=200,
        weight_decay=0.02, clip_grad_norm=1.0, crop_area=(0.35, 1.0), crop_ratio=(3 / 4, 4 / 3), shift_tokens=0.0,
        summary_loss="cosine", spatial_loss="match", cos_weight=0.9, l1_weight=0.1, summary_weight=1.0, spatial_weight=1.0,
        teacher_weights={}, teacher_summary_weights={}, balancing="naive", normalise="standardise",
        normalise_summary="standardise", target_grid="student", adaptor="mlp", adaptor_width=384, adaptor_blocks=0,
        adaptor_upsample=1, channels_last=True, seed=0, checkpoint_every=500, log_every=20,
    )  # fmt: skip


def am_radio() -> Recipe:
    """Stage 1 of AM-RADIO (arXiv 2312.06709): 300k steps of 1024 images at 256 px, AdamW, cosine from 1e-3.

    The paper gives no warm-up and no crop range; ours are marked here: 2,000 steps, area 0.4 to 1.
    """
    return replace(
        quick(), name="am-radio", student="e-radio-b", image_px=256, steps=300_000, batch_images=1024, lr=1e-3, warmup_steps=2000,
        crop_area=(0.4, 1.0), normalise="none", normalise_summary="none", target_grid="larger",
        adaptor_width=None, checkpoint_every=2000, log_every=50,
    )  # fmt: skip


def demo() -> Recipe:
    """What `radio-cache demo` trains: a small student on a few hundred crops, a minute or so on two CPU cores."""
    return replace(
        quick(),
        name="demo",
        image_px=96,
        steps=200,
        batch_images=48,
        warmup_steps=40,
        checkpoint_every=100,
        log_every=10,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"quick": quick, "am-radio": am_radio, "demo": demo}


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or from a `recipe.json` that a run saved. Raises ConfigError listing the names."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.is_file():
        try:
            return Recipe.from_json(json.loads(path.read_text()))
        except ValueError as exc:
            raise ConfigError(f"{path} is not a recipe in JSON: {exc}") from exc
    raise ConfigError(unknown_name("recipe", name, RECIPES) + " A path to a run's recipe.json works too.")


def with_settings(recipe: Recipe, settings: dict[str, str]) -> Recipe:
    """The recipe with `key=value` texts applied, typed by the field. `student_overrides.depth=3` reaches into a table.

    Raises ConfigError for unknown keys, the nearest first, and for values that do not fit the field.
    """
    types_of = typing.get_type_hints(Recipe)
    changed: dict[str, Any] = {}
    for key, text in settings.items():
        field, dot, inner = key.partition(".")
        if field not in types_of or field == "name":
            raise ConfigError(unknown_name("recipe setting", field, [f for f in types_of if f != "name"]))
        if dot:
            table = cast(dict[str, Any], changed.get(field, getattr(recipe, field)))
            if not isinstance(getattr(recipe, field), dict):
                raise ConfigError(f"--set {key}={text}: '{field}' is one value, it has no '{inner}'")
            changed[field] = {**table, inner: _literal(text)}
        else:
            changed[field] = _typed(key, text, types_of[field])
    return replace(recipe, **changed)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _typed(key: str, text: str, kind: Any) -> Any:
    value = _literal(text)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        origin = typing.get_origin(option)
        if option is types.NoneType and (value is None or text.lower() == "none"):
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and (isinstance(value, list) or "," in text):
            parts = cast(list[Any], value) if isinstance(value, list) else [_literal(part) for part in text.split(",")]
            if len(parts) == 2 and all(isinstance(part, int | float) for part in parts):
                return (float(parts[0]), float(parts[1]))
        if origin is Literal and text in typing.get_args(option):
            return text
        if option is str:
            return text
        if option in (int, bool, dict) and type(value) is option:
            return value
        if origin is dict and isinstance(value, dict):
            return cast(dict[str, Any], value)
    wanted = getattr(kind, "__name__", None) or str(kind).replace("typing.", "")
    raise ConfigError(f"--set {key}={text}: '{text}' is not a {wanted}")
