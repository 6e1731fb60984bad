"""A training run's step: forward and backward passes, the sum over processes, and the update."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radio_cache.errors import ConfigError, NonFiniteLossError
from radio_cache.reader import Cache
from radio_cache.storage.base import absolute_path_or_url
from trainer.data.batch import Batch, Targets, TeacherCodes, student_images
from trainer.data.crops import CropData
from trainer.data.holdout import split_rows
from trainer.data.loader import BatchLoader, LoadedBatch
from trainer.data.schedule import Schedule
from trainer.data.selection import select_teachers, teachers_by_group, usable_rows
from trainer.data.waits import Waits
from trainer.distributed.fsdp import clip_gradients, is_sharded, shard_student
from trainer.distributed.processes import Processes
from trainer.model.ema import Ema
from trainer.model.files import save_student, start_from
from trainer.model.mosaic import make_mosaics, split_mosaics
from trainer.model.student import DistilledStudent, build_distilled
from trainer.monitoring.metrics import StepLosses
from trainer.objective.objective import Objective, TeacherLoss, teacher_loss
from trainer.objective.target_statistics import RunStatistics
from trainer.objective.targets import TargetMaker, fold_targets
from trainer.run.build import make_crop_data, make_optimizer, make_student_config
from trainer.run.checkpoint import TrainingState, checkpoints
from trainer.run.folder import CHECKPOINTS, claim_run_folder
from trainer.run.layout import memory_layout
from trainer.run.lr_schedule import lr_at
from trainer.run.memory import checkpoint_activations
from trainer.run.step_memory import available_bytes, refuse_oversized_step, saved_activation_bytes
from trainer.train_config import TrainConfig

_DRAWS = 2
"""Number of a random stream derived from the recipe's seed: positions, dropped paths and noise of each step."""

_NUM_TOTALS = 3
"""Scalars of a step that belong to no term: total loss, stop flag, images."""


class _PassLosses(NamedTuple):
    """The rows of one pass, and each teacher's losses on them."""

    rows: NDArray[np.int64]
    losses: dict[str, TeacherLoss]


