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
    metavar="FOLDER",
    help="Folder of a run of radio-train. Unfinished runs need --checkpoint.",
)
@click.option(
    "--out",
    required=True,
    type=_path,
    metavar="FOLDER",
    help="Folder to create. With several --format, each is written to a subfolder.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=("safetensors",),
    show_default=True,
    help="Format to write. safetensors: for load_student. hf: for transformers.AutoModel, with its code in the folder. timm: for "
    "timm.create_model, also with features_only. onnx, torch-export: graphs for any number of images of the training "
    "size. Repeatable.",
)
@click.option(
    "--adaptor",
    "adaptors",
    multiple=True,
    metavar="TEACHER",
    help="Adaptor to include in hf, onnx and torch-export, by its teacher, or 'none'. Repeatable. [default: all]",
)
@click.option(
    "--checkpoint",
    metavar="best|last|STEP",
    help="Checkpoint to export, also of an unfinished run; STEP is a number of steps. [default: the finished student]",
)
@click.option(
    "--centre-share",
    type=float,
    metavar="SHARE",
    help="Side of the centre crop that the student takes of an image, as a share of the image's shorter side. Only for "
    "students whose teachers take a centre crop. [default: that of the run]",
)
@click.option(
    "--any-size",
    is_flag=True,
    help="Write an onnx graph for all image sizes that the student supports. Some students have no such graph.",
)
@click.option(
    "--picture",
    "pictures",
    type=_path,
    multiple=True,
    metavar="FILE",
    help="Image whose features the model card shows. Repeatable. [default: the first two images of the cache; their names "
    "are printed]",
)
@click.option(
    "--no-picture",
    is_flag=True,
    help="Write the model card without pictures, for example if the images of the cache are private.",
)
@click.option(
    "--results",
    type=_path,
    multiple=True,
    metavar="FILE",
    help="JSON file that radio-eval wrote with --json, whose results the model card shows. Repeatable.",
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
    """Export a trained student to safetensors, Hugging Face, timm, ONNX or torch.export.

    Each export is read back and its features are compared with the student's. Adaptors predict features in the units of
    their teacher.
    """
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
