"""Feature maps of a few images as colours: the live teacher, the cache, and what the student makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evals.encoders import OWN, LiveEncoder, StudentEncoder, recorded_teacher
from evals.errors import EvalError
from evals.shared.image_set import CacheImages, ImageSet
from radio_cache.errors import ShapeError
from radio_cache.geometry.crops import BoxXYXY, crop_weights
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.view import PcaColours
from trainer.data.crops import student_pixels

PICTURE_PX = 224


@dataclass(frozen=True)
class TeacherPictures:
    """One image through one teacher, in the colours of one basis: equal colours are equal features.

    live, cached, student (h, w, 3): maps as colours, row-major tokens; live is None where the teacher cannot be run.
    student_cosine, live_cosine: mean over tokens of the cosine with the cached map, from which the teacher's mean token
        was subtracted first: what all tokens share would otherwise make any two maps look alike.
    """

    name: str
    live: NDArray[np.uint8] | None
    cached: NDArray[np.uint8]
    student: NDArray[np.uint8]
    live_cosine: float | None
    student_cosine: float


@dataclass(frozen=True)
class ImagePictures:
    """One image: its key, its class, (h, w, 3) pixels of what the student is shown of it, and its maps."""

    key: str
    class_name: str
    image: NDArray[np.uint8]
    teachers: tuple[TeacherPictures, ...]


def live_maps(cache: Cache, name: str, rows: Sequence[int], *, device: torch.device) -> NDArray[np.float32]:
    """(n, h, w, c) maps of these rows from the teacher itself, with the weights and geometry recorded in the cache.

    Runs in float32, whatever precision the build used. Raises TeacherError if the teacher cannot be had.
    """
    teacher = recorded_teacher(cache.teachers[name].spec, device=device)
    return _maps(teacher, cache, rows)[OWN]


def _maps(encoder: LiveEncoder, cache: Cache, rows: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    source = CacheImages(cache)
    chosen = np.asarray(rows, np.int64)
    batches = list(encoder.maps(ImageSet(source, chosen, source.labels[chosen], source.class_names)))
    return {space: np.concatenate([batch[space] for batch in batches]) for space in batches[0]}


def feature_pictures(
    cache: Cache,
    rows: Sequence[int],
    class_names: Sequence[str],
    student: StudentEncoder,
    live: Mapping[str, NDArray[np.float32]],
) -> tuple[ImagePictures, ...]:
    """Pictures of these rows. class_names: one per row. live: teacher -> (n, h, w, c) maps as `live_maps` gives them.

    Every map shows the part of the image that the student is shown, teachers on their own grid. One basis per teacher,
    fitted to the cached maps shown. Raises EvalError if the cache holds none of the student's teachers.
    """
    names = [teacher.name for teacher in student.config.teachers if teacher.name in cache.teachers]
    if not names:
        learned = ", ".join(teacher.name for teacher in student.config.teachers)
        raise EvalError(f"{cache.url} holds no teacher of {student.name} ({learned}): there is no map to show")
    guesses = _maps(student, cache, rows)
    per_teacher = [
        _teacher_pictures(cache, rows, cache.teachers[name], student, guesses[name], live.get(name)) for name in names
    ]
    return tuple(
        ImagePictures(
            key=cache.index.key(row),
            class_name=class_names[number],
            image=_shown_image(cache, row, student),
            teachers=tuple(pictures[number] for pictures in per_teacher),
        )
        for number, row in enumerate(rows)
    )


def _teacher_pictures(
    cache: Cache,
    rows: Sequence[int],
    teacher: CachedTeacher,
    student: StudentEncoder,
    guess: NDArray[np.float32],
    live: NDArray[np.float32] | None,
) -> list[TeacherPictures]:
    sizes = [(int(h), int(w)) for h, w in cache.sizes_hw[list(rows)]]
    boxes = [student.seen_box_xyxy(size) for size in sizes]
    grid_hw = teacher.spec.geometry.grid_hw
    cached = teacher.maps(rows)
    if live is not None and live.shape != cached.shape:
        raise ShapeError(f"teacher '{teacher.name}': live maps are {live.shape}, the cache has {cached.shape}")
    shown, _ = _under_boxes(cached, boxes, sizes, teacher, out_hw=grid_hw)
    shown_live = None if live is None else _under_boxes(live, boxes, sizes, teacher, out_hw=grid_hw)[0]
    target, valid = _under_boxes(cached, boxes, sizes, teacher, out_hw=(guess.shape[1], guess.shape[2]))
    basis = PcaColours.fit(shown)
    mean = teacher.spatial_mean_std()[0]
    override_stages = np.ones(grid_hw, dtype=np.bool_)
    return [
        TeacherPictures(
            name=teacher.name,
            live=None if shown_live is None else basis.colours(shown_live[number]),
            cached=basis.colours(shown[number]),
            student=basis.colours(guess[number]),
            live_cosine=(
                None
                if shown_live is None
                else _cosine(shown_live[number] - mean, shown[number] - mean, override_stages)
            ),
            student_cosine=_cosine(guess[number] - mean, target[number] - mean, valid[number]),
        )
        for number in range(len(rows))
    ]


def _under_boxes(
    maps: NDArray[np.float32],
    boxes: Sequence[BoxXYXY],
    sizes_hw: Sequence[tuple[int, int]],
    teacher: CachedTeacher,
    *,
    out_hw: tuple[int, int],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(n, *out_hw, c) maps sampled under the boxes, and (n, *out_hw) which of those tokens the teacher saw."""
    weights = crop_weights(boxes, sizes_hw, teacher.spec.geometry, out_hw=out_hw)
    return weights.sample(maps), weights.valid


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating], valid: NDArray[np.bool_]) -> float:
    """Mean cosine of the tokens (h, w, c) where valid (h, w)."""
    products = (a * b).sum(axis=-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)
    return float(products[valid].mean())


def _shown_image(cache: Cache, row: int, student: StudentEncoder) -> NDArray[np.uint8]:
    image = CacheImages(cache).decoded(row)
    left, top, right, bottom = box = student.seen_box_xyxy((image.height, image.width))
    scale = PICTURE_PX / max(right - left, bottom - top)
    hw = (max(1, round((bottom - top) * scale)), max(1, round((right - left) * scale)))
    return student_pixels(image, hw, box)
