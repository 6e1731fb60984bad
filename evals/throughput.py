"""Throughput of networks in images per second, beside parameters, FLOPs and memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evals.encoders.base import LiveEncoder, Measurable
from evals.encoders.gathered import live_encoders
from evals.errors import EvalError
from evals.shared.charts import Point, scatter_chart
from evals.shared.devices import Device
from evals.shared.progress import Progress
from radio_cache.errors import ConfigError
from radio_cache.torch import pick_device

Mode = Literal["eager", "channels-last", "compiled"]
Precision = Literal["float32", "bfloat16", "float16"]

_SHORTEST_S = 0.2
"""A batch is repeated for at least this long, so that the resolution of the clock does not matter."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Settings of a throughput measurement.

    Attributes:
        runs, models, weights: the networks, as for k-NN.
        batches: images in a batch, one row each.
        modes, precisions: all pairs are timed; 16 bits by autocast.
        repeats: timed batches, at least.
        warmup: batches before them.
        device: where networks run.
    """

    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 16)
    modes: tuple[Mode, ...] = ("eager",)
    precisions: tuple[Precision, ...] = ("float32",)
    repeats: int = 5
    warmup: int = 2
    device: Device = "auto"

    def __post_init__(self) -> None:
        if not self.runs and not self.models:
            raise ConfigError("nothing to time: give --run RUN or --model MODEL")
        if min(*self.batches, self.repeats) < 1 or self.warmup < 0:
            raise ConfigError("--batch-size and --repeats are at least 1, --warmup at least 0")
        for value, choices in ((self.modes, get_args(Mode)), (self.precisions, get_args(Precision))):
            if unknown := [name for name in value if name not in choices]:
                raise ConfigError(f"'{unknown[0]}' is none of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class ThroughputRow:
    """One network in one mode with one batch size.

    Attributes:
        about: a short description of the network.
        params_m: millions of parameters.
        gflops: billions of floating point operations per image (a multiply-add is two).
        images_per_s: of the median batch.
        slowest, fastest: images per second of all timed batches.
        peak_mb: GPU memory; None on the CPU.
    """

    name: str
    kind: str
    about: str
    params_m: float
    gflops: float
    input_px: int
    mode: str
    precision: str
    batch: int
    images_per_s: float
    slowest: float
    fastest: float
    peak_mb: float | None


@dataclass(frozen=True, kw_only=True)
class ThroughputTable:
    """The measurements, and how they were made."""

    protocol: str
    device: str
    rows: tuple[ThroughputRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table."""
        return asdict(self)

    def best(self) -> dict[str, ThroughputRow]:
        """Return the fastest row of every network."""
        fastest: dict[str, ThroughputRow] = {}
        for row in self.rows:
            if row.name not in fastest or row.images_per_s > fastest[row.name].images_per_s:
                fastest[row.name] = row
        return fastest

    def quality_chart(self, quality: dict[str, float], metric: str) -> str:
        """Draw quality over speed for the networks that have both.

        Args:
            quality: name of a network -> per cent.
            metric: title of the quality axis.

        Returns:
            A complete SVG document.

        Raises:
            EvalError: if no network has both.
        """
        points = [Point(name, row.images_per_s, quality[name]) for name, row in self.best().items() if name in quality]
        if not points:
            raise EvalError(
                f"no network was both timed ({', '.join(self.best())}) and evaluated ({', '.join(quality)}): names must agree"
            )
        return scatter_chart(points, x_title=f"images a second, {self.device}", y_title=metric)


