"""Parquet files with images as bytes in one column, or with the paths of image files in one.

The layout of the Hugging Face `datasets` library and plainer ones are known. A file is listed from its footer and its columns of
classes and names; no image is read.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.columns import SourceImages, nowhere, unique_names
from cache_builder.sources.file_list import LABEL_NAMES, PATH_NAMES, images_at_paths, may_exist
from cache_builder.sources.labels import parse_labels
from radio_cache.errors import ImageError, SourceError
from radio_cache.images.parquet import MAX_GROUP_BYTES, is_plain, leaf_array, open_parquet, path_column
from radio_cache.storage.base import is_url

_IMAGE_NAMES = ("image.bytes", "image", "img.bytes", "img", "jpg.bytes", "jpg", "png.bytes", "png", "bytes")
"""Default names of the column of images, for files with several columns of bytes. The first one that exists is used."""

_KEY_NAMES = ("__key__",)
"""Default names of the column of image names, for files without a `path` beside the bytes."""

_LARGE_GROUP_BYTES = 1 << 20
"""Compressed row groups above this make reading single images slow."""


def list_parquet(path_or_url: str, *, image: str = "", label: str = "") -> SourceImages:
    """List the images of a Parquet file in row order. Offsets are numbers of rows.

    Args:
        path_or_url: location of the file.
        image: column of images. Empty: chosen by Hugging Face features, types and names.
        label: column of classes. Empty: chosen likewise.

    Raises:
        SourceError: no column fits, or several do; the file is truncated; its row groups are too large for reading a single
            image. The message lists the columns.
    """
    with _parquet_errors(path_or_url), open_parquet(path_or_url) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        if not metadata.num_rows:  # the columns of an empty file may have no types
            return SourceImages(
                members=[], labels=np.zeros(0, np.int32), class_names=None, offset=nowhere(0), length=nowhere(0)
            )
        features = _features(schema)
        # A file without columns of bytes may list image files by their paths.
        is_requested = bool(label)  # the user named the column of classes
        if paths := _path_column(schema, image):
            label, note = _label_column(path_or_url, schema, features, label)
            return _listed_paths(path_or_url, parquet, paths, label, note, is_requested=is_requested)
        column = _image_column(path_or_url, schema, features, image)
        notes = [*_layout_notes(path_or_url, metadata, column), *([] if image else _other_image_notes(schema, column))]
        label, note = _label_column(path_or_url, schema, features, label)
        notes += [note] if note else []
        name_column = _name_column(schema, column)
        # Only these two columns are read: the images may be terabytes.
        columns = [name for name in (label, name_column) if name]
        table = parquet.read(columns=columns, use_threads=False) if columns else None
        num_rows = int(metadata.num_rows)
        numbers, classes = np.full(num_rows, -1, np.int32), None
        if label:
            class_names = features.get(label, {}).get("names")
            array = leaf_array(table, label)
            numbers, classes = _labels(path_or_url, label, array, class_names, notes, is_requested=is_requested)
        members = [str(row) for row in range(num_rows)]
        if name_column:
            image_names = leaf_array(table, name_column).to_pylist()
            # `datasets` writes null bytes and a path for images that it does not embed.
            if name_column.endswith(".path") and _is_all_null(metadata, column):
                notes += _missing_files(path_or_url, image_names, column)
            # With a name missing, all images are named by their rows.
            if all(image_names):
                members, repeated = unique_names(image_names)
                notes += repeated
    return SourceImages(
        members=members,
        labels=numbers,
        class_names=classes,
        offset=np.arange(num_rows, dtype=np.int64),
        length=nowhere(num_rows),
        notes=tuple(notes),
        column=column,
        text_labels=bool(label) and is_text(schema.field(label).type),
    )


def _path_column(schema: Any, requested: str) -> str:
    """Return the column of paths to images, "" if the file holds images itself."""
    leaves = dict(_leaves(schema))
    text_columns = [name for name, kind in leaves.items() if is_text(kind)]
    if requested:
        return requested if requested in text_columns else ""
    if _byte_columns(leaves) or _byte_columns(dict(_leaves(schema, in_lists=True))):
        return ""
    return next((name for default in PATH_NAMES for name in text_columns if name.lower() == default), "")


def _listed_paths(
    path_or_url: str, parquet: Any, paths: str, label: str, note: str, *, is_requested: bool
) -> SourceImages:
    """Return the images of a Parquet file that lists files.

    Args:
        path_or_url: location of the Parquet file.
        parquet: the open file.
        paths: column of paths.
        label: column of classes, "" for none.
        note: message about the column of classes, "" for none.
        is_requested: whether the user named the column of classes.
    """
    table = parquet.read(columns=[paths, *([label] if label else [])], use_threads=False)
    entries: list[str | None] = leaf_array(table, paths).to_pylist()
    if None in entries or "" in entries:
        row = next(number for number, entry in enumerate(entries) if not entry)
        raise SourceError(f"{path_or_url}, row {row}: column {paths} names no file")
    numbers, classes = np.full(len(entries), -1, np.int32), None
    notes = [note] if note else []
    if label:
        class_names = _features(parquet.schema_arrow).get(label, {}).get("names")
        array = leaf_array(table, label)
        numbers, classes = _labels(path_or_url, label, array, class_names, notes, is_requested=is_requested)
    rows = range(len(entries))
    images = images_at_paths(path_or_url, cast(list[str], entries), rows, numbers, classes, counted="row")
    return replace(images, notes=(*images.notes, *notes))


@contextmanager
def _parquet_errors(path_or_url: str) -> Generator[None]:
    """Convert errors of reading one file into a SourceError that names it."""
    # pyarrow takes half a second to import, and most builds have no Parquet file.
    import pyarrow as pa

    try:
        yield
    except ImageError as exc:
        raise SourceError(f"{path_or_url} {exc}") from exc
    except (pa.ArrowException, OSError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise SourceError(
            f"{path_or_url} is damaged, was cut short, or is no Parquet file ({reason:.200}): fetch it again"
        ) from exc


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the features of Hugging Face's metadata by column: their `_type`, and the names of classes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: cast(dict[str, Any], item) for name, item in features.items() if isinstance(item, dict)}
    # Metadata is written by anyone, in any shape: without it the types and names of columns decide.
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _leaves(fields: Any, prefix: str = "", *, in_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (path, type) of every leaf column, with dots in the path of a nested one.

    Args:
        fields: an Arrow schema, or a list of fields.
        prefix: path of the column that holds them.
        in_lists: also yield the columns within lists.
    """
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
    """Return whether a column of this Arrow type holds text, in any layout, also dictionary-encoded."""
    import pyarrow.types as types

    # Layouts differ by the writing library, not by their content.
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _byte_columns(leaves: dict[str, Any]) -> list[str]:
    """Return the columns that hold bytes, in any layout, also dictionary-encoded.

    Columns of nulls count as well if a column of paths is beside them.
    """
    import pyarrow.types as types

    def holds_bytes(name: str, kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if types.is_null(kind):
            paths = path_column(name, leaves)
            return bool(paths) and is_text(leaves[paths])
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    return [name for name, kind in leaves.items() if holds_bytes(name, kind)]


def _image_column(path_or_url: str, schema: Any, features: dict[str, dict[str, Any]], requested: str) -> str:
    """Return the column with the bytes of images.

    Raises:
        SourceError: the requested column has no bytes, or no column can be chosen.
    """
    leaves = dict(_leaves(schema))
    column_list = ", ".join(f"{name} ({kind})" for name, kind in leaves.items())
    # Lists of one image a row are the last resort: other columns of bytes come first.
    binary = _byte_columns(leaves) or _byte_columns(dict(_leaves(schema, in_lists=True)))
    if requested:
        for name in binary:
            if name in (requested, f"{requested}.bytes") or name.startswith(f"{requested}.list."):
                return name
        kind = f"is {leaves[requested]}, and images are bytes" if requested in leaves else "does not exist"
        raise SourceError(f"{path_or_url}: column {requested} {kind}; the columns are {column_list}")
    images = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    # Columns declared as images come first, then any column of bytes.
    likely = [f"{name}.bytes" for name in images if f"{name}.bytes" in binary] or binary
    if len(likely) == 1:
        return likely[0]
    if not likely:
        raise SourceError(
            f"{path_or_url} has no column with the bytes of images; its columns are {column_list}; nor is one with paths called "
            + ", ".join(PATH_NAMES)
        )
    for name in _IMAGE_NAMES:
        if name in likely:
            return name
    raise SourceError(
        f"{path_or_url} has several columns of bytes ({', '.join(likely)}): name the one with the images, as in "
        f"'{path_or_url}#{likely[0]}'"
    )


def _other_image_notes(schema: Any, column: str) -> list[str]:
    """Return a note on other columns of bytes, such as masks, which are not used."""
    others = [name for name in _byte_columns(dict(_leaves(schema))) if name != column]
    return (
        [f"images are those of column {column}; other columns of bytes are not used: {', '.join(others)}"]
        if others
        else []
    )


def _label_column(
    path_or_url: str, schema: Any, features: dict[str, dict[str, Any]], requested: str
) -> tuple[str, str]:
    """Return the column of classes, and a message if none can be chosen; "" for none.

    Raises:
        SourceError: the requested column does not exist, or cannot hold classes.
    """
    if requested:
        if requested not in schema.names:
            raise SourceError(
                f"{path_or_url}: column {requested} does not exist; the columns are {', '.join(schema.names)}"
            )
        if not _is_class(schema.field(requested).type):
            raise SourceError(
                f"{path_or_url}: column {requested} is {schema.field(requested).type}, and a class is a number or a name"
            )
        return requested, ""
    declared = [
        name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name in schema.names
    ]
    likely = [name for default in LABEL_NAMES for name in schema.names if name.lower() == default]
    # A single declared column of classes comes first; of several, only one with a default name is chosen.
    for name in (*(declared if len(declared) == 1 else ()), *likely):
        if _is_class(schema.field(name).type):
            return name, ""
    if declared:
        return (
            "",
            f"no classes: there are several columns of them ({', '.join(declared)}); name one, as in '#,{declared[0]}'",
        )
    if likely:
        return (
            "",
            f"no classes: column {likely[0]} is {schema.field(likely[0]).type}, and a class is a number or a name",
        )
    # Only top-level columns are read for classes, so a nested one is named in the note.
    nested = [name for name, _ in _leaves(schema) if name.rpartition(".")[2].lower() in LABEL_NAMES]
    if nested:
        return (
            "",
            f"no classes: {nested[0]} is a field within another column; copy it into a column of its own, such as label",
        )
    return "", ""


def _is_class(kind: Any) -> bool:
    """Return whether a column of this Arrow type can hold classes: numbers or names, also dictionary-encoded."""
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
    path_or_url: str, column: str, array: Any, names: list[str] | None, notes: list[str], *, is_requested: bool
) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """Read the classes of all rows.

    Args:
        path_or_url: location of the file, for messages.
        column: the column of classes.
        array: its values.
        names: class names that the file declares for its numbers, None if it declares none.
        notes: receives a note if the column holds no classes, such as scores.
        is_requested: whether the user named the column: then it must hold classes.

    Returns:
        (n,) class numbers, -1 for no class, and their names; None if there are only numbers.

    Raises:
        SourceError: a value is no class, or a number has no name.
    """
    import pyarrow.types as types

    try:
        numbers, own_names = parse_labels(array.to_pylist())
    except ValueError as exc:
        # Fractions in a column that was chosen by its name are scores, not mistakes.
        if is_requested or not (types.is_floating(array.type) or types.is_decimal(array.type)):
            raise SourceError(
                f"{path_or_url}: column {column} holds {exc}: name another column, as in '#,OTHER'"
            ) from exc
        notes.append(f"no classes: column {column} holds {exc}")
        return np.full(len(array), -1, np.int32), None
    if own_names is not None or names is None:
        return numbers, own_names
    # Hugging Face declares the names of numbers in the metadata; a number beyond them means another column.
    highest = int(numbers.max(initial=-1))
    if highest >= len(names):
        raise SourceError(
            f"{path_or_url}: column {column} holds class {highest}, and the file names {len(names)} classes: name another "
            "column, as in '#,OTHER'"
        )
    return numbers, tuple(map(str, names))


