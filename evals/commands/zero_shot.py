"""radio-eval zero-shot."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from evals.commands.shared import AGAIN, IMAGES, PATH, Drawn, ProgressLines, compared, drawn, json_option, write_record
from radio_cache.terminal.output import PLACE, console, plain_errors, table

if TYPE_CHECKING:
    from evals.zero_shot import ZeroShotTable


@click.command("zero-shot")
@click.option(
    "--images",
    "--cache",
    "images",
    type=PLACE,
    metavar="PLACE",
    help=f"Labelled images: {IMAGES}. The CLIPs of a cache are compared, too. Default: the cache the run learned from.",
)
@compared
@click.option(
    "--text-weights",
    multiple=True,
    metavar="[TEACHER=]FILE",
    help="The weights file, in open_clip's format, whose text tower belongs to a teacher.",
)
@click.option(
    "--classes",
    type=PATH,
    metavar="FILE",
    help="What classes are called: lines of class<TAB>phrase, or a phrase a line. "
    "Default: CLIP's names for ImageNet, else the folders'.",
)
@click.option(
    "--templates", type=PATH, metavar="FILE", help="Sentences, one a line, {} for the class. Default: CLIP's 80."
)
@click.option(
    "--classifiers", type=PATH, metavar="DIR", help="Where text classifiers are kept. Default: ~/.cache/radio-cache."
)
@drawn()
@json_option
@plain_errors(on_interrupt=AGAIN)
def zero_shot(
    images: str | Path | None,
    text_weights: tuple[str, ...],
    classes: Path | None,
    templates: Path | None,
    classifiers: Path | None,
    json_file: Path | None,
    **encoders: Unpack[Drawn],
) -> None:
    """Zero-shot accuracy of CLIP-family teachers, of students through their CLIP heads, and of open_clip models.

    Images are compared with sentences about the classes, by the text tower of the teacher's own CLIP.
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
    """The table, and what it needs to be believed."""
    out = console()
    out.print(result.protocol)
    shown = table("", "", "what it is", "sentences by", "top-1", "top-5", left=3)
    for row in result.rows:
        shown.add_row(row.name, row.about, row.text, f"{row.top1:.1%}", f"{row.top5:.1%}")
    for paper in result.paper:
        shown.add_row(paper.name, f"reported, {paper.px} px", "", f"{paper.zero_shot:.1f}%", "")
    out.print(shown)
    for note in result.notes:
        out.print(f"note: {note}")
