"""`radio-cache plan`: predict the cost of a build with the same options."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cache_builder.commands.build import human_seconds
from radio_cache.terminal.files import OutputFile, write_output
from radio_cache.terminal.help import SectionedCommand
from radio_cache.terminal.options import RenamedOption
from radio_cache.terminal.output import console, human_bytes, in_width, plain_errors, print_line, table

if TYPE_CHECKING:
    from cache_builder.planning.plan import Plan
    from radio_cache.codecs.calibrate import CodecRequest

_OF_BUILD_ALONE = ("workers", "scheduler", "cluster", "log_json")


def plan_command(build: click.Command, sections: Mapping[str, Sequence[str]]) -> click.Command:
    """Return the command, with those options of `radio-cache build` that decide what is built, under its headings."""
    # The same option objects: a plan cannot drift from the build that it predicts.
    shared = [option for option in build.params if option.name not in _OF_BUILD_ALONE]
    # "Processes and machines" has options of builds alone.
    headings = {heading: names for heading, names in sections.items() if not set(names) <= set(_OF_BUILD_ALONE)}
    return SectionedCommand(
        "plan",
        params=[*shared, *_own_options()],
        callback=_plan,
        help=_HELP,
        sections={**_SECTIONS, **headings},
        examples=_EXAMPLES,
    )


_SECTIONS = {
    "Cost": ("devices", "dollars_per_hour", "student_steps", "student_batch"),
    "Measurement": ("probe_images", "probe_s", "no_weights", "as_json"),
}

_EXAMPLES = (
    "radio-cache plan --images photos/ --teacher efficientnet-lite0 --out c.zarr",
    "radio-cache plan --images photos/ --teacher clip --out c.zarr --no-weights",
    "radio-cache plan ... --devices 8 --dollars-per-hour 2.5 --student-steps 300000",
)


_HELP = """Predict the time, money and disk space of a build, and after how many student runs it pays. Writes no cache.

Takes the options of `radio-cache build`. Runs every teacher on a sample of the images on this device, and measures
decoding, teachers, encoding and the bytes of every codec.

\b
Without a cache, every student run has to run the teachers. A build pays after
    build device-seconds / (steps x batch size x teacher seconds per image)
