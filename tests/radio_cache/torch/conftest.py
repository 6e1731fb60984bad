"""One codec of every kind, and maps that no codec was calibrated on."""

from dataclasses import replace

import numpy as np
import pytest
from sample_codecs import LAYOUTS, REQUESTS, calibrated

from radio_cache.codecs import CODECS, Codec, KltZstd


@pytest.fixture(scope="session", params=[*CODECS, *LAYOUTS])
def codec(request: pytest.FixtureRequest) -> Codec:
    """Each codec in turn, and each layout of klt under zstd."""
    name, _, layout = request.param.partition(", ")
    codec = calibrated(REQUESTS[name])
    return replace(codec, layout=layout) if isinstance(codec, KltZstd) and layout else codec


@pytest.fixture
def maps() -> np.ndarray:
    """(2, 5, 4, 32) features."""
    return (np.random.default_rng(0).standard_t(3, size=(2, 5, 4, 32)) * 3).astype(np.float32)
