"""What encoding costs beside the teacher's forward pass, on the same device: `python benchmarks/encode.py [--device cuda]`.

A ViT-B/16 at 224 px (timm, random weights) is the teacher; its maps are encoded as the build does it, fidelity measured
too, and zstd's share added where the packing is zstd. Medians of interleaved rounds. Bar: 5 % of the forward pass. Exits
with 1 if it is missed.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import zstandard

from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.statistics.moments import Moments
from radio_cache.torch.encode import MapEncoder

BAR = 0.05
REQUESTS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "klt packed 0.99": CodecRequest(name="klt", packing="packed", fidelity=0.99),
    "klt zstd 0.99": CodecRequest(name="klt", packing="zstd", fidelity=0.99),
    "klt packed 0.999": CodecRequest(name="klt", packing="packed", fidelity=0.999),
}


def timed(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="Folder for the result.")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_base_patch16_224", num_classes=0).eval().to(device)
    pixels = torch.randn(args.batch, 3, 224, 224, device=device)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        tokens = model.forward_features(pixels)[:, 1:]
        return tokens.reshape(args.batch, 14, 14, -1)

    maps = forward()
    tokens = maps.reshape(-1, maps.shape[-1]).double().cpu().numpy()
    works: dict[str, Callable[[], object]] = {"forward pass": forward}
    for name, request in REQUESTS.items():
        codec = calibrate(request, Moments.of(tokens), tokens[::2], tokens[1::2]).codec
        encoder = MapEncoder(codec, device)
        compressor = zstandard.ZstdCompressor(level=codec.zstd_level) if codec.zstd_level is not None else None

        @torch.inference_mode()
        def encode(encoder: MapEncoder = encoder, compressor: zstandard.ZstdCompressor | None = compressor) -> None:
            for row in encoder(maps).codes.cpu().numpy():
                if compressor is not None:
                    compressor.compress(row.tobytes())

        works[name] = encode
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(args.rounds + 1):
        for name, work in works.items():
            taken = timed(work, device)
            if number:  # the first round warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = medians.pop("forward pass")
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    lines = [
        f"# Encoding, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`benchmarks/encode.py --batch {args.batch}`, {where}, torch {torch.__version__}. Forward pass of ViT-B/16 at 224 px, "
        f"{args.batch} images: {whole * 1e3:.0f} ms.",
        "",
        "| codec | encoding, ms | of the forward pass | below 5 % |",
        "|---|---|---|---|",
    ]
    for name, taken in medians.items():
        lines.append(f"| {name} | {taken * 1e3:.2f} | {taken / whole:.2%} | {'yes' if taken < BAR * whole else 'NO'} |")
    print("\n".join(lines))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{datetime.now(UTC):%Y-%m-%d}-encode.md").write_text("\n".join(lines) + "\n")
    sys.exit(any(taken >= BAR * whole for taken in medians.values()))


if __name__ == "__main__":
    main()
