"""What is looked at while a run goes on: k-NN on a few images, and pictures."""

import contextlib
from collections.abc import Generator
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batch import student_images
from trainer.data.crops import CropData
from trainer.monitoring.online_knn import OnlineKnn, top1_error
from trainer.monitoring.pictures import picture, save_picture
from trainer.run.step import TrainingRun


@final
class Evaluation:
    """Looks at the student of a run between two steps, as it would be used, and leaves it as it was."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._monitor: OnlineKnn | Literal["none"] | None = None  # None: not asked for yet

    def measured(self, step: int, last: bool) -> dict[str, float]:
        """What is measured beside the losses behind this step, if anything: k-NN on a few images. Draws the step's picture.

        The first process calls this; all of them do where the student is divided.
        """
        run, recipe = self._run, self._run.config.recipe
        if recipe.picture_every and (last or step % recipe.picture_every == 0):
            drawn = self._picture()
            if run.processes.is_first:
                save_picture(run.config.out, step, drawn)
        if not recipe.knn_every or not (last or step % recipe.knn_every == 0):
            return {}
        if self._monitor is None:
            self._monitor = (
                OnlineKnn.of(run.cache, self._final_data(), run.rows, run.held_out_rows, run.model.config) or "none"
            )
        if self._monitor == "none":
            return {}
        with self._evaluating():
            top1 = self._monitor.top1(self._summaries)
        # What the first process found holds for all of them: it decides what is kept.
        told = torch.tensor(top1 if run.processes.is_first else 0.0, dtype=torch.float64, device=run.device)
        top1 = float(run.processes.sum(told)) if run.training_state.is_divided else top1
        return {"knn": top1, "knn_error": top1_error(top1, len(self._monitor.queries))}

    @contextlib.contextmanager
    def _evaluating(self) -> Generator[None]:
        """The student as it is used: in evaluation, with averaged weights if the recipe has them; and as it was, afterwards."""
        run = self._run
        kept = [p.detach().clone() for p in run.parameters] if run.training_state.ema else []
        if run.training_state.ema:
            run.training_state.ema.apply()
        run.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            run.model.train()
            with torch.no_grad():
                for parameter, value in zip(run.parameters, kept, strict=False):
                    parameter.copy_(value)

    def _summaries(self, pixels: Tensor) -> Tensor:
        run = self._run
        images = pixels.to(run.device).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=run.layout)
        return run.model.student(images).summary

    def _final_data(self) -> CropData:
        """The group at whose size the student will be used."""
        return self._run.groups[self._run.config.recipe.final_group]

    def _picture(self) -> NDArray[np.uint8]:
        """Of two crops, always the same ones."""
        run, data = self._run, self._final_data()
        batch = data.batch(0, 0, min(2, run.config.recipe.stages[-1].groups[-1].batch_images))
        moved = batch.map(lambda tensor: tensor.to(run.device))
        with self._evaluating():
            features = run.model.student(student_images(moved, run.layout))
            guesses = run.model.adaptors(features, data.grid_hw, tuple(data.levels))
        maps: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for name, part in zip(data.levels, moved.teachers, strict=True):
            targets = run.targets_of(name, part)
            maps[name] = (
                targets.spatial.unflatten(1, targets.grid_hw).cpu().numpy(),
                guesses[name].spatial.unflatten(1, data.head_hw).cpu().numpy(),
            )
        return picture(batch.pixels.numpy(), maps)
