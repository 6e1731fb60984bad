"""From what a user types behind `--images` to folders, tars and lists: ranges, patterns, folders of tars."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from cache_builder.sources import file_list
from cache_builder.sources.folder import has_image_name
from radio_cache.errors import SourceError

Kind = Literal["folder", "tar", "list"]

WANTED = "--images takes a folder of images, WebDataset tars (.tar), or a text file that lists images (.txt)"

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Source:
    """One place that holds images; path is absolute."""

    kind: Kind
    path: str


def named_places(typed: str) -> list[str]:
    """The paths that one `--images` names, links followed: ranges such as {000..004} counted out, patterns matched.

    Raises SourceError for a place that is not there and a pattern that matches nothing.
    """
    braces = _BRACES.search(typed)
    if braces:
        low, high = braces.groups()
        if int(low) > int(high):
            raise SourceError(f"{typed}: the range {braces[0]} counts down")
        names = [typed.replace(braces[0], f"{i:0{len(low)}d}", 1) for i in range(int(low), int(high) + 1)]
        return [place for name in names for place in named_places(name)]
    path = Path(typed).expanduser()
    if any(mark in typed for mark in "*?[") and not path.exists():
        matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        if not matches:
            raise SourceError(f"no file matches '{typed}'")
        return [str(match.resolve()) for match in matches]
    if not path.exists():
        raise SourceError(f"{typed} does not exist: {WANTED}")
    return [str(path.resolve())]


def sources_at(place: str) -> list[Source]:
    """What lies at a path: one source, or the tars of a folder that holds nothing else.

    Raises SourceError for a file that is no source.
    """
    path = Path(place)
    if path.is_dir():
        return [Source("tar", name) for name in _tars_of(path)] or [Source("folder", place)]
    name = path.name.lower()
    if name.endswith(_COMPRESSED):
        raise SourceError(f"{place} is a compressed tar, which has no random access: decompress it first")
    if name.endswith(".tar"):
        return [Source("tar", place)]
    if name.endswith(file_list.ENDINGS):
        return [Source("list", place)]
    raise SourceError(f"{place} is a file, and not a tar or a list: {WANTED}")


def _tars_of(folder: Path) -> list[str]:
    """The tars in a folder that holds nothing but them, sorted; none if it is a folder of images."""
    tars: list[str] = []
    images = folders = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.endswith(".tar"):
                    tars.append(entry.path)
                elif entry.is_dir():
                    folders = True
                else:
                    images = images or has_image_name(entry.name)
    except OSError as exc:
        raise SourceError(f"{folder} cannot be listed: {exc.strerror or exc}: have its permissions changed") from exc
    if tars and images:
        raise SourceError(f"{folder} holds both tars and images: name the tars as '{folder}/*.tar'")
    return [] if folders else sorted(tars)


def refuse_doubles(sources: Sequence[Source]) -> None:
    """Raise SourceError if a source comes twice, or lies within another folder: its images would count twice."""
    paths = [source.path for source in sources]
    folders = {source.path for source in sources if source.kind == "folder"}
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise SourceError(f"{path} is given twice as a source of images")
        seen.add(path)
    for source in sources:
        outer = folders.intersection(_above(source.path)) if source.kind == "folder" else None
        if outer:
            raise SourceError(f"{source.path} is part of {outer.pop()}, another source: its images would count twice")


def _above(path: str) -> Iterator[str]:
    while "/" in path.rstrip("/"):
        path = path.rstrip("/").rpartition("/")[0]
        yield path or "/"


def prefixes(sources: Sequence[Source]) -> list[str]:
    """What keeps keys of several sources apart: each one's path below the folder they share."""
    if len(sources) == 1 and sources[0].kind in ("folder", "list"):
        return [""]
    parts = [PurePosixPath(source.path).parts for source in sources]
    shared = 0  # of parts that all have in common, file names aside
    while all(shared < len(own) - 1 and own[shared] == parts[0][shared] for own in parts):
        shared += 1
    return [f"{'/'.join(own[shared:])}/" for own in parts]
