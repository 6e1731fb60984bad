"""Output shared by all four commands: errors of one message, a table style, and progress in a terminal and in a log."""

import errno
import functools
import io
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from textwrap import fill
from types import TracebackType
from typing import IO, Any, ParamSpec, TypeVar, cast, final

import click
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from radio_cache.allowed_modules import allowing_modules
from radio_cache.errors import RadioCacheError
from radio_cache.storage.base import is_url

DATA_ON_STANDARD_OUTPUT = "radio_cache.data_on_standard_output"
"""Key of `click.Context.meta`: if set, standard output is for data only, and tables go to standard error."""


class PathOrUrl(click.ParamType[str | Path]):
    """The path or URL of a cache, such as s3://bucket/cache.zarr, which `click.Path` would break."""

    name = "place"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        return value if is_url(value) else Path(value)


PATH_OR_URL = PathOrUrl()

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it."""

_LOG_EVERY_S = 10.0
_STALLED_S = 30.0
"""Shortest pause without progress that is reported."""

_PADDING = re.compile(r"[ \t]+(?=\n)")

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that change the direction of writing, and lone surrogates."""


def plain_errors(*, on_interrupt: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a command: errors of radio-cache and of the system become one message without a traceback and exit code 1.

    Also makes waiting compute threads sleep, so that a command leaves room for others on the machine.

    Args:
        on_interrupt: next step for the user after Ctrl-C.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            # Read when torch loads OpenMP, which a command does after this. Waiting threads that spin cost 7 % less on an
            # idle machine, and make everything five times slower beside one other busy process (docs/log.md).
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            if isinstance(sys.stdout, io.TextIOWrapper):
                # Names of files and classes may have characters that the terminal's encoding lacks.
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                return command(*args, **kwargs)
            # Only errors whose cure is the user's become a message; a bug keeps its traceback.
            except RadioCacheError as exc:
                _print_error(printable_lines(str(exc)))
                sys.exit(1)
            except OSError as exc:
                # Disk full, no permission, no such device: the user's to cure. A closed pipe is click's business.
                if exc.errno is None or exc.errno == errno.EPIPE:
                    raise
                where = f": '{exc.filename}'" if exc.filename is not None else ""
                _print_error(f"{exc.strerror}{where}. {on_interrupt}".rstrip())
                sys.exit(1)
            except MemoryError as exc:
                requested_bytes = f" ({exc})" if str(exc) else ""
                _print_error(
                    f"there is not enough memory{requested_bytes}: free some, or process less at once. {on_interrupt}".rstrip()
                )
                sys.exit(1)
            except RuntimeError as exc:
                if "can't start new thread" not in str(exc):
                    raise
                _print_error(
                    "the system starts no more threads for this process: raise `ulimit -u`, free memory, or take fewer threads. "
                    f"{on_interrupt}".rstrip()
                )
                sys.exit(1)
            except KeyboardInterrupt:
                click.echo(f"\nstopped. {on_interrupt}", err=True)
                sys.exit(INTERRUPTED)

        return run

    return decorate


def allow_module_option(command: F) -> F:
    """Add --allow-module to a command. The modules named are allowed to everything that the command loads."""

    def allow(context: click.Context, option: click.Parameter, names: tuple[str, ...]) -> None:
        del option
        context.with_resource(allowing_modules(names))

    return click.option(
        "--allow-module",
        multiple=True,
        metavar="NAME",
        expose_value=False,
        callback=allow,
        help="Allow caches, runs and recipes to name this Python module or package as the code of a student or teacher "
        "(torch-module). Loading them runs that code. Repeatable. [default: none]",
    )(command)


def _print_error(message: str) -> None:
    """Print an error to standard error; in a terminal, break lines between words, but not within a `command` to copy."""
    lines = f"error: {message}".split("\n")
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        # A line break within a command would be pasted with it.
        unbroken_lines = [_COMMAND.sub(lambda match: match[0].replace(" ", _UNBROKEN), line) for line in lines]
        lines = [
            fill(line, width, break_long_words=False, break_on_hyphens=False).replace(_UNBROKEN, " ")
            for line in unbroken_lines
        ]
    click.echo("\n".join(lines), err=True)


_COMMAND = re.compile(r"`[^`]+`")
_UNBROKEN = "\N{NO-BREAK SPACE}"


def console() -> Console:
    """Return the console for results.

    It writes to standard output: as wide as a terminal, or 110 columns without padding in a file. If an option puts data
    on standard output (`--json -`), it writes to standard error.
    """
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(DATA_ON_STANDARD_OUTPUT):
        return _PlainConsole(stderr=True, highlight=False)
    if sys.stdout.isatty():
        return _PlainConsole(highlight=False)
    # A fixed width, so that a table in a log does not depend on the machine that wrote it.
    return _PlainConsole(file=cast("IO[str]", _Unpadded(sys.stdout)), width=110, highlight=False)


@final
class _PlainConsole(Console):
    """A console that prints all text literally: without markup in brackets or control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        plain: dict[str, Any] = options | {"markup": False, "emoji": False}
        return super().render_str(printable_lines(text), **plain)


def print_line(sentence: str) -> None:
    """Write a progress message to standard error, with control characters escaped."""
    # Standard error keeps results on standard output free of messages.
    click.echo(printable_lines(sentence), err=True)


class _Unpadded:
    """A text file without the trailing blanks with which rich pads the lines of a table."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(_PADDING.sub("", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """Return an empty table.

    A terminal of fewer than 100 columns gets one space between columns, and a line for each word of a number's header.

    Args:
        title: above the table.
        *columns: headers.
        left: number of leading columns that hold text; the others hold numbers, aligned right.
    """
    narrow = is_narrow()
    new_table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
        collapse_padding=narrow,
    )
    for position, name in enumerate(columns):
        # A broken number would be misread, and a broken name could not be copied; other text folds.
        number = position >= left
        new_table.add_column(
            _HEADER_BREAKS.sub("\n", name) if narrow and number else name,
            justify="right" if number else "left",
            overflow="ellipsis" if number else "fold",
            no_wrap=number or (position == 0 and not narrow),
        )
    return new_table


def is_narrow() -> bool:
    """Return whether results go to a terminal of fewer than 100 columns."""
    return sys.stdout.isatty() and shutil.get_terminal_size().columns < _WIDE


_WIDE = 100
_HEADER_BREAKS = re.compile(r" |(?<=\w)(?=/\w)")
"""Matches between words, and before the slash of a unit such as bits/value."""


def in_width(line: str, *, indent: int = 0) -> str:
    """Return the line broken between words to the width of the terminal, or unchanged in a file.

    Args:
        line: without line breaks.
        indent: columns before each line after the first.
    """
    if not sys.stdout.isatty():
        return line
    return fill(line, shutil.get_terminal_size().columns, subsequent_indent=" " * indent, break_on_hyphens=False)


def printable(text: str) -> str:
    """Return the text on one line, with control characters and unencodable ones written as escapes.

    An untrusted cache holds names and notes of its author's choice.
    """
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """Return the text with `printable` applied to each line."""
    return "\n".join(map(printable, text.split("\n")))


def human_bytes(num_bytes: float) -> str:
    """Format a size in decimal units, as disks are sold: 1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable: the last unit always returns")


@final
class _Bar(Progress):
    """A bar, with notes on a second line, for which the first has no room."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(f"  {self.note}", style="dim")


@final
class _TimeColumn(ProgressColumn):
    """The remaining time, or the total time at the end."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"{task.finished_time or 0:.1f} s")
        if task.fields.get("stalled"):
            return Text(task.fields["stalled"])
        remaining = task.time_remaining
        return Text("" if remaining is None else f"{timedelta(seconds=int(remaining))} left")


class ProgressLine:
    """Progress on standard error: a live bar in a terminal, a line every ten seconds in a log. A context manager.

    Args:
        name: of the activity.
        total: number of items.
        unit: of the items ("images").
        done: number of items completed before the start, which do not count for the rate.
    """

    def __init__(self, name: str, total: int, *, unit: str = "images", done: int = 0) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = self._done_before = done
        self._note = ""
        self._started = self._logged = self._moved = time.monotonic()
        self._longest_gap = 0.0
        # None in a log, where a redrawn bar would fill the file with control characters.
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            self._bar = _Bar(
                TextColumn("{task.description}"),
                # The texts around the bar take about 60 columns.
                BarColumn(bar_width=max(8, min(30, shutil.get_terminal_size().columns - 60))),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                _TimeColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> "ProgressLine":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._done, rate="", stalled="")
        return self

    def advance(self, count: int, note: str | None = None) -> None:
        """Add `count` completed items. `note` is the text after the rate from now on; None keeps it."""
        self._done += count
        self._note = self._note if note is None else note
        now = time.monotonic()
        # A call without images only updates the note, and must not hide a stall.
        if count:
            self._longest_gap, self._moved = max(self._longest_gap, now - self._moved), now
        if self._bar:
            self._bar.note = self._note
            rate = f"{self.rate:.1f} {self._unit}/s"
            self._bar.update(self._task, completed=self._done, rate=rate, stalled=self._stalled(now))
        elif now - self._logged >= _LOG_EVERY_S:
            self._log(now)

    @property
    def rate(self) -> float:
        """Items per second since the start, without those completed before."""
        return (self._done - self._done_before) / max(time.monotonic() - self._started, 1e-9)

    def _stalled(self, now: float) -> str:
        """Return a text in place of the remaining time, if nothing has arrived for much longer than before."""
        silent = now - self._moved
        # Shards may take minutes each: only three times the longest gap so far is unusual.
        if self._done >= self._total or silent < max(_STALLED_S, 3 * self._longest_gap):
            return ""
        return f"nothing done for {timedelta(seconds=int(silent))}"

    def _text(self, now: float) -> str:
        rate = (self._done - self._done_before) / max(now - self._started, 1e-9)
        return f"{rate:.1f} {self._unit}/s" + (f", {self._note}" if self._note else "")

    def _log(self, now: float) -> None:
        self._logged = now
        rate = (self._done - self._done_before) / max(now - self._started, 1e-9)
        # Without progress there is no rate to extrapolate.
        remaining = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 and self._done < self._total else ""
        if stalled := self._stalled(now):
            remaining = f", {stalled}"
        click.echo(f"{self._name}: {self._done}/{self._total} {self._unit}, {self._text(now)}{remaining}", err=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        # After an error, a last line would read as if the work had ended well.
        elif kind is None:
            self._log(time.monotonic())


@final
class CountLine:
    """A count of items of unknown total, on standard error.

    Nothing is printed for ten seconds, then a live line in a terminal, or a line every ten seconds in a log, also during one long
    request. A context manager.

    Args:
        name: of the activity.
        unit: of the items ("files").
    """

    def __init__(self, name: str, unit: str) -> None:
        self._name, self._unit, self._count = name, unit, 0
        self._counting = threading.Lock()
        self._done = threading.Event()
        # A thread of its own, since one request may block the caller for minutes; a daemon, so that it ends with the process.
        self._thread = threading.Thread(target=self._print_counts, name="count line", daemon=True)

    def __enter__(self) -> "CountLine":
        self._started = time.monotonic()
        self._thread.start()
        return self

    def advance(self, count: int) -> None:
        """Add `count` items, from any thread."""
        with self._counting:
            self._count += count

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def _text(self) -> str:
        return f"{self._name}: {self._count} {self._unit} in {time.monotonic() - self._started:.0f} s"

    def _print_counts(self) -> None:
        # Most counts end sooner, and then print nothing.
        if self._done.wait(_LOG_EVERY_S):
            return
        if sys.stderr.isatty():
            with Console(stderr=True).status(self._text) as line:
                while not self._done.wait(1.0):
                    line.update(self._text)
            return
        click.echo(self._text, err=True)
        while not self._done.wait(_LOG_EVERY_S):
            click.echo(self._text, err=True)
