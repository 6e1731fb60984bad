"""A build on a GPU beside the forward passes of the same batches: `python benchmarks/gpu/build.py IMAGES [--out FILE.md]`.

A ViT-H/14 at 224 px with random weights (as large as OpenCLIP-H's image tower) in bfloat16, the codec as in any build:

- wall time of `run_shards` (decode, forward, encode, fetch, compress, write) over the bare forward passes of the same batches,
  whose pixels lie in main memory: one after the other, and from two threads as a build hands them out. Bar: 1.05.
- thread-seconds by stage, what is waited for, and peak memory of the device.

Images repeat until there are enough. `--tiny` is a ViT-Ti/16 and few images, on a CPU where there is no GPU: whether it runs, no
measurement. Exits with 1 if the bar is missed.
"""

import argparse
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import BAR, Measured, RandomViT, bare, built, listed, prepared, random_preset, shares, verdict

from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.views import load_views
from cache_builder.teachers import FAMILIES, TEACHERS
from radio_cache.terminal.output import human_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="vit_huge_patch14_224", help="any plain ViT of timm at 224 px")
    parser.add_argument("--count", type=int, default=2048, help="images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a smoke test, on a CPU if need be")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tiny:
        args.model, args.count, args.batch, args.rounds = "vit_tiny_patch16_224", 32, 8, 1
    elif device == "cpu":
        sys.exit("this benchmark needs a CUDA device: benchmarks/build.py is for the CPU, and --tiny tries this one")
    FAMILIES["random-vit"] = RandomViT  # type: ignore[assignment]
    preset = random_preset(args.model)
    TEACHERS[preset.name] = preset
    with tempfile.TemporaryDirectory() as temporary:
        text, met = measured(args, device, preset.name, Path(temporary))
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    sys.exit(not met and not args.tiny)


def measured(args: argparse.Namespace, device: str, name: str, folder: Path) -> tuple[str, bool]:
    images = listed(args.images, args.count, folder)
    shard_images = max(args.batch, args.count // 8)
    cache, teacher, config = prepared(
        name, images, folder, shard_images, batch_images=args.batch, device=device, dtype="bfloat16"
    )
    access = ImageAccess(cache)
    seen = [one for row in cache.usable_rows().tolist() for one in load_views(cache, access, teacher.spec, (row, (0,)))]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole: list[Measured] = []
    plain: list[float] = []
    overlapped: list[float] = []
    for _ in range(args.rounds):
        whole.append(built(cache, teacher, config))
        plain.append(bare(teacher, seen, config, side_by_side=False))
        overlapped.append(bare(teacher, seen, config, side_by_side=True))
    best = min(whole, key=lambda one: one.wall_s)
    ratios = best.wall_s / min(plain), best.wall_s / min(overlapped)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = f"; peak {human_bytes(torch.cuda.max_memory_allocated())} of the device" if device == "cuda" else ""
    lines = [
        f"# A build on {where} beside its forward passes, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`{' '.join(['python', 'benchmarks/gpu/build.py', *sys.argv[1:]])}`; {os.cpu_count()} cores, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}; {args.model}, bfloat16, {len(seen)} images in batches of {args.batch}, codec "
        f"{cache.teachers[name].spec.codec.label}; best of {args.rounds} interleaved rounds; bar {BAR}.",
        "",
        f"- build {best.wall_s:.2f} s ({len(seen) / best.wall_s:.1f} images/s); bare forward passes {min(plain):.2f} s one after "
        f"the other, {min(overlapped):.2f} s from two threads",
        f"- build over bare forward: {ratios[0]:.3f} ({verdict(ratios[0])}) and {ratios[1]:.3f} ({verdict(ratios[1])})",
        f"- thread-seconds: {shares(best.stages)}; waited for: {best.stages.bottleneck()}",
        f"- {best.num_bytes / len(seen):.0f} bytes an image{peak}",
    ]
    return "\n".join(lines), ratios[0] <= BAR


if __name__ == "__main__":
    main()
