"""Feature maps of a few images as colours: the live teacher, the cached map, and the student's prediction."""

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

# Four columns of this size fit a laptop's screen.
PICTURE_PX = 224


@dataclass(frozen=True)
class TeacherPictures:
    """One image through one teacher, in the colours of one basis: equal colours are equal features.

    Attributes:
        live, cached, student: (h, w, 3) maps as colours; live is None if the teacher cannot be run.
        live_cosine, student_cosine: mean over tokens of the cosine with the cached map. The teacher's mean token is
            subtracted first: what all tokens share would otherwise make any two maps look alike.
    """

    name: str
    live: NDArray[np.uint8] | None
    cached: NDArray[np.uint8]
    student: NDArray[np.uint8]
    live_cosine: float | None
    student_cosine: float


@dataclass(frozen=True)
class ImagePictures:
    """One image and its maps.

    Attributes:
        image: (h, w, 3) pixels of the part that the student sees.
    """

    key: str
    class_name: str
    image: NDArray[np.uint8]
    teachers: tuple[TeacherPictures, ...]


def live_maps(cache: Cache, name: str, rows: Sequence[int], *, device: torch.device) -> NDArray[np.float32]:
    """Run a teacher of the cache on its images, in float32, with the weights and geometry recorded in the cache.

    Args:
        cache: of the images.
        name: of the teacher.
        rows: of the cache.
        device: where the teacher runs.

    Returns:
        (n, h, w, c) maps.

    Raises:
        TeacherError: if the teacher cannot be loaded.
    """
    # float32, so that the difference to the cached map shows the loss of storage alone.
    teacher = recorded_teacher(cache.teachers[name].spec, device=device)
    return _maps(teacher, cache, rows)[OWN]


def _maps(encoder: LiveEncoder, cache: Cache, rows: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Return feature space -> (n, h, w, c) maps of rows of the cache."""
    source = CacheImages(cache)
    # Labels and rows of a set of the chosen images, in the order of the page.
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
    """Return pictures of rows of a cache.

    Every map covers the part of the image that the student sees, teachers on their own grid. The colours are one basis per
    teacher, fitted to its cached maps of these rows.

    Args:
        cache: of the images.
        rows: of the cache.
        class_names: one per row.
        student: a student of some of the cache's teachers.
        live: teacher -> maps of `live_maps`; teachers that cannot be run are absent.

    Raises:
        EvalError: if the cache holds none of the student's teachers.
        ShapeError: if live maps differ from the cached ones in shape.
    """
    names = [teacher.name for teacher in student.config.teachers if teacher.name in cache.teachers]
    if not names:
        teacher_names = ", ".join(teacher.name for teacher in student.config.teachers)
        raise EvalError(f"{cache.url} holds no teacher of {student.name} ({teacher_names}): there is no map to show")
    # One pass of the student gives the maps of all heads.
    predictions = _maps(student, cache, rows)
    per_teacher = [
        _teacher_pictures(cache, rows, cache.teachers[name], student, predictions[name], live.get(name))
        for name in names
    ]
    return tuple(
        ImagePictures(
            key=cache.index.key(row),
            class_name=class_names[number],
            image=_student_view(cache, row, student),
            teachers=tuple(pictures[number] for pictures in per_teacher),
        )
        for number, row in enumerate(rows)
    )


def _teacher_pictures(
    cache: Cache,
    rows: Sequence[int],
    teacher: CachedTeacher,
    student: StudentEncoder,
    prediction: NDArray[np.float32],
    live: NDArray[np.float32] | None,
) -> list[TeacherPictures]:
    """Return one teacher's pictures of every row."""
    sizes = [(int(h), int(w)) for h, w in cache.sizes_hw[list(rows)]]
    boxes = [student.seen_box_xyxy(size) for size in sizes]
    grid_hw = teacher.spec.geometry.grid_hw
    # (n, h, w, c), of the whole view of the teacher.
    cached = teacher.maps(rows)
    if live is not None and live.shape != cached.shape:
        raise ShapeError(f"teacher '{teacher.name}': live maps are {live.shape}, the cache has {cached.shape}")
    # The student may see less of the image than the teacher: all maps are cut to its view.
    cached_in_view, _ = _sample_boxes(cached, boxes, sizes, teacher, out_hw=grid_hw)
    live_in_view = None if live is None else _sample_boxes(live, boxes, sizes, teacher, out_hw=grid_hw)[0]
    # The cosine is measured on the student's grid, where the student has its tokens.
    target, valid = _sample_boxes(cached, boxes, sizes, teacher, out_hw=(prediction.shape[1], prediction.shape[2]))
    # Fitted to cached maps only: a poor student must not change the colours of its teacher.
    basis = PcaColours.fit(cached_in_view)
    mean = teacher.spatial_mean_std()[0]
    # Live and cached maps share the teacher's grid, where every token is valid.
    all_tokens = np.ones(grid_hw, dtype=np.bool_)
    return [
        TeacherPictures(
            name=teacher.name,
            live=None if live_in_view is None else basis.colours(live_in_view[number]),
            cached=basis.colours(cached_in_view[number]),
            student=basis.colours(prediction[number]),
            live_cosine=(
                None
                if live_in_view is None
                else _cosine(live_in_view[number] - mean, cached_in_view[number] - mean, all_tokens)
            ),
            student_cosine=_cosine(prediction[number] - mean, target[number] - mean, valid[number]),
        )
        for number in range(len(rows))
    ]


def _sample_boxes(
    maps: NDArray[np.float32],
    boxes: Sequence[BoxXYXY],
    sizes_hw: Sequence[tuple[int, int]],
    teacher: CachedTeacher,
    *,
    out_hw: tuple[int, int],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return (n, *out_hw, c) maps sampled inside the boxes, and (n, *out_hw) True for tokens inside the teacher's view."""
    weights = crop_weights(boxes, sizes_hw, teacher.spec.geometry, out_hw=out_hw)
    return weights.sample(maps), weights.valid


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating], valid: NDArray[np.bool_]) -> float:
    """Return the mean cosine of the tokens of two (h, w, c) maps where valid (h, w)."""
    # (h, w, c) -> (h, w) cosines; the floor keeps tokens of zeros from dividing by zero.
    products = (a * b).sum(axis=-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)
    return float(products[valid].mean())


def _student_view(cache: Cache, row: int, student: StudentEncoder) -> NDArray[np.uint8]:
    """Return (h, w, 3) pixels of the part of the image that the student sees, its longer side PICTURE_PX."""
    image = CacheImages(cache).decoded(row)
    left, top, right, bottom = box = student.seen_box_xyxy((image.height, image.width))
    # The aspect ratio of the view is kept.
    scale = PICTURE_PX / max(right - left, bottom - top)
    hw = (max(1, round((bottom - top) * scale)), max(1, round((right - left) * scale)))
    return student_pixels(image, hw, box)
