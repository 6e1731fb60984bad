"""Evaluation during a run: k-NN on a few images, and pictures of features."""

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
from trainer.monitoring.pictures import feature_picture, save_picture
from trainer.run.step import TrainingRun


@final
class Evaluation:
    """Evaluation of a run's student between two steps. The student's state is the same afterwards.

    Args:
        run: run to evaluate.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._knn: OnlineKnn | Literal["none"] | None = None  # None until the first evaluation; "none" if impossible

    def metrics_after(self, step: int, last: bool) -> dict[str, float]:
        """Return the k-NN accuracy after a step and its standard error, if it is due, and write the picture if one is due.

        The first process calls this. If the student is sharded, all processes do.

        Args:
            step: number of completed steps.
            last: whether the run ends here.
        """
        run, recipe = self._run, self._run.config.recipe
        # The last step is always evaluated, whatever the interval.
        if recipe.picture_every and (last or step % recipe.picture_every == 0):
            picture = self._picture()
            if run.processes.is_first:
                save_picture(run.config.out, step, picture)
        if not recipe.knn_every or not (last or step % recipe.knn_every == 0):
            return {}
        if self._knn is None:
            self._knn = (
                OnlineKnn.of(run.cache, self._final_data(), run.rows, run.held_out_rows, run.model.config) or "none"
            )
        if self._knn == "none":
            return {}
        with self._evaluating():
            top1 = self._knn.top1(self._summaries)
        # Which checkpoint is the best has to be the same in all processes: the first one's result counts.
        shared = torch.tensor(top1 if run.processes.is_first else 0.0, dtype=torch.float64, device=run.device)
        top1 = float(run.processes.sum(shared)) if run.training_state.is_divided else top1
        return {"knn": top1, "knn_error": top1_error(top1, len(self._knn.queries))}

    @contextlib.contextmanager
    def _evaluating(self) -> Generator[None]:
        """Switch to evaluation mode and to averaged weights, if the recipe has them, until the block ends."""
        run = self._run
        trained = [p.detach().clone() for p in run.parameters] if run.training_state.ema else []
        # Averaged weights are what the finished student has.
        if run.training_state.ema:
            run.training_state.ema.apply()
        run.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            run.model.train()
            with torch.no_grad():
                for parameter, value in zip(run.parameters, trained, strict=False):
                    parameter.copy_(value)

    def _summaries(self, pixels: Tensor) -> Tensor:
        run = self._run
        # (b, h, w, 3) uint8 -> (b, 3, h, w) in [0, 1]
        images = pixels.to(run.device).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=run.layout)
        return run.model.student(images).summary

    def _final_data(self) -> CropData:
        """Return the data of the group whose input size the finished student has."""
        return self._run.groups[self._run.config.recipe.final_group]

    def _picture(self) -> NDArray[np.uint8]:
        """Return a picture of two crops, the same ones at every step."""
        run, data = self._run, self._final_data()
        # The first images of the first batch: crops are a function of the seed and the position.
        batch = data.batch(0, 0, min(2, run.config.recipe.stages[-1].groups[-1].batch_images))
        moved = batch.map(lambda tensor: tensor.to(run.device))
        with self._evaluating():
            features = run.model.student(student_images(moved, run.layout))
            predictions = run.model.adaptors(features, data.grid_hw, tuple(data.levels))
        maps: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for name, inputs in zip(data.levels, moved.teachers, strict=True):
            targets = run.targets_of(name, inputs)
            # (b, h * w, c) -> (b, h, w, c)
            maps[name] = (
                targets.spatial.unflatten(1, targets.grid_hw).cpu().numpy(),
                predictions[name].spatial.unflatten(1, data.head_hw).cpu().numpy(),
            )
        return feature_picture(batch.pixels.numpy(), maps)
