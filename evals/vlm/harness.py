"""Visual question answering by lmms-eval for a LLaVA whose vision tower is a student, or any other."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evals.errors import EvalError
from evals.shared.devices import Device
from radio_cache.errors import ConfigError, unknown_name
from radio_cache.torch import pick_device

TASKS = {"gqa": "gqa", "textvqa": "textvqa_val", "pope": "pope", "vqav2": "vqav2_val"}
"""Names in papers -> names in lmms-eval."""

# transformers knows the tower once this module of ours was imported, in the process that loads the LLaVA.
_START = "import runpy, trainer.dropins.llava; runpy.run_module('lmms_eval', run_name='__main__', alter_sys=True)"


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """Settings of a run of lmms-eval.

    Attributes:
        llava: folder of `save_pretrained` with the model and its processor.
        out: folder that lmms-eval writes to.
        tasks: keys of `TASKS`.
        limit: questions of each task at most, the first ones.
        device: where LLaVA runs.
    """

    llava: Path
    out: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    limit: int | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError("--task: " + unknown_name("task", task, TASKS))
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit needs at least 1 question, got {self.limit}")
        # lmms-eval splits --model_args at commas.
        if "," in str(self.llava):
            raise ConfigError(f"--llava {self.llava}: lmms-eval takes no path with a comma; rename it, or link to it")


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """One metric of one task by lmms-eval, usually a share in [0, 1].

    Attributes:
        metric: name and filter, such as `exact_match,none`.
    """

    task: str
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class VlmTable:
    """The metrics, and how they were measured.

    Attributes:
        record: path of lmms-eval's own file.
    """

    protocol: str
    rows: tuple[TaskMetric, ...]
    record: str

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table."""
        return asdict(self)


def run_harness(config: HarnessConfig) -> VlmTable:
    """Run lmms-eval as a subprocess and read its figures; its output goes to the terminal.

    Raises:
        EvalError: if lmms-eval is not installed or fails, or if the folder holds no LLaVA.
    """
    # Checked first: lmms-eval would download data sets before it fails on the folder.
    vision = _vision_tower(config.llava)
    if find_spec("lmms_eval") is None:
        raise EvalError(
            "radio-eval vlm --llava needs lmms-eval, which is not installed: pip install lmms-eval (it fetches the data "
            "sets from Hugging Face); radio-eval vlm --check needs neither"
        )
    # lmms-eval names its files by date: those that are new afterwards are the results.
    before = set(config.out.rglob("*results.json"))
    command = harness_command(config)
    # A process of its own: lmms-eval changes global state, and may exit.
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise EvalError(f"lmms-eval ended with exit code {code}; its message is above. It was run as: {command[3:]}")
    new_records = set(config.out.rglob("*results.json")) - before
    if not new_records:
        raise EvalError(f"lmms-eval succeeded but wrote no *results.json below {config.out}; its messages are above")
    # One run may write several files; the newest is read.
    record = max(new_records, key=lambda file: file.stat().st_mtime)
    num_questions = "all questions" if config.limit is None else f"the first {config.limit:,} questions of each"
    return VlmTable(
        protocol=f"{config.llava} (vision tower: {vision}), {', '.join(config.tasks)}, {num_questions}, by lmms-eval's llava_hf",
        rows=tuple(_rows(record, config.tasks)),
        record=str(record),
    )


def harness_command(config: HarnessConfig) -> list[str]:
    """Return lmms-eval's command line, in a Python process that can load students."""
    device = pick_device(config.device)
    # llava_hf's default device_map is "", which transformers 5 refuses.
    model = f"pretrained={config.llava},device={device},device_map={device}"
    command = [sys.executable, "-c", _START, "--model", "llava_hf", "--model_args", model]
    command += ["--tasks", ",".join(TASKS[task] for task in config.tasks), "--batch_size", "1"]
    command += ["--output_path", str(config.out)]
    return command if config.limit is None else [*command, "--limit", str(config.limit)]


def _vision_tower(folder: Path) -> str:
    """Return the model type of the vision tower. Raises EvalError if the folder holds no LLaVA with its processor."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, vision = config["model_type"], config["vision_config"]["model_type"]
    except FileNotFoundError as exc:
        raise EvalError(
            f"--llava {folder} holds no config.json, so no model. docs/vlm.md describes how to make a LLaVA"
        ) from exc
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise EvalError(
            f"--llava {folder} holds no LLaVA of transformers: {exc!r}. docs/vlm.md describes how to make one"
        ) from exc
    if kind != "llava":
        raise EvalError(f"--llava {folder} holds a model of the type {kind}, not a LLaVA")
    # Which of the two names is written depends on the version of transformers.
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise EvalError(
            f"--llava {folder} holds no processor, which prepares pictures and words: save it there, too "
            "(trainer.dropins.llava.llava_processor)"
        )
    return str(vision)


def _rows(record: Path, tasks: Sequence[str]) -> list[TaskMetric]:
    """Return the metrics in lmms-eval's file, without their standard errors."""
    try:
        results: dict[str, dict[str, Any]] = json.loads(record.read_text(encoding="utf-8"))["results"]
        return [
            TaskMetric(task=task, metric=metric, value=float(value))
            for task in tasks
            for metric, value in results[TASKS[task]].items()
            # lmms-eval also lists aliases and sample counts as text.
            if isinstance(value, int | float) and "stderr" not in metric
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EvalError(f"{record} has not the format that lmms-eval writes: {exc!r}") from exc
