"""The folder of a run: its files, its lock, and the check that a command resumes its own run."""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from radio_cache.errors import ConfigError, NotACacheError, TrainingError
from radio_cache.format.strict_json import parse_json
from radio_cache.storage.local import TEMPORARY, sync_folder, write_atomically
from trainer.recipes.recipe import Recipe

RECIPE_FILE, RUN_FILE, CHECKPOINTS = "recipe.json", "run.json", "checkpoints"
"""Names in a run's folder; `trainer.monitoring.metrics.METRICS_FILE` is another."""


@contextlib.contextmanager
def claim_run_folder(
    out: Path, recipe: Recipe, cache: str, teachers: Sequence[str], images: Mapping[str, str | int]
) -> Generator[None]:
    """Create the run's folder, or check that it belongs to this run, and lock it for this process.

    The first file of a run is `run.json`, which is locked before it gets its name. Of several starts at once, one therefore holds
    the folder from its first write, and the others write nothing.

    Args:
        out: folder of the run.
        recipe: recipe of the run.
        cache: path or URL of the cache.
        teachers: names of the teachers.
        images: identity of the images, so that a run does not resume with others or in another order.

    Raises:
        ConfigError: the folder holds a run with other settings; the message names them.
        NotACacheError: the folder is not a run.
        TrainingError: another process holds the folder.
    """
    settings = {"cache": cache, "teachers": list(teachers), "images": dict(images), "recipe": recipe.to_json()}
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    run_file = out / RUN_FILE
    if not run_file.exists():
        _refuse_foreign(out)
        out.mkdir(parents=True, exist_ok=True)
        with _new_run_file(run_file, json.dumps(settings, indent=1).encode()) as is_new:
            if is_new:
                write_atomically(out / RECIPE_FILE, json.dumps(recipe.to_json(), indent=1).encode())
                yield
                return
    # Before the lock: a command with other settings should hear about those, not about the running process.
    _refuse_other_settings(out, settings)
    with lock_run_folder(out):
        if not (out / RECIPE_FILE).exists():  # a start that was killed between its first two files
            write_atomically(out / RECIPE_FILE, json.dumps(recipe.to_json(), indent=1).encode())
        yield


@contextlib.contextmanager
def lock_run_folder(out: Path) -> Generator[None]:
    """Lock the run's folder for this process. The system releases the lock when the process ends, however it ends.

    Processes may outlive the torchrun that started them, and would write into the same files as the next start.

    Raises:
        TrainingError: another process holds the folder.
    """
    with (out / RUN_FILE).open("r+") as file:  # to be written, or network file systems refuse to lock it
        _lock(out, file)
        yield


def _lock(out: Path, file: IO[Any]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise TrainingError(
            f"{out} is being trained by another process (`fuser {out / RUN_FILE}` names it): wait until it is done, or stop "
            "it; the same command goes on from its last checkpoint"
        ) from exc
    except OSError:
        pass  # a file system without locks


@contextlib.contextmanager
def _new_run_file(run_file: Path, content: bytes) -> Generator[bool]:
    """Create `run.json`, locked before it has its name. Yield False if another start created its own first."""
    temporary = run_file.with_name(f"{run_file.name}{TEMPORARY}{uuid.uuid4().hex}")
    with temporary.open("x+b") as file:
        try:
            _lock(run_file.parent, file)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            try:
                # A hard link fails if the name exists, which a rename does not.
                os.link(temporary, run_file)
            except FileExistsError:
                is_new = False
            except OSError:  # a file system without hard links: two starts at the same instant could both succeed
                is_new = not run_file.exists()
                if is_new:
                    temporary.replace(run_file)
            else:
                is_new = True
            sync_folder(run_file.parent)
        finally:
            temporary.unlink(missing_ok=True)
        yield is_new


def _refuse_foreign(out: Path) -> None:
    """Raise NotACacheError for a path with anything but the files of a start that was stopped at its first writes."""
    if not out.exists():
        return
    if not out.is_dir() or any(
        path.name != RECIPE_FILE and not path.name.startswith((f"{RUN_FILE}{TEMPORARY}", f"{RECIPE_FILE}{TEMPORARY}"))
        for path in out.iterdir()
        if path.name != RUN_FILE  # another start has just made it
    ):
        raise NotACacheError(f"{out} exists and is not a run of radio-train: choose another --out, or remove it")


def _refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    recorded = read_run_file(out)
    # Runs of early versions recorded no images.
    recorded.setdefault("images", settings["images"])
    changed = [f"{key} was {before}, now {after}" for key, before, after in _differences(recorded, settings)]
    if changed:
        raise ConfigError(
            f"{out} holds a run with other settings: {'; '.join(changed[:5])}. Choose another --out, or remove that run"
        )


def read_run_file(out: Path) -> dict[str, Any]:
    """Return the content of a run's `run.json`: cache, teachers, images, and the recipe with this version's fields.

    Raises:
        ConfigError: the file is damaged, or of another version.
        NotACacheError: there is no such file.
    """
    run_file = out / RUN_FILE
    cure = "restore it from a copy, or choose another --out"
    try:
        recorded = parse_json(run_file.read_bytes())
    except FileNotFoundError as exc:
        raise NotACacheError(f"{out} is not a run of radio-train: it has no {RUN_FILE}") from exc
    except ValueError as exc:
        raise ConfigError(f"{run_file} is damaged ({exc}): {cure}") from exc
    if not isinstance(recorded, dict):
        raise ConfigError(f"{run_file} is damaged (it is no object): {cure}")
    settings = cast(dict[str, Any], recorded)
    for key, kind in (("cache", str), ("teachers", list), ("recipe", dict)):
        if not isinstance(settings.get(key), kind):
            raise ConfigError(f"{run_file} is damaged (it names no {key}): {cure}")
    try:
        settings["recipe"] = json.loads(json.dumps(Recipe.from_json(settings["recipe"]).to_json()))
    except ConfigError as exc:
        raise ConfigError(f"{run_file}: {exc}: {cure}, or go on with the version that wrote it") from exc
    return settings


def refuse_lost(out: Path) -> None:
    """Raise TrainingError if the run's folder was removed during training, before anything is written to it again."""
    if not (out / RUN_FILE).exists():
        raise TrainingError(
            f"the run's folder {out} was removed or renamed while it was being trained: stopped, and nothing more is written. "
            "Put it back, and the same command goes on from its last checkpoint; or start again"
        )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost paths at which two JSON values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast(dict[str, Any], old), cast(dict[str, Any], new)
        for key in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(cast(list[Any], old)) == len(cast(list[Any], new)):
        for position, (before, after) in enumerate(zip(cast(list[Any], old), cast(list[Any], new), strict=True)):
            yield from _differences(before, after, f"{path}.{position}")
    elif old != new:
        yield path, old, new
