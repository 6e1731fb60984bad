"""One codec of every kind, calibrated on heavy-tailed tokens, and maps it has not seen."""

import numpy as np
import pytest

from radio_cache.codecs import CODECS, Codec
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.moments import Moments

TOKENS = (np.random.default_rng(1).standard_t(3, size=(2000, 32)) * 3).astype(np.float32)
REQUESTS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "klt/packed": CodecRequest(packing="packed"),
    "klt/zstd": CodecRequest(packing="zstd"),
}


@pytest.fixture(scope="session", params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    """Each codec in turn."""
    return calibrate(REQUESTS[request.param], Moments.of(TOKENS), TOKENS, TOKENS[:400]).codec


@pytest.fixture
def maps() -> np.ndarray:
    """(2, 5, 4, 32) features."""
    return (np.random.default_rng(0).standard_t(3, size=(2, 5, 4, 32)) * 3).astype(np.float32)
