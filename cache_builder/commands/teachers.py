"""What `radio-cache teachers` prints: what every teacher says of an image, what that costs on disk, whose weights it runs."""

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from cache_builder.teachers import ALIASES, TEACHERS, TeacherPreset
from cache_builder.teachers.preset import OutputShape
from radio_cache.terminal.output import human_bytes, is_narrow, table

_BITS = {"half": 16.0, "int8": 8.0, "klt": 3.8}
"""Of one value in a map. That of klt at --fidelity 0.99 depends on teacher and images: it was 3.7 to 3.9 bits where it was
measured (benchmarks/results/2026-11-24-codecs.md)."""


def image_bytes(preset: TeacherPreset, codec: str) -> float:
    """Bytes that one image takes at the teacher's own size: its map in that codec, and its summary in float16."""
    assert preset.output is not None, "every teacher that has a name says what it gives"
    return preset.output.image_bytes(_BITS[codec])


def size_table() -> Table:
    """A line a teacher: what it takes, what it gives, what that costs; in a narrow terminal with the usual codec alone."""
    codecs = ["klt"] if is_narrow() else list(_BITS)
    labels = ["klt about" if codec == "klt" else codec for codec in codecs]
    rows = table("Bytes of an image, by codec", "teacher", "parameters", "input", "tokens", "summary", "map", *labels)
    for preset, output in _known():
        rows.add_row(
            _shown(preset.name),
            preset.params,
            f"{preset.input_px} px",
            f"{output.tokens} x {output.tokens}",
            str(output.summary_dim or "-"),
            str(output.spatial_dim),
            *(human_bytes(image_bytes(preset, codec)) for codec in codecs),
        )
    return rows


def photo_shares() -> str:
    """Say how much of a 4:3 photo the teachers see, the usual share first."""
    names: dict[str, list[str]] = {}
    for preset, _ in _known():
        names.setdefault(_share(preset), []).append(preset.name)
    usual = max(names, key=lambda share: len(names[share]))
    others = "; ".join(f"{share}: {', '.join(names[share])}" for share in sorted(names) if share != usual)
    return textwrap.fill(f"Of a 4:3 photo these teachers see {usual} of the area, but for {others}.", 100)


def named_table(presets: Sequence[TeacherPreset]) -> Table:
    """Build a table with a line a teacher, of any library: what it sees of an image, and where its weights come from."""
    rows = table("Teachers", "teacher", "input", "fit", "of a 4:3 photo", "licence", "from", left=6)
    for preset in presets:
        source = preset.weights.describe()
        rows.add_row(preset.name, f"{preset.input_px} px", preset.fit, _share(preset), preset.licence, source)
    return rows


def _share(preset: TeacherPreset) -> str:
    return f"{preset.photo_share:.0%}"


def weights_table() -> Table:
    """A line a teacher: licence, size of the download, and where it comes from."""
    rows = table("Weights", "teacher", "licence", "download", "from", left=4)
    for preset, _ in _known():
        source = preset.weights
        place = source.hub[0] if source.hub else source.describe()
        rows.add_row(preset.name, preset.licence, source.size, place)
    return rows


def teachers_json() -> list[dict[str, Any]]:
    """The same for machines, one object a teacher."""
    return [
        {
            "name": preset.name,
            "aliases": [alias for alias, name in ALIASES.items() if name == preset.name],
            "family": preset.family,
            "model": preset.model,
            "parameters": preset.params,
            "input_px": preset.input_px,
            "fit": preset.fit,
            "photo_share_4_3": round(preset.photo_share, 4),
            "tokens": [output.tokens, output.tokens],
            "summary_dim": output.summary_dim,
            "spatial_dim": output.spatial_dim,
            "image_bytes": {codec: round(image_bytes(preset, codec)) for codec in _BITS},
            "licence": preset.licence,
            "weights": preset.weights.describe(),
            "download": preset.weights.size,
        }
        for preset, output in _known()
    ]


def _known() -> list[tuple[TeacherPreset, OutputShape]]:
    return [(preset, preset.output) for preset in TEACHERS.values() if preset.output is not None]


def _shown(name: str) -> str:
    """With its short name, if it has one."""
    short = next((alias for alias, full in ALIASES.items() if full == name), None)
    return f"{name} ({short})" if short else name
