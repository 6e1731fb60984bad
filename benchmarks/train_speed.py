"""What a training step costs from the cache, beside steps that have no teacher and steps that run the teachers.

    python benchmarks/train_speed.py prepare --images photos/ --work WORK [--store-pixels 160]
    OMP_NUM_THREADS=1 python benchmarks/train_speed.py run --work WORK [--store-pixels 160] [--only small-3] [--rounds 3]
    python benchmarks/train_speed.py report                                # a table, and docs/assets/train-speed.png

constant  one batch, made once, with its targets: no teacher, nothing read, nothing decoded
pixels    fresh crops of the images, decoded in a thread, and constant targets: training without a teacher
cache     fresh crops, and targets from the stored codes
online    fresh crops, and every teacher run on every crop

One thread computes and one reads, so that a machine with two cores does what a GPU and its loader do. Rounds are interleaved;
medians over all steps of all rounds. The ceiling of what caching can bring is 1 + teachers' time / student's time, where the
student's time is the constant step. A line a setting is appended to benchmarks/results/train_speed.jsonl. With
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_ARENA_MAX=1 in the environment, memory that is freed is kept.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from live_teacher import LiveData, LiveTargets

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.pipeline.events import ReportedEvents
from cache_builder.teachers import TeacherOptions
from radio_cache.format.pixels import PixelStore
from trainer.data.batch import TeacherCodes
from trainer.data.crops import CodeReader, CropData, Crops
from trainer.data.loader import LoadedBatch
from trainer.data.waits import Waits
from trainer.distributed.processes import Processes
from trainer.recipes.presets import quick
from trainer.recipes.recipe import override_stages
from trainer.run.step import TrainingRun
from trainer.train_config import TrainConfig

RESULTS = Path(__file__).parent / "results" / "train_speed.jsonl"
PLOT = Path("docs/assets/train-speed.png")
TEACHERS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
STUDENTS = {"small": ("e-radio-tiny", 96, 16), "large": ("vit-s-16", 112, 16)}
"""Name -> student, side of its crops in pixels, images in a step."""


def cache_of(args: argparse.Namespace) -> Path:
    return args.work / f"photos{args.store_pixels or ''}.zarr"


def prepare(args: argparse.Namespace) -> None:
    teachers = {name: TeacherOptions() for name in TEACHERS}
    pixels = PixelStore(side_px=args.store_pixels, format="jpeg", quality=90) if args.store_pixels else None
    build_cache(
        BuildConfig(images=(str(args.images),), out=cache_of(args), teachers=teachers, pixels=pixels),
        ReportedEvents(print),
    )


class PixelsAlone(CropData):
    """Fresh pixels, and nothing read of any teacher."""

    constant: dict[str, TeacherCodes]

    def code_buffers(self, name: str, images: int) -> list[Any]:
        return []

    def read_teacher(self, name: str, crops: Crops, read: CodeReader, out: Any) -> TeacherCodes:
        return self.constant[name]


class Setting:
    """A student and a number of teachers, and its four kinds of steps."""

    def __init__(self, cache: Path, out: Path, student: str, teachers: int) -> None:
        name, side, batch = STUDENTS[student]
        recipe = replace(override_stages(quick(), image_px=side, batch_images=batch, steps=10_000), student=name)
        config = TrainConfig(cache=cache, recipe=recipe, out=out, teachers=TEACHERS[:teachers], data_threads=1)
        self.run = TrainingRun(config, Processes())
        self.run.model.train()
        self._from_cache = dict(self.run.targets)
        self._groups = dict(self.run.groups)
        [part] = self.run.schedule.batch_slices(0)
        batch = self.run.groups[0, 0].batch(0, part.first, part.last)
        made = {name: self._from_cache[name](one) for name, one in zip(self.run.teachers, batch.teachers, strict=True)}
        self._constant: Any = {
            name: (lambda part, shift=None, targets=targets: targets) for name, targets in made.items()
        }
        self._same = LoadedBatch(part, batch, Waits())
        self._live: Any = {
            name: LiveTargets(self._from_cache[name], self.run.cache, name) for name in self.run.teachers
        }

    def seconds(self, kind: str, steps: int) -> list[tuple[float, float]]:
        """Of each step but the first, which waits for the first batch; and how many of them it waited for data."""
        run = self.run
        run.makes_targets_ahead = kind != "online"  # a teacher that runs in the loop runs between the steps
        run.targets = {"cache": self._from_cache, "online": self._live}.get(kind, self._constant)
        run.groups = {key: self._as_read(kind, data) for key, data in self._groups.items()}
        if kind == "constant":
            return self._timed(repeat(self._same), steps)
        with run.loader(0) as loader:
            return self._timed(iter(loader), steps)

    def _as_read(self, kind: str, data: CropData) -> CropData:
        if kind == "cache":
            return data
        other = copy.copy(data)
        other.__class__ = LiveData if kind == "online" else PixelsAlone
        if isinstance(other, PixelsAlone):
            other.constant = cast(Any, dict(zip(self.run.teachers, self._same.batch.teachers, strict=True)))
        return other

    def _timed(self, loaded_batches: Iterator[LoadedBatch], steps: int) -> list[tuple[float, float]]:
        times: list[tuple[float, float]] = []
        for step in range(steps + 1):
            started = time.perf_counter()
            _, waits, _, _ = self.run.step(step, loaded_batches)
            times.append((time.perf_counter() - started, waits.pixels + waits.codes + waits.transfer))
        return times[1:]


def run(args: argparse.Namespace) -> None:
    for student in STUDENTS:
        for teachers in (1, 3):
            if args.only not in ("", f"{student}-{teachers}"):
                continue
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                setting = Setting(cache_of(args), Path(folder), student, teachers)
                steps = {
                    "constant": args.steps,
                    "pixels": args.steps,
                    "cache": args.steps,
                    "online": max(1, args.steps // 4),
                }
                times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in steps}
                for _ in range(args.rounds):
                    for kind, count in steps.items():
                        times[kind] += setting.seconds(kind, count)
            median = {kind: statistics.median(seconds for seconds, _ in values) for kind, values in times.items()}
            waited = {kind: statistics.fmean(waits for _, waits in values) for kind, values in times.items()}
            ceiling = 1 + (median["online"] - median["pixels"]) / median["constant"]
            result = {
                "student": STUDENTS[student][0],
                "px": STUDENTS[student][1],
                "batch": STUDENTS[student][2],
                "teachers": teachers,
                "store_pixels": args.store_pixels,
                "keeps_freed": "MALLOC_TRIM_THRESHOLD_" in os.environ,
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "steps": {k: len(v) for k, v in times.items()},
                "step_s": {kind: round(value, 4) for kind, value in median.items()},
                "waited_s": {kind: round(value, 4) for kind, value in waited.items()},
                "cache_over_constant": round(median["cache"] / median["constant"], 3),
                "cache_over_pixels": round(median["cache"] / median["pixels"], 3),
                "online_over_cache": round(median["online"] / median["cache"], 2),
                "ceiling": round(ceiling, 2),
            }
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


def report(args: argparse.Namespace) -> None:
    """The last result of every setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows_by_setting: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in RESULTS.read_text().splitlines():
        result = json.loads(line)
        rows_by_setting[
            tuple(result[name] for name in ("student", "px", "store_pixels", "teachers", "keeps_freed"))
        ] = result
    kinds = ("constant", "pixels", "cache", "online")
    print(
        "| student | images | teachers | "
        + " | ".join(kinds)
        + " | cache / constant | online / cache | of the ceiling |"
    )
    print("|---" * 10 + "|")
    figure, axes = plt.subplots(figsize=(9, 1 + 0.8 * len(rows_by_setting)))
    labels: list[str] = []
    for place, result in enumerate(rows_by_setting.values()):
        times, ratio, ceiling = result["step_s"], result["online_over_cache"], result["ceiling"]
        images = f"kept at {result['store_pixels']} px" if result["store_pixels"] else "their own JPEGs"
        images += ", memory kept" if result["keeps_freed"] else ""
        print(
            f"| `{result['student']}`, {result['px']} px | {images} | {result['teachers']} | "
            + " | ".join(f"{times[kind]:.3f}" for kind in kinds)
            + f" | {result['cache_over_constant']:.2f} | {ratio:.2f} | {ratio / ceiling:.0%} of {ceiling:.2f} |"
        )
        labels.append(f"{result['student']}, {result['teachers']} teacher{'s'[: result['teachers'] - 1]}\n{images}")
        for number, kind in enumerate(kinds):
            colour = ("tab:gray", "tab:olive", "tab:blue", "tab:red")[number]
            relative = times[kind] / times["constant"]
            axes.barh(place + (number - 1.5) / 5, relative, 0.18, color=colour, label=kind if place == 0 else None)
            axes.text(relative + 0.05, place + (number - 1.5) / 5, f"{relative:.2f}", va="center", fontsize=7)
    axes.set(
        yticks=range(len(labels)),
        yticklabels=labels,
        xlabel="a step's time, in steps with a constant batch and targets",
    )
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("prepare", prepare), ("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--work", type=Path, default=Path("speed-work"))
        command.add_argument("--images", type=Path, default=Path("photos"))
        command.add_argument(
            "--store-pixels", type=int, help="keep images in the cache, shorter sides of so many pixels"
        )
        command.add_argument("--only", default="", help="one setting, such as small-3")
        command.add_argument("--rounds", type=int, default=2)
        command.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
