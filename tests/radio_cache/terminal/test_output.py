"""What all commands share."""

import io
import queue
import re
import sys
import time

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

import radio_cache.terminal.output
from radio_cache.errors import SourceError
from radio_cache.terminal.output import (
    INTERRUPTED,
    CountLine,
    ProgressLine,
    console,
    human_bytes,
    in_width,
    plain_errors,
    print_line,
    table,
)


def run(body: BaseException) -> tuple[int, str]:
    @click.command()
    @plain_errors(on_interrupt="Run it again.")
    def command() -> None:
        raise body

    result = CliRunner().invoke(command)
    return result.exit_code, result.output


def test_our_errors_are_one_message_without_a_traceback() -> None:
    assert run(SourceError("photos holds no image")) == (1, "error: photos holds no image\n")


def test_in_a_terminal_errors_break_between_words_and_never_within_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    with_command = SourceError("no image was found anywhere; `radio-cache build --help` says what is one")

    @click.command()
    def command() -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        plain_errors(on_interrupt="")(raise_it)()

    def raise_it() -> None:
        raise with_command

    assert CliRunner().invoke(command).output.splitlines() == [
        "error: no image was found",
        "anywhere;",
        "`radio-cache build --help`",
        "says what is one",
    ]


def test_interrupting_says_what_to_do_next_and_exits_as_shells_expect() -> None:
    assert run(KeyboardInterrupt()) == (INTERRUPTED, "\nstopped. Run it again.\n")


def test_the_systems_refusals_are_one_message_with_the_file_and_how_to_go_on() -> None:
    assert run(PermissionError(13, "Permission denied", "/caches/c.zarr")) == (
        1,
        "error: Permission denied: '/caches/c.zarr'. Run it again.\n",
    )
    assert run(OSError(28, "No space left on device")) == (1, "error: No space left on device. Run it again.\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            MemoryError("Unable to allocate 3 GiB"),
            "error: there is not enough memory (Unable to allocate 3 GiB): free some",
        ),
        (MemoryError(), "error: there is not enough memory: free some"),
        (
            RuntimeError("can't start new thread"),
            "error: the system starts no more threads for this process: raise `ulimit -u`",
        ),
    ],
)
def test_no_memory_and_no_threads_are_one_message(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @plain_errors(on_interrupt="Run it again.")
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_code:
        command()
    assert exit_code.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.endswith("Run it again.\n")


def test_a_closed_pipe_is_left_to_click() -> None:
    assert run(BrokenPipeError(32, "Broken pipe")) == (1, "")


def test_errors_of_libraries_that_only_call_themselves_oserror_keep_their_traceback() -> None:
    @click.command()
    @plain_errors(on_interrupt="")
    def command() -> None:
        raise OSError("cannot identify image file")

    assert isinstance(CliRunner().invoke(command).exception, OSError)


def test_other_errors_keep_their_traceback() -> None:
    @click.command()
    @plain_errors(on_interrupt="")
    def command() -> None:
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(command).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (5.6e9, "5.6 GB"), (3.3e15, "3300.0 TB")]
)
def test_bytes_are_written_in_decimal_units(size: float, text: str) -> None:
    assert human_bytes(size) == text


def test_progress_in_a_log_is_a_line_now_and_then_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(radio_cache.terminal.output, "_LOG_EVERY_S", 0.0)
    with ProgressLine("lite0", 10, done=4) as line:
        line.advance(3, "teacher 90%")
        line.advance(3)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("lite0: 7/10 images, ")
    assert first.endswith(" s left")
    assert "images/s, teacher 90%" in second
    assert last.startswith("lite0: 10/10 images, ")
    assert "left" not in last


def test_progress_of_a_job_that_failed_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), ProgressLine("lite0", 10):
        raise ValueError("no")
    assert capsys.readouterr().err == ""


def test_a_count_is_told_again_and_again_once_it_takes_long_even_if_nothing_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(radio_cache.terminal.output, "_LOG_EVERY_S", 0.01)
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(radio_cache.terminal.output.click, "echo", lambda text, err: told.put(text))
    with CountLine("listing", "files") as line:
        assert told.get(timeout=10).startswith("listing: 0 files in ")
        line.advance(1000)
        line.advance(234)
        assert any(told.get(timeout=10).startswith("listing: 1234 files in ") for _ in range(100))


