"""Bits per value against fidelity on real teacher maps: our codecs, PHI-S and absmax integers, and FAISS quantisers.

    python benchmarks/codecs.py [--images DIR] [--teachers efficientnet-lite0 ...] [--out benchmarks/results]

Everything is fitted on one half of the images (seeded) and measured on the other. Bits count all that is stored per
image: chunk, checksum and its share of the shard's index. What is stored once per teacher (bases, tables, codebooks) is
listed beside, since its share depends on the number of images alone. Features are kept in the temporary folder, so that a
second run is quick. Without --images it runs on crops of the photographs inside scikit-image and scikit-learn.
"""

import argparse
import hashlib
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

import radio_cache
from cache_builder.demo.images import DemoImagesConfig, bundled_photos, make_demo_images
from cache_builder.pipeline.preprocess import teacher_input, view_pixels
from cache_builder.sources.folder import walk_folder
from cache_builder.teachers import load_teacher
from radio_cache.codecs import Codec
from radio_cache.codecs.base import CalibrationMaps
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.codecs.klt_zstd import split_integers
from radio_cache.errors import CodecError
from radio_cache.geometry.crops import valid_hw
from radio_cache.images.decode import decode_image
from radio_cache.shards.encoding import encode_shard
from radio_cache.statistics.fidelity import measure_fidelity
from radio_cache.statistics.moments import Moments
from radio_cache.statistics.phi_s import Affine, phi_s

Maps = NDArray[np.float32]
"""(images, h, w, c)"""
Chunks = list[bytes]

SHARD_IMAGES = 128
BATCH = 32
SEED = 0
FIDELITIES = (0.98, 0.985, 0.99, 0.995, 0.998, 0.999)
HELD_OUT_OF_CALIBRATION = 0.2
"""Of the calibration half, as in a build: the share on which klt chooses its step."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One codec on one teacher's held-out maps."""

    teacher: str
    family: str
    codec: str
    bits_per_value: float
    cosine: float
    cosine_worst: float
    relative_mse: float
    once_per_teacher_bytes: int


@dataclass(frozen=True)
class Sample:
    """One teacher's maps of the calibration images and of the others."""

    teacher: str
    calibration: Maps
    held_out: Maps

    @property
    def tokens(self) -> NDArray[np.float32]:
        return _tokens(self.calibration)

    def row(self, family: str, codec: str, chunks: Chunks, decoded: NDArray[np.float32], once_bytes: int) -> Row:
        """Bits from whole shards of these chunks, fidelity from what was decoded of them."""
        stored = sum(
            len(encode_shard(chunks[first : first + SHARD_IMAGES], len(chunks[first : first + SHARD_IMAGES])))
            for first in range(0, len(chunks), SHARD_IMAGES)
        )
        fidelity = measure_fidelity(_tokens(self.held_out), _tokens(decoded))
        return Row(
            teacher=self.teacher,
            family=family,
            codec=codec,
            bits_per_value=8 * stored / self.held_out.size,
            cosine=fidelity.cosine,
            cosine_worst=fidelity.cosine_worst,
            relative_mse=fidelity.relative_mse,
            once_per_teacher_bytes=once_bytes,
        )


