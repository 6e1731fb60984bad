"""What can be evaluated: teachers as the cache holds them, a trained student, and the same student untrained.

Every encoder turns images of a cache into summaries, one vector per image, in one or more feature spaces.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evals.errors import EvalError
from evals.pixels import pixel_batches
from radio_cache.crops import BoxXYXY
from radio_cache.reader import Cache, CachedTeacher, Rows
from trainer import DistilledStudent, load_student
from trainer.data import eval_box_xyxy, student_pixels

Kind = Literal["teacher", "student", "untrained"]
OnImages = Callable[[int], None]
"""Told the number of images encoded since it was last told."""

SUMMARY = "summary"
"""The feature space every encoder has: its own summary."""

_BATCH_IMAGES = 64


class Encoder(ABC):
    """Something that gives one vector per image of a cache.

    name: what tables call it. kind: what it is. about: one phrase for people.
    spaces: its feature spaces, `SUMMARY` first; a student's others are its guesses at its teachers, by their names.
    """

    def __init__(self, *, name: str, kind: Kind, about: str, spaces: tuple[str, ...]) -> None:
        self.name = name
        self.kind: Kind = kind
        self.about = about
        self.spaces = spaces

    @abstractmethod
    def encode(self, cache: Cache, rows: Rows, *, on_images: OnImages | None = None) -> dict[str, NDArray[np.float32]]:
        """(len(rows), width) features of the rows in every feature space, computed in one go."""

    @final
    def summaries(self, cache: Cache, rows: Rows, *, space: str = SUMMARY) -> NDArray[np.float32]:
        """(len(rows), width) features of the rows in one feature space. Raises EvalError for a space it has not."""
        if space not in self.spaces:
            raise EvalError(f"{self.name} has no feature space '{space}': it has {', '.join(self.spaces)}")
        return self.encode(cache, rows)[space]


@final
class CachedTeacherEncoder(Encoder):
    """A teacher's summaries as the cache holds them: no model runs."""

    def __init__(self, teacher: CachedTeacher) -> None:
        if teacher.spec.summary_dim is None:
            raise EvalError(f"teacher '{teacher.name}' has no summary, only maps: it cannot be compared by k-NN")
        super().__init__(
            name=teacher.name,
            kind="teacher",
            about=f"teacher, from the cache, {_pixels(teacher.spec.geometry.input_hw)}",
            spaces=(SUMMARY,),
        )
        self._spec = teacher.spec

    def encode(self, cache: Cache, rows: Rows, *, on_images: OnImages | None = None) -> dict[str, NDArray[np.float32]]:
        teacher = cache.teachers.get(self.name)
        if teacher is None:
            raise EvalError(f"{cache.url} has no teacher '{self.name}': it has {', '.join(cache.teachers) or 'none'}")
        features = teacher.summaries(rows)
        if on_images is not None:
            on_images(len(rows))
        return {SUMMARY: features}


@final
class StudentEncoder(Encoder):
    """A student, trained or not: its own summary, and its guess at the summary of every teacher that has one."""

    def __init__(self, model: DistilledStudent, *, name: str, trained: bool, device: torch.device) -> None:
        config = model.config
        history = f"{config.steps:,} steps, {config.images_seen:,} images seen" if trained else "never trained"
        super().__init__(
            name=name,
            kind="student" if trained else "untrained",
            about=f"{config.student}, {_pixels(config.image_hw)}, {history}",
            spaces=(SUMMARY, *(t.name for t in config.teachers if t.summary_dim is not None)),
        )
        self.config = config
        self._model, self._device = model.to(device), device

    @classmethod
    def of_run(cls, run: Path, *, name: str, trained: bool, device: torch.device) -> "StudentEncoder":
        """The student of a run folder; `trained=False` gives the same network as it was before its first step."""
        return cls(load_student(run, untrained=not trained), name=name, trained=trained, device=device)

    def encode(self, cache: Cache, rows: Rows, *, on_images: OnImages | None = None) -> dict[str, NDArray[np.float32]]:
        parts: dict[str, list[NDArray[np.float32]]] = {space: [] for space in self.spaces}
        for pixels in pixel_batches(cache, rows, self.pixels_of, batch_images=_BATCH_IMAGES):
            with torch.inference_mode():
                own = self._model.student(self._images(pixels))
                guesses = self._model.adaptors(own)
            parts[SUMMARY].append(own.summary.float().cpu().numpy())
            for space in self.spaces[1:]:
                summary = guesses[space].summary
                assert summary is not None, f"the spaces are those teachers with a summary, {space} is one"
                parts[space].append(summary.float().cpu().numpy())
            if on_images is not None:
                on_images(len(pixels))
        return {space: np.concatenate(arrays) for space, arrays in parts.items()}

    def teacher_maps(self, cache: Cache, rows: Rows) -> dict[str, NDArray[np.float32]]:
        """(len(rows), h, w, c) guesses at every teacher's map, on the student's own grid."""
        parts: dict[str, list[NDArray[np.float32]]] = {teacher.name: [] for teacher in self.config.teachers}
        for pixels in pixel_batches(cache, rows, self.pixels_of, batch_images=_BATCH_IMAGES):
            grid_hw = [side // self._model.student.patch_size for side in pixels.shape[1:3]]
            with torch.inference_mode():
                guesses = self._model.adaptors(self._model.student(self._images(pixels)))
            for name, arrays in parts.items():
                arrays.append(guesses[name].spatial.float().unflatten(1, grid_hw).cpu().numpy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def pixels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        """(h, w, 3): the image as this student sees it in evaluations."""
        return student_pixels(image, self.config.image_hw, self.seen_box_xyxy((image.height, image.width)))

    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        """The part of an image that this student is shown, in image pixels."""
        h, w = image_hw
        return eval_box_xyxy(image_hw, self.config.fit) or (0.0, 0.0, float(w), float(h))

    def _images(self, pixels: NDArray[np.uint8]) -> Float[Tensor, "b 3 h w"]:
        return torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2).float() / 255.0


def _pixels(hw: tuple[int, int]) -> str:
    return f"{hw[0]} px" if hw[0] == hw[1] else f"{hw[0]} x {hw[1]} px"
