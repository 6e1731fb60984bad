"""What caching costs in quality: the same student, steps and images, from targets made in different ways.

    python benchmarks/quality.py prepare --images cifar10/ --work WORK
    python benchmarks/quality.py run --work WORK [--only one-level,online] [--codecs half] [--seeds 3] [--epochs 30]
    python benchmarks/quality.py report                                    # tables, and docs/assets/quality.png

Every run appends a line with all its settings to benchmarks/results/quality.jsonl and is not done again, so that `run` may be
stopped and started.

online     the teacher runs on the very crop: the reference
one-level  crops of random size; targets from the map of the whole image at the teacher's own size
nearest    the same crops; targets from the level whose magnification is nearest (96, 128 or 192 px)
draw       crops drawn so that a level fits
views      one of 4 crops an image that the teacher saw, kept in the cache: `build --views 4`, views=1
no-crops   the whole image, always: what is usual with cached features

Measured on images that no run saw: k-NN (k = 20) of the student's own summaries, every held-out image against all others, shown
whole, and shown as its centre, 0.8 of the sides, at the same size (crops show things magnified, and so does that: arXiv
1906.06423); and the cosine between the student's map and the teacher's, standardised, token by token, of whole images and of
crops that the teacher saw live.
"""

import argparse
import json
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from live_teacher import LiveData, LiveTargets
from PIL import Image
from torch import Tensor

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.pipeline.events import ReportedEvents
from cache_builder.teachers import TeacherOptions
from cache_builder.workers.allocator import keep_freed_memory
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.format.codec_record import CodecRecord
from radio_cache.geometry.crops import BoxXYXY
from radio_cache.geometry.views import ViewSampling
from radio_cache.reader import Cache
from trainer.data.batch import Batch, student_images
from trainer.data.crops import CropData, student_pixels
from trainer.data.sampler import FullSampler
from trainer.distributed.processes import Processes
from trainer.objective.targets import TargetMaker
from trainer.recipes.presets import quick
from trainer.recipes.recipe import Recipe, override_stages
from trainer.run.step import TrainingRun
from trainer.train_config import TrainConfig

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
TEACHER, SIZES, STUDENT_PX, BATCH = "efficientnet-lite0", (96, 128, 192), 64, 64
CODECS = {"half": None, "klt-0.999": 0.999, "klt-0.99": 0.99, "klt-0.95": 0.95}
SETTINGS = ("online", "one-level", "nearest", "draw", "views", "no-crops")
LIVE = ("online",)
SHOWN = {"whole": 1.0, "centre": 0.8}
"""How held-out images are shown -> the share of their sides."""

VIEWS, K, TEMPERATURE = 4, 20, 0.07
CURVE_IMAGES, COSINE_IMAGES, CURVE_POINTS = 1000, 500, 3
HELD_OUT_AREA = (0.25, 1.0)
KEY = ("setting", "codec", "seed", "images", "epochs", "area")
"""What makes two runs the same."""


