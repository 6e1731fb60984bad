"""Recipes by name. Each is a function; its docstring gives the purpose and the source of the numbers.

`Recipe.not_from_paper` names the settings that the paper does not give, which are marked when a recipe is printed.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.format.strict_json import parse_json
from trainer.recipes.recipe import Group, Recipe, Stage

# SAM's features are of 1024 px; a group of its own gives it that size, and smaller batches.
_ALL_BUT_SAM, _SAM = ("!sam*",), ("sam*",)
# The window of each training step is drawn, so that the student works with any window, or none.
_VITDET = {"spectral_reparam": True, "train_windows": [6, 7, 8, 9, 12, 16], "window_probability": 0.5}


def quick() -> Recipe:
    """Train on thousands to a million images on one device; the default. Learning rate from CIFAR-10 crops (docs/results.md)."""
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
        # Losses of AM-RADIO, Eq. 1 to 3.
        summary_loss="cosine",
        spatial_loss="match",
        cos_weight=0.9,
        l1_weight=0.1,
        summary_weight=1.0,
        spatial_weight=1.0,
        teacher_weights={},
        teacher_summary_weights={},
        # All teachers weigh the same, which standardised targets make comparable.
        balancing="naive",
        normalise="standardise",
        normalise_summary="standardise",
        target_grid="student",
        adaptor="mlp",
        # Narrower than the paper's, which takes the widest teacher's: heads would outweigh a small student.
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
        # Two, so that a damaged one has a predecessor to resume from.
        keep_checkpoints=2,
        seed=0,
        checkpoint_every=500,
        log_every=20,
        knn_every=0,
        picture_every=0,
        not_from_paper=(),
    )


def demo() -> Recipe:
    """Train a small student on a few hundred crops in about a minute on two CPU cores; the recipe of `radio-cache demo`."""
    stage = Stage(name="all", steps=200, lr=2e-3, warmup_steps=40, groups=(Group(image_px=96, batch_images=48),))
    # Frequent checkpoints and log lines: there is something to see within the minute.
    return replace(quick(), name="demo", stages=(stage,), checkpoint_every=100, log_every=10)


def am_radio() -> Recipe:
    """AM-RADIO (arXiv 2312.06709), both stages: CLIP and DINOv2 at 256 px, then both at 432 px and SAM at 1024 px.

    600k steps of AdamW, 1e-3, cosine; in stage 2, half of 64 GPUs take 32 images each at 432 px and half 2 each at
    1024 px (the paper's own effective batch of 1,152 does not follow from that). Losses, heads and weights are the paper's.
    Not from the paper: warm-up, crop range, whether the rate starts again in stage 2, the share of windowed steps, clipping.
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
        student="vit-h-16",  # the paper's ViT-H/16
        student_overrides=dict(_VITDET),
        stages=stages,
        crop_area=(0.4, 1.0),
        normalise="none",
        normalise_summary="none",
        target_grid="larger",
        adaptor_width=None,
        channels_last=False,  # a ViT has one convolution
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

    The schedule is stage 1 of `am_radio`; rates and steps are not from the paper.
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

    Mode switching is cured by training every teacher at low and high resolution, so cache the teachers at several sizes
    (`radio-cache build --size 224 --size 1024`). Published are stages, resolutions, losses and the normalisation. Not from the
    paper: steps, rates, batch sizes, crop range, clipping.
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
    # The paper gives none of these for any stage.
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
    """Train any backbone as in the efficient-student study of AM-RADIO (arXiv 2312.06709): 224 px, all teachers.

    The paper gives the teachers (OpenCLIP ViT-H/14, DINOv2-g/14), images (ImageNet-21k), resolution and losses. Not from the
    paper: steps, rate, warm-up, batch size, crop range, clipping.
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
    """Train a small encoder that replaces SAM's: spatial features at 1024 px. Only the losses are from a paper."""
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
        summary_weight=0.0,  # SAM has no summary
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
    """Return a recipe by name, in which "-" and "_" are the same, or from a `recipe.json` that a run saved.

    Args:
        name: name of a recipe, or path of a file.
        allow_modules: modules that a file may name as the student's code (`torch-module:`).

    Raises:
        ConfigError: the name is unknown, and the message lists the known ones; or the file is no recipe, or names a module that
            is not allowed.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        hint = "Every run has one, as recipe.json"
        try:
            data = parse_json(path.read_bytes())
        except ValueError as exc:
            raise ConfigError(f"{path} is not a recipe in JSON: {exc}. {hint}") from exc
        if not isinstance(data, dict):
            raise ConfigError(f"{path} is not a recipe in JSON: it is no object. {hint}")
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
        + " `radio-train --recipe help` describes each; a path to a run's recipe.json works, too."
    )
