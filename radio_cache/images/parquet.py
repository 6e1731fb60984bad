"""Images in a column of a Parquet file, by row: what one image costs depends on how the file was written.

Where pages are plain and uncompressed, as the Hugging Face `datasets` library now writes images, an image is one read of
its own bytes. Where they are not, the whole column of its row group is read and decoded, and kept for the rows
beside it: right for reading in order, dear for reading at random (docs/design/007-sources.md).
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ImageError, UnreadableImageError
from radio_cache.images.files import open_local, read_path_or_url, reading_error, refuse_large, resolve_list_entry
from radio_cache.images.parquet_pages import value_ranges
from radio_cache.images.remote import RemoteFile
from radio_cache.storage.base import is_url

MAX_GROUP_BYTES = 1 << 30
"""Of a row group's images, where one cannot be read without the others; larger ones are refused when listed."""

# Limits of a process: decoded row groups in memory, and files whose metadata is in memory.
_KEPT_BYTES = 1 << 28
_KEPT_FILES = 1024

_DELTA_ROWS = 16
"""Rows decoded at a time where each may expand to a whole image, so that the size is checked in between."""

Ranges = tuple[NDArray[np.int64], NDArray[np.int64]]


def read_row(place: str, column: str, row: int) -> bytes:
    """Return the bytes of the image in one row. place: a path or a URL. column: as `Container.column`.

    Raises ImageError for a null and for rows that cannot be decoded, UnreadableImageError for a file that is not there or no
    longer the one that was listed, and StorageError as `read_path_or_url` does.
    """
    return _shared(os.getpid()).file(place, column).read(row)


@contextmanager
def open_parquet(place: str) -> Generator[Any]:
    """Open a `pyarrow.parquet.ParquetFile` and close it at the end.

    Raises:
        ImageError: as `read_path_or_url`.
        StorageError: as `read_path_or_url`. Errors of pyarrow for bytes that are not a Parquet file are raised as well.
    """
    with _parquet_file(place, None) as parquet:
        yield parquet


@contextmanager
def _parquet_file(place: str, dictionaries: list[str] | None) -> Generator[Any]:
    """Yield what `open_parquet` does.

    Args:
        place: path or URL.
        dictionaries: columns to read as dictionaries instead of expanding them.
    """
    import pyarrow.parquet as pq

    if is_url(place):
        # At a URL every read waits for a request: `pre_buffer` joins those of neighbouring column chunks.
        with _remote(place) as file, pq.ParquetFile(file, pre_buffer=True, read_dictionary=dictionaries) as parquet:
            yield parquet
        return
    with open_local(Path(place)) as (descriptor, _):
        # A duplicate, since `open_local` closes its own descriptor at the end of the block.
        file = os.fdopen(os.dup(descriptor), "rb")
    with file, pq.ParquetFile(file, pre_buffer=False, read_dictionary=dictionaries) as parquet:
        yield parquet


def path_column(column: str, names: Iterable[str]) -> str:
    """Return the column beside that of images which names files, as `datasets` has it ("image.path"); "" if there is none."""
    beside = f"{column.removesuffix('.bytes')}.path"
    return beside if column.endswith(".bytes") and beside in names else ""


def is_plain(chunk: Any) -> bool:
    """Return whether a column chunk (`ColumnChunkMetaData`) promises images that can be read one by one."""
    return chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page and "PLAIN" in chunk.encodings


class _Values(Protocol):
    """Images of one row group in memory."""

    num_bytes: int

    def image(self, number: int) -> bytes | None: ...

    def path(self, number: int) -> str:
        """Return the path or URL of an image that is not in the file itself, or "" without one."""
        ...


@final
class _Decoded:
    """Images as pyarrow decodes them. `paths` stand beside the images; None if the file has none."""

    def __init__(self, array: Any, paths: Any) -> None:
        self._array, self._paths = array, paths
        self.num_bytes = int(array.nbytes) + (0 if paths is None else int(paths.nbytes))

    def image(self, number: int) -> bytes | None:
        image = self._array[number].as_py()
        return image.encode() if isinstance(image, str) else image  # some writers declare the bytes to be text

    def path(self, number: int) -> str:
        return (self._paths[number].as_py() if self._paths is not None else None) or ""