def _tokens(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    return maps.reshape(-1, maps.shape[-1])


def our_codecs(sample: Sample) -> Iterator[Row]:
    """half, int8, and klt in all packings at several fidelities, through the functions that a build calls."""
    num_fitted = round(len(sample.calibration) * (1 - HELD_OUT_OF_CALIBRATION))
    fitted, tested = _tokens(sample.calibration[:num_fitted]), _tokens(sample.calibration[num_fitted:])
    moments = Moments.of(fitted)
    held_out = sample.calibration[num_fitted:]
    maps = CalibrationMaps(
        fitted=sample.calibration[:num_fitted], held_out=held_out, valid=np.ones(held_out.shape[:3], np.bool_)
    )
    requests = [CodecRequest(name="half"), CodecRequest(name="int8")]
    for fidelity in FIDELITIES:
        requests.append(CodecRequest(packing="zstd", fidelity=fidelity))
        requests.append(CodecRequest(packing="packed", fidelity=fidelity))
        requests.append(CodecRequest(packing="ans", fidelity=fidelity))
    for request in requests:
        klt = request.name == "klt"
        label = f"klt {request.packing}, fidelity {request.fidelity:g}" if klt else request.name
        try:
            codec = calibrate(request, moments, fitted, tested, maps=maps).codec
        except CodecError as exc:
            print(f"{sample.teacher}, {label}: {exc}")
            continue
        codes = codec.encode(sample.held_out)
        once = sum(array.nbytes for array in codec.arrays().values())
        family = f"klt {request.packing}" if klt else request.name
        yield sample.row(family, label, _stored(codec, codes), codec.decode(codes), once)


def _stored(codec: Codec, codes: NDArray[Any]) -> Chunks:
    chunks = [row.tobytes() for row in codes]
    return chunks if codec.zstd_level is None else _zstd(chunks, codec.zstd_level)


def _zstd(chunks: Chunks, level: int = 3) -> Chunks:
    compressor = zstandard.ZstdCompressor(level=level)
    return [compressor.compress(chunk) for chunk in chunks]


def phi_s_uniform(sample: Sample) -> Iterator[Row]:
    """PHI-S, a uniform step that reaches a fidelity, zstd: klt without its basis, which shows what the basis is worth."""
    affine = phi_s(Moments.of(sample.tokens))
    targets, measured = affine.forward(sample.tokens), affine.forward(sample.held_out)
    for fidelity in FIDELITIES:
        low, high = np.log(1e-3), np.log(8.0)
        for _ in range(14):
            step = float(np.exp((low + high) / 2))
            decoded = affine.inverse(np.rint(targets / step) * step).astype(np.float32)
            reached = measure_fidelity(sample.tokens, decoded).cosine >= fidelity
            low, high = (np.log(step), high) if reached else (low, np.log(step))
        step = float(np.exp(low))
        codes = np.rint(measured / step)
        planes = np.stack(split_integers(np.moveaxis(codes, -1, 1).astype(np.int32), "planes"), axis=1)
        decoded = affine.inverse(codes * step).astype(np.float32)
        label = f"PHI-S step + zstd, fidelity {fidelity:g}"
        chunks = _zstd([row.tobytes() for row in planes])
        yield sample.row("PHI-S step + zstd", label, chunks, decoded, _affine_bytes(affine))


def phi_s_integers(sample: Sample) -> Iterator[Row]:
    """PHI-S, then one uniform step for all channels: they all have unit variance. Values beyond the last code saturate."""
    affine = phi_s(Moments.of(sample.tokens))
    targets = affine.forward(sample.tokens)
    for bits in (8, 4):
        largest = 2 ** (bits - 1) - 1
        # In deviations, by least error on the calibration tokens.
        steps = np.geomspace(1.0, 60.0, 60) / largest
        step = min(steps, key=lambda s: _squared_error(targets, _quantised(targets, s, largest) * s))
        codes = _quantised(affine.forward(sample.held_out), step, largest)
        decoded = affine.inverse(codes * step).astype(np.float32)
        yield from _integer_rows(sample, "PHI-S", bits, codes, decoded, _affine_bytes(affine))


def _affine_bytes(affine: Affine) -> int:
    return 4 * (affine.matrix.size + affine.shift.size)  # kept as float32


def _quantised(values: NDArray[np.floating[Any]], step: Any, largest: int) -> NDArray[np.int8]:
    return np.clip(np.rint(values / step), -largest, largest).astype(np.int8)


def _squared_error(values: NDArray[np.float64], decoded: NDArray[np.float64]) -> float:
    return float(np.square(values - decoded).sum())


def absmax_integers(sample: Sample) -> Iterator[Row]:
    """One scale per channel from its largest magnitude in the calibration tokens; beyond it values saturate."""
    largest_value = np.maximum(np.abs(sample.tokens).max(axis=0), 1e-12)
    for bits in (8, 4):
        largest = 2 ** (bits - 1) - 1
        scale = largest_value / largest
        codes = _quantised(sample.held_out, scale, largest)
        decoded = (codes * scale).astype(np.float32)
        yield from _integer_rows(sample, "absmax", bits, codes, decoded, scale.size * 4)


def _integer_rows(
    sample: Sample, name: str, bits: int, codes: NDArray[np.int8], decoded: NDArray[np.float32], once: int
) -> Iterator[Row]:
    """Codes (images, h, w, c) stored plain (two int4 a byte), and channel by channel under zstd, packed or not: the smaller."""
    plain = codes if bits == 8 else _nibbles(codes)
    yield sample.row(f"{name} int{bits}", f"{name} int{bits}", [row.tobytes() for row in plain], decoded, once)
    by_channel = np.ascontiguousarray(np.moveaxis(codes, -1, 1))
    candidates = [_zstd([row.tobytes() for row in by_channel])]
    if bits == 4:
        candidates.append(_zstd([_nibbles(row.reshape(-1)).tobytes() for row in by_channel]))
    smallest = min(candidates, key=lambda chunks: sum(map(len, chunks)))
    yield sample.row(f"{name} int{bits}", f"{name} int{bits} + zstd", smallest, decoded, once)


def _nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    unsigned = (codes + 8).astype(np.uint8)
    if unsigned.shape[-1] % 2:
        unsigned = np.concatenate([unsigned, np.zeros_like(unsigned[..., :1])], axis=-1)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << np.uint8(4))


