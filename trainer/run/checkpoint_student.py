"""The student of a checkpoint, as the run would save it if it ended there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from radio_cache.errors import ConfigError, NotACacheError, TrainingError
from radio_cache.reader import Cache
from trainer.data.holdout import split_rows
from trainer.data.selection import usable_rows
from trainer.distributed.processes import Processes
from trainer.model.ema import Ema
from trainer.model.student import STARTING_SETTINGS, DistilledStudent, Heads, build_distilled
from trainer.objective.target_statistics import RunStatistics
from trainer.objective.targets import TargetMaker, fold_targets
from trainer.recipes.recipe import Recipe
from trainer.run.build import make_student_config
from trainer.run.checkpoint import BEST, DamagedCheckpointError, checkpoints, load_checkpoint
from trainer.run.folder import CHECKPOINTS, read_run_file
from trainer.students import refuse_foreign_code
from trainer.train_config import TrainConfig


def student_from_checkpoint(run: Path, which: str, *, adaptors: Heads = ()) -> tuple[DistilledStudent, str]:
    """Build the student of a checkpoint on the CPU, in evaluation mode, with heads that predict in the teachers' units.

    Args:
        run: folder of a run, finished or not.
        which: "best" by k-NN, "last", or the number of steps of a saved checkpoint.
        adaptors: as for `load_student`.

    Returns:
        The student, and a sentence that describes the checkpoint.

    Raises:
        ConfigError: there is no such checkpoint, or the run's cache has other images now.
        TrainingError: the checkpoint cannot be read.
    """
    path = _path_of(run, which)
    recorded = read_run_file(run)
    recipe, cache = Recipe.from_json(recorded["recipe"]), Cache(recorded["cache"])
    refuse_foreign_code(recipe.student)
    # Before the checkpoint is read, which may be large.
    _refuse_other_images(run, cache, recorded.get("images"))
    try:
        state = load_checkpoint(path)
    except DamagedCheckpointError as exc:
        raise TrainingError(f"{path} is damaged ({exc}): choose another --checkpoint") from exc
    teachers, step = tuple(recorded["teachers"]), int(state["step"])
    rows, _, split = split_rows(cache, usable_rows(cache, teachers, allow_partial=True), recipe.holdout)
    run_config = TrainConfig(cache=recorded["cache"], recipe=recipe, out=run, teachers=teachers)
    config = make_student_config(run_config, cache, teachers, split)
    # The student records how far it was trained.
    config = replace(config, steps=step, images_seen=round(config.images_seen * step / recipe.steps))
    # Building draws initial weights; the caller's random state stays as it is.
    with torch.random.fork_rng(devices=[]):
        # Pretrained weights would be downloaded only to be replaced.
        overrides = {key: value for key, value in config.overrides.items() if key not in STARTING_SETTINGS}
        model = build_distilled(replace(config, overrides=overrides))
    model.config = config
    _take_weights(path, model, state, recipe)
    cpu = torch.device("cpu")
    statistics = RunStatistics.of_run(run, cache, teachers, recipe, rows, cpu, Processes()).by_teacher
    fold_targets(
        model,
        {
            name: TargetMaker(cache, cache.teachers.levels(name), recipe, rows, cpu, statistics[name])
            for name in teachers
        },
    )
    model.use_heads(adaptors)
    description = f"{path.name}: step {step:,} of {recipe.steps:,}"
    if which == "best" and state.get("best") is not None:
        error = state.get("best_error")
        description += f", k-NN {state['best']:.1%}" + ("" if error is None else f" ± {error:.1%} (standard error)")
    return model.eval(), description


def _path_of(run: Path, which: str) -> Path:
    folder = run / CHECKPOINTS
    try:
        saved = checkpoints(folder)
    except OSError as exc:
        raise TrainingError(f"{folder} cannot be listed ({exc.strerror})") from exc
    if not saved:
        raise NotACacheError(f"{run} holds no checkpoint: give the folder of a run of radio-train that has saved one")
    steps = {int(path.stem.removeprefix("step-")): path for path in saved}
    if which == "last":
        return saved[-1]
    if which == "best":
        if (folder / BEST).exists():
            return folder / BEST
        raise ConfigError(
            f"{run} has no best checkpoint: it is chosen by k-NN, every `knn_every` steps, where images have classes; "
            "--checkpoint last"
        )
    if which.isdecimal() and int(which) in steps:
        return steps[int(which)]
    listed = ", ".join(map(str, steps))
    raise ConfigError(f"--checkpoint {which}: {run} has those of steps {listed}, and takes 'best' and 'last'")


def _refuse_other_images(run: Path, cache: Cache, images: Any) -> None:
    """Raise ConfigError if the cache has other images now: the statistics of the training images are folded into the heads."""
    if isinstance(images, dict) and (images.get("list"), images.get("in_cache")) != (
        cache.meta.index,
        cache.num_images,
    ):
        raise ConfigError(
            f"{cache.url} has other images than when {run} was begun ({images.get('in_cache')} then, {cache.num_images} now), "
            "and the heads would get the statistics of others: use a copy of the cache from then"
        )


def _take_weights(path: Path, model: DistilledStudent, state: dict[str, Any], recipe: Recipe) -> None:
    try:
        model.student.load_state_dict(state["student"])
        model.adaptors.load_state_dict(state["adaptors"])
        # The average replaces the trained weights, as at the end of a run.
        if recipe.ema is not None:
            average = Ema([model.student, model.adaptors], recipe.ema)
            average.load_state_dict(state["ema"])
            average.apply()
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as exc:
        raise TrainingError(
            f"checkpoint {path} is not one of this student and this radio-cache ({str(exc).splitlines()[0]:.200}): use the "
            "version that wrote it"
        ) from exc
