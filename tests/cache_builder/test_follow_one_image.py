"""CONTRIBUTING.md lists the functions that an image passes through in a build: this is the way that the code goes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tracing import Chain, call_chains, documented_chain

from cache_builder.cli import main
from radio_cache.storage.local import LocalStorage
from radio_cache.testing import write_images

START = "cache_builder/commands/build.py:build"
MAX_HOPS = 7


@pytest.fixture
def trace(fake_module: Any, fake_teachers: tuple[str, ...], tmp_path: Path) -> Callable[..., tuple[list[Chain], ...]]:
    """Build a tiny cache with the command; returns the chains to the teacher's network, and to writes of files."""

    def build(*options: str) -> tuple[list[Chain], ...]:
        write_images(tmp_path / "images", classes=("ant", "bee"), per_class=40, size=37)
        arguments = ["--images", str(tmp_path / "images"), "--teacher", fake_teachers[0], "--shard-images", "32"]
        with (
            call_chains(fake_module.FakeTeacher, "__call__", start=START) as to_network,
            call_chains(LocalStorage, "write", start=START) as to_write,
        ):
            result = CliRunner().invoke(main, ["build", *arguments, *options, "--out", str(tmp_path / "out.zarr")])
        assert result.exit_code == 0, result.output
        return to_network, to_write

    return build


@pytest.mark.parametrize("options", [(), ("--codec", "half", "--views", "1"), ("--store-pixels", "32")])
def test_no_call_of_the_network_and_no_write_is_more_than_seven_hops_away(
    trace: Callable[..., tuple[list[Chain], ...]], options: tuple[str, ...]
) -> None:
    for chains in trace(*options):
        assert chains
        for chain in chains:
            # A family's teacher calls its network from its own `__call__`, which is one hop more than the fake one.
            assert len(chain) < MAX_HOPS or chain[-1] == "radio_cache/writer.py:ShardWriter._write", chain
            assert len(chain) <= MAX_HOPS, chain


def test_the_way_that_is_documented_is_the_way_of_the_code(trace: Callable[..., tuple[list[Chain], ...]]) -> None:
    to_network, to_write = trace("--codec", "half")
    assert set(to_network) == {documented_chain("From the command to the teacher's network:")}
    documented = documented_chain("From the command to a file of a shard:")
    assert documented in to_write
    assert max(map(len, to_write)) <= MAX_HOPS