def run_throughput(config: ThroughputConfig, *, progress: Progress | None = None) -> ThroughputTable:
    """Time every network in every mode, precision and batch size.

    Raises:
        RadioCacheError: if a network cannot be loaded, or none can be timed.
    """
    device = torch.device(pick_device(config.device))
    encoders = live_encoders(config.runs, config.models, config.weights, device=device, untrained=False)
    rows: list[ThroughputRow] = []
    notes: list[str] = []
    kinds: list[tuple[Mode, Precision]] = [
        (mode, precision) for mode in config.modes for precision in config.precisions
    ]
    # Every pair of mode and precision is timed at every batch size.
    total = len(encoders) * len(kinds) * len(config.batches)
    num_done = 0
    for encoder in encoders:
        try:
            # ONNX files have no module to count or to compile.
            network = encoder.measurable()
        except EvalError as exc:
            notes.append(f"{exc}.")
            continue
        params, flops = _params_m(network.module), gflops(encoder, network, device)
        for mode, precision in kinds:
            for row in _timed(encoder, network, mode, precision, config, device, notes):
                rows.append(replace(row, params_m=params, gflops=flops))
            num_done += len(config.batches)
            if progress is not None:
                progress("networks", num_done, total, unit="timings")
    if not rows:
        raise EvalError("nothing could be timed" + "".join(f"; {note}" for note in notes))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    protocol = (
        f"networks alone, without heads, loading and preprocessing; {name}; {config.warmup} batches to warm up, the median of "
        f"at least {config.repeats}"
    )
    return ThroughputTable(protocol=protocol, device=name, rows=tuple(rows), notes=tuple(dict.fromkeys(notes)))


def gflops(encoder: LiveEncoder, network: Measurable, device: torch.device) -> float:
    """Return billions of floating point operations for one image, counted while the network runs."""
    # Counts matrix products and convolutions, which are nearly all operations.
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.call(_random_images(encoder, 1, device))
    return counter.get_total_flops() / 1e9


def _timed(
    encoder: LiveEncoder,
    network: Measurable,
    mode: Mode,
    precision: Precision,
    config: ThroughputConfig,
    device: torch.device,
    notes: list[str],
) -> Iterator[ThroughputRow]:
    """Yield a row per batch size, without parameters and FLOPs; a failure becomes a note."""
    # Weights and inputs need the same layout, or every layer converts.
    layout = torch.channels_last if mode == "channels-last" else torch.contiguous_format
    network.module.to(memory_format=layout)  # pyright: ignore[reportCallIssue]  # torch's overloads lack it alone
    # Compiled anew for every precision: autocast is part of the traced graph.
    call: Callable[[Tensor], object] = torch.compile(network.call) if mode == "compiled" else network.call
    for batch in config.batches:
        images = _random_images(encoder, batch, device).to(memory_format=layout)
        try:
            seconds, peak = _seconds(call, images, precision, config, device)
        except Exception as exc:  # compilers and devices fail in many ways; the other modes are still worth knowing
            notes.append(f"{encoder.name}, {mode}, {precision}, batch {batch}: {str(exc).strip().splitlines()[0]:.160}")
            continue
        yield ThroughputRow(
            name=encoder.name,
            kind=encoder.kind,
            about=encoder.description,
            params_m=0.0,
            gflops=0.0,
            input_px=encoder.geometry.input_hw[0],
            mode=mode,
            precision=precision,
            batch=batch,
            # The median is robust against single slow batches.
            images_per_s=batch / statistics.median(seconds),
            slowest=batch / max(seconds),
            fastest=batch / min(seconds),
            peak_mb=peak,
        )


def _seconds(
    call: Callable[[Tensor], object],
    images: Tensor,
    precision: Precision,
    config: ThroughputConfig,
    device: torch.device,
) -> tuple[list[float], float | None]:
    """Return seconds of every timed batch, and the peak GPU memory in MB."""
    gpu = device.type == "cuda"
    # Weights stay in float32, as in training; autocast converts per operation.
    half = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    with torch.inference_mode(), half:
        # Compilation, autotuning and the first allocation happen here.
        for _ in range(config.warmup):
            call(images)
        if gpu:
            torch.cuda.synchronize()
            # After the warm-up, so that autotuning's scratch memory does not count.
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while len(seconds) < config.repeats or sum(seconds) < _SHORTEST_S:
            started = time.perf_counter()
            call(images)
            if gpu:  # kernels are queued: the clock stops when they have run
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return seconds, torch.cuda.max_memory_allocated() / 1e6 if gpu else None


def _random_images(encoder: LiveEncoder, batch: int, device: torch.device) -> Tensor:
    # Noise, because a GPU draws less power on zeros and clocks higher than it would on images.
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, *encoder.geometry.input_hw, generator=generator).to(device)


def _params_m(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
