"""`radio-cache verify` and `repair`: check a cache, and drop damaged shards."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cache_builder.commands.build import SAME_COMMAND
from radio_cache.reader import Cache
from radio_cache.terminal.options import device_option
from radio_cache.terminal.output import PATH_OR_URL, allow_module_option, console, plain_errors, printable, table

if TYPE_CHECKING:
    from cache_builder.checks.recompute import RecomputeReport
    from radio_cache.checks.verify import VerifyReport


@click.command()
@click.argument("cache", type=PATH_OR_URL)
@click.option("--deep", is_flag=True, help="Also decode every map and summary, which takes longer.")
@click.option(
    "--recompute",
    "count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also run the teachers again on N images drawn at random, and compare with the stored features.",
)
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME", help="Teacher to --recompute. Repeatable. [default: all]"
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of the sample of --recompute.")
@click.option(
    "--weights",
    multiple=True,
    metavar="[NAME=]FILE",
    help="File with the weights of a teacher for --recompute, if it has moved since the build.",
)
@device_option("Device of --recompute: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
@allow_module_option
@plain_errors(on_interrupt="")
def verify(
    cache: str | Path,
    deep: bool,
    count: int | None,
    teachers: tuple[str, ...],
    seed: int,
    weights: tuple[str, ...],
    device: str,
) -> None:
    """Verify the checksums of all files of CACHE, and list what is damaged or missing. Changes nothing.

    With --recompute, also compare stored features with those that the teachers compute from the source images. Exits with
    code 1 if any file is damaged, or if a teacher's mean cosine or a single image is too far from the recorded fidelity.

    CACHE is a folder such as cache.zarr, or a URL such as s3://bucket/cache.zarr.
    """
    from radio_cache.checks.verify import verify_cache

    # Refused rather than ignored: a user would believe that the teacher was checked.
    if count is None and (teachers or weights):
        raise click.UsageError("--teacher and --weights are options of --recompute: add --recompute N")
    # Opened once, so that checks and messages are about the same state.
    opened = Cache(cache)
    report = verify_cache(opened, deep=deep)
    rows = table("", "unit", "shards right", "damaged", "not built yet")
    for unit, num_shards in report.shards.items():
        damages = [damage for damage in report.damages if damage.unit == unit and damage.shard is not None]
        damaged = len({damage.shard for damage in damages if not damage.is_unread})
        wrong = len({damage.shard for damage in damages})
        rows.add_row(unit, str(num_shards - wrong), str(damaged or "-"), str(report.missing[unit] or "-"))
    console().print(rows)
    for damage in report.damages:
        click.echo(printable(f"{damage.place}: {damage.what}"))
    if not report.ok:
        click.echo(f"\n{_cure(report, str(cache))}")
        raise SystemExit(1)
    click.echo(f"\n{cache}: all that is there is right" + (", decoded to the last map" if deep else ""))
    if count is not None:
        from cache_builder.checks.recompute import RecomputeConfig, recompute
        from cache_builder.commands.build_options import per_teacher
        from radio_cache.torch import pick_device

        # After the checksums: a teacher that differs from damaged features would prove nothing.
        names = teachers or tuple(opened.teachers)
        files = per_teacher("--weights", weights, names, lambda text: Path(text).expanduser(), shared=False)
        config = RecomputeConfig(count=count, teachers=names, weights=files, seed=seed, device=pick_device(device))
        if note := opened.remote_images_note():
            click.echo(note, err=True)
        _print_recomputed(recompute(opened, config))


def _cure(report: "VerifyReport", cache: str) -> str:
    """Return the cure of the damages that the lines above name."""
    unread = sum(damage.is_unread for damage in report.damages)
    damaged, mendable = len(report.damages) - unread, sum(damage.mendable for damage in report.damages)
    blocked = f"{unread} could not be read, which is no damage: make them readable, and verify again" if unread else ""
    if damaged == 0:
        return blocked
    if blocked:
        blocked = f". {blocked}"
    if mendable == 0:
        return f"{damaged} damaged. No build can make that again: the lines above name the cure{blocked}"
    other_cures = f", and follow the lines above for the other {damaged - mendable}" if mendable < damaged else ""
    return f"{damaged} damaged. Mend {mendable}: radio-cache repair {cache}, then the build command again{other_cures}{blocked}"


def _print_recomputed(report: "RecomputeReport") -> None:
    """Print the table and the complaints, and exit with 1 if there are any."""
    rows = table("", "recomputed", "images", "recorded", "now", "at least", "worst image", "at least", "summary")
    for result in report.teachers:
        summary = "-" if result.summary is None else f"{result.summary:.4f}"
        rows.add_row(
            result.name,
            str(result.images),
            f"{result.recorded:.4f}",
            f"{result.cosine:.4f}",
            f"{result.floor:.4f}",
            f"{result.worst.cosine:.4f}",
            f"{result.image_floor:.4f}",
            summary,
        )
    click.echo()
    console().print(rows)
    for key, reason in report.unreadable.items():
        click.echo(printable(f"{key} could not be compared: {reason}"))
    for result in report.teachers:
        for complaint in result.complaints():
            click.echo(printable(complaint))
    if not report.ok:
        raise SystemExit(1)
    left_out = (
        f" (without {len(report.unreadable)} of the sample that could not be compared)" if report.unreadable else ""
    )
    click.echo(f"\nthe teachers compute again what is stored, within the recorded loss of its codec{left_out}")


@click.command()
@click.argument("cache", type=PATH_OR_URL)
@plain_errors(on_interrupt=SAME_COMMAND)
def repair(cache: str | Path) -> None:
    """Remove the damaged shards of CACHE, so that the same build command makes only these again.

    Checks like `radio-cache verify --deep` first. `radio-cache info --commands CACHE` prints the build command.

    CACHE is a folder such as cache.zarr, or a URL such as s3://bucket/cache.zarr.
    """
    from radio_cache.checks.verify import repair_cache, verify_cache

    opened = Cache(cache)
    # Deep, because a shard may have right checksums and still not decode.
    report = verify_cache(opened, deep=True)
    for line in repair_cache(opened, report):
        click.echo(printable(line))
    if report.ok:
        click.echo("nothing to repair")
        return
    unread = sum(damage.is_unread for damage in report.damages)
    num_left = sum(not damage.mendable for damage in report.damages) - unread
    if num_left + unread < len(report.damages):
        click.echo(f"\nNow run the build command of {cache} again")
    if num_left:
        click.echo(f"\n{num_left} left alone, which no build can make again: the lines above name the cure")
    if unread:
        click.echo(f"\n{unread} could not be read, which is no damage: make them readable, and run repair again")
    if num_left or unread:
        raise SystemExit(1)


__all__ = ["repair", "verify"]