def _name_column(schema: Any, image: str) -> str:
    """Return the column that names images, "" if there is none."""
    leaves = dict(_leaves(schema))
    sibling = f"{image.rpartition('.')[0]}.path"  # image.bytes -> image.path
    return next((name for name in (sibling, *_KEY_NAMES) if name in leaves and is_text(leaves[name])), "")


def _is_all_null(metadata: Any, column: str) -> bool:
    """Return whether the statistics of a file prove that every row of a column is null."""
    number = _column_number(metadata, column)
    # A column of Arrow's null type has no statistics.
    if number is None or str(metadata.schema.column(number).logical_type) == "Null":
        return number is not None
    statistics = [metadata.row_group(group).column(number).statistics for group in range(metadata.num_row_groups)]
    null_counts = [group.null_count if group is not None and group.has_null_count else 0 for group in statistics]
    return sum(null_counts) == metadata.num_rows


def _missing_files(path_or_url: str, paths: list[str | None], column: str) -> list[str]:
    """Return a note on the files that a Parquet file names and that do not exist.

    Raises:
        SourceError: none of the files exists.
    """
    missing = [path for path in paths if path and not may_exist(path_or_url, path)]
    num_named = sum(map(bool, paths))
    if num_named and len(missing) == num_named:
        raise SourceError(
            f"{path_or_url} holds no image itself ({column} is null), and none of the {num_named} files that it names exists "
            f"({missing[0]!r:.200}): relative paths start from the folder of the Parquet file"
        )
    if not missing:
        return []
    return [
        f"{len(missing)} of the {num_named} files that it names do not exist ({missing[0]!r:.200}) and will be left out"
    ]


