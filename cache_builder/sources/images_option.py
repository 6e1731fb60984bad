"""The parser of `--images`: from ranges, patterns and folders to the folders, tars, Parquet files and lists they name."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from cache_builder.sources import file_list
from cache_builder.sources.folder import has_image_name
from cache_builder.sources.samples import member_extensions
from radio_cache.errors import ConfigError, SourceError
from radio_cache.images.remote import WEB, OnListed, list_remote
from radio_cache.storage.base import is_url

Kind = Literal["folder", "tar", "list", "parquet"]

EXPECTED = "--images takes a folder of images, WebDataset tars, Parquet files, or a file that lists images (.txt, .csv)"

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COLUMNS = re.compile(r"(.*(?:/|\.parquet|\.csv|\.tsv|\.tar))#([^/#,]*)(?:,([^/#,]*))?\Z", re.DOTALL)
"""A path or URL, and behind "#" the columns of images and of classes.

They are columns of a Parquet file, of a folder of them, or of a CSV or TSV file. For a tar they are the extensions of the photos
(`jpg;png`) and the field of the `.json` members that holds the class.
"""

_FILE_URL = "file://"


@dataclass(frozen=True)
class Source:
    """One folder, tar, Parquet file or list that holds images."""

    kind: Kind

    path: str
    """Absolute path, or URL."""

    image_column: str = ""
    """Column of images in a Parquet, CSV or TSV file, or extensions of photos in a tar; empty if the user named none."""

    label_column: str = ""
    """Column of classes, or field of the `.json` members of a tar with the class; empty if the user named none."""

    files: tuple[str, ...] = field(default=(), repr=False)
    """Paths of the files below a folder at a URL; empty for other sources."""


def expand_source(argument: str, on_listed: OnListed = lambda _: None) -> list[str]:
    """Return the paths and URLs that one `--images` argument names.

    Symbolic links are resolved, ranges such as {000..004} expanded, and patterns matched. Columns (`#image,label`) stay behind
    each path. A URL without a pattern is not requested.

    Args:
        argument: the argument as the user typed it.
        on_listed: called with the number of files at URLs as they are listed.

    Raises:
        SourceError: a path does not exist, or a pattern matches nothing.
    """
    braces = _BRACES.search(argument)
    if braces:
        low, high = braces.groups()
        if int(low) > int(high):
            raise SourceError(f"{argument}: the range {braces[0]} counts down")
        # One range a call: a further range in the name is expanded by the recursion.
        names = [argument.replace(braces[0], f"{i:0{len(low)}d}", 1) for i in range(int(low), int(high) + 1)]
        return [path for name in names for path in expand_source(name, on_listed)]
    location, columns = _without_columns(argument.removeprefix(_FILE_URL))
    if is_url(location):
        slash = "/" if columns and location.endswith("/") else ""
        return [match + slash + columns for match in _matching_urls(location, on_listed)]
    path = Path(location).expanduser()
    # A folder whose name contains a bracket is no pattern.
    if any(mark in location for mark in "*?[") and not path.exists():
        matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        if not matches:
            raise SourceError(f"no file matches '{location}'")
        return [f"{match.resolve()}{columns}" for match in matches]
    if not path.exists():
        raise SourceError(f"{location} does not exist: {EXPECTED}")
    # _COLUMNS recognises a folder by the slash before "#".
    return [f"{path.resolve()}{'/' if columns and path.is_dir() else ''}{columns}"]


def _without_columns(argument: str) -> tuple[str, str]:
    """Split off "#" and the columns behind a path. An existing file whose name contains "#" stays whole."""
    match = _COLUMNS.match(argument)
    if match is None or Path(argument).exists():
        return argument, ""
    return match[1], argument[len(match[1]) :]


def _matching_urls(url: str, on_listed: OnListed) -> list[str]:
    """Return the URL itself, or the URLs that match it as a pattern.

    Raises:
        SourceError: the URL is a pattern, and no object matches it.
    """
    # A question mark begins the query of a web address.
    marks = "*" if url.startswith(WEB) else "*?["
    first_mark = min((url.find(mark) for mark in marks if mark in url), default=-1)
    if first_mark < 0:
        return [url.rstrip("/")]
    parent = url[:first_mark].rpartition("/")[0]
    pattern = url[len(parent) + 1 :].split("/")
    # Part by part: as in a shell, "*" does not match a slash.
    matches = [
        f"{parent}/{name}"
        for name in _files_below(parent, on_listed)
        if len(parts := name.split("/")) == len(pattern) and all(map(fnmatchcase, parts, pattern))
    ]
    if not matches:
        raise SourceError(f"no object matches '{url}'")
    return matches


def sources_at(path_or_url: str, on_listed: OnListed = lambda _: None) -> list[Source]:
    """Return the sources at a path or URL of `expand_source`: one, or all tars or Parquet files of a folder of shards.

    Args:
        path_or_url: may end in columns, "#image,label".
        on_listed: called with the number of files at URLs as they are listed.

    Raises:
        SourceError: a file is no source, or it has no columns and some are named.
    """
    location, columns = _without_columns(path_or_url)
    location = location.rstrip("/") or "/"
    image, _, label = columns.removeprefix("#").partition(",")
    sources = _file_at(location)
    if sources is None:
        sources = _at_prefix(location, on_listed) if is_url(location) else _in_folder(Path(location))
    # Columns that no source can have were probably meant for another --images.
    if columns and not all(
        source.kind in ("parquet", "tar") or source.path.lower().endswith(file_list.TABLES) for source in sources
    ):
        raise SourceError(
            f"{location} has no columns such as '{columns}': only Parquet, CSV and TSV files, and tars, have"
        )
    return [Source(source.kind, source.path, image, label, source.files) for source in sources]


def with_member(sources: Sequence[Source], member: str) -> list[Source]:
    """Return the sources with `member` for the photos of tars, except where a tar's own `#` names its photos.

    Args:
        sources: sources of any kind.
        member: extensions of photos, `jpg;png`.

    Raises:
        ConfigError: `member` names no extension, or no source is a tar.
    """
    if not member_extensions(member):
        raise ConfigError(f"--member '{member}' names no extension: pass the extensions of photos, such as 'jpg;png'")
    if all(source.kind != "tar" for source in sources):
        raise ConfigError(
            f"--member '{member}' names members of samples in tars, and no --images is a tar: leave it out"
        )
    return [
        replace(source, image_column=member) if source.kind == "tar" and not source.image_column else source
        for source in sources
    ]


def _file_at(location: str) -> list[Source] | None:
    """Return the source that is this file; None for a folder.

    Raises:
        SourceError: the file is of no known kind.
    """
    # The query of a web address is no part of the name.
    name = PurePosixPath(location.partition("?")[0] if location.startswith(WEB) else location).name.lower()
    if not is_url(location) and Path(location).is_dir():
        return None
    if name.endswith(_COMPRESSED):
        raise SourceError(f"{location} is a compressed tar, which has no random access: decompress it first")
    if name.endswith(".tar"):
        return [Source("tar", location)]
    if name.endswith(".parquet"):
        return [Source("parquet", location)]
    if name.endswith(file_list.EXTENSIONS):
        return [Source("list", location)]
    if is_url(location):
        return None
    raise SourceError(f"{location} is a file, and not a tar, a Parquet file or a list: {EXPECTED}")


def _files_below(url: str, on_listed: OnListed) -> list[str]:
    """Return the paths of all files below a URL."""
    try:
        return [name for name, _ in list_remote(url, on_listed)]
    except FileNotFoundError as exc:  # a missing repository; a missing prefix of a bucket is an empty list
        raise SourceError(
            f"{url} does not exist ({' '.join(str(exc).split()):.200}): check its name; private repositories need credentials, "
            "HF_TOKEN for hf://"
        ) from exc


def _at_prefix(url: str, on_listed: OnListed) -> list[Source]:
    """Return the sources below a prefix of a bucket."""
    files = _files_below(url, on_listed)
    if not files:
        raise SourceError(f"{url} holds nothing: check the bucket, the prefix, and the case of both. {EXPECTED}")
    top_level = [name for name in files if "/" not in name]  # shards lie directly below the prefix
    shards = _shards(url, top_level, has_folders=len(top_level) < len(files))
    return shards or [Source("folder", url, files=tuple(files))]


def _in_folder(folder: Path) -> list[Source]:
    """Return the sources in a folder: its shards, or the folder itself as a tree of images."""
    names: list[str] = []
    has_folders = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # The name first: is_dir may need a system call, and a folder may hold a hundred thousand tars.
                if not entry.name.endswith((".tar", ".parquet")) and entry.is_dir():
                    has_folders = has_folders or not entry.name.startswith(".")
                else:
                    names.append(entry.name)
    except OSError as exc:
        raise SourceError(f"{folder} cannot be listed: {exc.strerror or exc}: change its permissions") from exc
    return _shards(str(folder), names, has_folders=has_folders) or [Source("folder", str(folder))]


def _shards(folder: str, names: Sequence[str], *, has_folders: bool) -> list[Source]:
    """Return the tars or Parquet files of a folder that holds no other images, sorted; [] for a folder of images.

    Args:
        folder: path or URL.
        names: names of the files in it.
        has_folders: whether it holds folders, too.

    Raises:
        SourceError: the folder mixes several kinds of sources, or holds compressed tars.
    """
    visible = sorted(name for name in names if not name.startswith("."))
    tars = [Source("tar", f"{folder}/{name}") for name in visible if name.endswith(".tar")]
    tables = [Source("parquet", f"{folder}/{name}") for name in visible if name.endswith(".parquet")]
    kinds = [kind for kind, shards in (("tars", tars), ("Parquet files", tables)) if shards]
    if kinds and any(has_image_name(name) for name in visible):
        kinds.append("images")
    compressed = [name for name in visible if name.lower().endswith(_COMPRESSED)]
    # Beside a folder of images a compressed tar is just another file; beside tars, or alone, it was meant as a source.
    if compressed and (tars or not (tables or has_folders or any(map(has_image_name, visible)))):
        raise SourceError(
            f"{folder}/{compressed[0]} is a compressed tar, which has no random access: decompress it first, or name the "
            f"files that are to be used, as in '{folder}/*.tar'"
        )
    if len(kinds) > 1:
        extension = "tar" if tars else "parquet"
        raise SourceError(f"{folder} holds both {' and '.join(kinds)}: name the {kinds[0]} as '{folder}/*.{extension}'")
    return [] if has_folders else tars + tables


def refuse_doubles(sources: Sequence[Source]) -> None:
    """Raise SourceError if a source occurs twice, or a folder lies within another one: images would count twice."""
    paths = [source.path for source in sources]
    # Only folders are compared with folders: a tar within a folder of images is not read as a part of it.
    folders = {source.path for source in sources if source.kind == "folder"}
    checked: set[str] = set()
    for path in paths:
        if path in checked:
            raise SourceError(f"{path} is given twice as a source of images")
        checked.add(path)
    for source in sources:
        outer = folders.intersection(_parents(source.path)) if source.kind == "folder" else None
        if outer:
            raise SourceError(f"{source.path} is part of {outer.pop()}, another source: its images would count twice")


def _parents(path: str) -> Iterator[str]:
    """Yield the folders that a path or URL lies in, innermost first."""
    while "/" in path.rstrip("/"):
        path = path.rstrip("/").rpartition("/")[0]
        yield path or "/"


def prefixes(sources: Sequence[Source]) -> list[str]:
    """Return the prefix of the keys of each source: its path below the folder that all sources share.

    A single folder or list needs no prefix.
    """
    if len(sources) == 1 and sources[0].kind in ("folder", "list"):
        return [""]
    split_paths = [PurePosixPath(source.path).parts for source in sources]
    # Number of leading parts that all paths share. The last part, the file's name, always belongs to the prefix.
    num_shared = 0
    while all(num_shared < len(parts) - 1 and parts[num_shared] == split_paths[0][num_shared] for parts in split_paths):
        num_shared += 1
    return [f"{'/'.join(parts[num_shared:])}/" for parts in split_paths]
