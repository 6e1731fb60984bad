"""What a run is put together from: the student's configuration, the images of every group, and the optimiser."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.storage.base import absolute_place
from trainer.data.crops import CodeReader, CropData, StudentFit, read_codes
from trainer.data.loader import GroupKey
from trainer.data.sampler import BlockSampler, FullSampler, Sampler
from trainer.data.schedule import Schedule
from trainer.data.shard_cache import ShardCache
from trainer.model.adaptors import TeacherWidths
from trainer.model.image_split import ImageSplit
from trainer.model.student import DistilledStudent, StudentConfig, with_centre_share
from trainer.recipes.recipe import Recipe
from trainer.students import STUDENTS, Student, ViTConfig
from trainer.train_config import TrainConfig


def make_student_config(
    config: TrainConfig, cache: Cache, teachers: tuple[str, ...], images: ImageSplit | None = None
) -> StudentConfig:
    """The student with a head for each of these teachers. images: which it is trained on."""
    recipe = config.recipe
    specs = [(name, cache.teachers.levels(name)[0].spec) for name in teachers]
    fit: StudentFit = "crop" if any(spec.geometry.fit == "crop" for _, spec in specs) else "squash"
    # Training draws crops from what all teachers saw, so the least of them is what the student knows.
    share = min(level.spec.geometry.centre_share for name in teachers for level in cache.teachers.levels(name))
    widths = tuple(
        TeacherWidths(name=name, summary_dim=spec.summary_dim, spatial_dim=spec.spatial_dim) for name, spec in specs
    )
    own = StudentConfig(
        student=recipe.student,
        overrides=_overrides(recipe, widths),
        image_hw=(recipe.final_px, recipe.final_px),
        fit=fit,
        teachers=widths,
        adaptor=recipe.adaptor,
        adaptor_width=recipe.adaptor_width,
        adaptor_blocks=recipe.adaptor_blocks,
        adaptor_upsample=recipe.adaptor_upsample,
        seed=recipe.seed,
        steps=recipe.steps,
        images_seen=recipe.images_seen,
        cache=absolute_place(config.cache),
        run=str(config.out.resolve()),
        recipe=recipe.name,
        centre_share=share,
        images=images,
        init=recipe.init,
    )
    return with_centre_share(own, recipe.centre_share)


def _overrides(recipe: Recipe, teachers: tuple[TeacherWidths, ...]) -> dict[str, Any]:
    """The student's settings; a ViT gets one class token for each teacher with a summary, if nothing else is said."""
    if not isinstance(STUDENTS.get(recipe.student), ViTConfig):
        return recipe.student_overrides
    summaries = sum(widths.summary_dim is not None for widths in teachers)
    return {"num_summary_tokens": max(1, summaries), **recipe.student_overrides}


def make_crop_data(
    config: TrainConfig,
    cache: Cache,
    rows: NDArray[np.int64],
    schedule: Schedule,
    student: Student,
    by_group: dict[GroupKey, tuple[str, ...]],
) -> tuple[dict[GroupKey, CropData], CodeReader]:
    """What every group sees of the images, and how codes are read. Raises ConfigError for a size the student cannot take."""
    recipe = config.recipe
    blocks = recipe.shuffle == "blocks" or (recipe.shuffle == "auto" and not cache.storage.is_local)
    shard_images = cache.meta.shard_images
    found: dict[GroupKey, CropData] = {}
    for key, names in by_group.items():
        group = recipe.stages[key[0]].groups[key[1]]
        side = group.image_px
        legal = student.nearest_supported_resolution(side, side)
        if legal != (side, side):
            path = f"stages.{key[0]}.groups.{key[1]}.image_px"
            raise ConfigError(
                f"{path}={side}: student '{recipe.student}' takes {legal[0]} as the nearest; --set {path}={legal[0]}"
            )
        _refuse_uneven_mosaics(recipe, schedule, key, student)
        seed = (recipe.seed, *key)
        order: Sampler = (
            BlockSampler(
                rows,
                shard_images,
                seed,
                group.batch_images,
                window=recipe.shuffle_shards,
                readers=schedule.num_slices(*key),
            )
            if blocks
            else FullSampler(rows, seed, group.batch_images)
        )
        grid = group.crop_px // student.patch_size
        found[key] = CropData(
            cache,
            names,
            recipe,
            rows,
            order,
            seed=seed,
            image_px=group.crop_px,
            grid_hw=(grid, grid),
            mosaic=group.mosaic,
        )
    return found, ShardCache(rows, shard_images, config.shard_cache_bytes) if blocks else read_codes


def _refuse_uneven_mosaics(recipe: Recipe, schedule: Schedule, key: GroupKey, student: Student) -> None:
    group = recipe.stages[key[0]].groups[key[1]]
    path, side = f"stages.{key[0]}.groups.{key[1]}", group.mosaic
    crop_px = student.nearest_supported_resolution(group.crop_px, group.crop_px)[0]
    if crop_px * side != group.image_px:
        raise ConfigError(
            f"{path}.image_px={group.image_px} cannot be a mosaic of {side} x {side} images: student '{recipe.student}' takes "
            f"crops of {crop_px} as the nearest; --set {path}.image_px={crop_px * side}"
        )
    passes = schedule.num_slices(*key) * recipe.accumulate
    images = passes * side**2
    if group.batch_images % images:
        raise ConfigError(
            f"{path}.batch_images={group.batch_images}: mosaics of {side**2} images in {passes} passes take multiples of "
            f"{images}: --set {path}.batch_images={-(-group.batch_images // images) * images}"
        )


def make_optimizer(model: DistilledStudent, balancing: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases), position tables, tokens, and what a balancing learns do not decay.

    The student's have groups of their own: one group's loops cannot take whole and divided weights.
    """
    groups: list[dict[str, Any]] = []
    for module, exempt in ((model.student, model.student.no_weight_decay), (model.adaptors, frozenset[str]())):
        named = list(module.named_parameters())
        groups.append({"params": [p for name, p in named if p.ndim >= 2 and name not in exempt]})
        groups.append({"params": [p for name, p in named if p.ndim < 2 or name in exempt], "weight_decay": 0.0})
    groups[-1]["params"] += balancing.parameters()
    return torch.optim.AdamW(groups, lr=recipe.stages[0].lr, weight_decay=recipe.weight_decay)