def recipe_of(setting: str, args: argparse.Namespace, seed: int) -> Recipe:
    steps = args.epochs * args.train_images // BATCH
    recipe = override_stages(quick(), image_px=STUDENT_PX, batch_images=BATCH, steps=steps, warmup_steps=steps // 10)
    whole = setting == "no-crops"
    return replace(
        recipe,
        name=f"quality-{setting}",
        crop_area=(1.0, 1.0) if whole else (args.least_area, 1.0),
        crop_ratio=(1.0, 1.0) if whole else recipe.crop_ratio,
        match={"nearest": "nearest", "draw": "draw"}.get(setting, "off"),
        views=float(setting == "views"),
        seed=seed,
    )


def cache_of(args: argparse.Namespace, setting: str, codec: str) -> Path:
    return args.work / f"train-{args.train_images}-{codec}{'-views' if setting == 'views' else ''}.zarr"


def prepare(args: argparse.Namespace) -> None:
    """Caches of the training images, of their views, and of the images held out, from which pixels and maps are measured."""
    args.work.mkdir(parents=True, exist_ok=True)
    train = args.work / f"train-{args.train_images}.tar"
    first, *others = sorted(args.images.glob("train-*.tar"))
    with tarfile.open(first) as source, tarfile.open(train, "w") as pixels:
        members = source.getmembers()
        for member in members[: args.train_images * len({Path(m.name).suffix for m in members})]:
            pixels.addfile(member, source.extractfile(member))
    sampling = ViewSampling(seed=0, area=(args.least_area, 1.0), ratio=quick().crop_ratio, flip_share=0.0)
    for codec in args.codecs.split(","):
        request = CodecRequest(name="half") if codec == "half" else CodecRequest(name="klt", fidelity=CODECS[codec])
        options = TeacherOptions(size_px=SIZES[0], fit="squash", codec=CodecRecord.of_request(request))
        levels = {f"{TEACHER}@{size}": replace(options, size_px=size, level_of=TEACHER) for size in SIZES[1:]}
        _build([train], cache_of(args, "", codec), {TEACHER: options, **levels})
        views = replace(options, views=1 + VIEWS, view_sampling=sampling)
        _build([train], cache_of(args, "views", codec), {TEACHER: views})
    options = TeacherOptions(size_px=SIZES[0], fit="squash", codec=CodecRecord.of_request(CodecRequest(name="half")))
    _build([*others, *sorted(args.images.glob("test-*.tar"))], args.work / "held-out.zarr", {TEACHER: options})


def _build(images: list[Path], out: Path, teachers: dict[str, TeacherOptions]) -> None:
    build_cache(BuildConfig(images=tuple(map(str, images)), out=out, teachers=teachers), ReportedEvents(print))


@dataclass(frozen=True)
class HeldOut:
    """Images that no run sees, and what the teacher says of them.

    pixels: by the way they are shown. whole, crops: batches and their targets.
    """

    pixels: dict[str, Tensor]
    labels: Tensor
    whole: list[tuple[Batch, Tensor]]
    crops: list[tuple[Batch, Tensor]]


@cache
def held_out(work: Path, train: Path) -> HeldOut:
    held, known = Cache(work / "held-out.zarr"), Cache(train)
    rows = np.arange(held.num_images, dtype=np.int64)
    recipe = override_stages(quick(), image_px=STUDENT_PX, batch_images=100, steps=1)
    maker = TargetMaker(
        known, known.teachers.levels(TEACHER)[:1], recipe, np.arange(known.num_images), torch.device("cpu")
    )
    live = LiveTargets(maker, held, TEACHER)

    def data(kind: type[CropData], area: tuple[float, float], ratio: tuple[float, float]) -> CropData:
        mine = replace(recipe, crop_area=area, crop_ratio=ratio, match="off")
        grid = STUDENT_PX // 16
        crops = CropData(
            held,
            [TEACHER],
            mine,
            rows,
            FullSampler(rows, (5,), 100),
            seed=(5,),
            image_px=STUDENT_PX,
            grid_hw=(grid, grid),
        )
        crops.__class__ = kind
        return crops

    def answers(made: CropData, make: Any) -> list[tuple[Batch, Tensor]]:
        batches = [made.batch(number, 0, 100) for number in range(COSINE_IMAGES // 100)]
        return [(batch, make(batch.teachers[0]).spatial.clone()) for batch in batches]

    whole = data(CropData, (1.0, 1.0), (1.0, 1.0))
    images = [whole.image(int(row)) for row in rows]
    side = (STUDENT_PX, STUDENT_PX)
    pixels = {
        name: torch.from_numpy(np.stack([student_pixels(image, side, _centre(image, share)) for image in images]))
        for name, share in SHOWN.items()
    }
    return HeldOut(
        pixels,
        torch.from_numpy(held.index.labels.astype(np.int64)),
        answers(whole, maker),
        answers(data(LiveData, HELD_OUT_AREA, quick().crop_ratio), live),
    )


def _centre(image: Image.Image, share: float) -> BoxXYXY:
    w, h = image.width, image.height
    return (w * (1 - share) / 2, h * (1 - share) / 2, w * (1 + share) / 2, h * (1 + share) / 2)


@torch.inference_mode()
def summaries(run: TrainingRun, pixels: Tensor) -> Tensor:
    return torch.cat(
        [
            run.model.student(
                part.permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)
            ).summary
            for part in pixels.split(100)
        ]
    )


def knn_of_others(features: Tensor, labels: Tensor) -> float:
    """Top-1 of every image, by the labels of its nearest among all the others."""
    features = torch.nn.functional.normalize(features, dim=1)
    right = 0
    for first in range(0, len(features), 1000):
        near = features[first : first + 1000] @ features.T
        mine = torch.arange(len(near))
        near[mine, mine + first] = -1.0
        neighbours = near.topk(K)
        votes = torch.zeros(len(near), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[neighbours.indices], torch.exp(neighbours.values / TEMPERATURE))
        right += int((votes.argmax(1) == labels[first : first + 1000]).sum())
    return right / len(features)


@torch.inference_mode()
def cosine(run: TrainingRun, answered: list[tuple[Batch, Tensor]]) -> float:
    cosines: list[Tensor] = []
    for batch, true in answered:
        features = run.model.student(student_images(batch, torch.channels_last))
        side = STUDENT_PX // run.model.student.patch_size
        said = run.model.adaptors(features, (side, side), (TEACHER,))[TEACHER].spatial
        cosines.append(torch.nn.functional.cosine_similarity(said, true, dim=-1).mean(1))
    return float(torch.cat(cosines).mean())


def train_one(args: argparse.Namespace, setting: str, codec: str, seed: int) -> dict[str, Any]:
    held = held_out(args.work, cache_of(args, "", "half"))
    recipe = recipe_of(setting, args, seed)
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(cache=cache_of(args, setting, codec), recipe=recipe, out=Path(out), data_threads=1)
        run = TrainingRun(config, Processes())
    if setting in LIVE:
        for data in run.groups.values():
            data.__class__ = LiveData
        cast(Any, run).targets = {TEACHER: LiveTargets(run.targets[TEACHER], run.cache, TEACHER)}
    started, losses, curve = time.process_time(), list[float](), list[Any]()
    every = max(1, recipe.steps // CURVE_POINTS)
    with run.loader(0) as loader:
        loaded_batches = iter(loader)
        for step in range(recipe.steps):
            run.model.train()
            losses.append(run.step(step, loaded_batches)[0].total)
            if (step + 1) % every == 0:
                run.model.eval()
                few = summaries(run, held.pixels["whole"][:CURVE_IMAGES])
                knn = knn_of_others(few, held.labels[:CURVE_IMAGES])
                curve.append(
                    [round((step + 1) * BATCH / args.train_images, 1), knn, round(statistics.fmean(losses[-every:]), 4)]
                )
    cpu_s = time.process_time() - started
    run.model.eval()
    knn = {f"knn_{shown}": knn_of_others(summaries(run, pixels), held.labels) for shown, pixels in held.pixels.items()}
    return {
        "setting": setting,
        "codec": codec,
        "seed": seed,
        "images": args.train_images,
        "epochs": args.epochs,
        "area": args.least_area,
        "steps": recipe.steps,
        "held_out": len(held.labels),
        "cpu_s": round(cpu_s),
        **knn,
        "cosine_whole": round(cosine(run, held.whole), 4),
        "cosine_crops": round(cosine(run, held.crops), 4),
        "loss": round(statistics.fmean(losses[-every:]), 4),
        "curve": curve,
    }


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for codec in args.codecs.split(","):
            for setting in args.only.split(","):
                asked = (setting, codec, seed, args.train_images, args.epochs, args.least_area)
                if codec != "half" and setting in LIVE:
                    continue
                if asked in {tuple(result[name] for name in KEY) for result in results(args)}:
                    continue
                result = train_one(args, setting, codec, seed)
                with args.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)


def results(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []


def report(args: argparse.Namespace) -> None:
    """A table for each length of run and range of crops: means over seeds, and their ranges; and the plot of the first one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs: dict[tuple[Any, ...], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for result in results(args):
        key = tuple(result[name] for name in ("images", "epochs", "area", "steps", "held_out"))
        runs.setdefault(key, {}).setdefault((result["setting"], result["codec"]), []).append(result)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    for number, (key, groups) in enumerate(sorted(runs.items(), key=lambda item: -len(item[1]))):
        images, epochs, area, steps, held = key
        print(
            f"\n{images} images, {epochs} epochs ({steps} steps), crops of {area} of the area or more, {held} held-out ones\n"
        )
        print(
            "| targets | codec | seeds | k-NN, whole | range | k-NN, centre | cosine, whole | cosine, crops | last loss |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        order = sorted(groups, key=lambda pair: (list(CODECS).index(pair[1]), SETTINGS.index(pair[0])))
        for place, pair in enumerate(order):
            values = {
                name: [result[name] for result in groups[pair]]
                for name in ("knn_whole", "knn_centre", "cosine_whole", "cosine_crops", "loss")
            }
            means = {name: statistics.fmean(values_of_run) for name, values_of_run in values.items()}
            whole = [100 * value for value in values["knn_whole"]]
            print(
                f"| {pair[0]} | {pair[1]} | {len(whole)} | {100 * means['knn_whole']:.1f} | {min(whole):.1f} to {max(whole):.1f} "
                f"| {100 * means['knn_centre']:.1f} | {means['cosine_whole']:.3f} | {means['cosine_crops']:.3f} "
                f"| {means['loss']:.2f} |"
            )
            if number == 0:
                colour = {"online": "tab:gray", "no-crops": "tab:red"}.get(pair[0], "tab:blue")
                axes[0].barh(place, 100 * means["knn_whole"], color=colour, alpha=0.7)
                axes[0].plot(whole, [place] * len(whole), "k.", markersize=4)
        if number == 0:
            axes[0].set(
                yticks=range(len(order)),
                yticklabels=[f"{setting}, {codec}" for setting, codec in order],
                xlabel=f"k-NN top-1 on {held} held-out images, %",
                title=f"{images} images, {epochs} epochs",
            )
            axes[0].invert_yaxis()
    longest = max(runs, key=lambda key: key[1])
    for (setting, codec), values_of_run in runs[longest].items():
        epochs, knn, _ = zip(*values_of_run[0]["curve"], strict=True)
        axes[1].plot(epochs, [100 * value for value in knn], marker="o", label=f"{setting}, {codec}")
    axes[1].set(xlabel="epochs", ylabel="k-NN top-1 while training, %", title=f"{longest[1]} epochs, one seed")
    axes[1].legend()
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
        command.add_argument("--train-images", type=int, default=500)
        command.add_argument("--epochs", type=int, default=30)
        command.add_argument(
            "--least-area", type=float, default=0.25, help="least share of the image that a crop shows"
        )
        command.add_argument("--codecs", default="half")
        command.add_argument("--only", default=",".join(SETTINGS))
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--first-seed", type=int, default=0)
        command.add_argument("--plot", type=Path, default=Path("docs/assets/quality.png"))
        command.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    keep_freed_memory()
    args.function(args)


if __name__ == "__main__":
    main()
