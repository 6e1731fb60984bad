"""One codec of every kind, calibrated on heavy-tailed tokens."""

from typing import get_args

import numpy as np

from radio_cache.codecs import Codec
from radio_cache.codecs.base import CalibrationMaps
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.codecs.klt_zstd import Layout
from radio_cache.statistics.moments import Moments

TOKENS = (np.random.default_rng(1).standard_t(3, size=(2000, 32)) * 3).astype(np.float32)
REQUESTS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "klt/packed": CodecRequest(packing="packed"),
    "klt/zstd": CodecRequest(packing="zstd"),
    "klt/ans": CodecRequest(packing="ans"),
}


LAYOUTS = tuple(f"klt/zstd, {layout}" for layout in get_args(Layout))


def calibrated(request: CodecRequest, grid_hw: tuple[int, int] = (5, 4)) -> Codec:
    """A codec for maps of this grid."""
    maps = TOKENS[:1800].reshape(-1, *grid_hw, 32)
    sample = CalibrationMaps(fitted=maps, held_out=maps[:20], valid=np.ones(maps[:20].shape[:3], np.bool_))
    return calibrate(request, Moments.of(TOKENS), TOKENS, TOKENS[:400], maps=sample).codec
