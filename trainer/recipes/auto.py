"""The automatic recipe: image size, steps and learning rate chosen for the cache and the student."""

from collections.abc import Sequence
from dataclasses import replace

from radio_cache.errors import StoreError
from radio_cache.reader import Cache
from radio_cache.usual_run import usual_run
from trainer.recipes.recipe import Group, Recipe

_VIT_LR = 1e-3
"""Learning rate of ViTs: half of the 2e-3 found on CIFAR-10 with `e-radio-tiny` (docs/results.md), as they are less stable."""


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
    """Return a one-stage recipe with settings chosen for the cache, the student and the device.

    The image size is the student's own, but at most the largest input size of its teachers: no target has more detail. The steps
    are thirty epochs or 25,600 crops, whichever is more (`radio_cache.usual_run`).

    Args:
        recipe: recipe with one stage, whose other settings are kept.
        cache: cache to train on.
        teachers: names of the teachers; if empty, all teachers in the cache.
        student: name of the student; None for the recipe's.
        device: torch device, which decides the batch size.
        steps: steps that the user chose; warm-up, log lines and checkpoints follow.
        batch_images: batch size that the user chose; the steps follow.

    Raises:
        StoreError: the cache holds no teacher.
    """
    # Imported at their use: building a network needs torch and timm, which the presets do not.
    import torch

    from trainer.students import STUDENTS, ViTConfig, create_student

    name = student or recipe.student
    with torch.device("meta"):  # only sizes are needed, no weights
        network = create_student(name)
    # Unknown names are reported later, together with the cached ones.
    selected = [cache.teachers[teacher] for teacher in teachers if teacher in cache.teachers]
    used_teachers = selected or list(cache.teachers.values())
    if not used_teachers:
        cache.teachers.refuse_unreadable()
        raise StoreError(f"{cache.url} holds no teacher yet: radio-cache build --out {cache.url} --teacher NAME ...")
    largest = max(max(teacher.spec.geometry.input_hw) for teacher in used_teachers)
    side = min(max(network.preferred_resolution), largest)
    side = network.nearest_supported_resolution(side, side)[0]
    usual = usual_run(cache.num_images, device, steps=steps, batch_images=batch_images)
    steps, batch = usual.steps, usual.batch_images
    # A backbone of timm is recognised as a ViT by its name.
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
        # About ten evaluations and five pictures a run.
        knn_every=max(50, steps // 10),
        picture_every=max(50, steps // 5),
    )
