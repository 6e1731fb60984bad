"""Stage 2: train a student against the cached features. One trainer; recipes, losses and heads are what varies."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from radio_cache.cli_support import ProgressLine
from radio_cache.errors import ConfigError, NonFiniteLossError
from radio_cache.reader import Cache
from radio_cache.storage import absolute_place
from trainer.adaptors import Head, TeacherWidths
from trainer.batch import Batch, student_images
from trainer.checkpoint import Progress, Trainee, restore_last, save_checkpoint
from trainer.choice import cached_teachers, teachers_by_group, usable_rows
from trainer.data import CodeReader, CropData, StudentFit, read_codes
from trainer.distilled import DistilledStudent, StudentConfig, build_distilled
from trainer.ema import Ema
from trainer.export import save_student
from trainer.feed import Fed, Feed, GroupKey, Waits
from trainer.memory import checkpoint_activations, telling_what_to_turn_down
from trainer.metrics import Log, Values
from trainer.monitor import Monitor
from trainer.objective import Objective, teacher_loss
from trainer.order import BlockOrder, FullOrder, Order
from trainer.pictures import picture, save_picture
from trainer.plan import Plan, lr_at
from trainer.processes import Processes
from trainer.recipe import Recipe
from trainer.run_folder import CHECKPOINTS, claim
from trainer.shard_cache import DEFAULT_BYTES, ShardCache
from trainer.students import STUDENTS, ViTConfig
from trainer.targets import TargetMaker

_DRAWS = 2
"""A stream of random numbers drawn from the recipe's seed: positions, dropped paths and noise of each step."""

_TOLD = 3
"""Numbers of a step that are no term's."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run: which cache, which teachers (none named: all of them), which recipe, where to, on what.

    allow_partial: train on the images that are there, of a cache that is not finished.
    shard_cache_bytes: memory for whole shards, where the images are shuffled by blocks.
    """

    cache: str | Path
    recipe: Recipe
    out: Path
    teachers: tuple[str, ...] = ()
    device: str = "cpu"
    allow_partial: bool = False
    data_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    shard_cache_bytes: int = DEFAULT_BYTES


@dataclass(frozen=True)
class TrainReport:
    """What a run did. steps: done in all; steps_before: by earlier starts. stopped: early, by a signal."""

    steps: int
    steps_before: int
    seconds: float
    stopped: bool


def train(config: TrainConfig, say: Callable[[str], None] = lambda _: None) -> TrainReport:
    """Train, or go on with the run in `config.out`: killed at any step, the same call gives the same weights.

    SIGTERM and Ctrl-C save a checkpoint and return early. Under torchrun, all processes call this alike. Raises
    ConfigError or StoreError before anything is written, NonFiniteLossError naming teacher, step and images.
    """
    processes = Processes.joined(torch.device(config.device))
    say = say if processes.is_first else lambda _: None
    try:
        run = TrainingRun(config, processes)
        run.claim()
        progress = restore_last(config.out / CHECKPOINTS, run.trainee, say)
        say(run.headline())
        with telling_what_to_turn_down():
            return run_steps(run, progress)
    finally:
        processes.leave()


def run_steps(run: "TrainingRun", progress: Progress) -> TrainReport:
    """The steps that are left, with log lines and checkpoints, and what the user takes home at the end."""
    config, recipe, first = run.config, run.config.recipe, run.processes.is_first
    started, done = time.perf_counter(), progress.step
    step, stopped = done, False
    run.model.train()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_signal())
        log = stack.enter_context(Log(config.out, done, progress.losses or {}, run.teachers)) if first else None
        line = stack.enter_context(ProgressLine("training", recipe.steps, unit="steps", done=done)) if first else None
        fed = iter(stack.enter_context(run.feed(done)))
        while step < recipe.steps and not stopped:
            values, waits, images, stopped = run.step(step, fed, stop.is_set())
            step += 1
            last = stopped or step == recipe.steps
            if log and line:
                log.add(values, waits, images)
                measured = run.measured(step, last)
                told = None
                if last or measured or step % recipe.log_every == 0:
                    told = log.write(step, run.lr_of(step - 1), measured)
                line.advance(1, told)
                is_best = "knn" in measured and (progress.best is None or measured["knn"] > progress.best)
                if is_best:
                    progress = replace(progress, best=measured["knn"])
                if last or is_best or step % recipe.checkpoint_every == 0:
                    saved = Progress(step, log.sums, progress.best)
                    save_checkpoint(
                        config.out / CHECKPOINTS, run.trainee, saved, keep=recipe.keep_checkpoints, is_best=is_best
                    )
        run.processes.wait_for_all()
    if first and not stopped:
        run.finish()
    return TrainReport(step, done, time.perf_counter() - started, stopped)