def faiss_quantisers(sample: Sample) -> Iterator[Row]:
    """FAISS scalar quantisers of 8, 6 and 4 bits (a range per channel), and product quantisers of 8-bit codes."""
    faiss: Any = importlib.import_module("faiss")
    channels = sample.held_out.shape[-1]
    indexes: list[tuple[str, str, Any, int]] = []
    for bits in (8, 6, 4):
        kind = getattr(faiss.ScalarQuantizer, f"QT_{bits}bit")
        indexes.append(("FAISS SQ", f"FAISS SQ{bits}", faiss.IndexScalarQuantizer(channels, kind), 8 * channels))
    for width in (2, 4):
        if channels % width == 0:
            pq = faiss.IndexPQ(channels, channels // width, 8)
            pq.pq.cp.seed = SEED
            pq.pq.cp.min_points_per_centroid = 1  # a hundred images have few tokens: do not warn once per sub-quantiser
            indexes.append(("FAISS PQ", f"FAISS PQ{channels // width}x8", pq, 4 * 256 * channels))
    for family, label, index, once in indexes:
        index.train(np.ascontiguousarray(sample.tokens))
        codes = index.sa_encode(np.ascontiguousarray(_tokens(sample.held_out)))
        decoded = index.sa_decode(codes).reshape(sample.held_out.shape)
        chunks = [part.tobytes() for part in codes.reshape(len(sample.held_out), -1)]
        yield sample.row(family, label, chunks, decoded, once)


def demo_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Crops of the bundled photographs; calibration and measurement share no pixel."""
    images = make_demo_images(
        bundled_photos(), folder, DemoImagesConfig(train_crops=20, test_crops=20, max_side_px=256)
    )
    train, test = (sorted(part.rglob("*.png")) for part in (images.train, images.test))
    order = np.random.default_rng(SEED).permutation(len(train))  # calibration's last fifth is of all photos
    return [train[i] for i in order], test


def split_files(folder: Path, limit: int | None) -> tuple[list[Path], list[Path]]:
    """The images below a folder, in a seeded order, one half and the other."""
    images = walk_folder(folder).images
    order = np.random.default_rng(SEED).permutation(len(images))[:limit]
    files = [folder / images[i] for i in order]
    return files[: len(files) // 2], files[len(files) // 2 :]


def features_of(name: str, files: list[Path], kept_in: Path) -> Maps:
    """A teacher's maps of image files, from the last run if it saw the same files."""
    listed = [[str(file), file.stat().st_size] for file in files]
    key = hashlib.sha256(json.dumps([name, version("timm"), listed]).encode()).hexdigest()[:16]
    cached_path = kept_in / f"{name}-{key}.npz"
    if cached_path.exists():
        with np.load(cached_path) as stored:
            return stored["maps"]
    teacher = load_teacher(name)
    geometry = teacher.spec.geometry
    parts: list[Maps] = []
    for first in range(0, len(files), BATCH):
        images = [decode_image(file.read_bytes()) for file in files[first : first + BATCH]]
        pixels = torch.from_numpy(np.stack([view_pixels(image, geometry) for image in images]))
        valid = [valid_hw((image.height, image.width), geometry) for image in images]
        with torch.inference_mode():
            parts.append(teacher(teacher_input(pixels, valid, teacher.spec.normalisation)).spatial.float().numpy())
    maps = np.ascontiguousarray(np.concatenate(parts))
    kept_in.mkdir(parents=True, exist_ok=True)
    np.savez(cached_path, maps=maps)
    return maps


def table(rows: list[Row]) -> str:
    lines = [
        "| codec | bits per value | mean cosine | worst 1 % | relative MSE | once per teacher |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.codec} | {row.bits_per_value:.2f} | {row.cosine:.5f} | {row.cosine_worst:.4f} | {row.relative_mse:.5f} "
        f"| {row.once_per_teacher_bytes / 1000:.0f} kB |"
        for row in rows
    ]
    return "\n".join(lines)


STYLES = {
    "klt zstd": ("#0b6e4f", "o", "-"),
    "klt ans": ("#6a3d9a", "D", "-"),
    "klt packed": ("#37b385", "s", "-"),
    "PHI-S step + zstd": ("#b3541e", ".", ":"),
    "PHI-S int8": ("#b3541e", "^", "none"),
    "PHI-S int4": ("#b3541e", "v", "none"),
    "absmax int8": ("#7a5195", "^", "none"),
    "absmax int4": ("#7a5195", "v", "none"),
    "FAISS SQ": ("#2f6db5", "D", "--"),
    "FAISS PQ": ("#84b1e0", "D", "none"),
    "int8": ("#222222", "+", "none"),
}
"""Family -> colour, marker, line. half, at 16 bits and an error of 1e-8, would only squeeze the others together."""


def plot(rows: list[Row], teachers: list[str], file: Path) -> None:
    """Two errors, logarithmic, against bits per value; a column per teacher. Down and left is better."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    size = (4.6 * len(teachers) + 1.6, 7.6)
    figure, axes = pyplot.subplots(2, len(teachers), figsize=size, sharex=True, sharey="row", squeeze=False)
    for axis, teacher in zip(axes[0], teachers, strict=True):
        axis.set_title(teacher)
    for column, teacher in enumerate(teachers):
        for family, (colour, marker, line) in STYLES.items():
            own = sorted(
                (row for row in rows if (row.teacher, row.family) == (teacher, family)),
                key=lambda row: row.bits_per_value,
            )
            look = {
                "color": colour,
                "marker": marker,
                "linestyle": line,
                "label": family,
                "linewidth": 1.3,
                "markersize": 6,
            }
            bits = [row.bits_per_value for row in own]
            axes[0][column].plot(bits, [1 - row.cosine for row in own], **look)
            axes[1][column].plot(bits, [row.relative_mse for row in own], **look)
        axes[1][column].set_xlabel("bits per value, all that is stored per image")
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log", xlim=(1.9, 8.7))
        axis.set_xticks([2, 3, 4, 5, 6, 8], labels=["2", "3", "4", "5", "6", "8"])
        axis.minorticks_off()
        axis.grid(color="#dddddd", linewidth=0.6)
    axes[0][0].set_ylabel("1 - mean cosine, held-out images")
    axes[1][0].set_ylabel("relative MSE, held-out images")
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / size[0], 1))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", frameon=False, fontsize=9)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of at least 128 photographs")
    parser.add_argument("--limit", type=int, help="use so many of them")
    parser.add_argument("--teachers", nargs="+", default=[f"efficientnet-lite{n}" for n in range(3)])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    kept_in = Path(tempfile.gettempdir()) / "radio-cache-codecs"
    calibration, held_out = split_files(args.images, args.limit) if args.images else demo_files(kept_in / "demo")
    schemes: tuple[Callable[[Sample], Iterator[Row]], ...] = (
        our_codecs,
        phi_s_uniform,
        phi_s_integers,
        absmax_integers,
        faiss_quantisers,
    )
    rows: list[Row] = []
    text = [f"# Codecs, {datetime.now(UTC):%Y-%m-%d}\n"]
    source = f"photographs of {args.images.name}" if args.images else "crops of bundled photographs"
    text.append(
        f"`benchmarks/codecs.py`, radio-cache {radio_cache.__version__}: {len(calibration)} {source} to calibrate on, "
        f"{len(held_out)} others to measure on, maps of whole images. Bits count everything stored per image: codes, "
        "checksum and its entry in the shard's index. What is stored once per teacher is listed beside.\n"
    )
    for name in args.teachers:
        sample = Sample(name, features_of(name, calibration, kept_in), features_of(name, held_out, kept_in))
        found = [row for scheme in schemes for row in scheme(sample)]
        rows += found
        text += [f"## {name}: maps of {'x'.join(map(str, sample.held_out.shape[1:]))}\n", table(found), ""]
        print("\n".join(text[-3:]), flush=True)
    stem = args.out / f"{datetime.now(UTC):%Y-%m-%d}-codecs{'' if args.images else '-demo'}"
    args.out.mkdir(parents=True, exist_ok=True)
    text.append(f"![1 - cosine against bits per value]({stem.name}.png)")
    stem.with_suffix(".md").write_text("\n".join(text) + "\n")
    stem.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    plot(rows, args.teachers, stem.with_suffix(".png"))
    print(f"wrote {stem}.md, .json and .png")


if __name__ == "__main__":
    main()
