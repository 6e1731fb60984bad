"""Encoder of a student, trained or not: its own features, and its heads' predictions of every teacher."""

from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evals.encoders.base import OWN, LiveEncoder, Measurable, Outputs, size_phrase
from radio_cache.errors import ConfigError
from radio_cache.geometry.crops import BoxXYXY, ViewGeometry
from trainer import DistilledStudent, load_student
from trainer.data.crops import eval_box_xyxy
from trainer.model.eval_view import eval_pixels
from trainer.model.student import backbone_and_heads


@final
class StudentEncoder(LiveEncoder):
    """A student of a run or an export.

    Args:
        model: the student with its heads.
        name: of its rows in tables.
        trained: False for the network before its first step.
        device: where it runs.
        size_px: side of its square input, if other than in training.

    Raises:
        ConfigError: if the student does not take inputs of that size.
    """

    def __init__(
        self, model: DistilledStudent, *, name: str, trained: bool, device: torch.device, size_px: int | None = None
    ) -> None:
        config = model.config
        input_hw = config.image_hw if size_px is None else (size_px, size_px)
        # Convolutional students need multiples of their stride, window attention multiples of its window.
        nearest = model.student.nearest_supported_resolution(*input_hw)
        if nearest != input_hw:
            raise ConfigError(
                f"{name}: {config.student} does not take {size_phrase(input_hw)}, the nearest it takes is "
                f"{size_phrase(nearest)}"
            )
        history = f"{config.steps:,} steps, {config.images_seen:,} images seen" if trained else "never trained"
        # An export may carry some of the heads only.
        heads = [teacher for teacher in config.teachers if teacher.name in model.heads]
        super().__init__(
            name=name,
            kind="student" if trained else "untrained",
            description=f"{config.student}, {size_phrase(input_hw)}, {history}",
            spaces=(OWN, *(t.name for t in heads if t.summary_dim is not None)),
        )
        self.config = config
        self.map_spaces = (OWN, *(t.name for t in heads))
        patch = model.student.patch_size
        self.geometry = ViewGeometry(
            # The view is made by `eval_pixels`, so the geometry only describes where tokens lie in it.
            fit="squash",
            input_hw=input_hw,
            resize_px=min(input_hw),
            interpolation="bicubic",
            grid_hw=(input_hw[0] // patch, input_hw[1] // patch),
            stride_px=float(patch),
            offset_px=patch / 2,
        )
        self.model, self._device, self._trained = model.to(device), device, trained

    @classmethod
    def of_run(
        cls, run: Path, *, name: str, trained: bool, device: torch.device, size_px: int | None = None
    ) -> "StudentEncoder":
        """Load the student of a run folder.

        Args:
            run: the folder.
            name: of its rows in tables.
            trained: False loads the network as it was before its first step.
            device: where it runs.
            size_px: side of its square input, if other than in training.

        Raises:
            RadioCacheError: if the folder holds no student, or the weights that it started from are not available.
        """
        model = load_student(run, adaptors="all", untrained=not trained)
        return cls(model, name=name, trained=trained, device=device, size_px=size_px)

    def pixels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the evaluation view of the image."""
        return eval_pixels(
            image, image_hw=self.geometry.input_hw, fit=self.config.fit, centre_share=self.config.centre_share
        )

    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        """Return the box of the evaluation view; the whole image for "squash"."""
        h, w = image_hw
        # None stands for the whole image.
        box = eval_box_xyxy(image_hw, self.config.fit, self.config.centre_share)
        return box or (0.0, 0.0, float(w), float(h))

    def outputs(self, pixels: UInt8[Tensor, "b h w 3"], images_hw: list[tuple[int, int]] | None = None) -> Outputs:
        """Run the student and all heads."""
        del images_hw  # a student's input has no padding
        # (b, h, w, 3) in 0..255 -> (b, 3, h, w) in [0, 1]
        images = pixels.to(self._device).permute(0, 3, 1, 2).float() / 255.0
        backbone, predictions = backbone_and_heads(self.model(images))
        fine_hw = tuple(side * self.config.adaptor_upsample for side in self.geometry.grid_hw)
        summaries, maps = {OWN: backbone.summary.float()}, {OWN: backbone.spatial.float()}
        for name, prediction in predictions.items():
            # Heads predict in the units of their teacher's features: maps compare with cached ones directly.
            maps[name] = prediction.spatial
            if prediction.summary is not None:
                summaries[name] = prediction.summary
        # Heads may upsample: their maps are finer than the backbone's. (b, n, c) -> (b, h, w, c)
        grids = {space: self.geometry.grid_hw if space == OWN else fine_hw for space in maps}
        return Outputs(summaries, {space: tokens.unflatten(1, grids[space]) for space, tokens in maps.items()})

    def measurable(self) -> Measurable:
        """Return the backbone alone: heads exist only in training."""
        return Measurable(self.model.student, self.model.student)

    def at_size(self, size_px: int) -> "StudentEncoder":
        """Return the same student for another input size; the weights are shared."""
        return StudentEncoder(self.model, name=self.name, trained=self._trained, device=self._device, size_px=size_px)