@final
class TrainingRun:
    """Everything of a run that is made once: the student, its optimiser, the images and targets of every group."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        recipe, self.device = config.recipe, torch.device(config.device)
        self.plan = Plan(recipe, world=processes.world, rank=processes.rank, accumulate=recipe.accumulate)
        self.cache = Cache(config.cache)
        by_group = teachers_by_group(recipe, cached_teachers(self.cache, config.teachers, recipe))
        asked = {name for names in by_group.values() for name in names}
        self.teachers = tuple(name for name in self.cache.teachers.names() if name in asked)
        self.model = build_distilled(self._student_config())
        self.rows = usable_rows(self.cache, self.teachers, allow_partial=config.allow_partial)
        self.groups, self._read = self._crop_data(by_group)
        next(iter(self.groups.values())).refuse_unreadable_pixels()
        self._layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=self._layout)  # pyright: ignore[reportCallIssue]  # not in torch's stub
        self.targets = self._target_makers()
        summaries = {widths.name: widths.summary_dim is not None for widths in self.model.config.teachers}
        self.objective = Objective(summaries, self.model.student.summary_dim, recipe)
        self.objective.balancing.to(self.device)
        self._bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and self.device.type == "cuda")
        if recipe.checkpoint_activations:
            checkpoint_activations(self.model.student)
        if recipe.compile:
            self.model.student.compile()
            self.model.adaptors.compile()
        optimizer = _optimizer(self.model, self.objective.balancing, recipe)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ema = None if recipe.ema is None else Ema([self.model.student, self.model.adaptors], recipe.ema)
        self._monitor: Monitor | Literal["none"] | None = None  # None: not asked for yet
        self.trainee = Trainee(self.model.student, self.model.adaptors, self.objective.balancing, optimizer, ema)

    def claim(self) -> None:
        """Make the run's folder, or check that it is this run's."""
        if self.processes.is_first:
            claim(self.config.out, self.config.recipe, absolute_place(self.config.cache), self.teachers)
        self.processes.wait_for_all()

    def feed(self, done: int) -> Feed:
        """The batches of the steps that are left."""
        return Feed(
            self.plan, self.groups, done, self.config.recipe.steps, device=self.device, threads=self.config.data_threads,
            read=self._read,
        )  # fmt: skip

    def lr_of(self, step: int) -> float:
        place = self.plan.place(step)
        return lr_at(place.step, self.config.recipe.stages[place.stage])

    def step(self, step: int, fed: Iterator[Fed], stop: bool = False) -> tuple[Values, Waits, int, bool]:
        """One optimiser step over all passes of all processes.

        Returns the losses before it, what this process waited for data, images over all processes, and whether any process
        was asked to stop. Raises NonFiniteLossError instead of stepping.
        """
        recipe, trainee = self.config.recipe, self.trainee
        seeds = np.random.SeedSequence((recipe.seed, _DRAWS, step, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        for group in trainee.optimizer.param_groups:
            group["lr"] = self.lr_of(step)
        trainee.optimizer.zero_grad(set_to_none=True)
        waits, batches = Waits(), list[Batch]()
        terms = self.objective.terms
        # In one tensor, so that one copy from the device tells all: total, stop, images; of each term its sum and its weight.
        told = torch.zeros(_TOLD + 2 * len(terms), device=self.device)
        told[1] = float(stop)
        for _ in self.plan.parts(step):
            part, batch, waited = next(fed)
            batches.append(Batch(batch.rows, batch.pixels, ()))
            for cause in ("pixels", "codes", "transfer"):
                setattr(waits, cause, getattr(waits, cause) + getattr(waited, cause))
            total, means = self._pass(self.groups[part.stage, part.group], batch)
            (total * part.weight).backward()
            share = (part.last - part.first) / recipe.stages[part.stage].groups[part.group].batch_images
            told[0] += total.detach() * part.weight
            for number, term in enumerate(terms):
                if term in means:
                    told[_TOLD + number] += means[term] * share
                    told[_TOLD + len(terms) + number] += share
            told[2] += part.last - part.first
        sums = self.processes.sum(told.clone()).tolist()
        values = _values(sums, terms)
        self._refuse_non_finite(step, values, batches)
        self._update((told[_TOLD + len(terms) :] > 0).float())
        return values, waits, round(sums[2]), sums[1] > 0

    def measured(self, step: int, last: bool) -> dict[str, float]:
        """What is measured beside the losses behind this step, if anything: k-NN on a few images. Draws the step's picture."""
        recipe = self.config.recipe
        if recipe.picture_every and (last or step % recipe.picture_every == 0):
            save_picture(self.config.out, step, self._picture())
        if not recipe.knn_every or not (last or step % recipe.knn_every == 0):
            return {}
        if self._monitor is None:
            fit = self.model.config.fit
            self._monitor = Monitor.of(self.cache, self._final_data(), self.rows, fit, recipe.seed) or "none"
        if self._monitor == "none":
            return {}
        with self._evaluating():
            return {"knn": self._monitor.top1(self._summaries)}

    @contextlib.contextmanager
    def _evaluating(self) -> Generator[None]:
        """The student as it is used: in evaluation, with averaged weights if the recipe has them; and as it was, afterwards."""
        kept = [p.detach().clone() for p in self._parameters] if self.trainee.ema else []
        if self.trainee.ema:
            self.trainee.ema.apply()
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=False):
                    parameter.copy_(value)

    def _summaries(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.device).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=self._layout)
        return self.model.student(images).summary

    def _final_data(self) -> CropData:
        """The group at whose size the student will be used."""
        return next(d for d in reversed(self.groups.values()) if d.image_px == self.config.recipe.final_px)

    def _picture(self) -> NDArray[np.uint8]:
        """Of two crops, always the same ones."""
        data = self._final_data()
        batch = data.batch(0, 0, min(2, self.config.recipe.stages[-1].groups[-1].batch_images))
        moved = batch.map(lambda tensor: tensor.to(self.device))
        with self._evaluating():
            features = self.model.student(student_images(moved, self._layout))
            guesses = self.model.adaptors(features, data.grid_hw, tuple(data.levels))
        finer = self.config.recipe.adaptor_upsample
        head_hw = (data.grid_hw[0] * finer, data.grid_hw[1] * finer)
        maps: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for name, part in zip(data.levels, moved.teachers, strict=True):
            targets = self.targets[name](part)
            maps[name] = (
                targets.spatial.unflatten(1, targets.grid_hw).cpu().numpy(),
                guesses[name].spatial.unflatten(1, head_hw).cpu().numpy(),
            )
        return picture(batch.pixels.numpy(), maps)

    def _pass(self, data: CropData, batch: Batch) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        """The loss of a batch, and the means of its terms."""
        names = tuple(data.levels)
        images = student_images(batch, self._layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            features = self.model.student(images)
            guesses = self.model.adaptors(features, data.grid_hw, names)
        recipe = self.config.recipe
        finer = recipe.adaptor_upsample
        shift_yx = None if batch.shift_yx is None else batch.shift_yx * finer
        head_hw = (data.grid_hw[0] * finer, data.grid_hw[1] * finer)
        losses = {
            name: teacher_loss(guesses[name], self.targets[name](part, shift_yx), recipe, head_hw)
            for name, part in zip(names, batch.teachers, strict=True)
        }
        total = self.objective(losses, features.summary)
        means = {(name, part): m.detach() for name, loss in losses.items() for part, m in loss.means().items()}
        return total, means

    def _update(self, present: Tensor) -> None:
        recipe, trainee = self.config.recipe, self.trainee
        self.processes.sum_gradients(self._parameters)
        for buffer in trainee.balancing.buffers():
            self.processes.average_present(buffer, present)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad_norm)
        trainee.optimizer.step()
        if trainee.ema:
            trainee.ema.update()

    def _refuse_non_finite(self, step: int, values: Values, batches: list[Batch]) -> None:
        named = [(name, value) for name, parts in values.teachers.items() for value in parts.values()]
        bad = next(((n, v) for n, v in [*named, ("all of them together", values.total)] if not math.isfinite(v)), None)
        if bad is None:
            return
        keys = [self.cache.index.key(row) for batch in batches for row in batch.rows[:3]]
        raise NonFiniteLossError(
            f"step {step}: the loss of teacher '{bad[0]}' is {bad[1]}, on images such as {', '.join(keys[:3])}. The last "
            "checkpoint is whole; try a lower --lr, or verify the cache"
        )

    def headline(self) -> str:
        """What is about to be trained, on how much."""
        recipe, model = self.config.recipe, self.model
        millions = sum(p.numel() for p in model.student.parameters()) / 1e6
        heads = sum(p.numel() for p in model.adaptors.parameters()) / 1e6
        partial = f" of {self.cache.num_images}" if len(self.rows) < self.cache.num_images else ""
        return (
            f"student {recipe.student}: {millions:.1f} M parameters, adaptor heads {heads:.1f} M; teachers "
            f"{', '.join(self.teachers)}\n{len(self.rows)}{partial} images, {recipe.steps} steps, {recipe.images_seen} fresh "
            f"crops ({recipe.images_seen / len(self.rows):.1f} epochs)"
        )

    def finish(self) -> None:
        """Fold the statistics into the heads, so that they speak the teachers' units, and save what the user takes home."""
        if self.trainee.ema:
            self.trainee.ema.apply()
        summary_heads = iter(self.model.adaptors.summary_heads)
        for widths, spatial_head in zip(self.model.config.teachers, self.model.adaptors.spatial_heads, strict=True):
            make = self.targets[widths.name]
            if make.spatial:
                make.spatial.fold_into(cast(Head, spatial_head))
            summary_head = next(summary_heads) if widths.summary_dim is not None else None
            if summary_head is not None and make.summary:
                make.summary.fold_into(cast(Head, summary_head))
        save_student(self.model.to("cpu").eval(), self.config.out)

    def _student_config(self) -> StudentConfig:
        config, recipe = self.config, self.config.recipe
        specs = [(name, self.cache.teachers.levels(name)[0].spec) for name in self.teachers]
        fit: StudentFit = "crop" if any(spec.geometry.fit == "crop" for _, spec in specs) else "squash"
        widths = tuple(
            TeacherWidths(name=name, summary_dim=spec.summary_dim, spatial_dim=spec.spatial_dim) for name, spec in specs
        )
        return StudentConfig(
            student=recipe.student, overrides=_overrides(recipe, widths), image_hw=(recipe.final_px, recipe.final_px), fit=fit,
            teachers=widths, adaptor=recipe.adaptor, adaptor_width=recipe.adaptor_width, adaptor_blocks=recipe.adaptor_blocks,
            adaptor_upsample=recipe.adaptor_upsample, seed=recipe.seed, steps=recipe.steps,
            images_seen=recipe.images_seen, cache=absolute_place(config.cache), run=str(config.out.resolve()),
            recipe=recipe.name,
        )  # fmt: skip

    def _crop_data(self, by_group: dict[GroupKey, tuple[str, ...]]) -> tuple[dict[GroupKey, CropData], CodeReader]:
        recipe, student = self.config.recipe, self.model.student
        blocks = recipe.shuffle == "blocks" or (recipe.shuffle == "auto" and not self.cache.storage.is_local)
        shard_images = self.cache.meta.shard_images
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
            seed = (recipe.seed, *key)
            order: Order = (
                BlockOrder(
                    self.rows, shard_images, seed, group.batch_images, window=recipe.shuffle_shards,
                    readers=self.plan.slices(*key),
                )
                if blocks
                else FullOrder(self.rows, seed, group.batch_images)
            )  # fmt: skip
            grid = side // student.patch_size
            found[key] = CropData(
                self.cache, names, recipe, self.rows, order, seed=seed, image_px=side, grid_hw=(grid, grid)
            )
        read = ShardCache(self.rows, shard_images, self.config.shard_cache_bytes) if blocks else read_codes
        return found, read

    def _target_makers(self) -> dict[str, TargetMaker]:
        return {
            name: TargetMaker(self.cache, self.cache.teachers.levels(name), self.config.recipe, self.rows, self.device)
            for name in self.teachers
        }


