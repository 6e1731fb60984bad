"""Teachers that run in the training loop, on the very crops: what a cache is compared with."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.pipeline.preprocess import teacher_input
from cache_builder.teachers import load_recorded
from radio_cache.geometry.crops import crop_weights, rescaled_box_xyxy
from radio_cache.reader import Cache
from radio_cache.torch import crop_maps
from trainer.data.batch import LevelCodes, TeacherCodes
from trainer.data.crops import CodeReader, CropData, Crops, student_pixels
from trainer.objective.targets import TargetMaker, Targets


class LiveData(CropData):
    """The teacher's own input of every crop in place of stored codes. views: crops an image has, or None for any number."""

    views: int | None = None

    def crops(self, number: int, first: int, last: int) -> Crops:
        if self.views is None:
            return super().crops(number, first, last)
        rows = self.sampler.rows(number, first, last)
        takes = np.random.default_rng((*self._seed, 9, number)).integers(self.views, size=last - first)
        rngs = [np.random.default_rng((17, int(row), int(take))) for row, take in zip(rows, takes, strict=True)]
        return self._draw_crops(rows, rngs)

    def code_buffers(self, name: str, images: int) -> list[NDArray[Any]]:
        return [np.empty((images, *self.levels[name].geometry.input_hw, 3), np.uint8)]

    def read_teacher(self, name: str, crops: Crops, read: CodeReader, out: Any) -> TeacherCodes:
        geometry = self.levels[name].geometry
        for place, (row, box, hw) in enumerate(zip(crops.rows, crops.boxes, crops.sizes_hw, strict=True)):
            image = self.image(int(row))
            box = rescaled_box_xyxy(box, hw, (image.height, image.width))  # a cache may keep its images smaller
            out[0][place] = student_pixels(image, geometry.input_hw, box)
        whole = [(0.0, 0.0, float(geometry.input_hw[1]), float(geometry.input_hw[0]))] * len(crops.rows)
        weights = crop_weights(whole, [geometry.input_hw] * len(crops.rows), geometry, out_hw=self.grid_hw)
        part = LevelCodes(
            0, torch.arange(len(crops.rows)), *map(torch.from_numpy, (out[0], weights.rows, weights.columns))
        )
        return TeacherCodes((part,), torch.from_numpy(weights.valid), torch.from_numpy(weights.coverage), None)


class LiveTargets:
    """The teacher runs on the crops; what a TargetMaker does otherwise."""

    def __init__(self, made: TargetMaker, cache: Cache, name: str) -> None:
        self.spatial, self.summary = made.spatial, made.summary
        self._teacher = load_recorded(cache.teachers[name].spec)

    @torch.inference_mode()
    def _features(self, pixels: torch.Tensor) -> Any:
        hw = (int(pixels.shape[1]), int(pixels.shape[2]))
        return self._teacher(teacher_input(pixels, [hw] * len(pixels), self._teacher.spec.normalisation))

    def __call__(self, part: TeacherCodes, shift_yx: Any = None) -> Targets:
        [level] = part.levels
        features = self._features(level.codes)
        spatial = self.spatial(crop_maps(features.spatial.clone().float(), level.rows, level.columns))
        summary = self.summary(features.summary.clone().float())
        h, w = part.valid.shape[1:]
        return Targets(spatial, part.valid.flatten(1), summary, part.coverage, (int(h), int(w)))
