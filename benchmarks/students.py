"""Students beside the image encoders they learn from: parameters, FLOPs, weights in memory, images/s on the CPU, float32.

    python benchmarks/students.py sizes                      # counts alone, no time is taken
    python benchmarks/students.py bars [--compiled]          # E-RADIO-L beside OpenCLIP-H/14 and DINOv2-g/14 at 224 px
    python benchmarks/students.py students [--compiled]      # all students and both teachers at 224 px, one after another
    python benchmarks/students.py vit                        # our ViTs beside timm's of the same shape
    python benchmarks/students.py sam --rounds 3             # E-RADIO-L at 1024 px beside SAM's encoders

Rounds are interleaved: each times one forward pass of every model, in turns forwards and backwards; medians are told, and the
fastest and slowest. The list of all students takes them one after another, and interleaves each one's eager and compiled
passes. All weights are random; E-RADIO is deployed (`ERadio.deploy`). OMP_NUM_THREADS decides the cores of all alike.
`--json FILE` keeps every time.

`--only NAME` (again and again) takes some of the students: compiling all of them takes an hour.

The bars: E-RADIO-L at least 4 times the images/s of either teacher; our ViT no slower than timm's of the same shape. SAM's have
a bar on a GPU alone (`benchmarks/gpu/students.py`): here the ratios are told.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from student_models import Model, build, dinov2_g_14, openclip_h_14, sam, size_of, student, students_at, timm_vit
from torch import nn

import radio_cache

WARM_UP = 2
BUILDS = 6


@dataclass(frozen=True)
class Timed:
    """One model's seconds per forward pass of `batch` images, round by round."""

    model: Model
    batch: int
    seconds: list[float]

    @property
    def images_per_s(self) -> float:
        return self.batch / statistics.median(self.seconds)


def time_interleaved(
    models: Sequence[tuple[Model, int]], *, rounds: int, compiled: bool, warm_up: int = WARM_UP
) -> list[Timed]:
    """Untimed passes of each, then rounds of one timed pass of each. models: with their batch sizes."""
    ready: list[tuple[nn.Module, torch.Tensor, Timed]] = []
    with torch.inference_mode():
        for model, batch in models:
            net: Any = build(model)
            images = torch.rand(batch, 3, model.image_px, model.image_px)
            net = torch.compile(net) if compiled else net
            for _ in range(warm_up):
                net(images)
            ready.append((net, images, Timed(model, batch, [])))
        for number in range(rounds):
            # There and back, so that none always comes behind the same one, whose weights fill the processor's caches.
            for net, images, timed in ready if number % 2 == 0 else reversed(ready):
                started = time.perf_counter()
                net(images)
                timed.seconds.append(time.perf_counter() - started)
    return [timed for _, _, timed in ready]


def time_built_anew(ours: Model, theirs: Model, batch: int, *, rounds: int, compiled: bool) -> list[Timed]:
    """Rounds of two models, built BUILDS times, each first in turn: where weights come to lie in memory makes a percent."""
    together = [Timed(ours, batch, []), Timed(theirs, batch, [])]
    for build_number in range(BUILDS):
        order = together if build_number % 2 == 0 else together[::-1]
        timings = time_interleaved([(timing.model, batch) for timing in order], rounds=rounds, compiled=compiled)
        for timing, new in zip(order, timings, strict=True):
            timing.seconds.extend(new.seconds)
    return together


