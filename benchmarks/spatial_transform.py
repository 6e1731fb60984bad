"""Bits per value if klt also transformed the map's rows and columns: what a codec of smooth maps could save.

    radio-cache build --images DIR --teacher efficientnet-lite0 --size 224 --size 448 --codec half --out half.zarr
    python benchmarks/spatial_transform.py half.zarr [--cosine 0.99] [--out benchmarks/results]

The cache must hold maps in half precision. Basis, scales and tables are fitted on one half of the images (seeded) and measured
on the other, every codec at the same mean cosine of the held-out tokens. Compared are today's klt, packed and zstd, with

- the KLT of channels, a gain per token (quarter octaves of the token's norm), and a 2-D DCT-II of each channel's map;
- fixed widths per channel and frequency, with Lloyd's tables, or entropy coding with one table per half octave of the expected
  magnitude and a dead zone that minimises distortion + lambda * rate;
- expected magnitudes per coefficient (measured), or as a product of one scale per channel and one per frequency.

Bits of entropy coding are those of an ideal coder with the tables of the calibration half, plus 7 bits a token for gains.
"""

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

import radio_cache
from radio_cache.codecs import CODECS
from radio_cache.codecs.base import CalibrationSample, CalibrationTarget
from radio_cache.codecs.bit_allocation import lloyd
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.reader import Cache
from radio_cache.statistics.moments import Moments

Maps = NDArray[np.float32]
"""(images, h, w, c)"""

GAIN_BITS = 7
GAINS_PER_OCTAVE = 4
LARGEST_WIDTH = 9
LARGEST_CODED = 60
PRIOR_IMAGES = 400
"""Weight of the separable model against measured variances, in images of the sample."""

SEARCH_ROUNDS = 11


@dataclass(frozen=True)
class Row:
    """One codec at the target cosine."""

    codec: str
    bits: float
    cosine: float
    worst_percentile: float


def transform(coordinates: Maps) -> Maps:
    """Return the orthonormal DCT-II along rows and columns."""
    return np.asarray(dctn(coordinates, axes=(1, 2), norm="ortho"), np.float32)


def inverse(coefficients: Maps) -> Maps:
    """Invert `transform`."""
    return np.asarray(idctn(coefficients, axes=(1, 2), norm="ortho"), np.float32)


