"""Stage 2: train a student against the cached features. One trainer; recipes, losses and heads are what varies."""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from radio_cache.cli_support import ProgressLine
from radio_cache.errors import ConfigError, NonFiniteLossError, NotACacheError, StoreError, unknown_name
from radio_cache.reader import Cache
from radio_cache.storage import absolute_place, write_atomically
from trainer.adaptors import Head, TeacherWidths
from trainer.checkpoint import LossSums, Trainee, checkpoints, restore, save_checkpoint
from trainer.data import Batch, CropData, StudentFit
from trainer.distilled import DistilledStudent, StudentConfig, backbone_and_heads, build_distilled
from trainer.export import save_student
from trainer.objective import Objective, TeacherLoss, teacher_loss
from trainer.recipes import Recipe
from trainer.targets import TargetMaker

RECIPE_FILE, METRICS_FILE = "recipe.json", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run: which cache, which teachers (none named: all of them), which recipe, where to, on what."""

    cache: str | Path
    recipe: Recipe
    out: Path
    teachers: tuple[str, ...] = ()
    device: str = "cpu"
    data_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))


@dataclass(frozen=True)
class TrainReport:
    """What a run did. steps: done in all; steps_before: by earlier starts. stopped: early, by a signal."""

    steps: int
    steps_before: int
    seconds: float
    stopped: bool


class Values(NamedTuple):
    """What the losses of a step were: in all, and teacher -> part ("summary", "spatial") -> value."""

    total: float
    teachers: dict[str, dict[str, float]]


def train(config: TrainConfig, say: Callable[[str], None] = lambda _: None) -> TrainReport:
    """Train, or go on with the run in `config.out`: killed at any step, the same call gives the same weights.

    SIGTERM and Ctrl-C save a checkpoint and return early. Raises ConfigError or StoreError before anything is written,
    NonFiniteLossError naming teacher, step and images.
    """
    recipe = config.recipe
    device = torch.device(config.device)
    cache = Cache(config.cache)
    teachers = _teachers(cache, config)
    student_config = _student_config(cache, config, teachers)
    model = build_distilled(student_config)
    side = recipe.image_px
    legal = model.student.nearest_supported_resolution(side, side)
    if legal != (side, side):
        raise ConfigError(
            f"image_px {side}: student '{recipe.student}' takes {legal[0]} as the nearest; --set image_px={legal[0]}"
        )
    grid = side // model.student.patch_size
    data = CropData(cache, teachers, recipe, (grid, grid))
    _claim(config, student_config)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]  # torch's stub lacks this overload
    targets = [TargetMaker(cache, name, recipe, data.rows, device) for name in teachers]
    summaries = {widths.name: widths.summary_dim is not None for widths in student_config.teachers}
    objective = Objective(summaries, model.student.summary_dim, recipe)
    objective.balancing.to(device)
    optimizer = _optimizer(model, objective.balancing, recipe)
    trainee = Trainee(model.student, model.adaptors, objective.balancing, optimizer)
    done, unlogged = _resume(config.out, trainee, say)
    say(_headline(model, data, recipe))

    started = time.perf_counter()
    model.train()
    step, stopped = done, False
    with _stop_signal() as stop, _Log(config.out, done, unlogged) as log, contextlib.ExitStack() as stack:
        line = stack.enter_context(ProgressLine("training", recipe.steps, unit="steps", done=done))
        batches = stack.enter_context(contextlib.closing(data.batches(done, recipe.steps, threads=config.data_threads)))
        for batch, wait_s in _timed(batches):
            values = train_step(model, optimizer, batch, targets, objective, recipe, layout)
            _check_finite(values, batch, data)
            step = batch.step + 1
            stopped = stop.is_set()
            log.add(values, wait_s, len(batch.rows))
            last = stopped or step == recipe.steps
            line.advance(
                1, log.write(step, lr_at(batch.step, recipe)) if last or step % recipe.log_every == 0 else None
            )
            if last or step % recipe.checkpoint_every == 0:
                save_checkpoint(config.out / "checkpoints", step, trainee, log.sums)
            if stopped:
                break
    if not stopped:
        _finish(model, targets, config)
    return TrainReport(step, done, time.perf_counter() - started, stopped)


def train_step(
    model: DistilledStudent, optimizer: torch.optim.Optimizer, batch: Batch, targets: list[TargetMaker], objective: Objective,
    recipe: Recipe, layout: torch.memory_format,
) -> Values:  # fmt: skip
    """One optimiser step; returns the losses before it. It is not made where one of them is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(batch.step, recipe)
    device = next(model.parameters()).device
    pixels = torch.from_numpy(batch.pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)
    images = pixels.to(torch.float32).div(255).contiguous(memory_format=layout)
    features, guesses = backbone_and_heads(model(images))
    side = recipe.image_px // model.student.patch_size * recipe.adaptor_upsample
    shift_yx = None if batch.shift_yx is None else batch.shift_yx * recipe.adaptor_upsample
    names = [teacher.name for teacher in model.config.teachers]
    losses = {
        name: teacher_loss(guesses[name], make(part, shift_yx), recipe, (side, side))
        for name, make, part in zip(names, targets, batch.teachers, strict=True)
    }
    total = objective(losses, features.summary)
    values = _values(total, losses)
    if not _all_finite(values):
        return values
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
    optimizer.step()
    return values


