"""Recipes by name. Each is a function whose docstring says what it is for and where its numbers come from.

Numbers that the papers do not give are ours; `Recipe.ours` names them, and they are marked when a recipe is printed.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.format.strict_json import parse_json
from trainer.recipes.recipe import Group, Recipe, Stage

_ALL_BUT_SAM, _SAM = ("!sam*",), ("sam*",)
_VITDET = {"spectral_reparam": True, "train_windows": [6, 7, 8, 9, 12, 16], "window_probability": 0.5}


def quick() -> Recipe:
    """The default: thousands to a million images on one device. Rates chosen by us on CIFAR-10 crops (docs/results.md)."""
    stage = Stage(name="all", steps=5000, lr=2e-3, warmup_steps=200, groups=(Group(image_px=96, batch_images=64),))
    return Recipe(
        name="quick",
        student_overrides={},
        stages=(stage,),
        groups="together",
        weight_decay=0.02,
        clip_grad_norm=1.0,
        crop_area=(0.35, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        match="nearest",
        views=0.0,
        shift_tokens=0.0,
        colour_jitter=0.0,
        summary_loss="cosine",
        spatial_loss="match",
        cos_weight=0.9,
        l1_weight=0.1,
        summary_weight=1.0,
        spatial_weight=1.0,
        teacher_weights={},
        teacher_summary_weights={},
        balancing="naive",
        normalise="standardise",
        normalise_summary="standardise",
        target_grid="student",
        adaptor="mlp",
        adaptor_width=384,
        adaptor_blocks=0,
        adaptor_upsample=1,
        channels_last=True,
        shuffle="auto",
        shuffle_shards=8,
        accumulate=1,
        precision="auto",
        compile=False,
        checkpoint_activations=False,
        ema=None,
        keep_checkpoints=2,
        seed=0,
        checkpoint_every=500,
        log_every=20,
        knn_every=0,
        picture_every=0,
        not_from_paper=(),
    )


def demo() -> Recipe:
    """What `radio-cache demo` trains: a small student on a few hundred crops, a minute or so on two CPU cores."""
    stage = Stage(name="all", steps=200, lr=2e-3, warmup_steps=40, groups=(Group(image_px=96, batch_images=48),))
    return replace(quick(), name="demo", stages=(stage,), checkpoint_every=100, log_every=10)


def am_radio() -> Recipe:
    """AM-RADIO (arXiv 2312.06709), both stages: CLIP and DINOv2 at 256 px, then they at 432 px and SAM at 1024 px.

    600k steps of AdamW, 1e-3, cosine; in stage 2, half of 64 GPUs take 32 images each at 432 px and half 2 each at
    1024 px (the paper's own effective batch of 1,152 does not follow from that). Losses, heads and weights are the paper's.
    Ours: warm-up, crop range, whether the rate starts again in stage 2, the share of windowed steps, clipping.
    """
    stages = (
        Stage(
            name="low resolution",
            steps=300_000,
            lr=1e-3,
            warmup_steps=2000,
            groups=(Group(teachers=_ALL_BUT_SAM, image_px=256, batch_images=1024),),
        ),
        Stage(
            name="with SAM",
            steps=300_000,
            lr=1e-3,
            warmup_steps=2000,
            groups=(
                Group(teachers=_ALL_BUT_SAM, image_px=432, batch_images=1024),
                Group(teachers=_SAM, image_px=1024, batch_images=64),
            ),
        ),
    )
    return replace(
        quick(),
        name="am-radio",
        student="vit-h-16",
        student_overrides=dict(_VITDET),
        stages=stages,
        crop_area=(0.4, 1.0),
        normalise="none",
        normalise_summary="none",
        target_grid="larger",
        adaptor_width=None,
        channels_last=False,
        checkpoint_every=2000,
        log_every=50,
        knn_every=10_000,
        picture_every=10_000,
        not_from_paper=(
            "stages.0.warmup_steps",
            "stages.1.warmup_steps",
            "stages.1.lr",
            "crop_area",
            "clip_grad_norm",
            "student_overrides.window_probability",
        ),
    )


def phi_s() -> Recipe:
    """PHI-S (arXiv 2410.01680): targets rotated so that every channel has variance 1, and the plain squared error.

    The schedule is stage 1 of `am_radio`; the paper's own rates and steps are not known here, so they are ours.
    """
    paper = am_radio()
    return replace(
        paper,
        name="phi-s",
        student="vit-b-16",
        student_overrides={},
        stages=paper.stages[:1],
        normalise="phi-s",
        spatial_loss="mse",
        not_from_paper=("stages.0.steps", "stages.0.lr", "stages.0.warmup_steps", "crop_area", "clip_grad_norm"),
    )


def radio_v25() -> Recipe:
    """RADIOv2.5: 256 px, then 432 px, then 432 and 1024 px together, every teacher at every resolution, PHI-S targets.

    That every teacher is seen at low and high resolution is what cures mode switching; keep the teachers at several sizes
    (`radio-cache build --size 224 --size 1024`). Published are stages, resolutions, losses and the normalisation. Ours:
    steps, rates, batch sizes, crop range, clipping.
    """

    def stage(number: int, steps: int, *groups: tuple[int, int]) -> Stage:
        return Stage(
            name=f"stage {number}",
            steps=steps,
            lr=1e-3 if number == 1 else 5e-4,
            warmup_steps=2000,
            groups=tuple(Group(image_px=px, batch_images=images) for px, images in groups),
        )

    stages = (stage(1, 300_000, (256, 1024)), stage(2, 150_000, (432, 512)), stage(3, 150_000, (432, 512), (1024, 64)))
    paths = [f"stages.{n}.{name}" for n in range(3) for name in ("steps", "lr", "warmup_steps")]
    paths += [f"stages.{n}.groups.{m}.batch_images" for n, s in enumerate(stages) for m in range(len(s.groups))]
    return replace(
        am_radio(),
        name="radio-v25",
        stages=stages,
        normalise="phi-s",
        spatial_loss="mse",
        target_grid="student",
        not_from_paper=(*paths, "crop_area", "clip_grad_norm", "student_overrides.window_probability"),
    )


def efficient() -> Recipe:
    """The efficient-student study of AM-RADIO (arXiv 2312.06709): one recipe for every backbone, 224 px, all teachers.

    The paper says which teachers (OpenCLIP ViT-H/14, DINOv2-g/14), images (ImageNet-21k) and resolution, and the losses.
    Ours: steps, rate, warm-up, batch size, crop range, clipping.
    """
    stage = Stage(
        name="all", steps=300_000, lr=1e-3, warmup_steps=2000, groups=(Group(image_px=224, batch_images=1024),)
    )
    return replace(
        am_radio(),
        name="efficient",
        student="e-radio-b",
        student_overrides={},
        stages=(stage,),
        channels_last=True,
        not_from_paper=(
            "stages.0.steps",
            "stages.0.lr",
            "stages.0.warmup_steps",
            "stages.0.groups.0.batch_images",
            "crop_area",
            "clip_grad_norm",
        ),
    )


def sam_only() -> Recipe:
    """A small encoder that takes the place of SAM's: its maps alone, at its own 1024 px. All numbers but the losses are ours."""
    stage = Stage(
        name="SAM",
        steps=100_000,
        lr=1e-3,
        warmup_steps=1000,
        groups=(Group(teachers=_SAM, image_px=1024, batch_images=64),),
    )
    return replace(
        am_radio(),
        name="sam-only",
        student="e-radio-l",
        student_overrides={},
        stages=(stage,),
        crop_area=(0.6, 1.0),
        target_grid="student",
        channels_last=True,
        summary_weight=0.0,
        not_from_paper=(
            "stages.0.steps",
            "stages.0.lr",
            "stages.0.warmup_steps",
            "stages.0.groups.0.batch_images",
            "crop_area",
            "clip_grad_norm",
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quick": quick,
    "demo": demo,
    "am-radio": am_radio,
    "phi-s": phi_s,
    "radio-v25": radio_v25,
    "efficient": efficient,
    "sam-only": sam_only,
}


def find_recipe(name: str, *, allow_modules: Iterable[str] = ()) -> Recipe:
    """A recipe by name ("-" and "_" are the same), or from a `recipe.json` that a run saved.

    allow_modules: modules that a file may name as the student's code (`torch-module:`); none by default.
    Raises ConfigError listing the names, or for a file that names a module which is not allowed.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        whole = "A whole one lies in every run, as recipe.json"
        try:
            data = parse_json(path.read_bytes())
        except ValueError as exc:
            raise ConfigError(f"{path} is not a recipe in JSON: {exc}. {whole}") from exc
        if not isinstance(data, dict):
            raise ConfigError(f"{path} is not a recipe in JSON: it is no object. {whole}")
        try:
            recipe = Recipe.from_json(cast(dict[str, Any], data))
            # Imported at its use: students need torch and timm, which recipes by name do not.
            from trainer.students import refuse_foreign_code

            refuse_foreign_code(recipe.student, allow_modules)
        except ConfigError as exc:
            raise ConfigError(f"{path}: {exc}") from exc
        return recipe
    if name.replace("_", "-") in RECIPES:
        return RECIPES[name.replace("_", "-")]()
    raise ConfigError(
        unknown_name("recipe", name, RECIPES)
        + " `radio-train --recipe help` says what each is for; a path to a run's recipe.json works, too."
    )
