"""The way of the code: which of our functions lead from a command to a call, across generators and threads.

Tests compare these chains with the lists in CONTRIBUTING.md. `call_chains` records them, `documented_chain` reads a list.
"""

import contextlib
import inspect
import re
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("radio_cache", "cache_builder", "trainer", "evals")

Chain = tuple[str, ...]
"""Functions from the outermost to the innermost, each as `path/of/file.py:qualified_name`."""

_before_thread = threading.local()
"""The chain that handed the work of the current thread to it."""


def _name_of(frame: FrameType) -> str | None:
    """Return the name of a frame's function in a chain, or None if it is not one of ours."""
    file = Path(frame.f_code.co_filename)
    if not file.is_relative_to(ROOT):
        return None
    path = file.relative_to(ROOT)
    if path.parts[0] not in PACKAGES:
        return None
    return f"{path.as_posix()}:{frame.f_code.co_qualname.replace('.<locals>', '')}"


def current_chain(frame: FrameType | None) -> Chain:
    """Return our functions on the stack of a frame, each once, after those that handed the work to its thread."""
    inner: list[str] = []
    while frame is not None:
        name = _name_of(frame)
        if name is not None:
            inner.append(name)
        frame = frame.f_back
    return tuple(dict.fromkeys((*getattr(_before_thread, "chain", ()), *reversed(inner))))


def _after(chain: Chain, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return `work` as it runs in another thread, on behalf of the functions of `chain`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_before_thread, "chain", ())
        _before_thread.chain = chain
        try:
            return work(*args, **kwargs)
        finally:
            _before_thread.chain = before

    return run


@contextlib.contextmanager
def call_chains(owner: type, method: str, *, start: str) -> Generator[list[Chain]]:
    """Record the chain of our functions that leads to each call of `owner.method`, while the block runs.

    Args:
        owner: class whose method is watched.
        method: name of the method; its own frame is not part of a chain.
        start: name of the function that a chain begins with, such as `cache_builder/commands/build.py:build`; calls that it
            does not lead to are left out.

    Yields:
        The list that chains are appended to, one per call.
    """
    chains: list[Chain] = []
    original, submit, start_thread = getattr(owner, method), ThreadPoolExecutor.submit, threading.Thread.start

    def watched(*args: Any, **kwargs: Any) -> Any:
        chain = current_chain(inspect.currentframe())
        if start in chain:
            chains.append(chain[chain.index(start) :])
        return original(*args, **kwargs)

    def submit_with_chain(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        return submit(pool, _after(current_chain(inspect.currentframe()), work), *args, **kwargs)

    def start_with_chain(thread: threading.Thread) -> None:
        thread.run = _after(current_chain(inspect.currentframe()), thread.run)
        start_thread(thread)

    setattr(owner, method, watched)
    ThreadPoolExecutor.submit = submit_with_chain  # type: ignore[method-assign]
    threading.Thread.start = start_with_chain  # type: ignore[method-assign]
    try:
        yield chains
    finally:
        setattr(owner, method, original)
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
        threading.Thread.start = start_thread  # type: ignore[method-assign]


def documented_chain(title: str) -> Chain:
    """Return the list of functions below a line `title` in CONTRIBUTING.md.

    Args:
        title: a whole line of the document, which a fenced block of lines `path/of/file.py: function` follows.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(rf"^{re.escape(title)}\n+```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None, f"CONTRIBUTING.md has no list below '{title}'"
    lines = block[1].splitlines()
    return tuple(re.sub(r"\s+", "", line.partition("#")[0]) for line in lines)