def _values(total: Tensor, losses: dict[str, TeacherLoss]) -> Values:
    """The losses as numbers, in one copy from the device."""
    means = {(name, part): mean for name, loss in losses.items() for part, mean in loss.means().items()}
    whole, *parts = torch.stack([total, *means.values()]).detach().tolist()
    teachers: dict[str, dict[str, float]] = {name: {} for name in losses}
    for (name, part), value in zip(means, parts, strict=True):
        teachers[name][part] = value
    return Values(whole, teachers)


def _all_finite(values: Values) -> bool:
    return all(
        math.isfinite(v) for v in (values.total, *(v for parts in values.teachers.values() for v in parts.values()))
    )


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of a step: linear warm-up to `lr`, then half a cosine to zero after the last step."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * share))


def _teachers(cache: Cache, config: TrainConfig) -> tuple[str, ...]:
    if not cache.teachers:
        cache.teachers.refuse_unreadable()
        raise StoreError(f"{cache.url} holds no teacher yet: radio-cache build --out {cache.url} --teacher NAME ...")
    for name in (*config.teachers, *config.recipe.teacher_weights, *config.recipe.teacher_summary_weights):
        if name not in cache.teachers:
            raise ConfigError(f"{cache.url}: " + unknown_name("cached teacher", name, cache.teachers))
    if not config.teachers:
        cache.teachers.refuse_unreadable()
    return config.teachers or cache.teachers.names()


def _student_config(cache: Cache, config: TrainConfig, names: tuple[str, ...]) -> StudentConfig:
    recipe = config.recipe
    specs = [cache.teachers[name].spec for name in names]
    fit: StudentFit = "crop" if any(spec.geometry.fit == "crop" for spec in specs) else "squash"
    widths = tuple(
        TeacherWidths(name=spec.name, summary_dim=spec.summary_dim, spatial_dim=spec.spatial_dim) for spec in specs
    )
    return StudentConfig(
        student=recipe.student, overrides=recipe.student_overrides, image_hw=(recipe.image_px, recipe.image_px), fit=fit,
        teachers=widths, adaptor=recipe.adaptor, adaptor_width=recipe.adaptor_width,
        adaptor_blocks=recipe.adaptor_blocks, adaptor_upsample=recipe.adaptor_upsample, seed=recipe.seed, steps=recipe.steps,
        images_seen=recipe.steps * recipe.batch_images, cache=absolute_place(config.cache), run=str(config.out.resolve()),
        recipe=recipe.name,
    )  # fmt: skip