def print_sizes(models: Sequence[Model]) -> list[dict[str, Any]]:
    print("| model | px | parameters, M | GFLOPs an image | weights, MB in float32 |\n|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for model in models:
        size = size_of(model)
        millions = size.parameters / 1e6
        print(f"| {model.name} | {model.image_px} | {millions:.1f} | {size.gflops:.1f} | {4 * millions:.0f} |")
        rows.append({"name": model.name, "kind": model.kind, "image_px": model.image_px, **asdict(size)})
    return rows


def print_times(found: Sequence[Timed], title: str) -> list[dict[str, Any]]:
    print(
        f"\n{title}\n\n| model | px | batch | images/s | fastest, slowest pass, s | GFLOP/s |\n|---|---|---|---|---|---|"
    )
    rows: list[dict[str, Any]] = []
    for one in found:
        rate = one.images_per_s * size_of(one.model).gflops
        passes = f"{min(one.seconds):.3f}, {max(one.seconds):.3f}"
        print(
            f"| {one.model.name} | {one.model.image_px} | {one.batch} | {one.images_per_s:.2f} | {passes} | {rate:.0f} |"
        )
        rows.append(
            {
                "name": one.model.name,
                "batch": one.batch,
                "image_px": one.model.image_px,
                "seconds": one.seconds,
                "title": title,
            }
        )
    return rows


def ratios(timings: Sequence[Timed], first: str, second: str) -> list[float]:
    """How many times as fast `first` is as `second`, round by round, in ascending order."""
    a, b = (next(timing for timing in timings if timing.model.name == name) for name in (first, second))
    return sorted((y / b.batch) / (x / a.batch) for x, y in zip(a.seconds, b.seconds, strict=True))


def print_ratio(timings: Sequence[Timed], first: str, second: str, bar: float | None = None) -> None:
    """The median over rounds, and between which ratios half of the rounds lie."""
    all_ratios = ratios(timings, first, second)
    times, quarter = statistics.median(all_ratios), len(all_ratios) // 4
    verdict = "" if bar is None else f"; the bar is {bar:g}: {'met' if times >= bar else 'MISSED'}"
    half = f"{all_ratios[quarter]:.3f} to {all_ratios[-1 - quarter]:.3f} in half of the rounds"
    print(f"\n{first} is {times:.3f} times as fast as {second} ({half}){verdict}")


def list_models(models: Sequence[Model], *, batch: int, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Each model by itself: memory, and eager passes, with compiled ones in between if asked for. Told line by line."""
    print(
        "| model | batch | weights, MB | a pass adds, MB | images/s eager | GFLOP/s | images/s compiled | gain | compiling, s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows: list[dict[str, Any]] = []
    for model in models:
        torch.compiler.reset()
        eager, quick = Timed(model, batch, []), Timed(model, batch, [])
        with torch.inference_mode():
            net: Any = build(model)
            images = torch.rand(batch, 3, model.image_px, model.image_px)
            net(images)  # what libraries allocate once and for all
            added = memory_of_a_pass(net, images)
            started, fast = time.perf_counter(), torch.compile(net)
            if compiled:
                fast(images)
            compiling = time.perf_counter() - started
            for number in range(rounds + 1):
                for row, run in ((eager, net), (quick, fast)) if compiled else ((eager, net),):
                    begun = time.perf_counter()
                    run(images)
                    if number:  # the first round warms up
                        row.seconds.append(time.perf_counter() - begun)
        size = size_of(model)
        cells = "| | |"
        if compiled:
            gain = statistics.median(a / b for a, b in zip(eager.seconds, quick.seconds, strict=True))
            cells = f"{quick.images_per_s:.2f} | {gain:.2f} | {compiling:.0f} |"
        print(
            f"| {model.name} | {batch} | {4e-6 * size.parameters:.0f} | {added / 1e6:.0f} | {eager.images_per_s:.2f} | "
            f"{eager.images_per_s * size.gflops:.0f} | {cells}",
            flush=True,
        )
        rows.append(
            {
                "name": model.name,
                "batch": batch,
                "image_px": model.image_px,
                "pass_bytes": added,
                "eager_s": eager.seconds,
                "compiled_s": quick.seconds,
            }
        )
    return rows


def memory_of_a_pass(net: nn.Module, images: torch.Tensor) -> int:
    """By how many bytes the process grows while it computes one pass, beyond what it is afterwards. Linux with glibc."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is counted from here on
    before = _kilobytes("VmRSS")
    net(images)
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "bars", "students", "vit", "sam"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="images in a pass; by default 1 for bars, 2 for students, 4 for vit")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="of students and vit: this one; may be given again"
    )
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    how = "torch.compile" if args.compiled else "eager"
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in cpuinfo if "model name" in line), "unknown processor")
    machine = f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, radio-cache {radio_cache.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine} of {os.cpu_count()} cores, {versions}, float32, {how}\n")
    rows: list[dict[str, Any]] = []
    match args.what:
        case "sizes":
            rows = print_sizes(
                [
                    *students_at(224),
                    student("e-radio-l", 1024),
                    student("e-radio-l-512", 512),
                    openclip_h_14(),
                    dinov2_g_14(),
                    sam("b"),
                    sam("l"),
                    sam("h"),
                ]
            )
        case "bars":
            models = [student("e-radio-l", 224), student("e-radio-l-512", 224), openclip_h_14(), dinov2_g_14()]
            timings = time_interleaved(
                [(model, args.batch or 1) for model in models], rounds=args.rounds, compiled=args.compiled
            )
            rows = print_times(timings, f"224 px, {how}")
            for teacher in ("OpenCLIP ViT-H/14", "DINOv2 ViT-g/14-reg"):
                print_ratio(timings, "e-radio-l", teacher, 4)
        case "students":
            every = [*students_at(224), openclip_h_14(), dinov2_g_14()]
            wanted = [model for model in every if not args.only or model.name in args.only]
            rows = list_models(wanted, batch=args.batch or 2, rounds=args.rounds, compiled=args.compiled)
        case "sam":
            timings = time_interleaved(
                [(model, 1) for model in (student("e-radio-l", 1024), sam("b"), sam("l"), sam("h"))],
                rounds=args.rounds,
                compiled=args.compiled,
                warm_up=1,
            )
            rows = print_times(timings, f"1024 px, {how}")
            for encoder in ("SAM ViT-L", "SAM ViT-H"):
                print_ratio(timings, "e-radio-l", encoder)
        case _:
            for letter, size in (("s", "small"), ("b", "base"), ("l", "large")):
                # The same shape: one class token, no registers.
                ours = student(f"vit-{letter}-16", 224, registers=0)
                theirs = timm_vit(f"vit_{size}_patch16_224", 224)
                if args.only and ours.name not in args.only:
                    continue
                timings = time_built_anew(ours, theirs, args.batch or 4, rounds=args.rounds, compiled=args.compiled)
                rows += print_times(timings, f"224 px, {how}")
                print_ratio(timings, ours.name, theirs.name, 1)
    if args.json:
        args.json.write_text(json.dumps({"cpu": cpu, "how": how, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
