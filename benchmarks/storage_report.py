"""The tables, bars and picture of `benchmarks/storage.py`."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import storage_peers as peers

import radio_cache

RING, RING_COPYING, BATCHES, COLLATE = (
    "ring of buffers, 2 threads",
    "ring of buffers, 2 threads of bare pread",
    "DataLoader of batches, 2 workers",
    "DataLoader of rows, 2 workers",
)
LIBRARY, LIBRARY_READ = "zstandard on chunks in memory, thrown away", "pread, zstandard into the batch"
_LIBRARIES = (
    "numpy",
    "zarr",
    "zarrs",
    "tensorstore",
    "h5py",
    "litdata",
    "mosaicml-streaming",
    "webdataset",
    "torch",
    "zstandard",
    "google-crc32c",
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One rate. rows: map and codec. per_second: rows a second; row_bytes: of one row, decoded."""

    rows: str
    part: str
    name: str
    per_second: float
    row_bytes: int


@dataclass(frozen=True)
class Bar:
    """ours / theirs in one part is at least `least` on every kind of rows (`each`), or on the median of them."""

    part: str
    ours: str
    theirs: str
    least: float
    each: bool = False

    @property
    def text(self) -> str:
        where = "everywhere" if self.each else "on the median"
        return f"{self.part}: {self.ours} >= {self.least:g} x {self.theirs}, {where}"


WARM = "warm, 1 process"
BARS = (
    Bar(WARM, peers.OURS, peers.PREAD, 0.8, each=True),
    Bar(WARM, peers.OURS, peers.PREAD, 1.0),
    Bar(WARM, peers.OURS_CHECKED_2, peers.PREAD, 1.2),
    Bar(WARM, peers.OURS_2, peers.MEMMAP, 1.3),
    *(
        Bar(WARM, ours, theirs, least)
        for theirs, least in (
            (peers.ONE_BY_ONE, 15),
            (peers.FANCY, 400),
            (peers.TENSORSTORE, 3.0),
            (peers.NPY, 2.5),
            (peers.LITDATA, 2.0),
            (peers.MOSAIC, 1.7),
        )
        for ours in (peers.OURS, peers.OURS_CHECKED_2)
    ),
    Bar("cold", peers.OURS_8, peers.PREAD, 2.0),
    Bar("cold", peers.OURS_8, peers.PREAD_8, 0.9),
    Bar("delivered", RING, BATCHES, 4.0),
    Bar("delivered", RING, COLLATE, 6.0),
    Bar("delivered", RING, RING_COPYING, 0.8),
    *(
        Bar(part, "radio-cache, verified", library, 0.9, each=True)
        for library in (LIBRARY, LIBRARY_READ)
        for part in ("zstd, 1 thread", "zstd, 2 threads")
    ),
    Bar("write", "radio-cache, unsynced", "zarr-python, unsynced", 4.0),
    Bar("write", "radio-cache, synced", "zarr-python, unsynced", 1.2),
)


def ratios(figures: Sequence[Figure], part: str, ours: str, theirs: str) -> dict[str, float]:
    """ours / theirs by kind of rows."""
    rates = {(f.rows, f.name): f.per_second for f in figures if f.part == part}
    kinds = dict.fromkeys(f.rows for f in figures if f.part == part)
    return {
        rows: rates[rows, ours] / rates[rows, theirs] for rows in kinds if {(rows, ours), (rows, theirs)} <= set(rates)
    }


def write_report(figures: Sequence[Figure], out: Path | None, *, json_of: Mapping[str, Any]) -> list[str]:
    """Print everything, and write it below `out`; returns the bars that were missed."""
    lines = [_title(), *_tables(figures)]
    bars, missed = _bars(figures)
    lines += bars
    print("\n".join(lines))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        stem = out / f"{datetime.now(UTC):%Y-%m-%d}-storage"
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
        keep(figures, out, json_of=json_of)
        _plot(figures, stem.with_suffix(".png"))
    return missed


