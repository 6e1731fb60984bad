"""The command radio-eval zero-shot."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from evals.commands.shared import (
    AGAIN,
    IMAGES,
    PATH,
    ProgressLines,
    SampledEncoderOptions,
    encoder_options,
    json_option,
    sampling_options,
    write_record,
)
from radio_cache.terminal.options import renamed_option
from radio_cache.terminal.output import PATH_OR_URL, console, plain_errors, table

if TYPE_CHECKING:
    from evals.zero_shot import ZeroShotTable


@click.command("zero-shot")
@click.option(
    "--images",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help=f"Labelled images to classify: {IMAGES}. The CLIP teachers of a cache are evaluated, too. [default: the cache the run "
    "was trained on]",
)
@renamed_option("--cache", "--images")
@encoder_options
@click.option(
    # Caches record the file of a teacher, which may have moved, or hold the image tower alone.
    "--text-weights",
    multiple=True,
    metavar="[TEACHER=]FILE",
    help="File in open_clip's format to load the text tower of a teacher from. [default: the teacher's own file]",
)
@click.option(
    "--classes",
    type=PATH,
    metavar="FILE",
    help="File with phrases for the classes: lines of class<TAB>phrase, or one phrase per line in the order of the classes. "
    "[default: CLIP's names for ImageNet, else the names of the class folders]",
)
@click.option(
    "--templates",
    type=PATH,
    metavar="FILE",
    help="File with sentences, one per line, in which {} stands for the class. [default: CLIP's 80 templates]",
)
@click.option(
    "--classifiers",
    type=PATH,
    metavar="FOLDER",
    help="Folder to store text classifiers in. [default: ~/.cache/radio-cache/text-classifiers]",
)
@sampling_options()
@json_option
@plain_errors(on_interrupt=AGAIN)
def zero_shot(
    images: str | Path | None,
    text_weights: tuple[str, ...],
    classes: Path | None,
    templates: Path | None,
    classifiers: Path | None,
    json_file: Path | None,
    **encoders: Unpack[SampledEncoderOptions],
) -> None:
    """Measure the zero-shot accuracy of CLIP teachers, of students with a CLIP adaptor, and of open_clip models.

    An image is classified by the most similar class sentence, encoded by the text tower of the teacher's own CLIP.
    """
    from evals.zero_shot import ZeroShotConfig, run_zero_shot

    config = ZeroShotConfig(
        images=images,
        text_weights=text_weights,
        classes=classes,
        templates=templates,
        classifiers=classifiers,
        **encoders,
    )
    with ProgressLines() as progress:
        result = run_zero_shot(config, progress=progress)
    print_zero_shot(result)
    write_record(json_file, result.to_json(), config)


def print_zero_shot(result: "ZeroShotTable") -> None:
    """Print the table and notes."""
    out = console()
    out.print(result.protocol)
    rows = table("", "", "description", "text tower", "top-1", "top-5", left=3)
    for row in result.rows:
        rows.add_row(row.name, row.about, row.text, f"{row.top1:.1%}", f"{row.top5:.1%}")
    # Published rows only appear on the full validation set of ImageNet.
    for paper in result.paper:
        rows.add_row(paper.name, f"reported, {paper.px} px", "", f"{paper.zero_shot:.1f}%", "")
    out.print(rows)
    for note in result.notes:
        out.print(f"note: {note}")
