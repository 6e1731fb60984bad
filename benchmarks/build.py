"""A build beside its parts: `python benchmarks/build.py IMAGES [--big-images 64] [--small-images 480] [--out FOLDER]`.

1. A large teacher (ViT-B/16 at 224 px, random weights), stored as klt and as half: wall time of `run_shards` over the bare
   forward passes of the same batches. Bar: 1.05.
2. A small one (EfficientNet-Lite0): wall time over (CPU seconds of decoding + forward + encoding + compressing, each alone on one
   thread) / cores, bar 1.05; and over the same stages in a process for each core, all at once, which share nothing but the
   machine: what no pipeline can be faster than.
3. The same images by a plain loop with one torch.save per image, and into a tar of safetensors per image: wall and bytes.
4. The small teacher's shards by one and by two worker processes of one thread each, from the first task handed out to the last
   receipt; what starting the workers costs is said beside it.

Rounds are interleaved; ratios are taken within a round, and their medians are told. Images repeat until there are enough. Exits
with 1 if a bar is missed.
"""

import argparse
import contextlib
import io
import os
import platform
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, final

import timm
import torch
from safetensors.torch import save as safetensors_bytes
from stages_apart import stages_apart
from torch import Tensor

from cache_builder.build import BuildConfig, build_cache
from cache_builder.pipeline.batch_size import CPU_BATCH
from cache_builder.pipeline.device import CodeBatch, DeviceWork, device_streams
from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.shards import run_shards
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.pipeline.views import TeacherView, load_views
from cache_builder.teachers import FAMILIES, TEACHERS, ComputeDtype, TeacherOptions, load_teacher
from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import TeacherPreset, WeightsSource
from cache_builder.teachers.weights import file_sha256
from cache_builder.workers.allocator import keep_freed_memory
from cache_builder.workers.cluster import local_pool
from radio_cache.codecs import Codec
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.format.checksums import crc32c
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import IMAGENET_PIXELS, TeacherSpec
from radio_cache.geometry.crops import patch_geometry
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache
from radio_cache.receipts import drop_receipt
from radio_cache.writer import compressed

BAR = 1.05
CODECS = ("klt", "half")
BATCH = CPU_BATCH  # what `--batch-size auto` takes on a CPU


def random_preset(model: str) -> TeacherPreset:
    """A ViT of timm at 224 px, with random weights."""
    return TeacherPreset(
        name=f"random-{model}".replace("_", "-"),
        family="random-vit",
        model=model,
        params="",
        licence="none",
        input_px=224,
        fit="crop",
        weights=WeightsSource(size="none", package=("radio_cache", "__init__.py")),
    )


RANDOM = random_preset("vit_base_patch16_224")