def keep(figures: Sequence[Figure], out: Path, *, json_of: Mapping[str, Any]) -> None:
    """Every figure as JSON, below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    document = {"title": _title(), **json_of, "figures": [asdict(figure) for figure in figures]}
    (out / f"{datetime.now(UTC):%Y-%m-%d}-storage.json").write_text(json.dumps(document, indent=1) + "\n")


def _title() -> str:
    versions = ", ".join(f"{name} {version}" for name in _LIBRARIES if (version := _version(name)))
    return (
        f"# Storage, {datetime.now(UTC):%Y-%m-%d}\n\n`benchmarks/storage.py`, radio-cache {radio_cache.__version__}, "
        f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}; {versions}. Random batches of 32 rows into one "
        "buffer; medians of interleaved turns. A ratio is to the first line of its table.\n"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def _tables(figures: Sequence[Figure]) -> list[str]:
    """One table a part: a line a reader, two columns a kind of rows."""
    lines: list[str] = []
    for part in dict.fromkeys(figure.part for figure in figures):
        here = [figure for figure in figures if figure.part == part]
        kinds, names = list(dict.fromkeys(f.rows for f in here)), list(dict.fromkeys(f.name for f in here))
        rate = {(f.rows, f.name): f for f in here}
        first = names[0] if peers.PREAD not in names else peers.PREAD
        lines += [f"## {part.capitalize()}", "", "| rows/s (GB/s, ratio) | " + " | ".join(kinds) + " |"]
        lines += ["|---|" + "---|" * len(kinds)]
        for name in names:
            cells = [_cell(rate.get((rows, name)), rate.get((rows, first))) for rows in kinds]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _cell(figure: Figure | None, floor: Figure | None) -> str:
    if figure is None or floor is None:
        return "–"
    gigabytes = figure.per_second * figure.row_bytes / 1e9
    return f"{figure.per_second:,.0f} ({gigabytes:.2f}, {figure.per_second / floor.per_second:.2f})"


def _bars(figures: Sequence[Figure]) -> tuple[list[str], list[str]]:
    lines, missed = ["## Bars", "", "| bar | least | median | met |", "|---|---|---|---|"], list[str]()
    for bar in BARS:
        quotients = list(ratios(figures, bar.part, bar.ours, bar.theirs).values())
        if not quotients:
            continue
        decide: Callable[[Sequence[float]], float] = min if bar.each else statistics.median
        met = decide(quotients) >= bar.least
        lines.append(
            f"| {bar.text} | {min(quotients):.2f} | {statistics.median(quotients):.2f} | {'yes' if met else 'NO'} |"
        )
        if not met:
            missed.append(bar.text)
    return [*lines, ""], missed


def _plot(figures: Sequence[Figure], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(dict.fromkeys(figure.part for figure in figures))
    heights = [len({f.name for f in figures if f.part == part}) for part in parts]
    picture, axes = plt.subplots(
        len(parts),
        1,
        figsize=(9, 1.2 * len(parts) + 0.42 * sum(heights)),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": [h + 1 for h in heights]},
    )
    for axis, part in zip(axes[:, 0], parts, strict=True):
        _plot_part(axis, [f for f in figures if f.part == part], part)
    picture.savefig(path, dpi=110)


def _plot_part(axis: Any, figures: Sequence[Figure], part: str) -> None:
    """Every kind of rows is a dot on its reader's line."""
    names, kinds = list(dict.fromkeys(f.name for f in figures)), list(dict.fromkeys(f.rows for f in figures))
    for kind in kinds:
        here = [f for f in figures if f.rows == kind]
        axis.scatter(
            [f.per_second * f.row_bytes / 1e9 for f in here], [names.index(f.name) for f in here], label=kind, s=24
        )
    axis.set(title=part, xscale="log", xlabel="GB/s" if part.startswith("zstd") is False else "GB/s decoded")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.legend(fontsize=7)
