"""Files that commands write: links, pipes and standard output; and what cannot be written is refused at the start."""

import os
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from radio_cache.errors import ConfigError
from radio_cache.terminal.files import OutputFile, write_output


@click.command()
@click.option("--json", "json_file", type=OutputFile())
@click.option("--plot", type=OutputFile(".png", ".jpg"))
def command(json_file: Path | None, plot: Path | None) -> None:
    click.echo("computed")
    for path in (json_file, plot):
        if path is not None:
            write_output(path, b"data")


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    (tmp_path / "ahead").symlink_to(tmp_path / "made" / "later")
    write_output(tmp_path / "ahead", b"new")
    assert (tmp_path / "made" / "later").read_bytes() == b"new"
    assert {one.name for one in tmp_path.iterdir()} == {"target", "link", "ahead", "made"}


def test_a_pipe_and_standard_output_are_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    contents: list[bytes] = []
    reader = threading.Thread(target=lambda: contents.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_output(tmp_path / "pipe", b"data")
    reader.join(timeout=30)
    assert contents == [b"data"]
    result = CliRunner().invoke(command, ["--json", "-"])
    assert result.output == "computed\ndata\n"
    write_output(Path("/dev/null"), b"data")
    assert not Path("/dev/null").is_file()


def test_what_could_not_be_written_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, reason in (
        (["--json", str(tmp_path)], "is a folder"),
        (["--json", str(tmp_path / "file" / "x.json")], "is a file, not a folder"),
        (["--plot", str(tmp_path / "x.xyz")], "should end in .png or .jpg"),
        (["--plot", "-"], "should end in .png or .jpg"),
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 2
        assert reason in result.output
        assert "computed" not in result.output


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/dev/full cannot be written: No space left on device; free some space"):
        write_output(Path("/dev/full"), b"data")