@final
class _Fetched:
    """Images in bytes fetched from the file, beginning at position `start` of it."""

    def __init__(self, data: bytes, start: int, ranges: Ranges) -> None:
        self._data, self._start, self._ranges, self.num_bytes = data, start, ranges, len(data)

    def image(self, number: int) -> bytes | None:
        first = int(self._ranges[0][number]) - self._start
        return self._data[first : first + int(self._ranges[1][number])]

    def path(self, number: int) -> str:
        return ""


@final
class _Shared:
    """State shared by the threads of a process: facts about files, and row groups in memory."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._files: OrderedDict[tuple[Any, ...], _File] = OrderedDict()
        self._groups: OrderedDict[tuple[_File, int], Future[_Values]] = OrderedDict()

    def file(self, place: str, column: str) -> "_File":
        """Return the metadata of a file, read again if the file has changed."""
        # Size and time are part of the key, so a changed file gets an entry of its own.
        key = (place, column, _identity(place))
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return self._files[key]
        # Opened outside the lock. If two threads open the same file, the first entry counts.
        parquet_file = _File(place, column)
        with self._lock:
            parquet_file = self._files.setdefault(key, parquet_file)
            while len(self._files) > _KEPT_FILES:
                self._files.popitem(last=False)
        return parquet_file

    def held(self, file: "_File", number: int) -> _Values | None:
        """Return a row group, if it is in memory or on its way there."""
        with self._lock:
            pending_group = self._groups.get((file, number))
        return pending_group and pending_group.result()

    def group(self, file: "_File", number: int, make: Callable[[], _Values]) -> _Values:
        """Return a row group. One thread makes it, and others that need the same one wait."""
        key = (file, number)
        with self._lock:
            pending_group = self._groups.get(key)
            if pending_group is None:
                new_group = self._groups[key] = Future[_Values]()
            else:
                new_group = None
                self._groups.move_to_end(key)
        if new_group is None:
            assert pending_group is not None
            return pending_group.result()
        try:
            # Outside the lock: other row groups stay available while this one is decoded.
            values = make()
        except BaseException as exc:
            with self._lock:
                # Removed first, so that a request after the error tries again.
                self._groups.pop(key, None)
            new_group.set_exception(exc)
            raise
        new_group.set_result(values)
        self._make_room()
        return values

    def _make_room(self) -> None:
        with self._lock:
            # Least recently used first. Unfinished groups have no size yet, and threads wait for them.
            done = {key: group.result().num_bytes for key, group in self._groups.items() if _is_there(group)}
            held = sum(done.values())
            for key, num_bytes in list(done.items())[:-1]:  # the latest stays, whatever its size
                if held <= _KEPT_BYTES:
                    return
                del self._groups[key]
                held -= num_bytes


def _is_there(group: Future[_Values]) -> bool:
    return group.done() and group.exception() is None


@lru_cache(maxsize=1)
def _shared(process: int) -> _Shared:  # locks and connections do not survive a fork
    return _Shared()


@final
class _File:
    """One column of a file: the positions of its row groups, and of the images in those that were read."""

    def __init__(self, place: str, column: str) -> None:
        self._place, self._column = place, column
        with self._named(UnreadableImageError), open_parquet(place) as parquet:
            metadata = parquet.metadata
            names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
            if column not in names:
                raise UnreadableImageError(
                    f"cannot be read: {place} has no column {column} now; it has {', '.join(names)}"
                )
            number = names.index(column)
            declared = metadata.schema.column(number)
            self._path_column = path_column(column, names)
            has_bytes = declared.physical_type == "BYTE_ARRAY"
            # A column of nulls alone has no type; its images are the files that the path column names.
            all_null = str(declared.logical_type) == "Null" and bool(self._path_column)
            # Level 1: each row is a list. `_decoded_lists` accepts lists of one image.
            self._in_list = declared.max_repetition_level == 1
            if not (has_bytes or all_null) or declared.max_repetition_level > 1:
                raise ImageError(
                    f"cannot be read: column {column} of {place} does not hold the bytes of one image a row"
                )
            self._optional = declared.max_definition_level > 0
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            # (row groups,) number of the row behind each group.
            self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
            chunks = [group.column(number) for group in groups]
            # (first byte, end) of chunks whose images can be read one by one; None for the others.
            self._spans = [
                _span(chunk) if has_bytes and not self._in_list and is_plain(chunk) else None for chunk in chunks
            ]
            self._group_bytes = [chunk.total_uncompressed_size for chunk in chunks]
            self._encodings = [frozenset(chunk.encodings) for chunk in chunks]
            self._in_dictionary = [has_bytes and chunk.has_dictionary_page for chunk in chunks]
        self._ranges: dict[int, Ranges | None] = {}

    def read(self, row: int) -> bytes:
        """Return the image in a row."""
        rows = int(self._ends[-1]) if len(self._ends) else 0
        if not 0 <= row < rows:
            raise UnreadableImageError(f"cannot be read: {self._place} has {rows} rows, not row {row}")
        group = int(np.searchsorted(self._ends, row, side="right"))
        number = row - self._first_row(group)
        shared = _shared(os.getpid())
        # Ranges unknown: decode the group once. Known at a URL: use the group if it is in memory. Known in a local file:
        # read the image alone.
        ranges = self._known_ranges(group)
        if ranges is None:
            values = shared.group(self, group, lambda: self._decoded(group))
        elif is_url(self._place):
            values = shared.held(self, group)
        else:
            values = None
        if values is None:
            assert ranges is not None
            return read_path_or_url(self._place, int(ranges[0][number]), int(ranges[1][number]))
        image = values.image(number)
        if image is None:
            if path := values.path(number):
                return read_path_or_url(resolve_list_entry(self._place, path))
            beside = f", and so is its {self._path_column}" if self._path_column else ""
            raise ImageError(f"row {row} of {self._place} holds no image: its {self._column} is null{beside}")
        refuse_large(len(image))
        return image

    def _first_row(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0

    def _known_ranges(self, group: int) -> Ranges | None:
        """Return the byte ranges of the images of a row group, if they are known or cheap to read; else None."""
        # Each length is a read of its own: cheap in a local file, a request at a URL (see `_decoded`).
        if group not in self._ranges and (self._spans[group] is None or not is_url(self._place)):
            self._ranges[group] = self._local_ranges(group) if self._spans[group] else None
        return self._ranges.get(group)

    def _local_ranges(self, group: int) -> Ranges | None:
        with open_local(Path(self._place)) as (descriptor, _):
            return self._found_ranges(group, lambda offset, length: os.pread(descriptor, length, offset))

    def _found_ranges(self, group: int, read: Callable[[int, int], bytes]) -> Ranges | None:
        span = self._spans[group]
        if span is None:
            return None
        count = int(self._ends[group]) - self._first_row(group)
        return value_ranges(read, *span, count, optional=self._optional)

    def _decoded(self, group: int) -> _Values:
        """Return a whole row group.

        The first read of a plain one at a URL fetches all of it, and records the range of each image. Reading the lengths one
        by one would take a request per image.
        """
        if self._group_bytes[group] > MAX_GROUP_BYTES:
            raise ImageError(
                f"cannot be read: row group {group} of {self._place} holds {self._group_bytes[group]} bytes of images in one: "
                "write the file again with row groups of about 100 rows"
            )
        span = self._spans[group]
        if span is not None and is_url(self._place):
            start, end = span
            data = read_path_or_url(self._place, start, end - start)
            ranges = self._found_ranges(group, lambda offset, length: data[offset - start :][:length])
            self._ranges[group] = ranges
            if ranges is not None:
                return _Fetched(data, start, ranges)
        # Dictionaries are not expanded: one of 100 kB may hold a single image for 15,000 rows.
        dictionaries = [self._column] if self._in_dictionary[group] else None
        with self._named(), _parquet_file(self._place, dictionaries) as parquet:
            columns = [self._column, *([self._path_column] if self._path_column else [])]
            if "DELTA_BYTE_ARRAY" in self._encodings[group]:
                return self._decoded_deltas(parquet, group, columns)
            table = parquet.read_row_group(group, columns=columns, use_threads=False)
            if self._in_list:
                return self._decoded_lists(table)
            paths = leaf_array(table, self._path_column) if self._path_column else None
            return _Decoded(leaf_array(table, self._column), paths)

    def _decoded_lists(self, table: Any) -> _Values:
        """Return a row group whose rows are lists, of one image each, or of none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        name, *inner = _names_of(table.schema, self._column)
        lists = pa.concat_arrays(table.column(name).chunks)
        counts = np.asarray(pc.fill_null(pc.call_function("list_value_length", [lists]), 0), np.int64)
        if (counts > 1).any():
            raise ImageError(
                f"cannot be read: column {self._column} of {self._place} does not hold the bytes of one image a row, but up to "
                f"{counts.max()} of them"
            )
        # (rows,) index into the flattened images. An empty list has none, so its index is masked and `take` yields null.
        rows = pa.array(np.cumsum(counts) - 1, mask=counts == 0)
        leaves = pa.table({name: lists.flatten()})
        # The schema has two levels for a list ("list", "element"), which a flattened array lacks.
        columns = [".".join([name, *inner[2:]]), f"{name}.path" if self._path_column else ""]
        arrays = [leaf_array(leaves, column).take(rows) if column else None for column in columns]
        return _Decoded(*arrays)

    def _decoded_deltas(self, parquet: Any, group: int, columns: list[str]) -> _Values:
        """Return a row group in the encoding DELTA_BYTE_ARRAY, with equal images stored once.

        Each value is stored as its difference from the value before, so a small file may expand to many large images.
        """
        import pyarrow as pa

        known: dict[bytes | str | None, int] = {}
        numbers: list[int] = []
        paths: list[Any] = []
        num_bytes = 0
        for batch in parquet.iter_batches(_DELTA_ROWS, row_groups=[group], columns=columns, use_threads=False):
            table = pa.Table.from_batches([batch])
            for image in leaf_array(table, self._column).to_pylist():
                num_bytes += 0 if image in known else len(image or b"")
                numbers.append(known.setdefault(image, len(known)))
            paths += leaf_array(table, self._path_column).to_pylist() if self._path_column else []
            # Counted after each batch, because the metadata does not bound the expanded size.
            if num_bytes > MAX_GROUP_BYTES:
                raise ImageError(
                    f"cannot be read: row group {group} of {self._place} unfolds to more than {MAX_GROUP_BYTES} bytes of images: "
                    "write the file again with row groups of about 100 rows"
                )
        images = pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(list(known)))
        return _Decoded(images, pa.array(paths, pa.string()) if paths else None)

    @contextmanager
    def _named(self, kind: type[ImageError] = ImageError) -> Generator[None]:
        """Translate errors of the library.

        Args:
            kind: class of the error for bytes that are damaged, or no Parquet file.
        """
        import pyarrow as pa

        try:
            yield
        # Lack of memory reveals nothing about the file.
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError) as exc:
            # With errno the system refused the read. Without it pyarrow reports damaged data as an OSError.
            if isinstance(exc, OSError) and exc.errno:
                raise reading_error(self._place, exc) from exc
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise kind(f"cannot be read: {self._place} is damaged, or no Parquet file now: {reason:.200}") from exc


