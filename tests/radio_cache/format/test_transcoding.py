"""What a copy in another packing says of where its maps come from."""

import pytest

from radio_cache.errors import CorruptShardError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.transcoding import Transcoding, transcoding_of
from radio_cache.statistics.fidelity import PERFECT


@pytest.mark.parametrize("fidelity", [None, PERFECT])
def test_a_conversion_reads_back_from_its_json(fidelity: object) -> None:
    made = Transcoding(source="klt/packed", fidelity=fidelity)  # type: ignore[arg-type]
    assert transcoding_of(CodecRecord(transcoded_from=made.to_json()), "zarr.json") == made


def test_most_codecs_are_of_no_conversion() -> None:
    assert transcoding_of(CodecRecord(parameters={"name": "klt", "packing": "zstd"}), "zarr.json") is None


@pytest.mark.parametrize("told", [[], "klt", {}, {"source": 3}, {"source": "klt/packed", "fidelity": {"cosine": 1}}])
def test_anything_else_is_damage_that_names_the_document(told: object) -> None:
    with pytest.raises(CorruptShardError, match=r"teachers/x/zarr\.json: 'converted' of the codec"):
        transcoding_of(CodecRecord(transcoded_from=told), "teachers/x/zarr.json")