def _claim(config: TrainConfig, student: StudentConfig) -> None:
    """Make the run's folder, or check that the one there is this run's."""
    out = config.out
    wanted = {"cache": student.cache, "teachers": [t.name for t in student.teachers], "recipe": config.recipe.to_json()}
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as they do in the file
    run_file = out / "run.json"
    if run_file.exists():
        recorded = json.loads(run_file.read_text())
        changed = [f"{key} was {was}, now {now}" for key, was, now in _differences(recorded, wanted)]
        if changed:
            raise ConfigError(
                f"{out} holds a run with other settings: {'; '.join(changed[:5])}. Choose another --out, or remove that run"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NotACacheError(f"{out} exists and is not a run of radio-train: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / RECIPE_FILE, json.dumps(config.recipe.to_json(), indent=1).encode())
    write_atomically(run_file, json.dumps(wanted, indent=1).encode())


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(cast(dict[str, Any], was), cast(dict[str, Any], now), f"{prefix}{key}.")
        elif was != now:
            yield f"{prefix}{key}", was, now


def _optimizer(model: DistilledStudent, balancing: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases), position tables, tokens, and what a balancing learns do not decay."""
    exempt = {f"student.{name}" for name in model.student.no_weight_decay}
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim >= 2 and name not in exempt]
    others = [p for name, p in named if p.ndim < 2 or name in exempt] + list(balancing.parameters())
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _resume(out: Path, trainee: Trainee, say: Callable[[str], None]) -> tuple[int, LossSums]:
    saved = checkpoints(out / "checkpoints")
    if not saved:
        return 0, {}
    say(f"going on from {saved[-1].name}")
    return restore(saved[-1], trainee)


def _headline(model: DistilledStudent, data: CropData, recipe: Recipe) -> str:
    millions = sum(p.numel() for p in model.student.parameters()) / 1e6
    heads = sum(p.numel() for p in model.adaptors.parameters()) / 1e6
    epochs = recipe.steps * recipe.batch_images / len(data.rows)
    names = ", ".join(teacher.name for teacher in data.teachers)
    return (
        f"student {recipe.student}: {millions:.1f} M parameters, adaptor heads {heads:.1f} M; teachers {names}\n"
        f"{len(data.rows)} images, {recipe.steps} steps of {recipe.batch_images} fresh crops at {recipe.image_px} px "
        f"({epochs:.1f} epochs)"
    )


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds the trainer waited for it."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def _check_finite(values: Values, batch: Batch, data: CropData) -> None:
    if _all_finite(values):
        return
    name, value = next(
        ((name, v) for name, parts in values.teachers.items() for v in parts.values() if not math.isfinite(v)),
        ("all of them together", values.total),
    )
    keys = [data.cache.index.key(row) for row in batch.rows[:3]]
    raise NonFiniteLossError(
        f"step {batch.step}: the loss of teacher '{name}' is {value}, on images such as "
        f"{', '.join(keys)}. The last checkpoint is whole; try a lower --lr, or verify the cache"
    )


def _finish(model: DistilledStudent, targets: list[TargetMaker], config: TrainConfig) -> None:
    """Fold the statistics into the heads, so that they speak the teachers' units, and save what the user takes home."""
    summary_heads = iter(model.adaptors.summary_heads)
    for widths, spatial_head, make in zip(model.config.teachers, model.adaptors.spatial_heads, targets, strict=True):
        if make.spatial:
            make.spatial.fold_into(cast(Head, spatial_head))
        summary_head = next(summary_heads) if widths.summary_dim is not None else None
        if summary_head is not None and make.summary:
            make.summary.fold_into(cast(Head, summary_head))
    save_student(model.to("cpu").eval(), config.out)


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


class _Log:
    """Averages between two log lines, to `metrics.jsonl` and TensorBoard."""

    def __init__(self, out: Path, steps_done: int, unlogged: LossSums) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # heavy, and only a run needs it

        _drop_lines_after(out / METRICS_FILE, steps_done)
        self._file = (out / METRICS_FILE).open("a")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=steps_done or None)
        self.sums = unlogged
        self._images, self._wait_s, self._started = 0, 0.0, time.perf_counter()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def add(self, values: Values, wait_s: float, num_images: int) -> None:
        """One step's losses."""
        self._append("loss", values.total)
        for name, parts in values.teachers.items():
            for part, value in parts.items():
                self._append(f"{name}/{part}", value)
        self._images += num_images
        self._wait_s += wait_s

    def write(self, step: int, lr: float) -> str:
        """Write the means since the last call; returns what the progress line shows."""
        now = time.perf_counter()
        means = {key: sum(values) / len(values) for key, values in self.sums.items()}
        teachers = sorted({key.rpartition("/")[0] for key in means if "/" in key})
        seconds = now - self._started
        record = {
            "step": step, "loss": means["loss"], "lr": lr, "images_per_s": self._images / seconds,
            "data_wait": self._wait_s / seconds,
            "teachers": {
                name: {part: means.get(f"{name}/{part}") for part in ("summary", "spatial")} for name in teachers
            },
        }  # fmt: skip
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, value in means.items():
            self._board.add_scalar(key, value, step)
        parts = ", ".join(f"{name} {_losses_in_words(means, name)}" for name in teachers)
        note = f"loss {means['loss']:.3f} ({parts}), {record['images_per_s']:.0f} images/s, data wait {record['data_wait']:.0%}"
        self.sums, self._images, self._wait_s, self._started = {}, 0, 0.0, now
        return note

    def _append(self, key: str, value: float) -> None:
        self.sums.setdefault(key, []).append(value)


def _losses_in_words(means: dict[str, float], teacher: str) -> str:
    """'0.31/0.54' (summary/spatial), or '0.54' for a teacher without a summary."""
    summary, spatial = means.get(f"{teacher}/summary"), means[f"{teacher}/spatial"]
    return f"{spatial:.2f}" if summary is None else f"{summary:.2f}/{spatial:.2f}"


def _drop_lines_after(path: Path, steps_done: int) -> None:
    """Forget metrics of steps that a resumed run does again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= steps_done]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
