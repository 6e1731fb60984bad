"""`radio-export`: what leaves the house."""

import json
from pathlib import Path

import click

from radio_cache import __version__
from radio_cache.cli_support import plain_errors
from radio_cache.errors import NotACacheError


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="radio-export")
@click.option(
    "--run", required=True, type=click.Path(path_type=Path), metavar="RUN", help="A finished run of radio-train."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to make.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors"]),
    default="safetensors",
    show_default=True,
    help="Weights as safetensors with a JSON beside them.",
)
@plain_errors(on_interrupt="")
def main(run: Path, out: Path, file_format: str) -> None:
    """Write a trained student to a folder that `trainer.load_student` reads. No pickle; heads speak the teachers' units."""
    from trainer.export import CONFIG_FILE, WEIGHTS_FILE, load_student, save_student

    del file_format  # one so far
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NotACacheError(f"{out} exists and is not empty: choose another --out, or remove it")
    model = load_student(run)
    save_student(model, out)
    config = json.loads((out / CONFIG_FILE).read_text())
    size = (out / WEIGHTS_FILE).stat().st_size / 1e6
    heads = ", ".join(teacher["name"] for teacher in config["teachers"])
    click.echo(f"{out}/{WEIGHTS_FILE}: {size:.1f} MB, student {config['student']}, heads for {heads}")
    click.echo(
        "\nUse it:\n"
        "    from trainer import load_student\n"
        f"    model = load_student('{out}')\n"
        "    summary, features = model(images)  # images (b, 3, h, w) in [0, 1]"
    )
