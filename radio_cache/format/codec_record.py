"""The record of a teacher's codec in its spec: parameters, the request they follow from, and how they were chosen."""

from dataclasses import dataclass, field
from typing import Any

from radio_cache.codecs import codec_label
from radio_cache.codecs.calibrate import CodecRequest

# Stored keys are part of the format, and keep the names of its first version.
_SECTIONS = {
    "request": "asked",
    "transcoded_from": "converted",
    "calibration": "calibration",
    "array_checksums": "arrays_crc32c",
}
"""Field of a record -> its key in the stored JSON, in the order in which they are written."""


@dataclass(frozen=True, kw_only=True)
class CodecRecord:
    """A teacher's codec, as its spec stores it.

    All but the parameters is there to be compared and reported, not to decode. It may be any JSON: a cache with sections of
    a newer version opens, and readers check the section that they use.

    Args:
        parameters: the codec's own JSON (`radio_cache.codecs.base.Codec.to_json`). Before calibration the requested name
            alone; empty if the build is to choose.
        request: JSON of the `CodecRequest` that the codec was calibrated for; None in the first caches.
        transcoded_from: JSON of the `radio_cache.format.transcoding.Transcoding` that made the maps; None for the teacher's
            own maps.
        calibration: number of images and tokens, seed, and fidelity on held-out images; None for codecs without.
        array_checksums: name of an array in `transform/` -> crc32c of its bytes; None in the first caches.
    """

    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    request: Any = None
    transcoded_from: Any = None
    calibration: Any = None
    array_checksums: Any = None

    @classmethod
    def of_request(cls, request: CodecRequest | None) -> "CodecRecord":
        """Return the record of a codec that is not calibrated yet. request: None leaves the choice to the build."""
        # The name alone: the other parameters follow from the calibration.
        return cls() if request is None else cls(parameters={"name": request.name}, request=request.to_json())

    @property
    def label(self) -> str:
        """The codec's key in `radio_cache.codecs.CODECS`: "half", "klt/zstd"."""
        return codec_label(self.parameters)

    @property
    def is_chosen(self) -> bool:
        """True if a codec is named, if only by a request."""
        return self != CodecRecord()

    def requested(self) -> CodecRequest | None:
        """Return the request as a value; None if none was recorded."""
        return CodecRequest(**self.request) if self.request else None

    def request_json(self) -> Any:
        """Return what decides the codec: the request, or the name alone where none was recorded.

        The other parameters follow from the request and the calibration images.
        """
        if self.request is not None:
            return self.request
        return {"name": self.parameters["name"]} if self.parameters else {}

    def to_json(self) -> dict[str, Any]:
        """Return the stored JSON: parameters, then the sections that there are."""
        sections = {key: getattr(self, name) for name, key in _SECTIONS.items()}
        # Sections without a value are left out, as in documents of the first caches.
        return self.parameters | {key: section for key, section in sections.items() if section is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "CodecRecord":
        """Build the record from what `to_json` returned."""
        # All that is no section belongs to the codec, parameters of a newer version included.
        parameters = {key: value for key, value in data.items() if key not in _SECTIONS.values()}
        return cls(parameters=parameters, **{name: data.get(key) for name, key in _SECTIONS.items()})
