"""Text files that list images: one path or URL a line, optionally followed by a tab and its class.

A CSV or TSV file lists images in one of its columns, and their classes in another.
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
from radio_cache.images.files import resolve_list_entry
from radio_cache.storage.base import is_url

CSV, TSV = ".csv", ".tsv"
TABLES = (CSV, TSV)
"""Extensions of lists whose first line may name columns. The first line of a CSV file always does."""

EXTENSIONS = (".txt", ".lst", ".list", *TABLES)
"""Extensions of files that are read as lists."""

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
"""Default names of the column with the paths of images. The first one that exists is used."""

LABEL_NAMES = ("label", "cls", "class", "labels")
"""Default names of the column with the classes. The first one that exists is used."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def list_file_list(path: str, content: bytes, *, image: str = "", label: str = "") -> SourceImages:
    """List the images that a list names, in its order. Relative paths start from the list's own folder.

    Labels are class numbers if all are whole numbers, and names otherwise (`cache_builder.sources.labels`).

    Args:
        path: absolute path or URL of the list.
        content: bytes of the list.
        image: column of paths in a CSV or TSV file. Empty: the first of `PATH_NAMES`.
        label: column of classes in a CSV or TSV file. Empty: the first of `LABEL_NAMES`.

    Raises:
        SourceError: a line has two tabs, a column does not exist, or `images_at_paths` refuses the entries.
    """
    # A CSV file always has a header; a list with tabs has one only if its first line reads like one.
    if path.lower().endswith(CSV):
        rows = _table_rows(path, content, ",", image, label)
    elif image or label or _has_header(path, content):
        rows = _table_rows(path, content, "\t", image, label)
    else:
        rows = _plain_rows(path, content)
    lines: list[int] = []
    entries: list[str] = []
    labels: list[str | None] = []
    for line, entry, row_label in rows:
        lines.append(line)
        entries.append(entry)
        labels.append(row_label)
    numbers, names = parse_labels(labels)
    return images_at_paths(path, entries, lines, numbers, names, counted="line")


def images_at_paths(
    path: str,
    entries: list[str],
    lines: Sequence[int],
    labels: NDArray[np.int32],
    class_names: tuple[str, ...] | None,
    *,
    counted: str,
) -> SourceImages:
    """Return the images at these paths and URLs. A URL is not requested before its image is read.

    Args:
        path: path or URL of the file that lists them.
        entries: the paths and URLs as they are written in that file.
        lines: position of each entry in that file.
        labels: (n,) class numbers, -1 for an image without a class.
        class_names: names of the class numbers, None if there are none.
        counted: unit of `lines` in messages: "line" or "row".

    Raises:
        SourceError: an image is listed twice, or none of the files exists.
    """
    first_entry: dict[str, tuple[int, str]] = {}  # file -> line and spelling of its first entry
    missing: list[str] = []
    for line, entry in zip(lines, entries, strict=True):
        file = _file_of(path, entry)
        if file in first_entry:
            first_line, first_spelling = first_entry[file]
            spelling = "" if first_spelling == entry else f", as {first_spelling}"
            raise SourceError(
                f"{path}, {counted} {line}: {entry} is in {counted} {first_line} already{spelling}: list every image once"
            )
        first_entry[file] = line, entry
        if not may_exist(path, entry):
            missing.append(f"{counted} {line}: {entry}")
    # A few missing files are reported and left out; if all are missing, the list itself is wrong.
    if missing and len(missing) == len(entries):
        raise SourceError(_all_missing_message(path, entries[0], missing))
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
        kind="list",  # also for a Parquet file of paths: its images are read like those of a text file
    )


def _all_missing_message(path: str, first: str, missing: Sequence[str]) -> str:
    """Return the error for a list none of whose files exists, with the mistake in its syntax that would explain it."""
    entry, blank, label = first.rpartition(" ")
    if blank and entry.strip() and may_exist(path, entry):
        cure = f"its lines end in a blank and a class ({label}): put a tab before the class instead"
    elif first != first.lstrip() and may_exist(path, first.lstrip()):
        cure = "its paths begin with a blank: leave out the blanks behind the separators"
    else:
        cure = "relative paths start from the list's own folder"
    try:
        searched = f"looked for at {resolve_list_entry(path, first)}): {cure}"
    except ImageError as exc:
        searched = f"which {exc})"
    return f"{path}: none of its {len(missing)} files exists ({missing[0]}, {searched}"


_Row = tuple[int, str, str | None]
"""Number of a line, its path or URL, and its class."""


