from dataclasses import replace

import numpy as np
import pytest
import zstandard

from cache_builder.commands.copy import copy
from radio_cache.codecs import KltZstd
from radio_cache.codecs.calibrate import CodecRequest, calibrate, packings
from radio_cache.errors import CodecError, ConfigError
from radio_cache.statistics.fidelity import measure_fidelity
from radio_cache.statistics.moments import Moments

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(24, 24)) * np.geomspace(3, 0.05, 24)[:, None]


def tokens(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 24)) * rng.lognormal(0, 0.4, (count, 1)) @ MIX + 0.3).astype(np.float32)


TRAIN, HELD_OUT, NEW = tokens(4000, 1), tokens(1000, 2), tokens(3000, 3).reshape(100, 6, 5, 24)
MOMENTS = Moments.of(TRAIN)


@pytest.mark.parametrize("packing", ["packed", "zstd"])
@pytest.mark.parametrize("fidelity", [0.95, 0.99, 0.999])
def test_images_never_seen_keep_the_fidelity_asked_for(packing: str, fidelity: float) -> None:
    calibrated = calibrate(CodecRequest(packing=packing, fidelity=fidelity), MOMENTS, TRAIN, HELD_OUT)
    decoded = calibrated.codec.decode(calibrated.codec.encode(NEW))
    measured = measure_fidelity(NEW.reshape(-1, 24), decoded.reshape(-1, 24))
    assert measured.cosine >= fidelity
    assert measured.cosine == pytest.approx(calibrated.fidelity.cosine, abs=0.15 * (1 - fidelity))
    assert measured.cosine < 1 - 0.5 * (1 - fidelity), "it spends more than it was asked for"


def test_more_fidelity_costs_more_bytes() -> None:
    sizes = [
        calibrate(CodecRequest(fidelity=f), MOMENTS, TRAIN, HELD_OUT).codec.row_shape((6, 5), 24)[-1]
        for f in (0.9, 0.99, 0.999)
    ]
    assert sizes == sorted(set(sizes))


def test_a_step_is_taken_as_it_is_and_packed_follows_what_it_would_keep() -> None:
    zstd = calibrate(CodecRequest(packing="zstd", step=0.3), MOMENTS, TRAIN, HELD_OUT)
    assert zstd.codec.to_json()["step"] == 0.3
    packed = calibrate(CodecRequest(packing="packed", step=0.3), MOMENTS, TRAIN, HELD_OUT)
    assert packed.fidelity.cosine >= zstd.fidelity.cosine


@pytest.mark.parametrize(("fidelity", "layout"), [(0.97, "nibbles"), (0.9999, "bytes")])
def test_the_layout_under_zstd_is_the_one_that_takes_fewer_bytes(fidelity: float, layout: str) -> None:
    codec = calibrate(CodecRequest(packing="zstd", fidelity=fidelity), MOMENTS, TRAIN, HELD_OUT).codec
    assert isinstance(codec, KltZstd)
    assert codec.layout == layout
    compressor = zstandard.ZstdCompressor(level=codec.level)
    sizes = {
        name: sum(len(compressor.compress(row.tobytes())) for row in replace(codec, layout=name).encode(NEW))
        for name in ("bytes", "nibbles")
    }
    assert min(sizes, key=lambda name: sizes[name]) == layout


def test_calibration_is_the_same_every_time() -> None:
    first, second = (calibrate(CodecRequest(), MOMENTS, TRAIN, HELD_OUT) for _ in range(2))
    for name, array in first.codec.arrays().items():
        np.testing.assert_array_equal(array, second.codec.arrays()[name])


def test_a_fidelity_out_of_reach_names_the_best_and_the_cure() -> None:
    with pytest.raises(CodecError, match=r"its finest setting.*--codec half"):
        calibrate(CodecRequest(fidelity=0.999999999), MOMENTS, TRAIN, HELD_OUT)


def test_impossible_requests_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'klt'"):
        CodecRequest(name="kltt")
    with pytest.raises(ConfigError, match="fidelity 1"):
        CodecRequest(fidelity=1.0)
    with pytest.raises(ConfigError, match="step 100"):
        CodecRequest(step=100)
    with pytest.raises(ConfigError, match="packing"):
        CodecRequest(packing="zip")


def test_what_decides_the_bytes_is_recorded_and_nothing_else() -> None:
    assert CodecRequest(name="half").to_json() == {"name": "half"}
    assert CodecRequest().to_json() == {"name": "klt", "packing": "packed", "fidelity": 0.99}
    assert CodecRequest(step=0.5).to_json() == {"name": "klt", "packing": "packed", "step": 0.5}


def test_the_copy_command_offers_every_packing() -> None:
    option = next(parameter for parameter in copy.params if parameter.name == "packing")
    assert tuple(option.type.choices) == packings()  # type: ignore[attr-defined]
