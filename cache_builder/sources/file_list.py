"""A text file that lists images: a path or a URL a line, and behind a tab, if there is one, its class."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.found import Found, nowhere, numbered
from radio_cache.errors import SourceError
from radio_cache.image_files import listed_place
from radio_cache.storage import is_url

ENDINGS = (".txt", ".tsv", ".lst", ".list")
"""Names of files that are taken for lists."""

_MAX_LABEL = 2**31 - 1
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def list_file_list(path: str, content: bytes) -> Found:
    """The images that a list names, in its order; relative paths start from the list's own folder.

    path: of the list, absolute, or its URL. Labels are class numbers if all are whole numbers, names otherwise. Whether
    there is anything at a URL is found out when the image is read.
    Raises SourceError with the line: two tabs, an image that comes twice, or a list of which no file exists.
    """
    entries: list[str] = []
    labels: list[str | None] = []
    line_of: dict[str, int] = {}
    missing: list[str] = []
    for number, line in _lines(content):
        entry, *label = line.split("\t")
        if len(label) > 1 or not entry:
            raise SourceError(f"{path}, line {number}: a line is a path, and after one tab its class: {line!r:.120}")
        if entry in line_of:
            raise SourceError(
                f"{path}, line {number}: {entry} is in line {line_of[entry]} already: list every image once"
            )
        line_of[entry] = number
        entries.append(entry)
        labels.append(label[0].strip() or None if label else None)
        place = listed_place(path, entry)
        if not _is_there(place):
            missing.append(f"line {number}: {entry}")
    if missing and len(missing) == len(entries):
        raise SourceError(
            f"{path}: none of its {len(missing)} files exists ({missing[0]}, looked for at "
            f"{listed_place(path, entries[0])}): relative paths start from the list's own folder"
        )
    notes: list[str] = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(entries)} files {'do' if len(missing) > 1 else 'does'} not exist ({missing[0]}) and will be "
            "left out"
        )
    numbers, names = _numbers(labels)
    return Found(
        members=entries, labels=numbers, class_names=names, offset=nowhere(len(entries)), length=nowhere(len(entries)),
        notes=tuple(notes),
    )  # fmt: skip


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not empty. File names are bytes, in any encoding."""
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        text = line.rstrip(b"\r").decode("utf-8", "surrogateescape")
        if text.strip():
            yield number, text


def _is_there(place: str) -> bool:
    try:
        return is_url(place) or os.path.exists(place)  # noqa: PTH110  # a million entries: no Path for each
    except ValueError:  # a zero byte
        return False


def _numbers(labels: Sequence[str | None]) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    given = [label for label in labels if label is not None]
    if all(label.isdecimal() and int(label) <= _MAX_LABEL for label in given):
        return np.array([-1 if label is None else int(label) for label in labels], np.int32), None
    return numbered(labels)
