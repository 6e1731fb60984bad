"""Settings of an evaluation as its JSON record holds them."""

from dataclasses import asdict, fields
from typing import Any

RECORDED_AS = "recorded_as"
"""Metadata of a field whose key in records differs from its name: keys stay as they are when a field is renamed."""


def settings_record(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by their keys in records."""
    # asdict goes into nested dataclasses, such as the settings of a probe.
    values = asdict(config)
    return {field.metadata.get(RECORDED_AS, field.name): values[field.name] for field in fields(config)}