def _plain_rows(path: str, content: bytes) -> Iterator[_Row]:
    """Yield the rows of a list without a header: a path, and after one tab its class."""
    for number, line in _lines(content):
        entry, *label = line.split("\t")
        if len(label) > 1 or not entry:
            raise SourceError(f"{path}, line {number}: a line is a path, and after one tab its class: {line!r:.120}")
        yield number, entry, label[0].strip() or None if label else None


def _has_header(path: str, content: bytes) -> bool:
    """Return whether the first line of a list with tabs names columns instead of a file.

    A header names a column of paths, and one of classes if it has two columns.
    """
    first_line = next((line for _, line in _lines(content)), "")
    names = [name.strip().lower() for name in first_line.split("\t")]
    # A TSV file may have columns of any name beside the paths; in other lists only the two expected columns are a header.
    if path.lower().endswith(TSV) and len(names) > 1:
        return any(name in PATH_NAMES for name in names) and not may_exist(path, first_line.split("\t")[0])
    is_header = names[0] in PATH_NAMES and (len(names) == 1 or names[1] in LABEL_NAMES)
    # A file may really be called "image": then the line is an entry.
    return is_header and not may_exist(path, names[0])


def _table_rows(path: str, content: bytes, delimiter: str, image: str, label: str) -> Iterator[_Row]:
    """Yield the rows of a file whose first line names its columns."""
    # surrogateescape: paths are bytes in any encoding, and must lead to the same file again.
    text = content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        image_column = _column(path, header, image, PATH_NAMES)
        if image_column is None:
            raise SourceError(
                f"{path}: its columns are {', '.join(header) or 'none'}, and none is called {', '.join(PATH_NAMES)}: name the "
                f"one with the paths of the images, as in '{path}#COLUMN' or '{path}#COLUMN,CLASS'"
            )
        label_column = _column(path, header, label, LABEL_NAMES)
        for row in rows:
            if not any(row):
                continue
            line = f"{path}, line {rows.line_num}"
            if len(row) != len(header) or not row[image_column]:
                problem = f"{len(row)} fields under {len(header)} columns" if len(row) != len(header) else "no path"
                raise SourceError(f"{line}: {problem}: {','.join(row)!r:.120}")
            for value in (row[image_column], "" if label_column is None else row[label_column]):
                # The csv module takes a quote after a blank for a part of the value.
                if value.startswith(" ") and value.lstrip().startswith('"'):
                    raise SourceError(f"{line}: a quote behind a blank, {value!r:.120}: leave out the blank")
            row_label = None if label_column is None else row[label_column].strip() or None
            yield rows.line_num, row[image_column], row_label
    except csv.Error as exc:
        raise SourceError(f"{path}, line {rows.line_num}: {exc}") from exc


def _column(path: str, header: Sequence[str], requested: str, defaults: Sequence[str]) -> int | None:
    """Return the position of the requested column, or of the first default that exists; None if there is none.

    Raises:
        SourceError: the requested column does not exist, or several columns have the name.
    """
    if requested and requested not in header:
        raise SourceError(f"{path}: column {requested} does not exist; the columns are {', '.join(header)}")
    # A requested name must match exactly; default names match in any case.
    names = header if requested else [name.lower() for name in header]
    name = requested or next((name for name in defaults if name in names), None)
    if name is None:
        return None
    if names.count(name) > 1:
        raise SourceError(f"{path}: {names.count(name)} columns are called {name}: give each a name of its own")
    return names.index(name)


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines that are not empty. File names are bytes, in any encoding."""
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        text = line.rstrip(b"\r").decode("utf-8", "surrogateescape")
        if text.strip():
            yield number, text


def _file_of(path: str, entry: str) -> str:
    """Return the file that an entry of the list at `path` leads to, in one spelling: `./a.jpg` is `a.jpg`. URLs stay as they are.

    `..` stays: behind a symbolic link it leads elsewhere than the text suggests.
    """
    try:
        location = resolve_list_entry(path, entry)
    except (ValueError, ImageError):  # the error is reported when the image is read
        return entry
    return location if is_url(location) else "/".join(part for part in location.split("/") if part not in ("", "."))


def may_exist(path: str, entry: str) -> bool:
    """Return whether an entry of the list at `path` is a URL or an existing file."""
    try:
        location = resolve_list_entry(path, entry)
        return is_url(location) or os.path.exists(location)  # noqa: PTH110  # a million entries: no Path for each
    except (ValueError, ImageError):  # a zero byte in the path, or a URL of an unknown scheme
        return False