def leaf_array(table: Any, column: str) -> Any:
    """Return the values of a column that may lie inside others ("image.bytes"), null where one of those is null; one array."""
    import pyarrow as pa
    import pyarrow.compute as pc

    name, *inner = _names_of(table.schema, column)
    array = table.column(name).combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # some versions of pyarrow leave an array without chunks as it is
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    for field in inner:
        array = pc.call_function("struct_field", [array], pc.StructFieldOptions(field))
    return array


def _names_of(schema: Any, column: str) -> list[str]:
    """Return the names of the nested fields that lead to a column. A field name may itself contain points."""
    if column in schema.names:
        return [column]
    name = max((name for name in schema.names if column.startswith(f"{name}.")), key=len)
    return [name, *column.removeprefix(f"{name}.").split(".")]


def _span(chunk: Any) -> tuple[int, int]:
    start = int(chunk.data_page_offset)
    return start, start + int(chunk.total_compressed_size)


def _identity(place: str) -> tuple[int, int]:
    """Return a value that changes when a local file does."""
    if is_url(place):
        return (0, 0)
    try:
        # A URL has no such check: it would cost one more request per image.
        status = os.stat(place)  # noqa: PTH116  # runs for every image, and Path costs more
    except (OSError, ValueError):
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


@contextmanager
def _remote(place: str) -> Generator[RemoteFile]:
    try:
        with RemoteFile(place) as file:
            yield file
    except FileNotFoundError as exc:
        raise UnreadableImageError(f"cannot be read: there is nothing at {place:.200}") from exc
    except PermissionError as exc:
        raise UnreadableImageError(f"cannot be read: the server refuses {place:.200}") from exc