def token_cosines(a: Maps, b: Maps) -> NDArray[np.float32]:
    """Return (images, h, w) cosines."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.maximum(lengths, 1e-12)


def gains_of(coordinates: Maps, mean: NDArray[np.float32]) -> Maps:
    """Return (images, h, w, 1) gains: the root mean square of whole tokens, so that errors are relative to their length."""
    rms = np.sqrt(np.square(coordinates + mean).mean(-1, keepdims=True))
    return np.exp2(np.round(np.log2(rms) * GAINS_PER_OCTAVE) / GAINS_PER_OCTAVE).astype(np.float32)


def variances(coefficients: Maps, *, separable: bool) -> NDArray[np.float64]:
    """Return (h, w, c) variances of coefficients: measured, or drawn towards a product of channel and frequency."""
    measured = np.square(coefficients.astype(np.float64)).mean(0)
    if not separable:
        return measured + 1e-12
    logs = np.log(measured + 1e-12)
    model = np.exp(logs.mean((0, 1), keepdims=True) + logs.mean(2, keepdims=True) - logs.mean())
    model *= measured.sum() / model.sum()
    images = len(coefficients)
    return (images * measured + PRIOR_IMAGES * model) / (images + PRIOR_IMAGES)


class Fitted:
    """The transform of a calibration sample, applied to held-out maps."""

    def __init__(self, calibration: Maps, held_out: Maps, *, separable: bool) -> None:
        channels = calibration.shape[-1]
        self.basis = KltBasis.fit(Moments.of(calibration.reshape(-1, channels)))
        self.mean = self.basis.rotated_mean
        seen, self.coordinates = self.basis.forward(calibration), self.basis.forward(held_out)
        self.gains = gains_of(self.coordinates, self.mean)
        self.seen = transform(seen / gains_of(seen, self.mean))
        self.coefficients = transform(self.coordinates / self.gains)
        self.variances = variances(self.seen, separable=separable)
        self.gain_bits = GAIN_BITS / channels

    def quality(self, decoded: Maps) -> tuple[float, float]:
        """Return the mean and the first percentile of the cosines of decoded coefficients."""
        cosines = token_cosines(inverse(decoded) * self.gains + self.mean, self.coordinates + self.mean)
        return float(cosines.mean()), float(np.percentile(cosines, 1))


def fixed_widths(fitted: Fitted, target: float, name: str) -> Row:
    """Measure fixed widths per coefficient, spent by the errors of Lloyd's tables on normalised coefficients."""
    scales = np.sqrt(fitted.variances).astype(np.float32)
    pool = (fitted.seen / scales).ravel()
    pool = pool[np.random.default_rng(0).permutation(len(pool))[:300_000]]
    tables = [np.zeros(1), *(lloyd(pool, width) for width in range(1, LARGEST_WIDTH + 1))]
    borders = [(table[1:] + table[:-1]) / 2 for table in tables]
    errors = [float(np.square(pool - t[np.searchsorted(b, pool)]).mean()) for t, b in zip(tables, borders, strict=True)]
    slopes, width = np.zeros(LARGEST_WIDTH), 0
    while width < LARGEST_WIDTH:  # the convex minorant of the errors: what each further bit saves
        saved = {end: (errors[width] - errors[end]) / (end - width) for end in range(width + 1, LARGEST_WIDTH + 1)}
        best = max(saved, key=lambda end: saved[end])
        slopes[width:best], width = saved[best], best
    savings = fitted.variances[..., None] * slopes
    ordered = np.sort(savings.ravel())[::-1]

    def decode(bits: float) -> tuple[float, Maps]:
        spent = max(1, int(bits * fitted.variances.size))
        widths = (savings >= ordered[spent - 1]).sum(-1)
        decoded = np.zeros_like(fitted.coefficients)
        for width in range(1, LARGEST_WIDTH + 1):
            chosen = widths == width
            normalised = fitted.coefficients[:, chosen] / scales[chosen]
            decoded[:, chosen] = tables[width][np.searchsorted(borders[width], normalised)] * scales[chosen]
        return float(widths.mean()) + fitted.gain_bits, decoded

    return _at_cosine(fitted, decode, target, name, low=0.1, high=LARGEST_WIDTH - 0.5, rising=True)


def coded(fitted: Fitted, target: float, trade: float, name: str) -> Row:
    """Measure a uniform step with a dead zone, under ideal entropy coding by classes. trade: lambda, in squared steps a bit."""

    def quantise(coefficients: Maps, step: float, magnitudes: NDArray[np.float32]) -> Maps:
        absolute = np.abs(coefficients) / step
        floor = np.floor(absolute)
        candidates = np.stack([np.zeros_like(floor), floor, floor + 1])
        decay = np.exp(-0.5 / magnitudes)
        # Bits under a Laplace distribution of this mean magnitude, sign included.
        zero, first = -np.log2(1 - decay), -np.log2((1 / decay - decay) / 2)
        rate = np.where(candidates == 0, zero, first + candidates / magnitudes * np.log2(np.e))
        cost = np.square(absolute - candidates) + trade * rate
        return np.take_along_axis(candidates, cost.argmin(0)[None], 0)[0]

    def decode(step: float) -> tuple[float, Maps]:
        magnitudes = np.maximum(np.sqrt(fitted.variances / 2) / step, 0.02).astype(np.float32)
        seen = quantise(fitted.seen, step, magnitudes).astype(int)
        codes = quantise(fitted.coefficients, step, magnitudes).astype(int)
        shrink = [
            float((np.abs(fitted.seen)[seen == k] / step - k).mean()) if (seen == k).any() else 0.0 for k in (1, 2)
        ]
        classes = np.round(2 * np.log2(magnitudes)).astype(int)
        bits = 0.0
        for number in np.unique(classes):
            chosen = classes == number
            counts = np.bincount(np.minimum(seen[:, chosen].ravel(), LARGEST_CODED), minlength=LARGEST_CODED + 1) + 0.02
            values = np.minimum(codes[:, chosen].ravel(), LARGEST_CODED)
            bits += float(-np.log2(counts / counts.sum())[values].sum()) + int((values > 0).sum())
        offsets = np.where(codes == 1, shrink[0], np.where(codes > 1, shrink[1], 0.0))
        decoded = (np.sign(fitted.coefficients) * (codes + offsets) * step).astype(np.float32)
        return bits / codes.size + fitted.gain_bits, decoded

    return _at_cosine(fitted, decode, target, name, low=0.02, high=4.0, rising=False)


