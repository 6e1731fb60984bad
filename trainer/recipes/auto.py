"""What a run does when nobody says: size, steps and rate that suit the cache and the student."""

from collections.abc import Sequence
from dataclasses import replace

from radio_cache.errors import StoreError
from radio_cache.reader import Cache
from radio_cache.usual_run import usual_run
from trainer.recipes.recipe import Group, Recipe

_VIT_LR = 1e-3
"""Rates are ours, found on CIFAR-10 with `e-radio-tiny` at 2e-3 (docs/results.md); ViTs take half, as they are less stable."""


def auto_recipe(
    recipe: Recipe,
    cache: Cache,
    teachers: Sequence[str],
    student: str | None,
    device: str,
    *,
    steps: int | None = None,
    batch_images: int | None = None,
) -> Recipe:
    """The one-stage recipe with the student's size, thirty epochs of crops or 25,600, and batches that fit the device.

    steps, batch_images: where the user decides them, what goes by them follows.

    The size is the student's own, but no larger than the largest input of its teachers: more pixels than any target has
    seen teach nothing.
    """
    # Imported at their use: building a network needs torch and timm, which the presets do not.
    import torch

    from trainer.students import STUDENTS, ViTConfig, create_student

    name = student or recipe.student
    with torch.device("meta"):  # sizes alone are wanted
        network = create_student(name)
    known = [cache.teachers[one] for one in teachers if one in cache.teachers] or list(cache.teachers.values())
    if not known:
        cache.teachers.refuse_unreadable()
        raise StoreError(f"{cache.url} holds no teacher yet: radio-cache build --out {cache.url} --teacher NAME ...")
    largest = max(max(teacher.spec.geometry.input_hw) for teacher in known)
    side = min(max(network.preferred_resolution), largest)
    side = network.nearest_supported_resolution(side, side)[0]
    usual = usual_run(cache.num_images, device, steps=steps, batch_images=batch_images)
    steps, batch = usual.steps, usual.batch_images
    lr = _VIT_LR if isinstance(STUDENTS.get(name), ViTConfig) or name.startswith("timm:vit") else recipe.stages[0].lr
    stage = replace(
        recipe.stages[0],
        steps=steps,
        lr=lr,
        warmup_steps=min(2000, steps // 20),
        groups=(Group(image_px=side, batch_images=batch),),
    )
    return replace(
        recipe,
        student=name,
        stages=(stage,),
        checkpoint_every=min(2000, max(50, steps // 20)),
        log_every=min(50, max(1, steps // 50)),
        knn_every=max(50, steps // 10),
        picture_every=max(50, steps // 5),
    )
