"""The command radio-eval segment."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from evals.commands.shared import (
    PATH,
    ProgressLines,
    SampledEncoderOptions,
    encoder_options,
    json_option,
    sampling_options,
    write_record,
)
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, save_picture
from radio_cache.terminal.options import renamed_option
from radio_cache.terminal.output import PATH_OR_URL, console, plain_errors, table

if TYPE_CHECKING:
    from evals.segmentation import SegmentTable

# ADE20K's 150 classes would scroll the table away.
_CLASSES_SHOWN = 30


@click.command()
@click.option(
    "--ade20k",
    type=PATH,
    metavar="FOLDER",
    help="Folder of ADE20K as the scene parsing benchmark publishes it, 150 classes.",
)
@click.option("--voc", type=PATH, metavar="FOLDER", help="Folder of Pascal VOC 2012, 21 classes.")
@click.option(
    "--train",
    type=PATH,
    nargs=2,
    metavar="IMAGES MASKS",
    help="Training set: a folder of images and a folder of masks (palette or grey PNG) with the same file names.",
)
@click.option(
    "--test", type=PATH, nargs=2, metavar="IMAGES MASKS", help="Test set, likewise. [default: a fifth of --train]"
)
@click.option(
    "--classes",
    metavar="FILE|N|A,B,C",
    help="Classes in --train: a file with one name per line, their number, or their names with commas. [default: numbers]",
)
@click.option("--first-id", default=0, show_default=True, metavar="N", help="Value of the first class in masks.")
@click.option(
    "--ignore", default=255, show_default=True, metavar="N", help="Value of unlabelled pixels in masks (ignore index)."
)
@click.option(
    "--cache",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Cache of the same images, whose teachers are evaluated on their cached maps.",
)
@encoder_options
@click.option(
    "--crop",
    default=512,
    show_default=True,
    metavar="PX",
    help="Side of the square windows that images are cut into, in pixels.",
)
@click.option(
    "--steps",
    type=int,
    metavar="N",
    help="Training steps of the probe. [default: 80,000, or 100 epochs if these are fewer]",
)
@click.option(
    "--batch-size", default=16, show_default=True, metavar="N", help="Windows per training step of the probe."
)
@click.option(
    "--features",
    type=PATH,
    metavar="FOLDER",
    help="Folder to store computed maps in. [default: ~/.cache/radio-cache/features]",
)
@click.option(
    "--pictures",
    type=OutputFile(*PICTURE_ENDINGS),
    metavar="FILE",
    help="Draw some test images to this PNG or JPEG file: image, true classes, predictions.",
)
@click.option("--num-images", default=6, show_default=True, metavar="N", help="Number of images to draw in --pictures.")
@renamed_option("--shown", "--num-images")
@sampling_options()
@json_option
@plain_errors(on_interrupt="The same command continues: maps that were computed are stored.")
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
    num_images: int,
    json_file: Path | None,
    **encoders: Unpack[SampledEncoderOptions],
) -> None:
    """Measure semantic segmentation by a linear probe on frozen feature maps: mIoU of students, teachers and other models.

    Maps are computed once and stored. After an interruption, the same command continues.
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
        # The probe shares --seed with the draw of images.
        probe=ProbeConfig(steps=steps, batch=batch_size, seed=encoders["seed"]),
        pictures=0 if pictures is None else num_images,
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
    """Print the table, IoU by class, and notes."""
    out = console()
    out.print(result.protocol)
    rows = table("", "", "description", "width", "steps", "mIoU", "pixel accuracy", left=2)
    for row in result.rows:
        scores = row.scores
        rows.add_row(
            row.name,
            row.about,
            str(row.width),
            f"{row.steps:,}",
            f"{scores.mean_iou:.1%}",
            f"{scores.pixel_accuracy:.1%}",
        )
    for paper, miou in result.paper:
        rows.add_row(paper.name, f"reported, {paper.px} px", "", "", f"{miou:.1f}%", "")
    out.print(rows)
    by_class = table("", "IoU by class", *(row.name for row in result.rows))
    for number, name in enumerate(result.class_names[:_CLASSES_SHOWN]):
        values = [row.scores.iou[number] for row in result.rows]
        # A class that occurs nowhere has no IoU.
        if all(value is None for value in values):
            continue  # in no test image and never predicted; a note counts such classes
        by_class.add_row(name, *("–" if value is None else f"{value:.1%}" for value in values))
    out.print(by_class)
    if (more := len(result.class_names) - _CLASSES_SHOWN) > 0:
        out.print(f"... and {more} classes more, all in --json")
    for note in result.notes:
        out.print(f"note: {note}")


def write_pictures(result: "SegmentTable", file: Path) -> None:
    """Write the table's pictures as one PNG."""
    from evals.segmentation.pictures import key_colours
    from radio_cache.view.picture_grid import picture_grid

    rows = [pictures.panes for pictures in result.pictures]
    save_picture(file, picture_grid(rows, legend=key_colours(result.class_names[:_CLASSES_SHOWN])))
