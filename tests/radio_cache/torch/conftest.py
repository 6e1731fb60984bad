"""One codec of every kind, calibrated on heavy-tailed tokens, and maps it has not seen."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from radio_cache.codecs import CODECS, Codec, KltZstd
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.codecs.klt_zstd import Layout
from radio_cache.statistics.moments import Moments

TOKENS = (np.random.default_rng(1).standard_t(3, size=(2000, 32)) * 3).astype(np.float32)
REQUESTS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "klt/packed": CodecRequest(packing="packed"),
    "klt/zstd": CodecRequest(packing="zstd"),
}


LAYOUTS = tuple(f"klt/zstd, {layout}" for layout in get_args(Layout))


@pytest.fixture(scope="session", params=[*CODECS, *LAYOUTS])
def codec(request: pytest.FixtureRequest) -> Codec:
    """Each codec in turn, and each layout of klt under zstd."""
    name, _, layout = request.param.partition(", ")
    codec = calibrate(REQUESTS[name], Moments.of(TOKENS), TOKENS, TOKENS[:400]).codec
    return replace(codec, layout=layout) if isinstance(codec, KltZstd) and layout else codec


@pytest.fixture
def maps() -> np.ndarray:
    """(2, 5, 4, 32) features."""
    return (np.random.default_rng(0).standard_t(3, size=(2, 5, 4, 32)) * 3).astype(np.float32)
