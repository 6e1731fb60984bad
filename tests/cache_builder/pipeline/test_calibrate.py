"""The codec a build chooses for a teacher that is new."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cache_builder.pipeline.calibrate import (
    ChosenCodec,
    calibrate_on_sample,
    codec_without_calibration,
    resolve_codec_request,
    sample_rows,
)
from radio_cache.codecs import Half, Int8, KltPacked, KltZstd
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import CodecError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import TeacherSpec
from radio_cache.testing import fake_spec

SPEC = replace(fake_spec("t", summary_dim=None, spatial_dim=8), codec=CodecRecord())  # 4 x 4 tokens an image
MIX = np.random.default_rng(0).normal(size=(8, 8))
MANY = np.arange(500)


def tokens_of(rows: list[int]) -> Iterator[np.ndarray]:
    for row in rows:
        yield (np.random.default_rng(row).normal(size=(16, 8)) @ MIX).astype(np.float32)


def choose_codec(spec: TeacherSpec, sample: Any, tokens_of: Any) -> ChosenCodec:
    """Choose as a build does when it registers a teacher."""
    request, note = resolve_codec_request(spec, len(sample))
    if not request.needs_calibration:
        return codec_without_calibration(request, note)
    maps = ((tokens[:, None], np.ones((len(tokens), 1), np.bool_)) for tokens in tokens_of(list(sample)))
    return calibrate_on_sample(request, list(sample), maps)


def chosen(request: CodecRequest | None, usable: Any = MANY) -> Any:
    return choose_codec(replace(SPEC, codec=CodecRecord.of_request(request)), np.asarray(usable), tokens_of)


def test_without_a_request_it_is_packed_klt_and_the_note_says_what_it_keeps() -> None:
    found = chosen(None)
    assert isinstance(found.codec, KltPacked)
    assert found.recorded.request == {"name": "klt", "packing": "packed", "fidelity": 0.99}
    assert found.recorded.calibration["cosine"] > 0.99
    assert "klt, packed: mean cosine 0.99" in found.note


def test_too_few_images_are_kept_as_float16_unless_klt_was_asked_for() -> None:
    found = chosen(None, range(20))
    assert isinstance(found.codec, Half)
    assert "20 images are too few" in found.note
    with pytest.raises(CodecError, match=r"^20 images are too few .* take at least 64, or --codec int8 or half"):
        chosen(CodecRequest(), range(20))


def test_requests_are_followed() -> None:
    assert isinstance(chosen(CodecRequest(name="half")).codec, Half)
    assert isinstance(chosen(CodecRequest(name="int8"), range(20)).codec, Int8)
    zstd = chosen(CodecRequest(packing="zstd", step=0.25)).codec
    assert isinstance(zstd, KltZstd)
    assert zstd.step == 0.25


def test_one_image_cannot_be_held_out_of_one() -> None:
    with pytest.raises(CodecError, match="take --codec half"):
        chosen(CodecRequest(name="int8"), [3])


@pytest.mark.parametrize("request_", [CodecRequest(name="int8"), CodecRequest(), CodecRequest(packing="zstd")])
def test_images_without_a_token_are_too_few_tokens(request_: CodecRequest) -> None:
    spec = replace(SPEC, codec=CodecRecord.of_request(request_))
    with pytest.raises(CodecError, match=r"^0 tokens are too few to calibrate the codec .* take --codec half"):
        choose_codec(spec, MANY[:80], lambda rows: (np.zeros((0, 8), np.float32) for _ in rows))


def test_the_same_images_give_the_same_codec() -> None:
    first, second = chosen(None), chosen(None)
    for name, array in first.codec.arrays().items():
        np.testing.assert_array_equal(array, second.codec.arrays()[name])


def test_the_sample_comes_from_all_over_the_cache_and_differs_by_teacher() -> None:
    rows = sample_rows(MANY, 100, "t")
    assert len(set(rows)) == 100
    assert max(rows) > 450
    assert min(rows) < 50
    assert rows == sample_rows(MANY, 100, "t") != sample_rows(MANY, 100, "u")