def _column_number(metadata: Any, column: str) -> int | None:
    """Return the position of a leaf column in the file, None if the file stores it under another path, as in a list."""
    numbers = range(metadata.num_columns)
    return next((number for number in numbers if metadata.schema.column(number).path == column), None)


def _layout_notes(path_or_url: str, metadata: Any, column: str) -> list[str]:
    """Return a note if the layout of the file makes reading single images slow.

    Raises:
        SourceError: single images cannot be read at all.
    """
    number = _column_number(metadata, column)
    if number is None:
        raise SourceError(f"{path_or_url}: column {column} is a list in the file, and one row must be one image")
    # A chunk is one column of one row group, the unit that Parquet compresses.
    chunks = [metadata.row_group(group).column(number) for group in range(metadata.num_row_groups)]
    list_depth = metadata.schema.column(number).max_repetition_level
    if list_depth > 1 or (list_depth and sum(chunk.num_values for chunk in chunks) > metadata.num_rows):
        column_list = ", ".join(f"{field.name} ({field.type})" for field in metadata.schema.to_arrow_schema())
        raise SourceError(
            f"{path_or_url} has no column with the bytes of images; its columns are {column_list}; in the lists of column "
            f"{column} some rows hold several images, and one row must be one image"
        )
    # Plain chunks on a local disk are read image by image; all others as a whole row group.
    whole = [chunk for chunk in chunks if is_url(path_or_url) or not is_plain(chunk)]
    largest = max((int(chunk.total_uncompressed_size) for chunk in whole), default=0)
    if largest > MAX_GROUP_BYTES:
        raise SourceError(
            f"{path_or_url} has row groups with {largest} bytes of images, which have to be read as a whole: write it again "
            "with row groups of about 100 rows"
        )
    slow = [chunk for chunk in chunks if not is_plain(chunk) and chunk.total_uncompressed_size > _LARGE_GROUP_BYTES]
    if slow:
        mean_mb = sum(int(chunk.total_uncompressed_size) for chunk in slow) / len(slow) / 1e6
        return [
            f"its images are compressed or in dictionaries: reading one in random order reads its row group ({mean_mb:.0f} MB); "
            "docs/sources.md shows how to write it better"
        ]
    return []
