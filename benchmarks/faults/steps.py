"""What a process was doing to the disk when it was killed."""

import mmap
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import kind_of_file

from radio_cache.storage.local import TEMPORARY


class Steps:
    """What a writer does at the moment, in memory that outlives it: the number of changes begun, and the name of the last."""

    SIZE = 256

    def __init__(self, shared: mmap.mmap, slot: int) -> None:
        self._shared, self._at = shared, slot * self.SIZE
        self.clear()

    def clear(self) -> None:
        self._shared[self._at : self._at + self.SIZE] = bytes(self.SIZE)

    def count(self) -> int:
        return struct.unpack_from("<I", self._shared, self._at)[0]

    def name(self) -> str:
        return self._shared[self._at + 4 : self._at + self.SIZE].rstrip(b"\0").decode()

    def set(self, name: str) -> None:
        self._shared[self._at + 4 : self._at + self.SIZE] = name.encode()[: self.SIZE - 4].ljust(self.SIZE - 4, b"\0")

    def begin(self, name: str) -> None:
        self.set(name)
        struct.pack_into("<I", self._shared, self._at, self.count() + 1)

    def follow(self, place: Path) -> None:
        """Note every change this process makes to the disk from now on."""
        opened: dict[int, str] = {}

        def around(module: Any, name: str, doing: str, path_of: Callable[..., Any]) -> None:
            original = getattr(module, name)

            def run(*given: Any, **named: Any) -> Any:
                what = _what(path_of(*given), place, opened)
                if name == "open" and not given[1] & os.O_CREAT:
                    return original(*given, **named)
                self.begin(f"{doing} {what}")
                made = original(*given, **named)
                if name == "open":
                    opened[made] = str(given[0])
                self.set("between two changes")
                return made

            setattr(module, name, run)

        around(os, "open", "opening", lambda path, *_: path)
        around(os, "writev", "writing", lambda descriptor, *_: descriptor)
        around(os, "fdatasync", "syncing", lambda descriptor: descriptor)
        around(os, "fsync", "syncing", lambda _: "a folder")
        around(os, "replace", "renaming", lambda source, _: source)
        around(os, "rename", "renaming", lambda source, _: source)
        around(os, "unlink", "deleting", lambda path, **_: path)
        around(os, "mkdir", "making", lambda *_: "a folder")
        around(Path, "write_bytes", "writing", lambda path, _: path)
        around(shutil, "rmtree", "deleting", lambda path, **_: path)


def _what(path: Any, place: Path, opened: dict[int, str]) -> str:
    """What a file is: given by its path, by its descriptor, or in words."""
    path = str(opened.get(path, "a file") if isinstance(path, int) else path)
    if not path.startswith("/"):
        return path if path.startswith("a ") else "what is removed"  # names below a descriptor
    parts = Path(path).relative_to(place.parent).parts
    if not parts or TEMPORARY in parts[0]:
        return "a cache in the making"
    if any(TEMPORARY in part for part in parts[:-1]) or (len(parts) == 3 and parts[1] == "teachers"):
        return "a teacher in the making, or dropped"
    return f"a file of kind '{kind_of_file('/'.join(part.split(TEMPORARY)[0] for part in parts[1:]))}'"
