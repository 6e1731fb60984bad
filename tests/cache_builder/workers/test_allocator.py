"""Blocks that are freed are kept for the next pass. In processes of their own: it cannot be undone."""

import os
import subprocess
import sys

import pytest

from cache_builder.workers.allocator import allocator_environment

CHILD = """
import resource, sys, threading
from cache_builder.workers.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def passes():
    for _ in range(8):
        activations = [b"x" * size for _ in range(6)]
        del activations

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

size, before = 20 << 20, faults()
thread = threading.Thread(target=passes)
thread.start()
thread.join()
print(kept, faults() - before)
"""


def faults(what: str, **more: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what], env=environment | more, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept, int(count)


NEEDS_GLIBC = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")


@NEEDS_GLIBC
def test_large_blocks_are_mapped_once_and_not_at_every_use() -> None:
    _, given_back = faults("not")
    kept, count = faults("keep")
    assert kept == "True"
    assert count < given_back / 3
    _, count = faults("not", **allocator_environment())  # as worker processes are started
    assert count < given_back / 3


def test_what_the_environment_says_of_memory_stays() -> None:
    assert faults("keep", MALLOC_ARENA_MAX="2")[0] == "False"
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"


def test_workers_are_not_told_what_the_environment_says_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert allocator_environment() == {}
