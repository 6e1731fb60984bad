"""What caching costs in quality: the same student, steps and images, from targets made in different ways.

    python benchmarks/quality.py prepare --images cifar10/ --work WORK     # caches of EfficientNet-Lite0 at three sizes
    python benchmarks/quality.py run --work WORK [--only one-level,online] [--codecs half] [--seeds 3] [--steps 300]
    python benchmarks/quality.py report                                    # table, and docs/assets/quality.png

Every run appends a line to benchmarks/results/quality.jsonl and is not done again, so that `run` may be stopped and started.

online     the teacher runs on the very crop: the reference
one-level  crops of random size; targets from the map of the whole image at the teacher's own size
nearest    the same crops; targets from the level whose magnification is nearest (96, 128 or 192 px)
draw       crops drawn so that a level fits
views      4 fixed crops an image, of which every step takes one, exact targets: what `build --views 4` stores, computed live
no-crops   the whole image, always: what is usual with cached features

Measured on the test images, which no run saw: k-NN (k = 20) of the student's own summaries, bank the training images; and the
cosine between the student's map of the whole image and the teacher's, token by token, both less the teacher's mean token.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from live_teacher import LiveData, LiveTargets

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.calibrate import wanted_codec
from cache_builder.teachers import TeacherOptions
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.crops import crop_weights
from radio_cache.reader import Cache
from radio_cache.torch import crop_maps
from trainer.checkpoint import Progress
from trainer.data import CropData, student_pixels
from trainer.export import load_student
from trainer.loop import TrainConfig, TrainingRun, run_steps
from trainer.monitor import knn_predictions
from trainer.processes import Processes
from trainer.recipe import Recipe, everywhere
from trainer.recipes import quick

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
TEACHER, SIZES, STUDENT_PX = "efficientnet-lite0", (96, 128, 192), 64
CODECS = {"half": None, "klt-0.999": 0.999, "klt-0.99": 0.99, "klt-0.95": 0.95}
SETTINGS = ("online", "one-level", "nearest", "draw", "views", "no-crops")
VIEWS = 4


def recipe_of(setting: str, seed: int, steps: int) -> Recipe:
    recipe = everywhere(quick(), image_px=STUDENT_PX, steps=steps, warmup_steps=steps // 10)
    area = (1.0, 1.0) if setting == "no-crops" else (0.25, 1.0)
    ratio = (1.0, 1.0) if setting == "no-crops" else recipe.crop_ratio
    match = {"nearest": "nearest", "draw": "draw"}.get(setting, "off")
    return replace(
        recipe,
        name=f"quality-{setting}",
        crop_area=area,
        crop_ratio=ratio,
        match=match,
        seed=seed,
        checkpoint_every=10**6,
    )


def prepare(args: argparse.Namespace) -> None:
    for codec in args.codecs.split(","):
        for split, tars in (("train", [f"train-00{n}.tar" for n in range(args.tars)]), ("test", ["test-000.tar"])):
            if split == "test" and codec != "half":
                continue
            request = CodecRequest(name="half") if codec == "half" else CodecRequest(name="klt", fidelity=CODECS[codec])
            teachers: dict[str, TeacherOptions] = {}
            for size in SIZES[: args.levels] if split == "train" else SIZES[:1]:
                name = TEACHER if size == SIZES[0] else f"{TEACHER}@{size}"
                teachers[name] = TeacherOptions(
                    size_px=size,
                    fit="squash",
                    codec=wanted_codec(request),
                    level_of=None if size == SIZES[0] else TEACHER,
                )
            started = time.perf_counter()
            build_cache(BuildConfig(
                images=tuple(str(args.images / tar) for tar in tars), out=args.work / f"{split}-{codec}.zarr", teachers=teachers,
            ), say=print)  # fmt: skip
            print(f"{split}-{codec}: {time.perf_counter() - started:.0f} s")


def train_one(args: argparse.Namespace, setting: str, codec: str, seed: int) -> dict[str, Any]:
    cache = args.work / f"train-{codec}.zarr"
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        out = Path(folder) / "run"
        config = TrainConfig(cache=cache, recipe=recipe_of(setting, seed, args.steps), out=out, data_threads=1)
        run = TrainingRun(config, Processes())
        if setting in ("online", "views"):
            for data in (cast(Any, one) for one in run.groups.values()):
                data.__class__ = LiveData
                data.views = VIEWS if setting == "views" else None
            cast(Any, run).targets = {TEACHER: LiveTargets(run.targets[TEACHER], run.cache, TEACHER)}
        run.claim()
        started = time.perf_counter()
        run_steps(run, Progress())
        seconds = time.perf_counter() - started
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        return {
            "setting": setting, "codec": codec, "seed": seed, "steps": args.steps, "train_s": round(seconds, 1),
            "loss": last["loss"], **measured(out, Cache(args.work / "train-half.zarr"), Cache(args.work / "test-half.zarr")),
        }  # fmt: skip


@torch.inference_mode()
def measured(run: Path, bank: Cache, test: Cache) -> dict[str, float]:
    model = load_student(run, adaptors="all")

    def features(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        data = CropData.__new__(CropData)
        data.cache = cache
        summaries, maps = [], []
        for first in range(0, cache.num_images, 100):
            rows = range(first, min(first + 100, cache.num_images))
            pixels = np.stack([student_pixels(data.image(row), (STUDENT_PX, STUDENT_PX)) for row in rows])
            out = model(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
            summaries.append(out["backbone"].summary)
            maps.append(out[TEACHER].spatial)
        return torch.cat(summaries), torch.cat(maps)

    known, _ = features(bank)
    asked, said = features(test)
    labels = torch.from_numpy(bank.index.labels.astype(np.int64))
    top1 = float((knn_predictions(known, labels, asked).numpy() == test.index.labels).mean())
    teacher = test.teachers[TEACHER]
    rows = np.arange(test.num_images)
    boxes = [(0.0, 0.0, float(w), float(h)) for h, w in test.sizes_hw]
    side = STUDENT_PX // model.student.patch_size
    sizes = [(int(h), int(w)) for h, w in test.sizes_hw]
    weights = crop_weights(boxes, sizes, teacher.spec.geometry, out_hw=(side, side))
    true = crop_maps(torch.from_numpy(teacher.maps(rows)), *map(torch.from_numpy, (weights.rows, weights.columns)))
    mean = torch.from_numpy(teacher.spatial_mean_std()[0]).float()
    cosine = torch.nn.functional.cosine_similarity(said - mean, true - mean, dim=-1)
    return {"knn": top1, "cosine": float(cosine.mean())}


def run(args: argparse.Namespace) -> None:
    done = {(r["setting"], r["codec"], r["seed"], r["steps"]) for r in results()}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for codec in args.codecs.split(","):
            for setting in args.only.split(","):
                live = setting in ("online", "views")
                if (live and codec != "half") or (setting, codec, seed, args.steps) in done:
                    continue
                result = train_one(args, setting, codec, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)


def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report(args: argparse.Namespace) -> None:
    """Means and ranges over seeds; and the plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for result in results():
        groups.setdefault((result["setting"], result["codec"], result["steps"]), []).append(result)
    order = sorted(groups, key=lambda key: (key[2], list(CODECS).index(key[1]), SETTINGS.index(key[0])))
    print(
        "| targets | codec | steps | seeds | k-NN top-1 | range | cosine of maps | range |\n|---|---|---|---|---|---|---|---|"
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 + 0.35 * len(order)), sharey=True)
    for place, key in enumerate(order):
        cells: list[str] = []
        for axis, name, scale, form in ((axes[0], "knn", 100, "{:.1f}"), (axes[1], "cosine", 1, "{:.3f}")):
            values = [scale * result[name] for result in groups[key]]
            mean = statistics.fmean(values)
            axis.barh(place, mean, color="tab:gray" if key[0] == "online" else "tab:blue", alpha=0.7)
            axis.plot(values, [place] * len(values), "k.", markersize=4)
            cells += [form.format(mean), f"{form.format(min(values))} to {form.format(max(values))}"]
        print(f"| {key[0]} | {key[1]} | {key[2]} | {len(groups[key])} | {' | '.join(cells)} |")
    labels = [f"{setting}, {codec}, {steps} steps" for setting, codec, steps in order]
    axes[0].set(yticks=range(len(order)), yticklabels=labels, xlabel="k-NN top-1 on test images, %")
    axes[1].set(xlabel="cosine of student's and teacher's maps, centred")
    axes[0].invert_yaxis()
    figure.tight_layout()
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("prepare", prepare), ("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--work", type=Path, default=Path("quality-work"))
        command.add_argument("--images", type=Path, default=Path("cifar10"))
        command.add_argument("--tars", type=int, default=3, help="of training images")
        command.add_argument(
            "--levels", type=int, default=3, help="sizes that the training images are kept at, from 96 px up"
        )
        command.add_argument("--codecs", default="half")
        command.add_argument("--only", default=",".join(SETTINGS))
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--first-seed", type=int, default=0)
        command.add_argument("--steps", type=int, default=300)
        command.add_argument("--plot", type=Path, default=Path("docs/assets/quality.png"))
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
