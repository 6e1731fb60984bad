"""The command radio-eval sam."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from evals.commands.shared import (
    AGAIN,
    PATH,
    ProgressLines,
    device_option,
    json_option,
    runs_option,
    sampling_options,
    write_record,
)
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, save_picture
from radio_cache.terminal.output import console, plain_errors, table

if TYPE_CHECKING:
    from evals.sam.protocol import ProtocolName
    from evals.sam.table import Prompt
    from evals.shared.devices import Device


@click.command()
@click.option("--annotations", type=PATH, required=True, metavar="FILE", help="JSON file of COCO with the instances.")
@click.option(
    "--images",
    type=PATH,
    required=True,
    metavar="FOLDER",
    help="Folder with the images that --annotations names.",
)
@runs_option
@click.option(
    "--sam",
    "sam_name",
    default="sam",
    show_default=True,
    metavar="NAME",
    help="SAM teacher whose mask decoder is used; `radio-cache teachers` lists them.",
)
@click.option(
    "--weights",
    type=PATH,
    metavar="FILE",
    help="Load the weights of --sam from this file, in the format of segment-anything.",
)
@click.option(
    "--prompt",
    type=click.Choice(["box", "1-point", "3-points", "detections"]),
    default="box",
    show_default=True,
    help="Prompt for each mask: the true box, points inside the true mask, or the boxes of --detections.",
)
@click.option(
    "--protocol",
    type=click.Choice(["efficientvit-sam", "single-mask"]),
    default="efficientvit-sam",
    show_default=True,
    help="Evaluation protocol. efficientvit-sam is that of the published results: best of three masks, crowd regions "
    "included, sizes by the area in the file, further points where the last mask is wrong. single-mask predicts one mask per "
    "prompt.",
)
@click.option(
    "--detections", type=PATH, metavar="FILE", help="JSON file with a detector's boxes, in COCO's result format."
)
@click.option(
    "--pictures",
    type=OutputFile(*PICTURE_ENDINGS),
    metavar="FILE",
    help="Draw the masks of four images to this PNG or JPEG file.",
)
@sampling_options()
@json_option
@device_option
@plain_errors(on_interrupt=AGAIN)
def sam(
    annotations: Path,
    images: Path,
    runs: tuple[Path, ...],
    sam_name: str,
    weights: Path | None,
    prompt: str,
    protocol: str,
    detections: Path | None,
    pictures: Path | None,
    seed: int,
    limit: int | None,
    json_file: Path | None,
    device: "Device",
) -> None:
    """Evaluate SAM, and SAM with a student as its image encoder, on COCO instances: mIoU by object size, and AP."""
    from evals.sam import SamConfig, run_sam
    from radio_cache.view.picture_grid import picture_grid

    config = SamConfig(
        annotations=annotations,
        images=images,
        runs=runs,
        sam=sam_name,
        weights=weights,
        prompt=cast("Prompt", prompt),
        protocol=cast("ProtocolName", protocol),
        detections=detections,
        # Four images fill a screen; masks of more would only be smaller.
        pictures=0 if pictures is None else 4,
        seed=seed,
        limit=limit,
        device=device,
    )
    with ProgressLines() as progress:
        result = run_sam(config, progress=progress)
    out = console()
    out.print(result.protocol)
    # small, medium and large are COCO's size classes, by area.
    rows = table("", "", "masks", "mIoU", "small", "medium", "large", "AP")
    for row in result.rows:
        # A size without instances has no figure.
        figures = (row.miou, row.small, row.medium, row.large, row.ap)
        rows.add_row(row.name, f"{row.instances:,}", *("–" if value is None else f"{value:.1%}" for value in figures))
    for paper in result.paper:
        rows.add_row(f"{paper.name}, {paper.px} px, reported", "", f"{paper.sam_coco}%", "", "", "", "")
    out.print(rows)
    for note in result.notes:
        out.print(f"note: {note}")
    write_record(json_file, result.to_json(), config)
    if pictures is not None:
        save_picture(pictures, picture_grid(result.pictures))
        out.print(f"\n{pictures}")
