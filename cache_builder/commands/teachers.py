"""`radio-cache teachers`: list teachers, their features, bytes on disk, licences and weights."""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from cache_builder.teachers import ALIASES, TEACHERS, TeacherPreset, find_teacher
from cache_builder.teachers.preset import OutputShape
from radio_cache.terminal.output import console, human_bytes, is_narrow, plain_errors, table

_BITS = {"half": 16.0, "int8": 8.0, "klt": 3.8}
"""Codec -> bits of one value in a map. That of klt at --fidelity 0.99 depends on teacher and images: it was 3.7 to 3.9 bits
where it was measured (benchmarks/results/2026-11-24-codecs.md)."""


@click.command()
@click.option(
    "--json",
    "as_json",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the list as JSON instead of tables, to FILE or to standard output.",
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@plain_errors(on_interrupt="")
def teachers(names: tuple[str, ...], as_json: str | None) -> None:
    """List the teachers: feature sizes, bytes per image, licences, and the sources of their weights.

    With NAME, such as timm:MODEL or open_clip:MODEL/WEIGHTS, list only these: input size, the share of a photo that they
    see, and licence.
    """
    # Models of other libraries have no sizes without being built, so that their table is a shorter one.
    if names:
        if as_json is not None:
            raise click.UsageError("--json lists all built-in teachers: leave out NAME")
        console().print(named_table([find_teacher(name) for name in names]))
        return
    if as_json is not None:
        with click.open_file(as_json, "w") as file:
            file.write(json.dumps(teachers_json(), indent=1) + "\n")
        return
    console().print(size_table())
    click.echo(f"\n{photo_shares()}")
    click.echo(
        "\nBytes are those of an image at the teacher's own input size. klt is an estimate at --fidelity 0.99:\n"
        "`radio-cache plan` measures it on your images. Summary and map are numbers of channels.\n"
    )
    console().print(weights_table())
    click.echo(
        "\nSources with a slash are repositories on huggingface.co. Models of timm and open_clip are teachers, too:\n"
        "timm:MODEL, open_clip:MODEL/WEIGHTS. Features, your own checkpoints and licences: docs/teachers.md.\n"
        "Without a network: download the file elsewhere and pass it with `radio-cache build --weights FILE`."
    )


def image_bytes(preset: TeacherPreset, codec: str) -> float:
    """Return the bytes of one image at the teacher's own size: its map in that codec, and its summary in float16."""
    assert preset.output is not None, "every named teacher has a known output"
    return preset.output.image_bytes(_BITS[codec])


def size_table() -> Table:
    """Return a table of inputs, outputs and bytes, a line per teacher. In a narrow terminal with the usual codec alone."""
    codecs = ["klt"] if is_narrow() else list(_BITS)
    labels = ["klt about" if codec == "klt" else codec for codec in codecs]
    rows = table("Bytes of an image, by codec", "teacher", "parameters", "input", "tokens", "summary", "map", *labels)
    for preset, output in _named_outputs():
        rows.add_row(
            _label(preset.name),
            preset.params,
            f"{preset.input_px} px",
            f"{output.tokens} x {output.tokens}",
            str(output.summary_dim or "-"),
            str(output.spatial_dim),
            *(human_bytes(image_bytes(preset, codec)) for codec in codecs),
        )
    return rows


def photo_shares() -> str:
    """Return a sentence about the share of a 4:3 photo that the teachers see, the usual share first."""
    names: dict[str, list[str]] = {}
    for preset, _ in _named_outputs():
        names.setdefault(_share(preset), []).append(preset.name)
    usual = max(names, key=lambda share: len(names[share]))
    others = "; ".join(f"{share}: {', '.join(names[share])}" for share in sorted(names) if share != usual)
    return textwrap.fill(f"These teachers see {usual} of the area of a 4:3 photo, except: {others}.", 100)


def named_table(presets: Sequence[TeacherPreset]) -> Table:
    """Return a table of inputs, visible shares and weights of any library's teachers, a line per teacher."""
    rows = table("Teachers", "teacher", "input", "fit", "of a 4:3 photo", "licence", "from", left=6)
    for preset in presets:
        source = preset.weights.describe()
        rows.add_row(preset.name, f"{preset.input_px} px", preset.fit, _share(preset), preset.licence, source)
    return rows


def _share(preset: TeacherPreset) -> str:
    return f"{preset.photo_share:.0%}"


def weights_table() -> Table:
    """Return a table of licences and downloads, a line per teacher."""
    rows = table("Weights", "teacher", "licence", "download", "from", left=4)
    for preset, _ in _named_outputs():
        source = preset.weights
        address = source.hub[0] if source.hub else source.describe()
        rows.add_row(preset.name, preset.licence, source.size, address)
    return rows


def teachers_json() -> list[dict[str, Any]]:
    """Return the contents of all tables, one object per teacher."""
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
        for preset, output in _named_outputs()
    ]


def _named_outputs() -> list[tuple[TeacherPreset, OutputShape]]:
    return [(preset, preset.output) for preset in TEACHERS.values() if preset.output is not None]


def _label(name: str) -> str:
    """Return the name, with the short one behind it if there is one."""
    short = next((alias for alias, full in ALIASES.items() if full == name), None)
    return f"{name} ({short})" if short else name