def _at_cosine(
    fitted: Fitted,
    decode: Callable[[float], tuple[float, Maps]],
    target: float,
    name: str,
    *,
    low: float,
    high: float,
    rising: bool,
) -> Row:
    """Halve the range of a parameter until the mean cosine is the target. rising: the cosine rises with the parameter."""
    for _ in range(SEARCH_ROUNDS):
        middle = float(np.sqrt(low * high))
        enough = fitted.quality(decode(middle)[1])[0] >= target
        low, high = (low, middle) if enough == rising else (middle, high)
    bits, decoded = decode(high if rising else low)
    return Row(name, bits, *fitted.quality(decoded))


def today(label: str, calibration: Maps, held_out: Maps, target: float) -> Row:
    """Measure a codec of radio-cache, calibrated so that the held-out half has the target cosine."""
    channels = calibration.shape[-1]
    tokens = calibration.reshape(-1, channels)
    tested = held_out.reshape(-1, channels)
    sample = CalibrationSample(moments=Moments.of(tokens), tokens=tokens, held_out=tested)
    codec = CODECS[label].calibrate(CalibrationTarget(fidelity=target, cosine=target), sample).codec
    codes = codec.encode(held_out)
    num_bytes = codes.nbytes
    if codec.zstd_level is not None:
        compressor = zstandard.ZstdCompressor(level=codec.zstd_level)
        num_bytes = sum(len(compressor.compress(row.tobytes())) for row in codes)
    cosines = token_cosines(codec.decode(codes), held_out)
    return Row(label, num_bytes * 8 / held_out.size, float(cosines.mean()), float(np.percentile(cosines, 1)))


def main() -> None:
    """Print a table for each teacher of the cache, and write it to a file with `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="cache with maps in half precision")
    parser.add_argument("--cosine", type=float, default=0.99, help="mean cosine of held-out tokens (default 0.99)")
    parser.add_argument("--out", type=Path, help="folder for the table")
    arguments = parser.parse_args()
    cache = Cache(arguments.cache)
    lines = [
        f"# KLT and DCT beside today's klt, mean cosine {arguments.cosine:g}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`python benchmarks/spatial_transform.py CACHE --cosine {arguments.cosine:g}`: radio-cache {radio_cache.__version__}, "
        f"NumPy {np.__version__}, {os.cpu_count()} cores ({platform.machine()}). Half of the images to fit, half to measure.",
        "",
    ]
    for name, teacher in cache.teachers.items():
        rows = cache.usable_rows([name])
        maps = np.asarray(teacher.maps(rows), np.float32)
        order = np.random.default_rng(0).permutation(len(maps))
        calibration, held_out = maps[order[: len(maps) // 2]], maps[order[len(maps) // 2 :]]
        lines += [
            f"## {name}: {len(maps)} images, {maps.shape[1]} x {maps.shape[2]} tokens, {maps.shape[3]} channels",
            "",
            "| codec | bits a value | of today's | mean cosine | first percentile |",
            "|---|---|---|---|---|",
        ]
        packed = today("klt/packed", calibration, held_out, arguments.cosine)
        zstd = today("klt/zstd", calibration, held_out, arguments.cosine)
        measured = Fitted(calibration, held_out, separable=False)
        separable = Fitted(calibration, held_out, separable=True)
        table = [
            (packed, packed),
            (fixed_widths(measured, arguments.cosine, "DCT, fixed widths, measured variances"), packed),
            (fixed_widths(separable, arguments.cosine, "DCT, fixed widths, separable variances"), packed),
            (zstd, zstd),
            (coded(measured, arguments.cosine, 0.0, "DCT, ideally coded, measured variances, no dead zone"), zstd),
            (coded(separable, arguments.cosine, 0.0, "DCT, ideally coded, separable variances, no dead zone"), zstd),
            (coded(separable, arguments.cosine, 0.06, "DCT, ideally coded, separable variances, lambda 0.06"), zstd),
        ]
        lines += [
            f"| {row.codec} | {row.bits:.2f} | {row.bits / base.bits:.2f} | {row.cosine:.4f} | {row.worst_percentile:.4f} |"
            for row, base in table
        ]
        lines.append("")
        print("\n".join(lines[-9 - 4 :]), flush=True)
    if arguments.out:
        file = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-spatial-transform-{arguments.cosine:g}.md"
        file.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
