"""Factories of a run's parts: the student's configuration, the data of every group, and the optimiser."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.storage.base import absolute_path_or_url
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
    """Return the configuration of the student with a head for each teacher.

    Args:
        config: configuration of the run.
        cache: cache of the features.
        teachers: names of the teachers.
        images: split of the images, which is recorded with the student.
    """
    recipe = config.recipe
    specs = [(name, cache.teachers.levels(name)[0].spec) for name in teachers]
    # One centre-cropping teacher is enough: training crops then never reach the borders.
    fit: StudentFit = "crop" if any(spec.geometry.fit == "crop" for _, spec in specs) else "squash"
    # Training crops lie within every teacher's view, so the smallest centre crop is what the student has learned.
    share = min(level.spec.geometry.centre_share for name in teachers for level in cache.teachers.levels(name))
    widths = tuple(
        TeacherWidths(name=name, summary_dim=spec.summary_dim, spatial_dim=spec.spatial_dim) for name, spec in specs
    )
    student = StudentConfig(
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
        cache=absolute_path_or_url(config.cache),
        run=str(config.out.resolve()),
        recipe=recipe.name,
        centre_share=share,
        images=images,
        init=recipe.init,
    )
    return with_centre_share(student, recipe.centre_share)


def _overrides(recipe: Recipe, teachers: tuple[TeacherWidths, ...]) -> dict[str, Any]:
    """Return the student's settings; a ViT gets one class token for each teacher with a summary, unless the recipe sets it."""
    if not isinstance(STUDENTS.get(recipe.student), ViTConfig):
        return recipe.student_overrides
    num_summaries = sum(widths.summary_dim is not None for widths in teachers)
    return {"num_summary_tokens": max(1, num_summaries), **recipe.student_overrides}


def make_crop_data(
    config: TrainConfig,
    cache: Cache,
    rows: NDArray[np.int64],
    schedule: Schedule,
    student: Student,
    by_group: dict[GroupKey, tuple[str, ...]],
) -> tuple[dict[GroupKey, CropData], CodeReader]:
    """Return the data of every group, and the reader of codes.

    Args:
        config: configuration of the run.
        cache: cache of images and features.
        rows: rows to train on, sorted.
        schedule: schedule of the passes.
        student: student network.
        by_group: (stage, group) -> names of its teachers.

    Raises:
        ConfigError: the student does not support the size of a group, or mosaics do not divide its batch.
    """
    recipe = config.recipe
    # An object store answers a few large requests faster than many small ones: whole shards are read, and shuffled.
    blocks = recipe.shuffle == "blocks" or (recipe.shuffle == "auto" and not cache.storage.is_local)
    shard_images = cache.meta.shard_images
    data: dict[GroupKey, CropData] = {}
    for key, names in by_group.items():
        group = recipe.stages[key[0]].groups[key[1]]
        side = group.image_px
        supported = student.nearest_supported_resolution(side, side)
        if supported != (side, side):
            path = f"stages.{key[0]}.groups.{key[1]}.image_px"
            raise ConfigError(
                f"{path}={side}: student '{recipe.student}' takes {supported[0]} as the nearest; --set {path}={supported[0]}"
            )
        _refuse_uneven_mosaics(recipe, schedule, key, student)
        # Groups draw independently, whatever the other groups of the recipe are.
        seed = (recipe.seed, *key)
        sampler: Sampler = (
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
        # Of one crop; a mosaic has `mosaic` squared of them.
        grid = group.crop_px // student.patch_size
        data[key] = CropData(
            cache,
            names,
            recipe,
            rows,
            sampler,
            seed=seed,
            image_px=group.crop_px,
            grid_hw=(grid, grid),
            mosaic=group.mosaic,
        )
    return data, ShardCache(rows, shard_images, config.shard_cache_bytes) if blocks else read_codes


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
    # Every pass needs whole mosaics.
    images = passes * side**2
    if group.batch_images % images:
        raise ConfigError(
            f"{path}.batch_images={group.batch_images}: mosaics of {side**2} images in {passes} passes take multiples of "
            f"{images}: --set {path}.batch_images={-(-group.batch_images // images) * images}"
        )


def make_optimizer(model: DistilledStudent, balancing: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW without weight decay of vectors (norms, biases), position tables, tokens, and learned balancing weights.

    The student's parameters are in groups of their own, since fused updates cannot mix whole and sharded tensors.
    """
    groups: list[dict[str, Any]] = []
    for module, exempt in ((model.student, model.student.no_weight_decay), (model.adaptors, frozenset[str]())):
        # By the number of axes, as in timm: weights of layers have two or more.
        named = list(module.named_parameters())
        groups.append({"params": [p for name, p in named if p.ndim >= 2 and name not in exempt]})
        groups.append({"params": [p for name, p in named if p.ndim < 2 or name in exempt], "weight_decay": 0.0})
    groups[-1]["params"] += balancing.parameters()
    return torch.optim.AdamW(groups, lr=recipe.stages[0].lr, weight_decay=recipe.weight_decay)
