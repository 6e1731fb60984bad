"""`radio-export`: what leaves the house."""

from pathlib import Path

import click

from radio_cache import __version__
from radio_cache.terminal.help import HELP_SETTINGS, Command
from radio_cache.terminal.output import allow_module_option, plain_errors, printable

FORMATS = ("safetensors", "hf", "timm", "onnx", "torch-export")

_path = click.Path(path_type=Path)


@click.command(cls=Command, context_settings=HELP_SETTINGS)
@click.version_option(__version__, prog_name="radio-export")
@click.option(
    "--run", required=True, type=_path, metavar="RUN", help="A run of radio-train, unfinished with --checkpoint."
)
@click.option(
    "--out", required=True, type=_path, metavar="DIR", help="Folder to make; several formats get one each in it."
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=("safetensors",),
    show_default=True,
    help="May be given several times. hf: transformers.AutoModel, the folder carries its code. timm: timm.create_model, with "
    "features_only. onnx, torch-export: a graph for any number of images of the size trained at; onnx also with --any-size.",
)
@click.option(
    "--adaptor",
    "adaptors",
    multiple=True,
    metavar="TEACHER",
    help="Heads that hf, onnx and torch-export give; all by default, 'none' for none.",
)
@click.option(
    "--checkpoint",
    metavar="best|last|STEP",
    help="Of the run, instead of the student it ended with, also where it was stopped early. [default: the finished student]",
)
@click.option(
    "--centre-share",
    type=float,
    metavar="SHARE",
    help="Share of an image's shorter side that the student is shown, where its teachers saw a centre crop. [default: the run's]",
)
@click.option(
    "--any-size",
    is_flag=True,
    help="onnx for images of any size that the student takes, checked in the graph; not every student can.",
)
@click.option(
    "--picture",
    "pictures",
    type=_path,
    multiple=True,
    metavar="IMAGE",
    help="Images for the model card. [default: the first two of the cache, named on the screen]",
)
@click.option("--no-picture", is_flag=True, help="A model card without a picture: images of the cache may be private.")
@click.option(
    "--results",
    type=_path,
    multiple=True,
    metavar="JSON",
    help="What radio-eval wrote with --json, for the model card.",
)
@allow_module_option
@plain_errors(on_interrupt="")
def main(
    run: Path,
    out: Path,
    formats: tuple[str, ...],
    adaptors: tuple[str, ...],
    pictures: tuple[Path, ...],
    no_picture: bool,
    results: tuple[Path, ...],
    centre_share: float | None,
    checkpoint: str | None,
    any_size: bool,
) -> None:
    """Write a trained student in the formats of other tools, read each back and compare it. Heads speak the teachers' units."""
    from trainer.exports import Card, export_student

    if no_picture and pictures:
        raise click.UsageError("--picture and --no-picture exclude each other")
    heads = () if adaptors == ("none",) else adaptors or "all"
    card = Card(pictures=() if no_picture else pictures or "cache", results=results)
    report = export_student(
        run,
        out,
        formats=formats,
        adaptors=heads,
        card=card,
        centre_share=centre_share,
        checkpoint=checkpoint,
        any_size=any_size,
        on_progress=lambda text: click.echo(printable(text), err=True),
    )
    if report.checkpoint is not None:
        click.echo(report.checkpoint)
    if report.folding is not None:
        click.echo(
            f"batch norms and position biases folded: features change by at most {report.folding:.1e} of the largest"
        )
    for one in report.exported:
        size = f"{one.num_bytes / 1e6:.1f} MB"
        click.echo(f"\n{one.folder}: {one.format}, {size}; read back, features differ by at most {one.change:.1e}")
        for line in one.written.use:
            click.echo(f"    {line}")
        for note in one.written.notes:
            click.echo(f"  note: {note}")


if __name__ == "__main__":
    main()