@final
class TrainingRun:
    """The parts of a run that are made once: the student, its optimiser, and the data and targets of every group.

    Args:
        config: configuration of the run.
        processes: processes that train together.
        on_message: receives notes for the user.

    Raises:
        ConfigError: the recipe does not fit the cache, the student, or the processes.
        StoreError: the cache has no teacher, or is unfinished.
        TrainingError: images cannot be read, or a step needs more memory than there is.
    """

    def __init__(
        self, config: TrainConfig, processes: Processes, on_message: Callable[[str], object] = lambda _: None
    ) -> None:
        self.config, self.processes = config, processes
        recipe, self.device = config.recipe, torch.device(config.device)
        self.schedule = Schedule(recipe, world=processes.world, rank=processes.rank, accumulate=recipe.accumulate)
        self.cache = Cache(config.cache)
        if note := self.cache.remote_images_note():
            on_message(note)
        by_group = teachers_by_group(recipe, select_teachers(self.cache, config.teachers, recipe))
        used_teachers = {name for names in by_group.values() for name in names}
        # In the cache's order, whatever the order of --teacher.
        self.teachers = tuple(name for name in self.cache.teachers.names() if name in used_teachers)
        rows = usable_rows(self.cache, self.teachers, allow_partial=config.allow_partial)
        self.rows, self.held_out_rows, split = split_rows(self.cache, rows, recipe.holdout)
        self.model = build_distilled(make_student_config(config, self.cache, self.teachers, split))
        # A checkpoint replaces the weights anyway.
        if recipe.init is not None and not checkpoints(config.out / CHECKPOINTS):
            start_from(self.model.student, Path(recipe.init))
        self.groups, self._read = make_crop_data(
            config, self.cache, self.rows, self.schedule, self.model.student, by_group
        )
        next(iter(self.groups.values())).refuse_unreadable_pixels()
        self.layout = memory_layout(self.model.student, recipe, self.device)
        self.model.to(self.device, memory_format=self.layout)  # pyright: ignore[reportCallIssue]  # not in torch's stub
        self.statistics = RunStatistics.of_run(
            config.out, self.cache, self.teachers, recipe, self.rows, self.device, processes
        )
        self.targets = {
            name: TargetMaker(self.cache, self.cache.teachers.levels(name), recipe, self.rows, self.device, statistics)
            for name, statistics in self.statistics.by_teacher.items()
        }
        # A GPU makes targets faster than the loader's threads do.
        self.makes_targets_ahead = self.device.type == "cpu"
        summaries = {widths.name: widths.summary_dim is not None for widths in self.model.config.teachers}
        self.objective = Objective(summaries, self.model.student.summary_dim, recipe)
        if not any(self.objective.weight(*term) for term in self.objective.terms):
            raise ConfigError(
                f"recipe '{recipe.name}': all losses of {', '.join(self.teachers)} weigh 0, so that nothing is trained: give "
                "one of summary_weight, spatial_weight, teacher_weights a weight"
            )
        self.objective.balancing.to(self.device)
        self._bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and self.device.type == "cuda")
        # In this order: FSDP wraps blocks as they will run, and compilation comes last.
        if recipe.checkpoint_activations:
            checkpoint_activations(self.model.student)
        if recipe.fsdp:
            shard_student(self.model.student, processes, self.device)
        if self.device.type == "cpu" and not recipe.fsdp:
            self._refuse_too_large_steps()
        if recipe.compile:
            self.model.student.compile()
            self.model.adaptors.compile()
        optimizer = make_optimizer(self.model, self.objective.balancing, recipe)
        # As the optimiser holds them: sharding has replaced some.
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ema = None if recipe.ema is None else Ema([self.model.student, self.model.adaptors], recipe.ema)
        self.training_state = TrainingState(
            self.model.student, self.model.adaptors, self.objective.balancing, optimizer, ema
        )

    @contextlib.contextmanager
    def claim_folder(self) -> Generator[None]:
        """Create the run's folder or check that it is this run's, and lock it in the first process until the block ends."""
        images: dict[str, str | int] = {
            "list": self.cache.meta.index,
            "in_cache": self.cache.num_images,
            "used": len(self.rows),
        }
        if len(self.held_out_rows):
            images["held_out"] = len(self.held_out_rows)
        with contextlib.ExitStack() as stack:
            if self.processes.is_first:
                cache = absolute_path_or_url(self.config.cache)
                stack.enter_context(claim_run_folder(self.config.out, self.config.recipe, cache, self.teachers, images))
                if not self.statistics.from_folder:
                    self.statistics.save(self.config.out)
            self.processes.wait_for_all()
            yield

    def _refuse_too_large_steps(self) -> None:
        """Raise TrainingError, before anything is written, if a pass of any group needs more memory than is available.

        The memory is extrapolated from passes of one image and of two. They run in evaluation mode, which draws no random numbers
        and updates no statistics.
        """
        recipe, parameters = self.config.recipe, list(self.model.parameters())
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        fixed = size * (3 if recipe.ema is None else 4)  # gradients and two moments; an average
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Balancings keep running averages, which these passes must not change.
        balancing = {name: value.clone() for name, value in self.objective.balancing.state_dict().items()}
        self.model.eval()
        for (stage, group), data in self.groups.items():
            images = recipe.stages[stage].groups[group].batch_images
            # Of one pass of one process.
            images //= self.schedule.num_slices(stage, group) * recipe.accumulate
            unit = data.mosaic**2
            if images < 2 * unit:
                continue  # no more of a batch can be drawn, and nothing smaller can be proposed
            bytes_of_one, bytes_of_two = (
                saved_activation_bytes(functools.partial(self._pass, data, data.batch(0, 0, count * unit)), parameters)
                for count in (1, 2)
            )
            refuse_oversized_step(
                per_image=(bytes_of_two - bytes_of_one) / unit,
                images=images,
                fixed=fixed + 2 * bytes_of_one - bytes_of_two,
                path=f"stages.{stage}.groups.{group}",
                processes=processes,
                accumulate=recipe.accumulate,
                available=available_bytes(),
            )
        self.model.train()
        self.objective.balancing.load_state_dict(balancing)

    @property
    def has_classes(self) -> bool:
        """True if the training images have at least two classes."""
        labels = np.unique(self.cache.index.labels[self.rows])
        return bool(np.count_nonzero(labels >= 0) > 1)

    def loader(self, first_step: int) -> BatchLoader:
        """Return the loader of all batches from a step on."""
        return BatchLoader(
            self.schedule,
            self.groups,
            first_step,
            self.config.recipe.steps,
            device=self.device,
            threads=self.config.data_threads,
            read=self._read,
            targets=self.targets if self.makes_targets_ahead else None,
        )

    def lr_of(self, step: int) -> float:
        """Return the learning rate of a step."""
        position = self.schedule.stage_step(step)
        return lr_at(position.step, self.config.recipe.stages[position.stage])

    def step(
        self, step: int, loaded_batches: Iterator[LoadedBatch], stop: bool = False
    ) -> tuple[StepLosses, Waits, int, bool]:
        """Make one optimiser step over all passes of all processes.

        Args:
            step: number of the step, from 0.
            loaded_batches: batches of this process, in order.
            stop: whether this process received a signal to stop.

        Returns:
            Losses before the update, times that this process waited for data, number of images over all processes, and whether
            any process received a signal to stop.

        Raises:
            NonFiniteLossError: a loss is not finite; the weights stay as they are.
        """
        recipe, training_state = self.config.recipe, self.training_state
        # Seeded by step and rank, so that a resumed run draws what an uninterrupted one would have.
        seeds = np.random.SeedSequence((recipe.seed, _DRAWS, step, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        for group in training_state.optimizer.param_groups:
            group["lr"] = self.lr_of(step)
        training_state.optimizer.zero_grad(set_to_none=True)
        waits, pass_losses = Waits(), list[_PassLosses]()
        terms = self.objective.terms
        # One tensor, so that one copy from the device carries all: total, stop, images; then each term's sum and its weight.
        scalars = torch.zeros(_NUM_TOTALS + 2 * len(terms), device=self.device)
        first_weight = _NUM_TOTALS + len(terms)
        scalars[1] = float(stop)
        for _ in self.schedule.batch_slices(step):
            batch_slice, batch, waited = next(loaded_batches)
            for cause in ("pixels", "codes", "transfer"):
                setattr(waits, cause, getattr(waits, cause) + getattr(waited, cause))
            total, losses = self._pass(self.groups[batch_slice.stage, batch_slice.group], batch)
            (total * batch_slice.weight).backward()
            pass_losses.append(_PassLosses(batch.rows, losses))
            means = {(name, kind): mean for name, loss in losses.items() for kind, mean in loss.means().items()}
            num_images = batch_slice.last - batch_slice.first
            share = num_images / recipe.stages[batch_slice.stage].groups[batch_slice.group].batch_images
            scalars[0] += total.detach() * batch_slice.weight
            for number, term in enumerate(terms):
                if term in means:
                    scalars[_NUM_TOTALS + number] += means[term] * share
                    scalars[first_weight + number] += share
            scalars[2] += num_images
        # A copy is summed: the update needs this process's own weights of the terms.
        sums = self.processes.sum(scalars.clone()).tolist()
        losses_of_step = _step_losses(sums, terms)
        self._refuse_non_finite(step, losses_of_step, pass_losses)
        self._update((scalars[first_weight:] > 0).float())
        return losses_of_step, waits, round(sums[2]), sums[1] > 0

    def _pass(self, data: CropData, batch: Batch) -> tuple[Tensor, dict[str, TeacherLoss]]:
        """Return the loss of a batch, and every teacher's losses, detached."""
        names = tuple(data.levels)
        images = student_images(batch, self.layout)
        if data.mosaic > 1:
            images = make_mosaics(images, data.mosaic).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            # (m, 3, H, W) -> summary (m, s), spatial (m, N, c); a mosaic's tokens then become those of its images
            features = self.model.student(images)
            if data.mosaic > 1:
                features = split_mosaics(features, data.grid_hw, data.mosaic)
            predictions = self.model.adaptors(features, data.grid_hw, names)
        recipe = self.config.recipe
        shift_yx = data.head_shift_yx(batch.shift_yx)
        losses = {
            name: teacher_loss(predictions[name], self.targets_of(name, inputs, shift_yx), recipe, data.head_hw)
            for name, inputs in zip(names, batch.teachers, strict=True)
        }
        total = self.objective(losses, features.summary)
        return total, {name: loss.detached() for name, loss in losses.items()}

    def targets_of(self, name: str, inputs: TeacherCodes | Targets, shift_yx: Tensor | None = None) -> Targets:
        """Return a teacher's targets in a batch: those that the loader made, or new ones from its codes."""
        return inputs if isinstance(inputs, Targets) else self.targets[name](inputs, shift_yx)

    def _update(self, present: Tensor) -> None:
        """Update the weights. present: (terms,) 1 where this process computed the term, else 0."""
        recipe, training_state = self.config.recipe, self.training_state
        # FSDP has summed the gradients of sharded parameters already.
        self.processes.sum_gradients([p for p in self.parameters if not is_sharded(p)])
        # Balancings average over steps; a process without a term has nothing to add to its average.
        for buffer in training_state.balancing.buffers():
            self.processes.average_present(buffer, present)
        # One norm over the student and all heads.
        clip_gradients(list(self.model.parameters()), recipe.clip_grad_norm)
        training_state.optimizer.step()
        if training_state.ema:
            training_state.ema.update()

    def _refuse_non_finite(self, step: int, losses: StepLosses, pass_losses: Sequence[_PassLosses]) -> None:
        if math.isfinite(losses.total):
            return
        sums = {name: sum(parts.values()) for name, parts in losses.teachers.items()}
        non_finite = next(((name, value) for name, value in sums.items() if not math.isfinite(value)), None)
        # Only this process's images can be named; others computed the rest.
        by_image = [
            (passed.rows, passed.losses[non_finite[0]].is_finite())
            for passed in pass_losses
            if non_finite and non_finite[0] in passed.losses
        ]
        keys = [self.cache.index.key(row) for rows, finite in by_image for row in rows[~finite]]
        if non_finite:
            problem = f"the loss of teacher '{non_finite[0]}' is {non_finite[1]}"
        else:
            problem = f"all losses together are {losses.total}"
        if keys:
            num_images = sum(len(rows) for rows, _ in by_image)
            listed = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
            problem += f", on {len(keys)} of {num_images} images: {listed}"
        # A diverged student fails on all images, damaged features on one or two.
        raise NonFiniteLossError(
            f"step {step}: {problem}. The last checkpoint is whole; try a lower --lr, or, where it is few images, "
            f"radio-cache verify {self.cache.url}"
        )

    def headline(self) -> str:
        """Return a summary of the run for the screen: student, teachers, images, steps and epochs."""
        recipe, model = self.config.recipe, self.model
        millions = sum(p.numel() for p in model.student.parameters()) / 1e6
        heads = sum(p.numel() for p in model.adaptors.parameters()) / 1e6
        images = str(len(self.rows))
        if len(self.rows) < self.cache.num_images:
            images += f" of {self.cache.num_images}"
        images += " images"
        if len(self.held_out_rows):
            images += f" ({len(self.held_out_rows)} held out)"
        return (
            f"student {recipe.student}: {millions:.1f} M parameters, adaptor heads {heads:.1f} M; teachers "
            f"{', '.join(self.teachers)}\n{images}, {recipe.steps} steps, {recipe.images_seen} fresh "
            f"crops ({recipe.images_seen / len(self.rows):.1f} epochs)"
        )

    def finish(self) -> None:
        """Fold the target statistics into the heads, so that they predict in the teachers' units, and save the student.

        The first process writes. If the student is sharded, all processes call this.
        """
        if self.training_state.ema:
            self.training_state.ema.apply()
        model = self._whole_model()
        if not self.processes.is_first:
            return
        # The heads' last layers absorb the normalisation, which is linear.
        fold_targets(model, self.targets)
        save_student(model.to("cpu").eval(), self.config.out)

    def _whole_model(self) -> DistilledStudent:
        """Return the model, gathered from all processes if it is sharded."""
        if not self.training_state.is_divided:
            return self.model
        state = self.training_state.state_dict(keep=self.processes.is_first)
        model = build_distilled(self.model.config)
        if self.processes.is_first:
            model.student.load_state_dict(state["student"])
            model.adaptors.load_state_dict(state["adaptors"])
        return model.to(self.device)


def _step_losses(sums: list[float], terms: tuple[tuple[str, str], ...]) -> StepLosses:
    """Return the total loss, and the mean over the step's images of each term that was computed."""
    teachers: dict[str, dict[str, float]] = {}
    for number, (name, part) in enumerate(terms):
        total, weight = sums[_NUM_TOTALS + number], sums[_NUM_TOTALS + len(terms) + number]
        if weight > 0:
            teachers.setdefault(name, {})[part] = total / weight
    return StepLosses(sums[0], teachers)
