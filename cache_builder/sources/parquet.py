"""A Parquet file with images as bytes in one of its columns: the layout of the Hugging Face `datasets` library, or plainer;
or with the paths of image files in one.

Listed from the footer and the columns of classes and names; no image is read.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.columns import SourceImages, nowhere, unique_names
from cache_builder.sources.file_list import LABEL_NAMES, PATH_NAMES, found_at_places, is_there
from cache_builder.sources.labels import parse_labels
from radio_cache.errors import ImageError, SourceError
from radio_cache.images.parquet import MAX_GROUP_BYTES, is_plain, leaf_array, open_parquet, path_column
from radio_cache.storage.base import is_url

_IMAGE_NAMES = ("image.bytes", "image", "img.bytes", "img", "jpg.bytes", "jpg", "png.bytes", "png", "bytes")
"""Columns that are taken for the images where there are several of bytes and no other sign; the first of them counts."""

_KEY_NAMES = ("__key__",)
"""Columns that name an image, where there is no `path` within its own column."""

_DEAR_GROUP_BYTES = 1 << 20


def list_parquet(place: str, *, image: str = "", label: str = "") -> SourceImages:
    """The images of a Parquet file, at a path or a URL, in row order; offsets are numbers of rows.

    image, label: names of columns; found by what the file says about itself if empty: Hugging Face features, types, names.
    Raises SourceError, naming the columns there are, if there is none, or several that might be meant; if the file was cut
    short; or if its row groups are so large that no single image can be read.
    """
    with _named(place), open_parquet(place) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        if not metadata.num_rows:  # which may say nothing of the types of its columns either
            return SourceImages(
                members=[], labels=np.zeros(0, np.int32), class_names=None, offset=nowhere(0), length=nowhere(0)
            )
        features = _features(schema)
        if paths := _path_column(schema, image):
            return _listed_paths(
                place, parquet, paths, *_label_column(place, schema, features, label), asked=bool(label)
            )
        column = _image_column(place, schema, features, image)
        notes = [*_layout_notes(place, metadata, column), *([] if image else _other_image_notes(schema, column))]
        asked = bool(label)
        label, note = _label_column(place, schema, features, label)
        notes += [note] if note else []
        names = _name_column(schema, column)
        wanted = [name for name in (label, names) if name]
        table = parquet.read(columns=wanted, use_threads=False) if wanted else None
        rows = int(metadata.num_rows)
        numbers, classes = np.full(rows, -1, np.int32), None
        if label:
            known = features.get(label, {}).get("names")
            numbers, classes = _labels(place, label, leaf_array(table, label), known, notes, asked=asked)
        members = [str(row) for row in range(rows)]
        if names:
            found = leaf_array(table, names).to_pylist()
            if names.endswith(".path") and _is_all_null(metadata, column):
                notes += _missing_files(place, found, column)
            if all(found):
                members, repeated = unique_names(found)
                notes += repeated
    return SourceImages(
        members=members,
        labels=numbers,
        class_names=classes,
        offset=np.arange(rows, dtype=np.int64),
        length=nowhere(rows),
        notes=tuple(notes),
        column=column,
        text_labels=bool(label) and is_text(schema.field(label).type),
    )


def _path_column(schema: Any, asked: str) -> str:
    """The column of paths to images, "" if the file holds images itself."""
    leaves = dict(_leaves(schema))
    text = [name for name, kind in leaves.items() if is_text(kind)]
    if asked:
        return asked if asked in text else ""
    if _byte_columns(leaves) or _byte_columns(dict(_leaves(schema, in_lists=True))):
        return ""
    return next((name for known in PATH_NAMES for name in text if name.lower() == known), "")


def _listed_paths(place: str, parquet: Any, paths: str, label: str, note: str, *, asked: bool) -> SourceImages:
    table = parquet.read(columns=[paths, *([label] if label else [])], use_threads=False)
    entries: list[str | None] = leaf_array(table, paths).to_pylist()
    if None in entries or "" in entries:
        row = next(number for number, entry in enumerate(entries) if not entry)
        raise SourceError(f"{place}, row {row}: column {paths} names no file")
    numbers, classes = np.full(len(entries), -1, np.int32), None
    notes = [note] if note else []
    if label:
        names = _features(parquet.schema_arrow).get(label, {}).get("names")
        numbers, classes = _labels(place, label, leaf_array(table, label), names, notes, asked=asked)
    found = found_at_places(place, cast(list[str], entries), range(len(entries)), numbers, classes, counted="row")
    return replace(found, notes=(*found.notes, *notes))


@contextmanager
def _named(place: str) -> Generator[None]:
    import pyarrow as pa

    try:
        yield
    except ImageError as exc:
        raise SourceError(f"{place} {exc}") from exc
    except (pa.ArrowException, OSError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise SourceError(
            f"{place} is damaged, was cut short, or is no Parquet file ({reason:.200}): fetch it again"
        ) from exc


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's metadata says of each column: its `_type`, and the names of classes."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: cast(dict[str, Any], one) for name, one in found.items() if isinstance(one, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _leaves(fields: Any, prefix: str = "", *, in_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """(path, type) of every column, those within others by a path with points. in_lists: also within lists."""
    import pyarrow.types as types

    for field in fields:
        if in_lists and (types.is_list(field.type) or types.is_large_list(field.type)):
            yield from _leaves([field.type.value_field], f"{prefix}{field.name}.list.")
            continue
        if types.is_struct(field.type):
            inner = [field.type.field(number) for number in range(field.type.num_fields)]
            yield from _leaves(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.type


def is_text(kind: Any) -> bool:
    """Return whether a column of this Arrow type holds text, of whichever length and layout, also in a dictionary."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _byte_columns(leaves: dict[str, Any]) -> list[str]:
    """The columns that hold bytes, of whichever length and layout, also in a dictionary; and those that would if not all of them
    were null, with the files' paths beside them."""
    import pyarrow.types as types

    def holds_bytes(name: str, kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if types.is_null(kind):
            beside = path_column(name, leaves)
            return bool(beside) and is_text(leaves[beside])
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    return [name for name, kind in leaves.items() if holds_bytes(name, kind)]


def _image_column(place: str, schema: Any, features: dict[str, dict[str, Any]], asked: str) -> str:
    leaves = dict(_leaves(schema))
    there = ", ".join(f"{name} ({kind})" for name, kind in leaves.items())
    binary = _byte_columns(leaves) or _byte_columns(dict(_leaves(schema, in_lists=True)))
    if asked:
        for name in binary:
            if name in (asked, f"{asked}.bytes") or name.startswith(f"{asked}.list."):
                return name
        kind = f"is {leaves[asked]}, and images are bytes" if asked in leaves else "is not there"
        raise SourceError(f"{place}: column {asked} {kind}; the columns are {there}")
    images = [name for name, one in features.items() if one.get("_type") == "Image"]
    likely = [f"{name}.bytes" for name in images if f"{name}.bytes" in binary] or binary
    if len(likely) == 1:
        return likely[0]
    if not likely:
        raise SourceError(
            f"{place} has no column with the bytes of images; its columns are {there}; nor is one with paths called "
            + ", ".join(PATH_NAMES)
        )
    for name in _IMAGE_NAMES:
        if name in likely:
            return name
    raise SourceError(
        f"{place} has several columns of bytes ({', '.join(likely)}): say which holds the images, as in '{place}#{likely[0]}'"
    )


def _other_image_notes(schema: Any, column: str) -> list[str]:
    """Return a note on further columns of bytes, such as masks, which the choice of `column` leaves alone."""
    others = [name for name in _byte_columns(dict(_leaves(schema))) if name != column]
    return (
        [f"images are those of column {column}; other columns of bytes are left alone: {', '.join(others)}"]
        if others
        else []
    )


def _label_column(place: str, schema: Any, features: dict[str, dict[str, Any]], asked: str) -> tuple[str, str]:
    """The column of classes, "" for none, and a sentence about it where there is something to say."""
    if asked:
        if asked not in schema.names:
            raise SourceError(f"{place}: column {asked} is not there; the columns are {', '.join(schema.names)}")
        if not _is_class(schema.field(asked).type):
            raise SourceError(
                f"{place}: column {asked} is {schema.field(asked).type}, and a class is a number or a name"
            )
        return asked, ""
    known = [name for name, one in features.items() if one.get("_type") == "ClassLabel" and name in schema.names]
    likely = [name for word in LABEL_NAMES for name in schema.names if name.lower() == word]
    for name in (*(known if len(known) == 1 else ()), *likely):
        if _is_class(schema.field(name).type):
            return name, ""
    if known:
        return "", f"no classes: there are several columns of them ({', '.join(known)}); name one, as in '#,{known[0]}'"
    if likely:
        return (
            "",
            f"no classes: column {likely[0]} is {schema.field(likely[0]).type}, and a class is a number or a name",
        )
    nested = [name for name, _ in _leaves(schema) if name.rpartition(".")[2].lower() in LABEL_NAMES]
    if nested:
        return (
            "",
            f"no classes: {nested[0]} is a field within another column; copy it into a column of its own, such as label",
        )
    return "", ""


def _is_class(kind: Any) -> bool:
    import pyarrow.types as types

    text, kind = is_text(kind), kind.value_type if types.is_dictionary(kind) else kind
    return bool(
        text
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )


def _labels(
    place: str, column: str, array: Any, names: list[str] | None, notes: list[str], *, asked: bool
) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """Class numbers, -1 for no class, and their names if there are names.

    asked: the user named the column; else a column that holds no classes, such as scores, is left alone with a note.
    """
    import pyarrow.types as types

    try:
        numbers, own_names = parse_labels(array.to_pylist())
    except ValueError as exc:
        if asked or not (types.is_floating(array.type) or types.is_decimal(array.type)):
            raise SourceError(f"{place}: column {column} holds {exc}: name another column, as in '#,OTHER'") from exc
        notes.append(f"no classes: column {column} holds {exc}")
        return np.full(len(array), -1, np.int32), None
    if own_names is not None or names is None:
        return numbers, own_names
    highest = int(numbers.max(initial=-1))
    if highest >= len(names):
        raise SourceError(
            f"{place}: column {column} holds class {highest}, and the file names {len(names)} classes: name another column, "
            "as in '#,OTHER'"
        )
    return numbers, tuple(map(str, names))


def _name_column(schema: Any, image: str) -> str:
    """The column that names images, "" if there is none."""
    leaves = dict(_leaves(schema))
    beside = f"{image.rpartition('.')[0]}.path"
    return next((name for name in (beside, *_KEY_NAMES) if name in leaves and is_text(leaves[name])), "")


def _is_all_null(metadata: Any, column: str) -> bool:
    """Return whether a file says of a column that no row has a value in it."""
    number = _column_number(metadata, column)
    if number is None or str(metadata.schema.column(number).logical_type) == "Null":
        return number is not None
    counts = (metadata.row_group(group).column(number).statistics for group in range(metadata.num_row_groups))
    return sum(one.null_count if one is not None and one.has_null_count else 0 for one in counts) == metadata.num_rows


def _missing_files(place: str, paths: list[str | None], column: str) -> list[str]:
    """A note on how many of the files that a Parquet file names are not there. Raises SourceError if none of them is."""
    missing = [path for path in paths if path and not is_there(place, path)]
    named = sum(map(bool, paths))
    if named and len(missing) == named:
        raise SourceError(
            f"{place} holds no image itself ({column} is null), and none of the {named} files that it names exists "
            f"({missing[0]!r:.200}): relative paths start from the folder of the Parquet file"
        )
    if not missing:
        return []
    return [
        f"{len(missing)} of the {named} files that it names do not exist ({missing[0]!r:.200}) and will be left out"
    ]


def _column_number(metadata: Any, column: str) -> int | None:
    numbers = range(metadata.num_columns)
    return next((number for number in numbers if metadata.schema.column(number).path == column), None)


def _layout_notes(place: str, metadata: Any, column: str) -> list[str]:
    """What the way the file was written costs. Raises SourceError if it cannot be read image by image at all."""
    number = _column_number(metadata, column)
    if number is None:
        raise SourceError(f"{place}: column {column} is a list in the file, and one row must be one image")
    chunks = [metadata.row_group(group).column(number) for group in range(metadata.num_row_groups)]
    in_list = metadata.schema.column(number).max_repetition_level
    if in_list > 1 or (in_list and sum(chunk.num_values for chunk in chunks) > metadata.num_rows):
        there = ", ".join(f"{field.name} ({field.type})" for field in metadata.schema.to_arrow_schema())
        raise SourceError(
            f"{place} has no column with the bytes of images; its columns are {there}; in the lists of column {column} some rows "
            "hold several images, and one row must be one image"
        )
    together = [chunk for chunk in chunks if is_url(place) or not is_plain(chunk)]
    largest = max((int(chunk.total_uncompressed_size) for chunk in together), default=0)
    if largest > MAX_GROUP_BYTES:
        raise SourceError(
            f"{place} has row groups with {largest} bytes of images, which have to be read as a whole: write it again with row "
            "groups of about 100 rows"
        )
    dear = [chunk for chunk in chunks if not is_plain(chunk) and chunk.total_uncompressed_size > _DEAR_GROUP_BYTES]
    if dear:
        each = sum(int(chunk.total_uncompressed_size) for chunk in dear) / len(dear) / 1e6
        return [
            f"its images are compressed or in dictionaries: reading one in random order reads its row group ({each:.0f} MB); "
            "docs/sources.md says how to write it better"
        ]
    return []
