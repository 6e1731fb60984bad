"""A two-stage `am-radio`, scaled down, on two processes, killed while it trains and started again: the same student?

    python benchmarks/faults/train_kills.py --cache photos.zarr [--kills 2] [--result FILE.md]

CACHE: three EfficientNet-Lite teachers (`benchmarks/train_speed.py prepare`). Stage 1: two of them at 64 px; stage 2: these at
96 px, and the third at 128 px, each group on a process of its own. Real photographs, real `torchrun`, real SIGKILLs to all its
processes at random moments. Weights and losses must equal, bit by bit, those of a run that nothing happened to.
"""

import argparse
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from radio_cache import __version__
from trainer.recipes.presets import am_radio
from trainer.recipes.recipe import Group, Recipe, Stage
from trainer.run.checkpoint import checkpoints

FIRST = ("efficientnet-lite0", "efficientnet-lite1")
SECOND = ("efficientnet-lite2",)


def scaled_down(student: str, steps: int) -> Recipe:
    """`am_radio` with its losses, heads, grids and windowed steps; small sizes, few steps, and averaged weights besides."""
    half = steps // 2
    stages = (
        Stage(
            name="low resolution",
            steps=half,
            lr=1e-3,
            warmup_steps=4,
            groups=(Group(teachers=FIRST, image_px=64, batch_images=16),),
        ),
        Stage(
            name="with the third",
            steps=steps - half,
            lr=1e-3,
            warmup_steps=4,
            groups=(
                Group(teachers=FIRST, image_px=96, batch_images=16),
                Group(teachers=SECOND, image_px=128, batch_images=8),
            ),
        ),
    )
    overrides = {"spectral_reparam": True, "train_windows": [2, 4], "window_probability": 0.5}
    return replace(
        am_radio(),
        name="am-radio-small",
        student=student,
        student_overrides=overrides if student.startswith("vit") else {},
        stages=stages,
        ema=0.99,
        checkpoint_every=5,
        log_every=5,
        knn_every=0,
        picture_every=0,
    )


def start(cache: Path, recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += [
        "-m",
        "trainer.cli",
        "--cache",
        str(cache),
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True
        )


def step_of(out: Path) -> int:
    paths = checkpoints(out / "checkpoints")
    return int(paths[-1].stem.removeprefix("step-")) if paths else 0


def killed_run(args: argparse.Namespace, recipe: Path, out: Path, steps: int) -> list[int]:
    """Steps of the last checkpoints when the processes were killed."""
    rng, kills = random.Random(args.seed), list[int]()
    for number in range(args.kills):
        # Some way into an equal part of the run, and then at any moment of what follows.
        wanted = max(1, steps * (2 * number + 1) // (2 * args.kills))
        process = start(args.cache, recipe, out)
        while step_of(out) < wanted and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        if process.poll() is not None:
            sys.exit(
                f"the run ended before kill {number + 1}: more --steps\n{out.with_suffix('.log').read_text()[-2000:]}"
            )
        # The trainer's processes have sessions of their own: who kills torchrun alone leaves them at work.
        started = [process, *psutil.Process(process.pid).children(recursive=True)]
        if len(started) != 3:
            sys.exit(f"torchrun and two processes were to be killed, here are {started}")
        for one in started:
            one.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(started[1:])
        kills.append(step_of(out))
    finished(start(args.cache, recipe, out), out)
    return kills


def finished(process: subprocess.Popen[bytes], out: Path) -> None:
    if process.wait():
        sys.exit(out.with_suffix(".log").read_text()[-4000:])


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--students", default="e-radio-tiny,vit-tiny-16")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    rows: list[str] = []
    for student in args.students.split(","):
        recipe = scaled_down(student, args.steps)
        with tempfile.TemporaryDirectory() as folder:
            file, whole, cut = (Path(folder) / name for name in ("recipe.json", "whole", "cut"))
            file.write_text(json.dumps(recipe.to_json()))
            finished(start(args.cache, file, whole), whole)
            kills = killed_run(args, file, cut, args.steps)
            one, other = (load_file(out / "student.safetensors") for out in (whole, cut))
            different = [name for name in one if not torch.equal(one[name], other[name])]
            if one.keys() != other.keys() or different or losses(whole) != losses(cut):
                sys.exit(f"{student}: not the same: {different[:5] or 'names or losses'}")
            logged = losses(whole)
            rows.append(
                f"| `{student}` | {args.steps} | {', '.join(map(str, kills))} | {logged[0][1]:.3f} | {logged[-1][1]:.3f} "
                f"| {len(one)} tensors and {len(logged)} logged losses, bit by bit |"
            )
            print(rows[-1], flush=True)
    table = "\n".join(
        [
            "| student | steps | last checkpoints at the kills | first loss | last | equal to the uninterrupted run |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    text = (
        "# A two-stage am-radio on two processes, killed twice\n\n`python benchmarks/faults/train_kills.py`, radio-cache "
        f"{__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, {os.cpu_count()} cores.\n\n{table}\n"
    )
    print(f"\n{text}")
    if args.result:
        args.result.write_text(text)


if __name__ == "__main__":
    main()
