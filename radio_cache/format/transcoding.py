"""The record of a transcoded copy: the codec from which its maps were decoded."""

from dataclasses import asdict, dataclass
from typing import Any

from radio_cache.errors import CorruptShardError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.strict_json import from_json
from radio_cache.statistics.fidelity import Fidelity


@dataclass(frozen=True, kw_only=True)
class Transcoding:
    """The source of transcoded maps.

    The receipts of a transcoded teacher compare with the source's decoded maps, not with the teacher's output.

    Attributes:
        source: the codec that the maps were decoded from ("klt/packed").
        fidelity: of the source to the teacher; None if the source had none recorded.
    """

    source: str
    fidelity: Fidelity | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def transcoding_of(codec: CodecRecord, place: str) -> Transcoding | None:
    """Return what a teacher's maps were encoded from; None if that was the teacher.

    Args:
        codec: of the teacher's spec.
        place: path or URL of the document, for messages.

    Raises:
        CorruptShardError: if the record holds something else there.
    """
    if codec.transcoded_from is None:
        return None
    # A spec opens with any JSON in this record, so it is checked here, where it is used.
    try:
        return from_json(Transcoding, codec.transcoded_from)
    except (TypeError, ValueError, AttributeError) as exc:
        raise CorruptShardError(f"{place}: 'converted' of the codec says nothing that is known here: {exc}") from exc
