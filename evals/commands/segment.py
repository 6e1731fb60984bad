"""radio-eval segment."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from evals.commands.shared import PATH, Drawn, ProgressLines, compared, drawn, json_option, write_record
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, save_picture
from radio_cache.terminal.output import PLACE, console, plain_errors, table

if TYPE_CHECKING:
    from evals.segmentation import SegmentTable

_CLASSES_SHOWN = 30


@click.command()
@click.option("--ade20k", type=PATH, metavar="DIR", help="ADE20K as the scene parsing benchmark ships it: 150 classes.")
@click.option("--voc", type=PATH, metavar="DIR", help="Pascal VOC 2012: 21 classes.")
@click.option(
    "--train",
    type=PATH,
    nargs=2,
    metavar="IMAGES MASKS",
    help="Folders of images and of masks (palette or grey PNG) with the same names.",
)
@click.option("--test", type=PATH, nargs=2, metavar="IMAGES MASKS", help="Likewise; without, a fifth of the pairs.")
@click.option(
    "--classes",
    metavar="FILE|N|A,B,C",
    help="Names of the classes in --train: a file with a name a line. Default: numbers.",
)
@click.option("--first-id", default=0, show_default=True, help="The number in masks of the first class.")
@click.option("--ignore", default=255, show_default=True, help="The number in masks of pixels that nobody labelled.")
@click.option(
    "--cache", type=PLACE, metavar="CACHE", help="Compare the teachers of a cache of these images, as it holds them."
)
@compared
@click.option("--crop", default=512, show_default=True, help="Side of the windows that a network is shown, pixels.")
@click.option("--steps", type=int, help="Of the probe. Default: 80,000, or 100 passes where the images are few.")
@click.option("--batch-size", default=16, show_default=True, help="Windows in a step of the probe.")
@click.option(
    "--features", type=PATH, metavar="DIR", help="Where maps are kept. Default: ~/.cache/radio-cache/features."
)
@click.option(
    "--pictures",
    type=OutputFile(*PICTURE_ENDINGS),
    metavar="FILE.png",
    help="Show a few test images: image, truth, prediction.",
)
@click.option("--shown", default=6, show_default=True, help="How many images --pictures shows.")
@drawn()
@json_option
@plain_errors(on_interrupt="The same command goes on: maps that were computed are kept.")
def segment(
    ade20k: Path | None,
    voc: Path | None,
    train: tuple[Path, Path] | None,
    test: tuple[Path, Path] | None,
    classes: str | None,
    first_id: int,
    ignore: int,
    cache: str | Path | None,
    crop: int,
    steps: int | None,
    batch_size: int,
    features: Path | None,
    pictures: Path | None,
    shown: int,
    json_file: Path | None,
    **encoders: Unpack[Drawn],
) -> None:
    """Semantic segmentation by a linear probe on frozen maps: mIoU of students, teachers and any model, side by side.

    Maps are computed once and kept in a cache of their own; a run that was stopped goes on where it was.
    """
    from evals.segmentation import SegmentConfig, run_segment
    from evals.segmentation.probe import ProbeConfig

    config = SegmentConfig(
        ade20k=ade20k,
        voc=voc,
        train=train,
        test=test,
        classes=classes,
        first_id=first_id,
        ignore=ignore,
        cache=cache,
        crop_px=crop,
        features=features,
        probe=ProbeConfig(steps=steps, batch=batch_size, seed=encoders["seed"]),
        pictures=0 if pictures is None else shown,
        **encoders,
    )
    with ProgressLines() as progress:
        result = run_segment(config, progress=progress)
    print_segment(result)
    write_record(json_file, result.to_json(), config)
    if pictures is not None:
        write_pictures(result, pictures)
        console().print(f"\n{pictures}")


def print_segment(result: "SegmentTable") -> None:
    """The table, IoU by class, and what the figures need to be believed."""
    out = console()
    out.print(result.protocol)
    shown = table("", "", "what it is", "width", "steps", "mIoU", "pixels right", left=2)
    for row in result.rows:
        scores = row.scores
        shown.add_row(
            row.name,
            row.about,
            str(row.width),
            f"{row.steps:,}",
            f"{scores.mean_iou:.1%}",
            f"{scores.pixel_accuracy:.1%}",
        )
    for paper, miou in result.paper:
        shown.add_row(paper.name, f"reported, {paper.px} px", "", "", f"{miou:.1f}%", "")
    out.print(shown)
    by_class = table("", "IoU by class", *(row.name for row in result.rows))
    for number, name in enumerate(result.class_names[:_CLASSES_SHOWN]):
        values = [row.scores.iou[number] for row in result.rows]
        if all(value is None for value in values):
            continue  # in no test image, and nobody said it was: a note counts them
        by_class.add_row(name, *("–" if value is None else f"{value:.1%}" for value in values))
    out.print(by_class)
    if (more := len(result.class_names) - _CLASSES_SHOWN) > 0:
        out.print(f"... and {more} classes more, all in --json")
    for note in result.notes:
        out.print(f"note: {note}")


def write_pictures(result: "SegmentTable", file: Path) -> None:
    """The table's pictures as one PNG."""
    from evals.segmentation.pictures import key_colours
    from radio_cache.view.picture_grid import picture_grid

    rows = [pictures.panes for pictures in result.pictures]
    save_picture(file, picture_grid(rows, legend=key_colours(result.class_names[:_CLASSES_SHOWN])))
