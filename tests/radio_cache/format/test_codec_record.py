"""A codec's record keeps the JSON that caches have, in its order."""

import json
from typing import Any

import pytest

from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.format.codec_record import CodecRecord

REQUEST = {"name": "klt", "packing": "zstd", "step": 0.4}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"name": "half"},
        {"name": "klt", "asked": REQUEST},
        {"name": "klt", "packing": "zstd", "step": 0.4, "asked": REQUEST, "calibration": {"cosine": 1.0}},
        {"name": "klt", "packing": "packed", "asked": REQUEST, "converted": {"source": "klt/zstd", "fidelity": None}},
        {"name": "int8", "asked": {"name": "int8"}, "arrays_crc32c": {"scale": 7}},
        {"name": "half", "asked": "much", "calibration": 3, "a newer key": [1]},
    ],
    ids=str,
)
def test_a_record_writes_the_json_that_it_was_read_from(data: dict[str, Any]) -> None:
    written = CodecRecord.from_json(data).to_json()
    assert written == data
    if "a newer key" not in data:
        assert json.dumps(written) == json.dumps(data)


def test_a_request_comes_back_as_a_value_and_decides_the_codec() -> None:
    request = CodecRequest(packing="zstd", step=0.4)
    record = CodecRecord.of_request(request)
    assert record.requested() == request
    assert record.request_json() == REQUEST
    assert record.is_chosen
    assert not CodecRecord.of_request(None).is_chosen
    assert CodecRecord(parameters={"name": "half"}).request_json() == {"name": "half"}
