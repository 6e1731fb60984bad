"""The command radio-eval vlm."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evals.commands.shared import AGAIN, PATH, device_option, json_option, write_record
from radio_cache.errors import ConfigError
from radio_cache.terminal.options import renamed_option
from radio_cache.terminal.output import console, plain_errors, printable, table

if TYPE_CHECKING:
    from evals.shared.devices import Device

VLM_TASKS = ("gqa", "textvqa", "pope", "vqav2")
"""Keys of `evals.vlm.TASKS`, repeated so that the help needs no torch; a test compares them."""


@click.command()
@click.option(
    "--check",
    is_flag=True,
    help="Check that the student of --run works as the vision tower of a small, untrained language model.",
)
@click.option("--run", type=PATH, metavar="FOLDER", help="Folder of a run of radio-train, for --check.")
@click.option(
    "--adaptor",
    metavar="TEACHER",
    help="Adaptor whose features LLaVA reads, for --check. [default: the backbone's own features]",
)
@renamed_option("--head", "--adaptor")
@click.option(
    "--llava",
    type=PATH,
    metavar="FOLDER",
    help="Folder of a LLaVA and its processor, saved by transformers, to evaluate with lmms-eval.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help=f"Task to run: {', '.join(VLM_TASKS)}. Repeatable. [default: all]",
)
@click.option(
    "--out",
    type=PATH,
    metavar="FOLDER",
    help="Folder that lmms-eval writes to. [default: lmms-eval in that of --llava]",
)
@click.option("--limit", type=int, metavar="N", help="Use only the first N questions of each task. [default: all]")
@json_option
@device_option
@plain_errors(on_interrupt=AGAIN)
def vlm(
    check: bool,
    run: Path | None,
    adaptor: str | None,
    llava: Path | None,
    tasks: tuple[str, ...],
    out: Path | None,
    limit: int | None,
    json_file: Path | None,
    device: "Device",
) -> None:
    """Evaluate a student as the vision tower of LLaVA: --check tests that it fits, --llava runs GQA, TextVQA, POPE and VQAv2."""
    # Exactly one of the two modes, and --run with --check only.
    if check == (llava is not None) or check != (run is not None):
        raise ConfigError("give --check and --run FOLDER, or --llava FOLDER")
    from trainer.exports.libraries import library

    # An optional dependency: the message names what to install.
    library("transformers", "radio-eval vlm")
    if llava is None:
        assert run is not None, "checked above"
        _check(run, adaptor, json_file)
        return
    from evals.vlm import HarnessConfig, run_harness

    config = HarnessConfig(
        llava=llava, out=out or llava / "lmms-eval", tasks=tasks or VLM_TASKS, limit=limit, device=device
    )
    result = run_harness(config)
    write_record(json_file, result.to_json(), config)
    console().print(result.protocol)
    rows = table("", "task", "metric", "value", left=2)
    # Metrics have different scales: four significant digits suit all of them.
    for row in result.rows:
        rows.add_row(row.task, row.metric, f"{row.value:.4g}")
    console().print(rows)
    console().print(result.record)


def _check(run: Path, adaptor: str | None, json_file: Path | None) -> None:
    """Run the check and print what holds."""
    from evals.vlm import check_wiring
    from trainer.model.adaptors import BACKBONE

    wiring = check_wiring(run, teacher=adaptor or BACKBONE)
    write_record(json_file, wiring.to_json())
    out = console()
    out.print(
        f"{wiring.student} ({wiring.teacher}) as the vision tower of a LLaVA with a small random language model: "
        f"{wiring.tokens} tokens a picture, {wiring.width} wide"
    )
    # A check that fails is an error, so that the printed ones hold.
    for check in wiring.held:
        out.print(f"holds: {check}")
    out.print(printable(f"it answers (random weights, no meaning): {wiring.answer}"))
