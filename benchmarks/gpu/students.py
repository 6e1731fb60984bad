"""Students beside the image encoders they learn from, on a GPU: bfloat16, compiled, images/s and peak memory.

    python benchmarks/gpu/students.py [--json FILE] [--rounds 20] [--quick | --tiny]

At 224 px with batches of 128: every student, OpenCLIP-H/14, DINOv2-g/14. At 512 and 1024 px with batches of 1, 2, 4, 8 and 16:
E-RADIO-L, the 512-px E-RADIO-L and ViT-B/L/H-16; SAM's encoders at 1024. Models that are compared in a bar are timed in turns,
pass by pass; the others one after another, so that a billion parameters at a time need memory. Medians of device time.

Bars: E-RADIO-L at least 6 times the images/s of OpenCLIP-H/14 and of DINOv2-g/14 at 224 px; at 1024 px at least 5.9 times those
of SAM-L and 10.3 times those of SAM-H, which are the paper's (arXiv 2312.06709, on an A100 with TensorRT).

`--tiny` goes the same way with the smallest students at 64 px, on a CPU where there is no GPU: whether it runs, no measurement.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from student_models import Model, build, dinov2_g_14, openclip_h_14, sam, size_of, student, students_at

import radio_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
WARM_UP = 5


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def allocated(*, peak: bool = False) -> int:
    """Bytes of the device; 0 on a CPU, whose memory is not counted."""
    if not ON_GPU:
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


class Ready:
    """A compiled model on the device with its images. peak_mb: of a pass, weights included."""

    def __init__(self, model: Model, batch: int) -> None:
        self.model, self.batch, self.ms = model, batch, list[float]()
        before = allocated()
        net: Any = build(model).to(DEVICE, torch.bfloat16).to(memory_format=torch.channels_last)
        self.images = torch.rand(batch, 3, model.image_px, model.image_px, device=DEVICE, dtype=torch.bfloat16)
        self.net = torch.compile(net, backend="inductor" if ON_GPU else "eager")
        for _ in range(WARM_UP):
            self.net(self.images)
        wait()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        self.net(self.images)
        wait()
        self.peak_mb = (allocated(peak=True) - before) / 1e6

    def time(self) -> None:
        if not ON_GPU:
            started = time.perf_counter()
            self.net(self.images)
            self.ms.append(1000 * (time.perf_counter() - started))
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.net(self.images)
        end.record()
        end.synchronize()
        self.ms.append(start.elapsed_time(end))

    @property
    def images_per_s(self) -> float:
        return 1000 * self.batch / statistics.median(self.ms)


def run(models: Sequence[Model], batch: int, rounds: int, rows: list[dict[str, Any]]) -> dict[str, Ready]:
    """Time models in turns and print their rows."""
    ready: dict[str, Ready] = {}
    with torch.inference_mode():
        for model in models:
            try:
                ready[model.name] = Ready(model, batch)
            except torch.OutOfMemoryError:
                print(f"| {model.name} | {model.image_px} | {batch} | out of memory | | | |", flush=True)
        for _ in range(rounds):
            for one in ready.values():
                one.time()
    for name, one in ready.items():
        tflops = one.images_per_s * size_of(one.model).gflops / 1e3
        speed = f"{one.images_per_s:.0f} | {min(one.ms):.2f}, {max(one.ms):.2f}"
        print(f"| {name} | {one.model.image_px} | {batch} | {speed} | {one.peak_mb:.0f} | {tflops:.0f} |", flush=True)
        rows.append(
            {"name": name, "image_px": one.model.image_px, "batch": batch, "ms": one.ms, "peak_mb": one.peak_mb}
        )
    return ready


def bar(ready: dict[str, Ready], first: str, second: str, times: float) -> str:
    if first not in ready or second not in ready:
        return f"{first} beside {second}: not measured"
    ratio = statistics.median(b / a for a, b in zip(ready[first].ms, ready[second].ms, strict=True))
    return f"{first} is {ratio:.2f} times as fast as {second}; the bar is {times:g}: {'met' if ratio >= times else 'MISSED'}"


def forget() -> None:
    """Free the models of one group before the next."""
    torch._dynamo.reset()
    if ON_GPU:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="the bars alone")
    parser.add_argument("--tiny", action="store_true", help="a smoke test, on a CPU if need be")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not ON_GPU and not args.tiny:
        sys.exit("this benchmark needs a CUDA device: benchmarks/students.py is for the CPU, and --tiny tries this one")
    device = torch.cuda.get_device_name() if ON_GPU else "a CPU"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, radio-cache {radio_cache.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {device}, {versions}, bfloat16, torch.compile\n")
    print("| model | px | batch | images/s | fastest, slowest pass, ms | peak memory, MB | TFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    bars = tiny(rows) if args.tiny else measured(args.rounds, rows, quick=args.quick)
    print("\n" + "\n\n".join(bars))
    if args.json:
        args.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))


def tiny(rows: list[dict[str, Any]]) -> list[str]:
    """Two small students compared, and each in two sizes of batch, which is all that `measured` does."""
    models = [student(name, 64) for name in ("e-radio-tiny", "vit-tiny-16")]
    bars = [bar(run(models, 2, 2, rows), "e-radio-tiny", "vit-tiny-16", 0)]
    forget()
    for model in models:
        for batch in (1, 2):
            run([model], batch, 2, rows)
        forget()
    return bars


def measured(rounds: int, rows: list[dict[str, Any]], *, quick: bool) -> list[str]:
    """Every row, into `rows`; returns what the bars say."""
    bars: list[str] = []
    ready = run([student("e-radio-l", 224), openclip_h_14(), dinov2_g_14()], 128, rounds, rows)
    bars += [bar(ready, "e-radio-l", teacher, 6) for teacher in ("OpenCLIP ViT-H/14", "DINOv2 ViT-g/14-reg")]
    del ready
    forget()
    ready = run(
        [student("e-radio-l", 1024), student("e-radio-l-512", 1024), sam("b"), sam("l"), sam("h")], 4, rounds, rows
    )
    bars += [bar(ready, "e-radio-l", "SAM ViT-L", 5.9), bar(ready, "e-radio-l", "SAM ViT-H", 10.3)]
    del ready
    forget()
    if not quick:
        for model in students_at(224):
            if model.name != "e-radio-l":
                run([model], 128, rounds, rows)
                forget()
        for image_px in (512, 1024):
            names = ("e-radio-l", "e-radio-l-512", "vit-b-16", "vit-l-16", "vit-h-16")
            teachers = [sam(letter) for letter in "blh"] if image_px == 1024 else []
            for model in [*(student(name, image_px) for name in names), *teachers]:
                for batch in (1, 2, 4, 8, 16):
                    run([model], batch, rounds, rows)
                forget()
    return bars


if __name__ == "__main__":
    main()
