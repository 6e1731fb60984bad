"""Images a second: of networks alone, warmed up, medians of repeated batches; beside parameters, FLOPs and memory."""

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
"""A batch is repeated at least so long in all, so that the clock's grain and the first repeat do not count."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """What to time. batches: images in a batch, one row each. modes, precisions: all pairs are timed; 16 bits by autocast.

    repeats: timed batches, at least; warmup: batches before them.
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
            raise ConfigError("nothing to time: give --run RUN or --model WHAT")
        if min(*self.batches, self.repeats) < 1 or self.warmup < 0:
            raise ConfigError("--batch-size and --repeats are at least 1, --warmup at least 0")
        for value, known in ((self.modes, get_args(Mode)), (self.precisions, get_args(Precision))):
            if bad := [one for one in value if one not in known]:
                raise ConfigError(f"'{bad[0]}' is none of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class ThroughputRow:
    """One network in one mode with one batch. images_per_s: of the median batch; slowest, fastest: of all timed.

    gflops: billions of floating point operations an image (a multiply-add is two). peak_mb: on a GPU, None on the CPU.
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
    """What was measured and how."""

    protocol: str
    device: str
    rows: tuple[ThroughputRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def best(self) -> dict[str, ThroughputRow]:
        """The fastest row of every network."""
        fastest: dict[str, ThroughputRow] = {}
        for row in self.rows:
            if row.name not in fastest or row.images_per_s > fastest[row.name].images_per_s:
                fastest[row.name] = row
        return fastest

    def against(self, quality: dict[str, float], what: str) -> str:
        """Quality (per cent) over speed, as SVG: the networks that have both. Raises EvalError if there is none."""
        points = [Point(name, row.images_per_s, quality[name]) for name, row in self.best().items() if name in quality]
        if not points:
            raise EvalError(
                f"no network was both timed ({', '.join(self.best())}) and judged ({', '.join(quality)}): names must agree"
            )
        return scatter_chart(points, x_title=f"images a second, {self.device}", y_title=what)


def run_throughput(config: ThroughputConfig, *, progress: Progress | None = None) -> ThroughputTable:
    """Time every network in every mode, precision and batch size. Raises RadioCacheError with what is wrong."""
    device = torch.device(pick_device(config.device))
    encoders = live_encoders(config.runs, config.models, config.weights, device=device, untrained=False)
    rows: list[ThroughputRow] = []
    notes: list[str] = []
    kinds: list[tuple[Mode, Precision]] = [
        (mode, precision) for mode in config.modes for precision in config.precisions
    ]
    total = len(encoders) * len(kinds) * len(config.batches)
    done = 0
    for encoder in encoders:
        try:
            network = encoder.measurable()
        except EvalError as exc:
            notes.append(f"{exc}.")
            continue
        params, flops = _params_m(network.module), gflops(encoder, network, device)
        for mode, precision in kinds:
            for timed in _timed(encoder, network, mode, precision, config, device, notes):
                rows.append(replace(timed, params_m=params, gflops=flops))
            done += len(config.batches)
            if progress is not None:
                progress("networks", done, total, unit="timings")
    if not rows:
        raise EvalError("nothing could be timed" + "".join(f"; {note}" for note in notes))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    protocol = (
        f"networks alone, without heads, loading and preprocessing; {name}; {config.warmup} batches to warm up, the median of "
        f"at least {config.repeats}"
    )
    return ThroughputTable(protocol=protocol, device=name, rows=tuple(rows), notes=tuple(dict.fromkeys(notes)))


def gflops(encoder: LiveEncoder, network: Measurable, device: torch.device) -> float:
    """Billions of floating point operations of one image, counted while it runs."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.call(_images(encoder, 1, device))
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
    layout = torch.channels_last if mode == "channels-last" else torch.contiguous_format
    network.module.to(memory_format=layout)  # pyright: ignore[reportCallIssue]  # torch's overloads lack it alone
    call: Callable[[Tensor], object] = torch.compile(network.call) if mode == "compiled" else network.call
    for batch in config.batches:
        images = _images(encoder, batch, device).to(memory_format=layout)
        try:
            seconds, peak = _seconds(call, images, precision, config, device)
        except Exception as exc:  # compilers and devices fail in many ways; the other modes are still worth knowing
            notes.append(f"{encoder.name}, {mode}, {precision}, batch {batch}: {str(exc).strip().splitlines()[0]:.160}")
            continue
        yield ThroughputRow(
            name=encoder.name,
            kind=encoder.kind,
            about=encoder.about,
            params_m=0.0,
            gflops=0.0,
            input_px=encoder.geometry.input_hw[0],
            mode=mode,
            precision=precision,
            batch=batch,
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
    """Seconds of every timed batch, and the most memory that was in use, MB."""
    gpu = device.type == "cuda"
    half = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    with torch.inference_mode(), half:
        for _ in range(config.warmup):
            call(images)
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while len(seconds) < config.repeats or sum(seconds) < _SHORTEST_S:
            started = time.perf_counter()
            call(images)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return seconds, torch.cuda.max_memory_allocated() / 1e6 if gpu else None


def _images(encoder: LiveEncoder, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, *encoder.geometry.input_hw, generator=generator).to(device)


def _params_m(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
