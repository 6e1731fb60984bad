"""What a teacher's maps were encoded from where that was not the teacher: in a copy that has another packing."""

from dataclasses import asdict, dataclass
from typing import Any, cast

from radio_cache.errors import CorruptShardError
from radio_cache.format.strict_json import from_json
from radio_cache.statistics.fidelity import Fidelity

CONVERSION = "converted"
"""In a teacher's codec, beside `asked` and `calibration`: only told."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """source: the codec that the maps were decoded from ("klt/packed"). fidelity: what that one kept of the teacher's; None
    where nobody measured. What receipts say of a converted teacher is beside the maps of the source."""

    source: str
    fidelity: Fidelity | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def conversion_of(codec: dict[str, Any], place: str) -> Conversion | None:
    """Of a stored codec. place: of the document, for messages. Raises CorruptShardError for what says no such thing."""
    told = codec.get(CONVERSION)
    if told is None:
        return None
    try:
        return from_json(Conversion, cast(dict[str, Any], told))
    except (TypeError, ValueError, AttributeError) as exc:
        raise CorruptShardError(f"{place}: '{CONVERSION}' of the codec says nothing that is known here: {exc}") from exc
