"""From what a user types behind `--images` to folders, tars, Parquet files and lists: ranges, patterns, folders of tars."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from cache_builder.sources import file_list
from cache_builder.sources.folder import has_image_name
from cache_builder.sources.samples import member_endings
from radio_cache.errors import ConfigError, SourceError
from radio_cache.images.remote import WEB, OnListed, list_remote
from radio_cache.storage.base import is_url

Kind = Literal["folder", "tar", "list", "parquet"]

WANTED = "--images takes a folder of images, WebDataset tars, Parquet files, or a file that lists images (.txt, .csv)"

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COLUMNS = re.compile(r"(.*(?:/|\.parquet|\.csv|\.tsv|\.tar))#([^/#,]*)(?:,([^/#,]*))?\Z", re.DOTALL)
"""A place, and behind "#" the columns of images and of classes: of a Parquet file, a folder of them, a CSV or TSV file. In a tar
they are the endings of the photos (`jpg;png`) and the field of the `.json` members that holds the class."""

_FILE_URL = "file://"


@dataclass(frozen=True)
class Source:
    """One place that holds images; path is absolute, or a URL.

    image_column, label_column: of a Parquet, CSV or TSV file, if the user named them; of a tar, the endings of photos and the
    field of `.json` members with the class. files: paths below the folder, of one at a URL.
    """

    kind: Kind
    path: str
    image_column: str = ""
    label_column: str = ""
    files: tuple[str, ...] = field(default=(), repr=False)


def expand_source(typed: str, tell: OnListed = lambda _: None) -> list[str]:
    """The paths and URLs that one `--images` names, links followed: ranges such as {000..004} counted out, patterns matched.

    Columns (`#image,label`) stay behind the places they were typed behind. tell: told of files at URLs as they are listed.
    Raises SourceError for a place that is not there and a pattern that matches nothing. URLs without a pattern are
    not looked for here.
    """
    braces = _BRACES.search(typed)
    if braces:
        low, high = braces.groups()
        if int(low) > int(high):
            raise SourceError(f"{typed}: the range {braces[0]} counts down")
        names = [typed.replace(braces[0], f"{i:0{len(low)}d}", 1) for i in range(int(low), int(high) + 1)]
        return [place for name in names for place in expand_source(name, tell)]
    place, columns = _without_columns(typed.removeprefix(_FILE_URL))
    if is_url(place):
        slash = "/" if columns and place.endswith("/") else ""
        return [match + slash + columns for match in _matching_urls(place, tell)]
    path = Path(place).expanduser()
    if any(mark in place for mark in "*?[") and not path.exists():
        matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        if not matches:
            raise SourceError(f"no file matches '{place}'")
        return [f"{match.resolve()}{columns}" for match in matches]
    if not path.exists():
        raise SourceError(f"{place} does not exist: {WANTED}")
    # A folder is told from a file by its last slash, for whoever looks for columns behind it.
    return [f"{path.resolve()}{'/' if columns and path.is_dir() else ''}{columns}"]


def _without_columns(typed: str) -> tuple[str, str]:
    """A place, and "#" with the columns behind it, if there are any and no file is really called so."""
    found = _COLUMNS.match(typed)
    if found is None or Path(typed).exists():
        return typed, ""
    return found[1], typed[len(found[1]) :]


def _matching_urls(url: str, tell: OnListed) -> list[str]:
    """The URL itself, or what matches it as a pattern. The question mark of a web address is none."""
    marks = "*" if url.startswith(WEB) else "*?["
    first = min((url.find(mark) for mark in marks if mark in url), default=-1)
    if first < 0:
        return [url.rstrip("/")]
    above = url[:first].rpartition("/")[0]
    pattern = url[len(above) + 1 :].split("/")
    found = [
        f"{above}/{name}"
        for name in _files_below(above, tell)
        if len(parts := name.split("/")) == len(pattern) and all(map(fnmatchcase, parts, pattern))
    ]
    if not found:
        raise SourceError(f"no object matches '{url}'")
    return found


def sources_at(place: str, tell: OnListed = lambda _: None) -> list[Source]:
    """What lies at a path or URL of `expand_source`: one source, or the tars or Parquet files of a folder without others.

    tell: told of files at URLs as they are listed.
    Raises SourceError for a file that is no source.
    """
    place, columns = _without_columns(place)
    place = place.rstrip("/") or "/"
    image, _, label = columns.removeprefix("#").partition(",")
    found = _file_at(place)
    if found is None:
        found = _at_prefix(place, tell) if is_url(place) else _in_folder(Path(place))
    if columns and not all(
        one.kind in ("parquet", "tar") or one.path.lower().endswith(file_list.TABLES) for one in found
    ):
        raise SourceError(
            f"{place} has no columns such as '{columns}': only Parquet, CSV and TSV files, and tars, have"
        )
    return [Source(one.kind, one.path, image, label, one.files) for one in found]


def with_member(sources: Sequence[Source], member: str) -> list[Source]:
    """The sources, with `member` for the photo of a sample where a tar's own `#` does not name another.

    Raises ConfigError if it names nothing, or if no source is a tar.
    """
    if not member_endings(member):
        raise ConfigError(f"--member '{member}': the endings of photos, such as 'jpg;png'")
    if all(source.kind != "tar" for source in sources):
        raise ConfigError(
            f"--member '{member}' names members of samples in tars, and no --images is a tar: leave it out"
        )
    return [
        replace(source, image_column=member) if source.kind == "tar" and not source.image_column else source
        for source in sources
    ]


def _file_at(place: str) -> list[Source] | None:
    """The source that is this file; None if it is a folder."""
    name = PurePosixPath(place.partition("?")[0] if place.startswith(WEB) else place).name.lower()
    if not is_url(place) and Path(place).is_dir():
        return None
    if name.endswith(_COMPRESSED):
        raise SourceError(f"{place} is a compressed tar, which has no random access: decompress it first")
    if name.endswith(".tar"):
        return [Source("tar", place)]
    if name.endswith(".parquet"):
        return [Source("parquet", place)]
    if name.endswith(file_list.ENDINGS):
        return [Source("list", place)]
    if is_url(place):
        return None
    raise SourceError(f"{place} is a file, and not a tar, a Parquet file or a list: {WANTED}")


def _files_below(url: str, tell: OnListed) -> list[str]:
    try:
        return [name for name, _ in list_remote(url, tell)]
    except FileNotFoundError as exc:  # a prefix of a bucket holds nothing; a repository that is not there is an error
        raise SourceError(
            f"{url} does not exist ({' '.join(str(exc).split()):.200}): check its name; what is private needs credentials, "
            "HF_TOKEN for hf://"
        ) from exc


def _at_prefix(url: str, tell: OnListed) -> list[Source]:
    """What a bucket holds below a prefix."""
    files = _files_below(url, tell)
    if not files:
        raise SourceError(f"{url} holds nothing: check the bucket, the prefix, and the case of both. {WANTED}")
    above = [name for name in files if "/" not in name]
    shards = _shards(url, above, folders=len(above) < len(files))
    return shards or [Source("folder", url, files=tuple(files))]


def _in_folder(folder: Path) -> list[Source]:
    """What a folder holds."""
    names: list[str] = []
    folders = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.endswith((".tar", ".parquet")) and entry.is_dir():
                    folders = folders or not entry.name.startswith(".")
                else:
                    names.append(entry.name)
    except OSError as exc:
        raise SourceError(f"{folder} cannot be listed: {exc.strerror or exc}: have its permissions changed") from exc
    return _shards(str(folder), names, folders=folders) or [Source("folder", str(folder))]


def _shards(folder: str, names: Sequence[str], *, folders: bool) -> list[Source]:
    """The tars or Parquet files in a folder that holds nothing but them, sorted; none if it is a folder of images.

    names: of the files in it. folders: whether there are folders in it, too.
    """
    there = sorted(name for name in names if not name.startswith("."))
    tars = [Source("tar", f"{folder}/{name}") for name in there if name.endswith(".tar")]
    tables = [Source("parquet", f"{folder}/{name}") for name in there if name.endswith(".parquet")]
    kinds = [kind for kind, found in (("tars", tars), ("Parquet files", tables)) if found]
    if kinds and any(has_image_name(name) for name in there):
        kinds.append("images")
    compressed = [name for name in there if name.lower().endswith(_COMPRESSED)]
    if compressed and (tars or not (tables or folders or any(map(has_image_name, there)))):
        raise SourceError(
            f"{folder}/{compressed[0]} is a compressed tar, which has no random access: decompress it first, or name the "
            f"files that are to be used, as in '{folder}/*.tar'"
        )
    if len(kinds) > 1:
        ending = "tar" if tars else "parquet"
        raise SourceError(f"{folder} holds both {' and '.join(kinds)}: name the {kinds[0]} as '{folder}/*.{ending}'")
    return [] if folders else tars + tables


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
