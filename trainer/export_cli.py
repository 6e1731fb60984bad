"""The command `radio-export`: write a trained student in the formats of other tools."""

from pathlib import Path

import click

from radio_cache import __version__
from radio_cache.terminal.help import HELP_SETTINGS, Command
from radio_cache.terminal.output import allow_module_option, plain_errors, printable

# Repeated from trainer.exports, whose import takes seconds; a test compares them.
FORMATS = ("safetensors", "hf", "timm", "onnx", "torch-export")

_path = click.Path(path_type=Path)


@click.command(cls=Command, context_settings=HELP_SETTINGS)
@click.version_option(__version__, prog_name="radio-export")
@click.option(
    "--run",
    required=True,
    type=_path,
    metavar="RUN",
    help="Folder of a run of radio-train; with --checkpoint it may be unfinished.",
)
@click.option(
    "--out", required=True, type=_path, metavar="DIR", help="Folder to create; several formats get one subfolder each."
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=("safetensors",),
    show_default=True,
    help="Repeatable. hf: transformers.AutoModel, with its code in the folder. timm: timm.create_model, with features_only. "
    "onnx, torch-export: a graph for any number of images of the training size; onnx also with --any-size.",
)
@click.option(
    "--adaptor",
    "adaptors",
    multiple=True,
    metavar="TEACHER",
    help="Heads to include in hf, onnx and torch-export, or 'none'. Repeatable. [default: all]",
)
@click.option(
    "--checkpoint",
    metavar="best|last|STEP",
    help="Checkpoint of the run to export, also of a run that was stopped early. [default: the finished student]",
)
@click.option(
    "--centre-share",
    type=float,
    metavar="SHARE",
    help="Side of the student's centre crop, as a share of an image's shorter side; only where its teachers take a centre crop. "
    "[default: the run's]",
)
@click.option(
    "--any-size",
    is_flag=True,
    help="Make the onnx graph take any image size that the student supports. Not every student can.",
)
@click.option(
    "--picture",
    "pictures",
    type=_path,
    multiple=True,
    metavar="IMAGE",
    help="Image for the model card. Repeatable. [default: the first two of the cache, named on the screen]",
)
@click.option(
    "--no-picture", is_flag=True, help="Write a model card without a picture, if images of the cache are private."
)
@click.option(
    "--results",
    type=_path,
    multiple=True,
    metavar="JSON",
    help="File that radio-eval wrote with --json, for the model card. Repeatable.",
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
    """Write a trained student in the formats of other tools. Each is read back and compared. Heads predict in teachers' units."""
    # Imported at its use: torch takes seconds, which --help should not.
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
    for export in report.exported:
        size = f"{export.num_bytes / 1e6:.1f} MB"
        click.echo(
            f"\n{export.folder}: {export.format}, {size}; read back, features differ by at most {export.change:.1e}"
        )
        for line in export.written.use:
            click.echo(f"    {line}")
        for note in export.written.notes:
            click.echo(f"  note: {note}")


if __name__ == "__main__":
    main()
