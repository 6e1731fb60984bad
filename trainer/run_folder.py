"""The folder of a run: whose it is, and that the same command goes on with it."""

import contextlib
import fcntl
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from radio_cache.errors import ConfigError, NotACacheError, TrainingError
from radio_cache.local_storage import write_atomically
from trainer.recipe import Recipe

RECIPE_FILE, METRICS_FILE, RUN_FILE, CHECKPOINTS = "recipe.json", "metrics.jsonl", "run.json", "checkpoints"


def claim(
    out: Path, recipe: Recipe, cache: str, teachers: Sequence[str], images: Mapping[str, str | int]
) -> None:
    """Make the run's folder, or check that the one there is this run's.

    images: which of the cache's they are, so that a run does not go on with others, in another order.
    Raises ConfigError naming what was set otherwise, NotACacheError for a folder that is no run.
    """
    wanted = {"cache": cache, "teachers": list(teachers), "images": dict(images), "recipe": recipe.to_json()}
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as they do in the file
    run_file = out / RUN_FILE
    if run_file.exists():
        recorded = _recorded(run_file)
        # With what its version did not know yet.
        recorded.setdefault("images", wanted["images"])
        recorded["recipe"] = json.loads(json.dumps(Recipe.from_json(recorded["recipe"]).to_json()))
        changed = [f"{key} was {was}, now {now}" for key, was, now in _differences(recorded, wanted)]
        if changed:
            raise ConfigError(
                f"{out} holds a run with other settings: {'; '.join(changed[:5])}. Choose another --out, or remove that run"
            )
        return
    # A recipe alone is what a start leaves that was stopped, or found no room, right here.
    if out.exists() and (not out.is_dir() or any(path.name != RECIPE_FILE for path in out.iterdir())):
        raise NotACacheError(f"{out} exists and is not a run of radio-train: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / RECIPE_FILE, json.dumps(recipe.to_json(), indent=1).encode())
    write_atomically(run_file, json.dumps(wanted, indent=1).encode())


@contextlib.contextmanager
def held(out: Path) -> Generator[None]:
    """Keep the run's folder to this process; the system lets go of it when the process ends, however it ends.

    What torchrun started may outlive it, and would write into the same files as the next start. Raises TrainingError if another
    process has the folder.
    """
    with (out / RUN_FILE).open("r+") as file:  # to be written, or network file systems refuse to lock it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise TrainingError(
                f"{out} is being trained by another process (`fuser {out / RUN_FILE}` names it): wait until it is done, or stop "
                "it; the same command goes on from its last checkpoint"
            ) from exc
        except OSError:
            pass  # a file system without locks: nobody can tell
        yield


def refuse_lost(out: Path) -> None:
    """Raise TrainingError if the folder of the run was taken away while it was trained, before half of it is made anew."""
    if not (out / RUN_FILE).exists():
        raise TrainingError(
            f"the run's folder {out} was removed or renamed while it was being trained: stopped, and nothing more is written. "
            "Put it back, and the same command goes on from its last checkpoint; or start again"
        )


def _recorded(run_file: Path) -> dict[str, Any]:
    try:
        return json.loads(run_file.read_text())
    except ValueError as exc:
        raise ConfigError(f"{run_file} is damaged ({exc}): restore it from a copy, or choose another --out") from exc


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Paths at which two values of JSON differ, down to the innermost, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        was, now = cast(dict[str, Any], old), cast(dict[str, Any], new)
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(cast(list[Any], old)) == len(cast(list[Any], new)):
        for place, (was, now) in enumerate(zip(cast(list[Any], old), cast(list[Any], new), strict=True)):
            yield from _differences(was, now, f"{path}.{place}")
    elif old != new:
        yield path, old, new
