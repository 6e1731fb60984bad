"""A text file that lists images: a path or a URL a line, and behind a tab, if there is one, its class; or a CSV or TSV file with
a column of either.
"""

import csv
import io
import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.columns import SourceImages, nowhere
from cache_builder.sources.labels import parse_labels
from radio_cache.errors import ImageError, SourceError
from radio_cache.images.files import listed_place
from radio_cache.storage.base import is_url

CSV, TSV = ".csv", ".tsv"
TABLES = (CSV, TSV)
"""Lists whose first line may name columns; in a CSV file it does."""

ENDINGS = (".txt", ".lst", ".list", *TABLES)
"""Names of files that are taken for lists."""

PATH_NAMES = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
    "img_path",
    "url",
)
LABEL_NAMES = ("label", "cls", "class", "labels")
"""Columns that are taken for the places of images and their classes where nobody says; the first of them counts."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def list_file_list(path: str, content: bytes, *, image: str = "", label: str = "") -> SourceImages:
    """The images that a list names, in its order; relative paths start from the list's own folder.

    path: of the list, absolute, or its URL. image, label: columns of a CSV or TSV file; found by their names if empty. Labels are
    class numbers if all are whole numbers, names otherwise (`cache_builder.sources.labels`).
    Raises SourceError with the line: two tabs, a column that is not there, or what `found_at_places` does not take.
    """
    if path.lower().endswith(CSV):
        rows = _table_rows(path, content, ",", image, label)
    elif image or label or _has_header(path, content):
        rows = _table_rows(path, content, "\t", image, label)
    else:
        rows = _rows(path, content)
    lines: list[int] = []
    entries: list[str] = []
    labels: list[str | None] = []
    for line, entry, given in rows:
        lines.append(line)
        entries.append(entry)
        labels.append(given)
    numbers, names = parse_labels(labels)
    return found_at_places(path, entries, lines, numbers, names, counted="line")


def found_at_places(
    path: str,
    entries: list[str],
    lines: Sequence[int],
    labels: NDArray[np.int32],
    class_names: tuple[str, ...] | None,
    *,
    counted: str,
) -> SourceImages:
    """The images at these places. Whether there is anything at a URL is found out when the image is read.

    lines: where in the file at `path` each entry is; counted: what is counted there, such as lines.
    Raises SourceError for an image that comes twice, and if none of the files exists.
    """
    line_of: dict[str, tuple[int, str]] = {}
    missing: list[str] = []
    for line, entry in zip(lines, entries, strict=True):
        file = _file_of(path, entry)
        if file in line_of:
            first_line, first = line_of[file]
            spelling = "" if first == entry else f", as {first}"
            raise SourceError(
                f"{path}, {counted} {line}: {entry} is in {counted} {first_line} already{spelling}: list every image once"
            )
        line_of[file] = line, entry
        if not is_there(path, entry):
            missing.append(f"{counted} {line}: {entry}")
    if missing and len(missing) == len(entries):
        entry, blank, label = entries[0].rpartition(" ")
        cure = (
            f"its lines end in a blank and a class ({label}): put a tab before the class instead"
            if blank and entry.strip() and is_there(path, entry)
            else "its paths begin with a blank: leave out the blanks behind the separators"
            if entries[0] != entries[0].lstrip() and is_there(path, entries[0].lstrip())
            else "relative paths start from the list's own folder"
        )
        try:
            looked_for = f"looked for at {listed_place(path, entries[0])}): {cure}"
        except ImageError as exc:
            looked_for = f"which {exc})"
        raise SourceError(f"{path}: none of its {len(missing)} files exists ({missing[0]}, {looked_for}")
    notes: list[str] = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(entries)} files {'do' if len(missing) > 1 else 'does'} not exist ({missing[0]}) and will be "
            "left out"
        )
    return SourceImages(
        members=entries,
        labels=labels,
        class_names=class_names,
        offset=nowhere(len(entries)),
        length=nowhere(len(entries)),
        notes=tuple(notes),
        kind="list",
    )


_Row = tuple[int, str, str | None]
"""The number of a line, the place it names, and its class."""


def _rows(path: str, content: bytes) -> Iterator[_Row]:
    for number, line in _lines(content):
        entry, *label = line.split("\t")
        if len(label) > 1 or not entry:
            raise SourceError(f"{path}, line {number}: a line is a path, and after one tab its class: {line!r:.120}")
        yield number, entry, label[0].strip() or None if label else None


def _has_header(path: str, content: bytes) -> bool:
    """Return whether the first line of a list with tabs names columns instead of a file: one of paths, and of classes
    if it has two.
    """
    first = next((line for _, line in _lines(content)), "")
    names = [name.strip().lower() for name in first.split("\t")]
    if path.lower().endswith(TSV) and len(names) > 1:
        return any(name in PATH_NAMES for name in names) and not is_there(path, first.split("\t")[0])
    is_header = names[0] in PATH_NAMES and (len(names) == 1 or names[1] in LABEL_NAMES)
    return is_header and not is_there(path, names[0])


def _table_rows(path: str, content: bytes, delimiter: str, image: str, label: str) -> Iterator[_Row]:
    """Of a file whose first line names its columns."""
    text = content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        at = _column(path, header, image, PATH_NAMES)
        if at is None:
            raise SourceError(
                f"{path}: its columns are {', '.join(header) or 'none'}, and none is called {', '.join(PATH_NAMES)}: name the "
                f"one with the paths of the images, as in '{path}#COLUMN' or '{path}#COLUMN,CLASS'"
            )
        labels_at = _column(path, header, label, LABEL_NAMES)
        for row in rows:
            if not any(row):
                continue
            if len(row) != len(header) or not row[at]:
                what = f"{len(row)} fields under {len(header)} columns" if len(row) != len(header) else "no path"
                raise SourceError(f"{path}, line {rows.line_num}: {what}: {','.join(row)!r:.120}")
            for value in (row[at], "" if labels_at is None else row[labels_at]):
                if value.startswith(" ") and value.lstrip().startswith('"'):  # to the csv module a part of the value
                    where = f"{path}, line {rows.line_num}"
                    raise SourceError(f"{where}: a quote behind a blank, {value!r:.120}: leave out the blank")
            yield rows.line_num, row[at], None if labels_at is None else row[labels_at].strip() or None
    except csv.Error as exc:
        raise SourceError(f"{path}, line {rows.line_num}: {exc}") from exc


def _column(path: str, header: Sequence[str], asked: str, known: Sequence[str]) -> int | None:
    """Where a column is, the one asked for or the first of those known. Raises SourceError if the one asked for is not there."""
    if asked and asked not in header:
        raise SourceError(f"{path}: column {asked} is not there; the columns are {', '.join(header)}")
    names = header if asked else [name.lower() for name in header]
    name = asked or next((name for name in known if name in names), None)
    if name is None:
        return None
    if names.count(name) > 1:
        raise SourceError(f"{path}: {names.count(name)} columns are called {name}: give each a name of its own")
    return names.index(name)


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not empty. File names are bytes, in any encoding."""
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        text = line.rstrip(b"\r").decode("utf-8", "surrogateescape")
        if text.strip():
            yield number, text


def _file_of(path: str, entry: str) -> str:
    """Return the place that an entry of the list at `path` leads to, in one spelling: `./a.jpg` is `a.jpg`; a URL as it is.

    `..` stays: behind a link it leads elsewhere than the text says.
    """
    try:
        place = listed_place(path, entry)
    except (ValueError, ImageError):  # named where the image is read
        return entry
    return place if is_url(place) else "/".join(part for part in place.split("/") if part not in ("", "."))


def is_there(path: str, entry: str) -> bool:
    """Return whether there is, or may be, an image where an entry of the list at `path` leads."""
    try:
        place = listed_place(path, entry)
        return is_url(place) or os.path.exists(place)  # noqa: PTH110  # a million entries: no Path for each
    except (ValueError, ImageError):  # a zero byte; a URL that nothing reads
        return False