def test_a_count_in_a_terminal_is_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radio_cache.terminal.output, "_LOG_EVERY_S", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = io.StringIO()
    monkeypatch.setattr(
        radio_cache.terminal.output,
        "Console",
        lambda **_: Console(file=shown, width=80, force_terminal=True, no_color=True),
    )
    with CountLine("listing", "files") as line:
        line.advance(7)
        deadline = time.monotonic() + 10
        while "listing: 7 files in 0 s" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "listing: 7 files in 0 s" in shown.getvalue()


def test_a_count_that_is_soon_complete_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with CountLine("listing", "files") as line:
        line.advance(7)
    assert capsys.readouterr().err == ""


def test_a_narrow_terminal_gets_tables_in_which_no_number_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    columns = ("images", "made now", "images/s", "time", "codec", "cosine", "bytes/image", "stored")
    numbers = ("10000", "10000", "30.9", "5.4 min", "klt/packed", "0.9912", "37.3 kB", "37.3 MB")
    rows = table("", "teacher", *columns)
    rows.add_row("efficientnet-lite0", *numbers)
    rows.add_row("openai-clip-vit-l-14-336@448", *numbers)
    shown = io.StringIO()
    Console(file=shown, width=80).print(rows)
    lines = shown.getvalue().splitlines()
    assert [line for line in lines if "…" in line or len(line) > 80] == []
    assert sum(" ".join(line.split()).endswith(" ".join(numbers)) for line in lines) == 2


def test_a_bar_has_its_count_rate_and_time_on_one_line_and_the_rest_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = io.StringIO()
    monkeypatch.setattr(
        radio_cache.terminal.output,
        "Console",
        lambda **_: Console(file=shown, width=80, force_terminal=True, no_color=True),
    )
    with ProgressLine("efficientnet-lite0", 60) as line:
        line.advance(60, "teacher 88%, 12.0 kB written")
    *_, bar, note = (part for part in re.sub(r"\x1b\[[0-9;?]*\w", "", shown.getvalue()).splitlines() if part.strip())
    assert re.search(r"efficientnet-lite0 .* 60/60 [\d.]+ images/s [\d.]+ s$", bar.rstrip())
    assert note.strip() == "teacher 88%, 12.0 kB written"


def test_lines_are_broken_between_words_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert in_width("pays     from student run 1 on") == "pays     from student run 1 on"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert in_width("pays     from student run 1 on", indent=9) == "pays     from\n         student run\n         1 on"


def test_nothing_done_for_long_is_said_in_place_of_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("radio_cache.terminal.output.time.monotonic", lambda: now)
    line = ProgressLine("clip", 100)
    for now in (20.0, 40.0):  # noqa: B007  # read by the clock
        line.advance(40)
    assert ", 10 s left" in capsys.readouterr().err
    now = 90.0
    line.advance(0)
    assert ", 22 s left" in capsys.readouterr().err
    now = 101.0
    line.advance(0)
    said = capsys.readouterr().err
    assert "nothing done for 0:01:01" in said
    assert "left" not in said


NASTY = "\x1b[31mred\x07 [bold]x[/bold] [/] :cat: \udcff"


def test_names_in_sentences_and_tables_steer_no_terminal_and_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(f"cannot use {NASTY}\nsecond line")
    rows = table("", "name", "number")
    rows.add_row(NASTY, "1")
    console().print(rows)
    console().print(f"note: {NASTY}")
    out, err = capsys.readouterr()
    escaped = r"\x1b[31mred\x07 [bold]x[/bold] [/] :cat: \udcff"
    assert err == f"cannot use {escaped}\nsecond line\n"
    assert out.count(escaped) == 2


def test_results_with_any_characters_go_to_an_ascii_output() -> None:
    @click.command()
    @plain_errors(on_interrupt="")
    def command() -> None:
        console().print("größe \N{SNOWMAN}")

    result = CliRunner(charset="ascii").invoke(command)
    assert (result.exit_code, result.output) == (0, "gr\\xf6\\xdfe \\u2603\n")