def _overrides(recipe: Recipe, teachers: tuple[TeacherWidths, ...]) -> dict[str, Any]:
    """The student's settings; a ViT gets one class token for each teacher with a summary, if nothing else is said."""
    if not isinstance(STUDENTS.get(recipe.student), ViTConfig):
        return recipe.student_overrides
    summaries = sum(widths.summary_dim is not None for widths in teachers)
    return {"num_summary_tokens": max(1, summaries), **recipe.student_overrides}


def _values(sums: list[float], terms: tuple[tuple[str, str], ...]) -> Values:
    """Means over the step's images, of the terms that were asked."""
    teachers: dict[str, dict[str, float]] = {}
    for number, (name, part) in enumerate(terms):
        total, weight = sums[_TOLD + number], sums[_TOLD + len(terms) + number]
        if weight > 0:
            teachers.setdefault(name, {})[part] = total / weight
    return Values(sums[0], teachers)


def _optimizer(model: DistilledStudent, balancing: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases), position tables, tokens, and what a balancing learns do not decay."""
    exempt = {f"student.{name}" for name in model.student.no_weight_decay}
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim >= 2 and name not in exempt]
    others = [p for name, p in named if p.ndim < 2 or name in exempt] + list(balancing.parameters())
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.stages[0].lr, weight_decay=recipe.weight_decay)


@contextlib.contextmanager
def _stop_signal() -> Generator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that the step under way ends and a checkpoint is written."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread; whoever runs us elsewhere stops us otherwise
        return

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
