"""klt with a DCT of rows and columns: traps of grids and samples, and a row decoded from the text of docs/format.md alone."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radio_cache import Cache
from radio_cache.codecs import KltAns, codec_from_json
from radio_cache.codecs.base import CalibrationMaps
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.errors import CodecError, CorruptShardError, StoreError
from radio_cache.statistics.moments import Moments

REQUEST = CodecRequest(packing="ans")


def smooth_maps(count: int, grid_hw: tuple[int, int], channels: int = 24, seed: int = 0) -> np.ndarray:
    """Maps of low frequencies, with tokens of various lengths and a mean."""
    rng = np.random.default_rng(seed)
    h, w = grid_hw
    waves = np.stack(
        [np.cos(np.pi * (np.arange(n) + 0.5) * k / n) for n, k in ((h, 0), (h, 1))] if h > 1 else [np.ones(h)]
    )
    rows = np.einsum("nkc,kh->nhc", rng.normal(size=(count, len(waves), channels)), waves)
    columns = np.cos(np.pi * (np.arange(w) + 0.5) / w)
    maps = rows[:, :, None] * (1 + columns[None, None, :, None]) + 0.05 * rng.normal(size=(count, h, w, channels))
    lengths = np.exp(rng.normal(size=(count, h, w, 1)) * 0.3)
    return (lengths * (maps @ rng.normal(size=(channels, channels))) + 0.5).astype(np.float32)


def calibrated(maps: np.ndarray, request: CodecRequest = REQUEST) -> KltAns:
    tokens = maps.reshape(-1, maps.shape[-1])
    sample = CalibrationMaps(fitted=maps, held_out=maps[:8], valid=np.ones(maps[:8].shape[:3], np.bool_))
    codec = calibrate(request, Moments.of(tokens), tokens, tokens, maps=sample).codec
    assert isinstance(codec, KltAns)
    return codec


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)).mean())


@pytest.mark.parametrize("grid_hw", [(1, 9), (9, 1), (5, 4), (7, 7), (1, 1)])
def test_any_grid_keeps_the_fidelity(grid_hw: tuple[int, int]) -> None:
    codec = calibrated(smooth_maps(80, grid_hw))
    unseen = smooth_maps(40, grid_hw)
    assert mean_cosine(codec.decode(codec.encode(unseen)), unseen) > 0.985


def test_smooth_maps_take_fewer_bytes_than_with_channels_alone() -> None:
    maps = smooth_maps(80, (8, 8))
    tokens = maps.reshape(-1, maps.shape[-1])
    packed = calibrate(CodecRequest(packing="packed"), Moments.of(tokens), tokens, tokens).codec
    codec = calibrated(maps)
    used = np.mean([len(row.tobytes().rstrip(b"\0")) for row in codec.encode(maps)])
    assert used < 0.6 * packed.encode(maps).nbytes / len(maps)


def test_one_image_and_none() -> None:
    codec = calibrated(smooth_maps(30, (5, 4)))
    maps = smooth_maps(2, (5, 4), seed=3)
    np.testing.assert_array_equal(codec.encode(maps[0]), codec.encode(maps)[0])
    assert codec.decode(codec.encode(maps[:0])).shape == (0, 5, 4, 24)


@pytest.mark.parametrize("maps", [np.zeros((2, 5, 4, 24)), np.full((2, 5, 4, 24), 7.0), 1e-20 * np.ones((2, 5, 4, 24))])
def test_constant_maps_survive(maps: np.ndarray) -> None:
    codec = calibrated(smooth_maps(30, (5, 4)))
    decoded = codec.decode(codec.encode(maps.astype(np.float32)))
    assert np.isfinite(decoded).all()


def test_dead_channels_outliers_and_more_channels_than_tokens() -> None:
    maps = smooth_maps(40, (3, 3), channels=24)
    maps[..., 5] = 0
    maps[3, 1, 1] *= 1e3
    codec = calibrated(maps)
    assert mean_cosine(codec.decode(codec.encode(maps)), maps) > 0.98
    few = smooth_maps(12, (2, 2), channels=64)
    assert np.isfinite(calibrated(few).decode(calibrated(few).encode(few))).all()


def test_noise_beyond_the_tables_is_stored_all_the_same() -> None:
    codec = calibrated(smooth_maps(60, (7, 7)))
    noise = np.random.default_rng(5).normal(size=(4, 7, 7, 24)).astype(np.float32) * 100
    assert mean_cosine(codec.decode(codec.encode(noise)), noise) > 0.95


def test_a_finer_fidelity_costs_more_and_an_impossible_one_is_refused() -> None:
    maps = smooth_maps(60, (5, 4))
    fine = calibrated(maps, CodecRequest(packing="ans", fidelity=0.9995))
    assert mean_cosine(fine.decode(fine.encode(maps)), maps) > 0.999
    assert fine.step < calibrated(maps).step
    with pytest.raises(CodecError, match=r"cannot reach fidelity"):
        calibrated(maps, CodecRequest(packing="ans", fidelity=0.99999999))


def test_another_grid_and_damaged_parameters_are_named() -> None:
    codec = calibrated(smooth_maps(30, (5, 4)))
    with pytest.raises(StoreError, match=r"maps of \(5, 4\), not of \(4, 5\)"):
        codec.row_shape((4, 5), 24)
    for name, change in (
        ("frequencies", codec.frequencies + np.uint16(1)),
        ("thresholds", codec.thresholds[:, :1]),
        ("channel_scales", codec.channel_scales[1:]),
    ):
        with pytest.raises(StoreError, match="codec klt"):
            codec_from_json(codec.to_json(), {**codec.arrays(), name: change})
    with pytest.raises(StoreError, match="lanes"):
        codec_from_json(codec.to_json() | {"lanes": 0}, codec.arrays())


def test_flipped_bytes_are_an_error() -> None:
    codec = calibrated(smooth_maps(30, (5, 4)))
    codes = codec.encode(smooth_maps(2, (5, 4), seed=4))
    codes[1, 30] ^= 0xFF
    with pytest.raises(CorruptShardError, match="row 1 is no code"):
        codec.decode(codes)


GOLDEN = Path(__file__).parents[2] / "golden/v1-ans.zarr"


def decode_by_the_text(row: bytes, parameters: dict[str, Any], arrays: dict[str, Any]) -> np.ndarray:
    """Decode one row as docs/format.md describes it, with NumPy alone."""
    (h, w), c = arrays["frequency_scales"].shape, len(arrays["channel_scales"])
    lanes, tables = parameters["lanes"], arrays["frequencies"].astype(int)
    num_words, num_escapes = np.frombuffer(row, "<u4", 2)
    state = np.frombuffer(row, "<u4", lanes, 8).astype(int).tolist()
    at = 8 + 4 * lanes
    words = iter(np.frombuffer(row, "<u2", num_words, at).tolist())
    escapes = iter(np.frombuffer(row, "<i2", num_escapes, at + 2 * int(num_words)).tolist())
    scales = arrays["frequency_scales"][:, :, None].astype(int) + arrays["channel_scales"]
    classes = np.clip(scales // 4, 0, len(tables) - 2).ravel()
    values = np.zeros(h * w * (1 + c), int)
    runs = [(len(tables) - 1, np.arange(h * w))]
    runs += [(k, h * w + np.flatnonzero(classes == k)) for k in range(len(tables) - 1)]
    for table, positions in runs:
        ends = np.cumsum(tables[table])
        for number, position in enumerate(positions):
            slot = state[number % lanes] & 4095
            symbol = int(np.searchsorted(ends, slot, side="right"))
            x = tables[table][symbol] * (state[number % lanes] >> 12) + slot - (ends - tables[table])[symbol]
            state[number % lanes] = x if x >= 65536 else x << 16 | next(words)
            values[position] = next(escapes) if symbol == 255 else -(symbol + 1) // 2 if symbol % 2 else symbol // 2
    gains = 2.0 ** (np.cumsum(values[: h * w]).reshape(h, w, 1) / 4)
    q = values[h * w :].reshape(h, w, c)
    shrink = np.where(abs(q) > 1, parameters["shrink"][1], parameters["shrink"][0])
    z = np.sign(q) * (abs(q) + shrink) * parameters["step"]
    dct = [np.cos(np.pi * (2 * np.arange(n) + 1) * np.arange(n)[:, None] / (2 * n)) * np.sqrt(2 / n) for n in (h, w)]
    for matrix in dct:
        matrix[0] /= np.sqrt(2)
    y = np.einsum("kh,lw,klc->hwc", *dct, z) * gains
    phi = math.sqrt(arrays["eigenvalues"].astype(float).mean())
    return arrays["mean"] + phi * y @ arrays["basis"].T


def test_a_stranger_decodes_a_row_from_the_text_alone() -> None:
    codec = calibrated(smooth_maps(60, (5, 4)))
    maps = smooth_maps(3, (5, 4), seed=9)
    codes = codec.encode(maps)
    for row, decoded in zip(codes, codec.decode(codes), strict=True):
        foreign = decode_by_the_text(row.tobytes(), codec.to_json(), codec.arrays())
        np.testing.assert_allclose(foreign, decoded, rtol=1e-3, atol=1e-3 * float(np.abs(decoded).max()))


def test_the_golden_cache_is_decoded_from_the_text_alone() -> None:
    teacher = Cache(GOLDEN).teachers["golden-ans"]
    for row, decoded in zip(teacher.codes([0, 2]), teacher.maps([0, 2]), strict=True):
        foreign = decode_by_the_text(row.tobytes(), teacher.spec.codec.parameters, teacher.codec.arrays())
        np.testing.assert_allclose(foreign, decoded, rtol=1e-4, atol=1e-4 * float(np.abs(decoded).max()))