@final
class RandomViT(Teacher):
    """A ViT of timm with random weights: as slow as a real one, and its maps as hard to pack as they come."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        torch.manual_seed(0)
        self._net: Any = timm.create_model(preset.model, num_classes=0).eval()
        width, patch_px = int(self._net.embed_dim), int(self._net.patch_embed.patch_size[0])
        self._prefix, self._grid = int(self._net.num_prefix_tokens), (preset.input_px // patch_px,) * 2
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=preset.model,
            licence="none",
            weights="random",
            weights_sha256=file_sha256(path),
            normalisation=IMAGENET_PIXELS,
            geometry=patch_geometry(preset.input_px, patch_px, fit="crop", interpolation="bicubic"),
            summary_dim=width,
            spatial_dim=width,
            summary_note="class token",
            spatial_note="patch tokens",
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={},
        )

    def __call__(self, images: Tensor) -> Features:
        tokens = self._net.forward_features(images)
        return Features(tokens[:, 0], tokens[:, self._prefix :].unflatten(1, self._grid))

    def to(self, device: torch.device) -> None:
        self._net.to(device)


@dataclass(frozen=True)
class Measured:
    """Seconds and bytes of one way to keep the features of num_images."""

    wall_s: float
    num_bytes: int
    stages: StageSeconds


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def built(cache: Cache, teacher: Teacher, config: BuildConfig) -> Measured:
    """All shards of a teacher that has joined the cache, made again."""
    name, stages = teacher.spec.name, StageSeconds()
    for shard in range(cache.meta.num_shards):
        drop_receipt(cache.storage, name, shard)
    with ThreadPoolExecutor(config.threads) as pool:
        shards = list(range(cache.meta.num_shards))
        wall, _ = timed(lambda: list(run_shards(cache, teacher, shards, config, pool, stages)))
    return Measured(wall, Cache(cache.storage).teachers[name].stored_bytes(), stages)


def bare(teacher: Teacher, views: list[TeacherView], config: BuildConfig, *, side_by_side: bool) -> float:
    """Wall seconds of the forward passes alone, from pixels in memory: on all cores in one pass, or a pass a core."""
    device, shard_images, batch_images = torch.device(config.device), config.shard_images, config.batch_images
    work = DeviceWork(teacher, device, StageSeconds())
    # Cut as the build cuts them: within shards.
    shards = [views[first : first + shard_images] for first in range(0, len(views), shard_images)]
    batches = [shard[first : first + batch_images] for shard in shards for first in range(0, len(shard), batch_images)]

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def one_by_one() -> None:
        for batch in batches:
            work.features(batch)
        finished()

    if not side_by_side:
        return timed(one_by_one)[0]
    with device_streams(device) as streams, ThreadPoolExecutor(streams) as pool:

        def overlapped() -> None:
            for _ in prefetch_map(pool, work.features, batches, depth=streams + 1):
                pass
            finished()

        return timed(overlapped)[0]


def stages_alone(cache: Cache, teacher: Teacher, codec: Codec, rows: list[int]) -> dict[str, float]:
    """CPU seconds of each stage by itself, on one thread while the other cores have nothing to do."""
    spec, device, stages = teacher.spec, torch.device("cpu"), StageSeconds()
    seconds: dict[str, float] = {}
    views: list[TeacherView] = []
    access = ImageAccess(cache)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, seconds["decode"] = timed(
            lambda: views.extend(view for row in rows for view in load_views(cache, access, spec, (row, (0,))))
        )
        parts = [views[first : first + BATCH] for first in range(0, len(views), BATCH)]
        codes: list[CodeBatch] = []
        work = DeviceWork(teacher, device, stages, codec=codec)
        _, both = timed(lambda: codes.extend(batch for part in parts for batch in work.codes(part)))
        # One thread: its wall seconds are its CPU seconds, but for what others take from it, which `both` does not hold.
        seconds["forward"] = both * stages.teacher / (stages.teacher + stages.encode)
        seconds["encode"] = both - seconds["forward"]
    finally:
        torch.set_num_threads(before)
    chunks = [row.tobytes() for batch in codes for row in batch.codes]
    level = codec.zstd_level
    _, seconds["compress"] = timed(
        lambda: [crc32c(chunk if level is None else compressed(chunk, level=level)) for chunk in chunks]
    )
    return seconds


def plain_loop(cache: Cache, teacher: Teacher, rows: list[int], folder: Path, *, tar: bool) -> Measured:
    """What scripts do: decode, run, save float16, image by image; batches of 4, one file an image or one tar of them."""
    work = DeviceWork(teacher, torch.device("cpu"), StageSeconds())
    folder.mkdir()

    def run() -> None:
        archive = tarfile.open(folder / "features.tar", "w") if tar else None  # noqa: SIM115  # closed by the stack
        if archive is not None:
            stack.enter_context(archive)
        access = ImageAccess(cache)
        for first in range(0, len(rows), BATCH):
            batch = [
                one
                for row in rows[first : first + BATCH]
                for one in load_views(cache, access, teacher.spec, (row, (0,)))
            ]
            for part in work.features(batch):
                for one, image in zip(part.views, part.spatial, strict=True):
                    arrays = {"spatial": image.half().contiguous()}
                    if archive is None:
                        torch.save(arrays, folder / f"{one.row}.pt")
                        continue
                    data = safetensors_bytes(arrays)
                    member = tarfile.TarInfo(f"{one.row}.safetensors")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))

    with contextlib.ExitStack() as stack:
        wall, _ = timed(run)
    return Measured(wall, sum(file.stat().st_size for file in folder.iterdir()), StageSeconds())


def listed(images: Path, count: int, folder: Path) -> Path:
    """A text file that names `count` images, repeated under other names where there are fewer."""
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pool = folder / f"images-{count}"
    pool.mkdir()
    for number in range(count):
        source = files[number % len(files)]
        (pool / f"{number:06d}{source.suffix}").symlink_to(source.resolve())
    return pool


def prepared(
    name: str,
    images: Path,
    folder: Path,
    shard_images: int,
    *,
    batch_images: int = BATCH,
    device: str = "cpu",
    dtype: ComputeDtype = "float32",
    request: CodecRequest | None = None,
) -> tuple[Cache, Teacher, BuildConfig]:
    """A complete cache of one teacher, the teacher on its device, and how it was built."""
    options = TeacherOptions(dtype=dtype, codec=CodecRecord.of_request(request))
    out = folder / f"{name}-{request.name if request else 'usual'}.zarr"
    config = BuildConfig(
        images=(str(images),),
        teachers={name: options},
        out=out,
        shard_images=shard_images,
        batch_size=batch_images,
        device=device,
    )
    cache = build_cache(config).cache
    teacher = load_teacher(name, options)
    teacher.to(torch.device(device))
    return cache, teacher, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--big-images", type=int, default=64)
    parser.add_argument("--small-images", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep_freed_memory()  # as the command does
    FAMILIES["random-vit"] = RandomViT  # type: ignore[assignment]
    TEACHERS[RANDOM.name] = RANDOM
    cores = torch.get_num_threads()
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines += large(args, folder)
        lines += small(args, folder, cores)
    head = [
        f"# What a build costs beside its parts, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`{' '.join(['python', 'benchmarks/build.py', *sys.argv[1:]])}`; {platform.machine()}, {os.cpu_count()} cores, "
        f"{cores} threads, torch {torch.__version__}; medians of {args.rounds} interleaved rounds; bar {BAR}.",
        "",
    ]
    text = "\n".join([*head, *lines, ""])
    print(text)
    if args.out:
        (args.out / f"{datetime.now(UTC):%Y-%m-%d}-build.md").write_text(text)
    sys.exit(any("MISSED" in line for line in lines))


def large(args: argparse.Namespace, folder: Path) -> list[str]:
    images = listed(args.images, args.big_images, folder)
    places = {
        name: prepared(RANDOM.name, images, folder, args.big_images // 2, request=CodecRequest(name=name))
        for name in CODECS
    }
    cache, teacher, config = places[CODECS[0]]
    rows = cache.usable_rows().tolist()
    access = ImageAccess(cache)
    views = [view for row in rows for view in load_views(cache, access, teacher.spec, (row, (0,)))]
    whole: dict[str, list[Measured]] = {name: [] for name in CODECS}
    one_pass, side = [], []
    for _ in range(args.rounds):
        for name, place in places.items():
            whole[name].append(built(*place))
        side.append(bare(teacher, views, config, side_by_side=True))
        one_pass.append(bare(teacher, views, config, side_by_side=False))
    lines = [
        f"## ViT-B/16, random weights, {len(rows)} images",
        "",
        f"- bare forward passes {median(one_pass):.2f} s with all threads in each, {median(side):.2f} s side by side",
    ]
    for name, builds in whole.items():
        walls = [build.wall_s for build in builds]
        lines += [
            f"- codec {name}, {builds[0].num_bytes / len(rows):.0f} bytes an image: build {median(walls):.2f} s, "
            f"{ratios(walls, one_pass)} of the plain passes; {ratios(walls, side)} of those side by side",
            f"  - thread-seconds: {shares(builds[0].stages)}",
        ]
    return [*lines, ""]


def small(args: argparse.Namespace, folder: Path, cores: int) -> list[str]:
    name = "efficientnet-lite0"
    images = listed(args.images, args.small_images, folder)
    cache, teacher, config = prepared(name, images, folder, 64)
    rows, codec = cache.usable_rows().tolist(), cache.teachers[name].codec
    whole: list[Measured] = []
    alone: list[dict[str, float]] = []
    apart: list[float] = []
    loops: dict[str, list[Measured]] = {"torch.save per image": [], "tar of safetensors": []}
    peaks: list[int] = []
    with stages_apart(cache, name, BATCH, cores) as seconds_apart:
        for number in range(args.rounds):
            apart.append(seconds_apart())
            whole.append(built(cache, teacher, config))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            alone.append(stages_alone(cache, teacher, codec, rows))
            for how, runs in loops.items():
                runs.append(plain_loop(cache, teacher, rows, folder / f"{how[:3]}-{number}", tar=how.startswith("tar")))
    walls = [run.wall_s for run in whole]
    ideal = [sum(seconds.values()) / cores for seconds in alone]
    stage_seconds = ", ".join(f"{stage} {median([seconds[stage] for seconds in alone]):.2f}" for stage in alone[0])
    lines = [
        f"## EfficientNet-Lite0, {len(rows)} images, codec {cache.teachers[name].spec.codec.label}",
        "",
        f"- CPU seconds of each stage alone: {stage_seconds}; together over {cores} cores {median(ideal):.2f} s",
        f"- the same stages in {cores} processes at once, one a core: {median(apart):.2f} s, "
        f"{ratios(apart, ideal, bar=None)} of that: what the cores take from each other",
        f"- build {median(walls):.2f} s, {ratios(walls, ideal)} of the stages alone; {ratios(walls, apart)} of those processes; "
        f"thread-seconds: {shares(whole[0].stages)}",
        f"- largest resident size after each build, MB: {', '.join(f'{peak / 1024:.0f}' for peak in peaks)}",
        "",
        "| way | seconds | of the build's | bytes an image |",
        "|---|---|---|---|",
        f"| this build | {median(walls):.2f} | 1 | {whole[0].num_bytes / len(rows):.0f} |",
    ]
    for how, runs in loops.items():
        taken, each = [run.wall_s for run in runs], runs[0].num_bytes / len(rows)
        lines.append(f"| plain loop, {how} | {median(taken):.2f} | {ratios(taken, walls, bar=None)} | {each:.0f} |")
    return [*lines, "", *scaling(cache, config, len(rows), args.rounds)]


def scaling(cache: Cache, config: BuildConfig, num_images: int, rounds: int) -> list[str]:
    """The same shards by worker processes; a thread each, or a second worker would have no core of its own here."""
    config = replace(config, threads=1)
    (name,) = config.teachers
    seconds: dict[int, list[float]] = {1: [], 2: []}
    starting: list[float] = []
    for _ in range(rounds):
        for workers, taken in seconds.items():
            for shard in range(cache.meta.num_shards):
                drop_receipt(cache.storage, name, shard)
            started = time.perf_counter()
            with local_pool(workers, device="cpu", threads=1) as worker_pool:
                starting.append(time.perf_counter() - started)
                taken.append(build_cache(config, worker_pool=worker_pool).results[0].seconds)
    one, two = (median(taken) for taken in seconds.values())
    return [
        f"## Workers, {name}, {num_images} images in {cache.meta.num_shards} shards",
        "",
        f"- one worker of one thread {one:.2f} s; two {two:.2f} s: {one / two:.2f} times as fast; loading the teacher in each is "
        f"part of it",
        f"- starting the workers, before that: {min(starting):.1f} to {max(starting):.1f} s",
        "",
    ]


def shares(stages: StageSeconds) -> str:
    named = {name: getattr(stages, name) for name in ("decode", "teacher", "encode", "write")}
    total = sum(named.values())
    return ", ".join(f"{name} {seconds:.2f} ({seconds / total:.0%})" for name, seconds in named.items())


def ratios(seconds: Sequence[float], of: Sequence[float], *, bar: float | None = BAR) -> str:
    """The median of the rounds' ratios, their range, and whether the bar is met."""
    quotients = [value / other for value, other in zip(seconds, of, strict=True)]
    text = f"{median(quotients):.3f} ({min(quotients):.2f} to {max(quotients):.2f})"
    return text if bar is None else f"{text}: {verdict(median(quotients))}"


def verdict(ratio: float) -> str:
    return "met" if ratio <= BAR else "MISSED"


if __name__ == "__main__":
    main()