student runs, rounded up. docs/plan.md explains the calculation.
"""


def _own_options() -> list[click.Option]:
    return [
        click.Option(
            ["--devices"],
            default=1,
            show_default=True,
            metavar="N",
            help="Predict also for N devices like this one, each with as many CPU cores.",
        ),
        click.Option(["--dollars-per-hour"], type=float, metavar="DOLLARS", help="Price of one device per hour."),
        click.Option(
            # Not --steps: --step of the build is the quantiser's.
            ["--student-steps"],
            type=int,
            metavar="N",
            help="Optimiser steps of one student run. [default: that of radio-train, thirty epochs or 25,600 images]",
        ),
        click.Option(
            ["--student-batch-size", "student_batch"],
            type=int,
            metavar="N",
            help="Images per optimiser step of the student. [default: that of radio-train]",
        ),
        click.Option(
            ["--probe-images"],
            default=64,
            show_default=True,
            metavar="N",
            help="Number of images to measure on, drawn at random from all.",
        ),
        click.Option(
            ["--probe-seconds", "probe_s"],
            default=20.0,
            show_default=True,
            metavar="SECONDS",
            help="Approximate time per teacher in seconds. Slow teachers are measured on fewer images.",
        ),
        click.Option(
            ["--no-weights"],
            is_flag=True,
            help="Use random weights for teachers that are not downloaded. Times stay the same; bytes of klt are left out.",
        ),
        click.Option(
            ["--json", "as_json"],
            type=OutputFile(),
            metavar="FILE",
            help="Also write all measurements to this file as JSON; - is standard output.",
        ),
        RenamedOption("--steps", "--student-steps"),
    ]


@plain_errors(on_interrupt="Nothing was written.")
def _plan(
    devices: int,
    dollars_per_hour: float | None,
    student_steps: int | None,
    student_batch: int | None,
    probe_images: int,
    probe_s: float,
    no_weights: bool,
    as_json: Path | None,
    device: str,
    **options: Any,
) -> None:
    from cache_builder.commands.build_options import build_config
    from cache_builder.planning.plan import PlanConfig, plan_build
    from cache_builder.workers.allocator import keep_freed_memory
    from radio_cache.torch import pick_device

    config = PlanConfig(
        build=build_config(device=pick_device(device), **options),
        devices=devices,
        dollars_per_hour=dollars_per_hour,
        student_steps=student_steps,
        student_batch=student_batch,
        probe_images=probe_images,
        probe_s=probe_s,
        no_weights=no_weights,
    )
    # Times would be longer than those of a build otherwise.
    if config.build.device == "cpu":
        keep_freed_memory()  # as a build does
    plan = plan_build(config, on_message=print_line)
    for note in plan.notes:
        print_line(note)
    console().print(times(plan))
    click.echo()
    console().print(bytes_per_image(plan))
    click.echo()
    for line in conclusions(plan):
        click.echo(in_width(line, indent=9))
    if as_json is not None:
        write_output(as_json, json.dumps(plan.to_json(), indent=1, default=str).encode() + b"\n")


def times(plan: "Plan") -> Table:
    """Return a table of milliseconds per image by stage, and of the time of all images, a line per teacher."""
    build, devices = plan.config.build, plan.config.devices
    rows = table(
        f"Time, measured on {build.device} with {build.threads} thread{'s' * (build.threads > 1)}",
        "teacher",
        "px",
        "probed",
        "decode ms",
        "teacher ms",
        "encode ms",
        "images left",
        "1 device",
        *([f"{devices} devices"] if devices > 1 else []),
    )
    for teacher in plan.teachers:
        probe = teacher.probe
        # Calibration runs once, however many devices there are.
        shards_s = teacher.seconds - teacher.calibration_s
        # More devices than shards have nothing to do.
        shared = (
            [human_seconds(teacher.calibration_s + shards_s / min(devices, plan.num_shards))] if devices > 1 else []
        )
        rows.add_row(
            probe.name + (" (random weights)" if teacher.random_weights else ""),
            str(probe.input_hw[0]),
            str(probe.images),
            *(f"{1000 * seconds:.1f}" for seconds in (probe.decode_s, probe.forward_s)),
            f"{1000 * (probe.encode_s + probe.pack_s / build.threads):.1f}",
            str(teacher.images_left),
            human_seconds(teacher.seconds),
            *shared,
        )
    return rows


def bytes_per_image(plan: "Plan") -> Table:
    """Return a table of bytes per image in every codec, and of all images in the requested one, a line per teacher."""
    from cache_builder.planning.measure import COMPARED

    rows = table(
        "Bytes per view: map and summary, measured on the same images",
        "teacher",
        *map(_label, COMPARED),
        "all images",
    )
    for teacher in plan.teachers:
        costs = [teacher.probe.cost_of(request).bytes_per_image for request in COMPARED]
        bound = "at most " if teacher.is_upper_bound else ""
        rows.add_row(
            teacher.probe.name,
            *("-" if cost is None else human_bytes(cost + teacher.probe.summary_bytes) for cost in costs),
            f"{bound}{human_bytes(plan.num_images * teacher.bytes_per_image)} in {_label(teacher.stored.request)}",
        )
    return rows


def _label(request: "CodecRequest") -> str:
    if not request.codec_class.reaches_fidelity:
        return request.name
    return f"{request.packing} " + (f"{request.fidelity:g}" if request.step is None else f"step {request.step:g}")


def conclusions(plan: "Plan") -> list[str]:
    """Return the lines below the tables: size, space, time, money, and when a cache pays."""
    config, runs = plan.config, plan.runs_to_break_even
    # A codec that could not be calibrated on the sample is counted as half, the largest.
    bound = "at most " if any(teacher.is_upper_bound for teacher in plan.teachers) else ""
    lines = [
        f"images   {plan.num_images:,} in {plan.num_shards:,} shard{'s' * (plan.num_shards > 1)} of {config.build.shard_images}",
        f"bytes    {bound}{human_bytes(plan.stored_bytes)} in all, the list of images included; {_space(plan)}",
    ]
    if plan.pixel_bytes:
        stored = human_bytes(plan.num_images * plan.pixel_bytes)
        lines.append(f"pixels   {stored} of them are the images themselves, {human_bytes(plan.pixel_bytes)} each")
    wall = f"{human_seconds(plan.wall_s(1))} on 1 device"
    if config.devices > 1:
        wall += f", {human_seconds(plan.wall_s(config.devices))} on {config.devices}"
        if plan.num_shards < config.devices:
            wall += f" (of which {plan.num_shards} have a shard to do)"
    lines.append(f"time     {wall}, looking at every image once included ({human_seconds(plan.scan_s)})")
    if plan.dollars is not None:
        lines.append(
            f"dollars  {plan.dollars:,.2f} for {config.devices} x {human_seconds(plan.wall_s(config.devices))}"
        )
    per_run = f"{plan.student_run.steps:,} steps x {plan.student_run.batch_images} images"
    lines.append(
        f"pays     from student run {max(1, math.ceil(runs)):,} on: the build costs {human_seconds(plan.device_s)} of one "
        f"device, running the teachers online {human_seconds(plan.online_s)} in every run ({per_run}), "
        f"{1 / runs:,.{0 if runs < 0.1 else 2}f} times that"
    )
    for teacher in plan.teachers:
        if teacher.is_upper_bound:
            reason = teacher.probe.cost_of(teacher.probe.requested).why
            lines.append(f"unknown  {teacher.probe.name}, {_label(teacher.probe.requested)}: {reason}; counted as half")
    return lines


def _space(plan: "Plan") -> str:
    out = plan.config.build.out
    if plan.free_bytes is None:
        return f"{out} is a bucket, whose free space is not known"
    fits = "fits" if plan.fits else "DOES NOT FIT"
    return f"{human_bytes(plan.bytes_to_write)} to write, {human_bytes(plan.free_bytes)} free at {out}: {fits}"
