"""Images in Parquet files, by row: every way a file may be written gives the same bytes, and says what it cannot give."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_cache.errors import ImageError
from radio_cache.format.schema import Container
from radio_cache.images import files as file_bytes
from radio_cache.images import parquet as parquet_images
from radio_cache.images.containers import read_image
from radio_cache.images.parquet import open_parquet, read_row
from radio_cache.images.parquet_pages import value_ranges

PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def some_images(count: int, *, most: int = 3000) -> list[bytes]:
    rng = np.random.default_rng(count)
    return [rng.bytes(int(rng.integers(0, most))) for _ in range(count)]


def write(path: Path, images: list[bytes | None], *, group: int = 7, **how: Any) -> Path:
    column = pa.array([None if one is None else {"bytes": one, "path": None} for one in images], IMAGE)
    labels = pa.array(range(len(images)), pa.int64())
    pq.write_table(pa.table({"label": labels, "image": column}), path, row_group_size=group, **how)
    return path


@pytest.fixture
def ranges_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that images were read by."""
    seen: list[tuple[int, int]] = []
    original = parquet_images.read_path_or_url

    def watched(place: str, offset: int = -1, length: int = -1) -> bytes:
        seen.append((offset, length))
        return original(place, offset, length)

    monkeypatch.setattr(parquet_images, "read_path_or_url", watched)
    return seen


@pytest.mark.parametrize(
    "how",
    [
        PLAIN,
        PLAIN | {"data_page_version": "2.0"},
        PLAIN | {"data_page_size": 2000, "write_batch_size": 2},
        {},
        PLAIN | {"write_page_checksum": True},
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "none"},
        PLAIN | {"column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}},
    ],
    ids=str,
)
def test_every_image_is_read_in_any_order_however_the_file_was_written(tmp_path: Path, how: dict[str, Any]) -> None:
    images = some_images(40)
    path = write(tmp_path / "a.parquet", list(images), **how)
    container = Container(kind="parquet", path=str(path), prefix="a.parquet/", column="image.bytes")
    for row in np.random.default_rng(1).permutation(40).tolist():
        assert read_image(container, f"a.parquet/{row}", row, -1) == images[row]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_one_image_of_a_plain_file_is_one_read_of_its_own_bytes(
    tmp_path: Path, version: str, ranges_read: list[tuple[int, int]]
) -> None:
    images = some_images(20)
    path = write(tmp_path / "a.parquet", list(images), data_page_version=version, **PLAIN)
    assert [read_row(str(path), "image.bytes", row) for row in (13, 2)] == [images[13], images[2]]
    assert [length for _, length in ranges_read] == [len(images[13]), len(images[2])]
    whole = path.read_bytes()
    assert [whole[offset : offset + length] for offset, length in ranges_read] == [images[13], images[2]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_places_of_values_are_those_that_pyarrow_decodes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Over sizes of images, pages and levels; where values are null, none are claimed."""
    images = data.draw(st.lists(st.one_of(st.none(), st.binary(max_size=40)), min_size=1, max_size=30))
    required = data.draw(st.booleans()) and None not in images
    table = pa.table(
        [pa.array(images, pa.binary())], schema=pa.schema([pa.field("x", pa.binary(), nullable=not required)])
    )
    path = tmp_path_factory.mktemp("pages") / "a.parquet"
    pq.write_table(
        table,
        path,
        data_page_version=data.draw(st.sampled_from(["1.0", "2.0"])),
        data_page_size=data.draw(st.integers(1, 200)),
        write_batch_size=data.draw(st.integers(1, 9)),
        **PLAIN,
    )
    whole = path.read_bytes()
    chunk = pq.read_metadata(path).row_group(0).column(0)
    span = (chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size)
    found = value_ranges(lambda offset, length: whole[offset:][:length], *span, len(images), optional=not required)
    if None in images:
        assert found is None
    else:
        assert found is not None
        assert [whole[o : o + n] for o, n in zip(*map(np.ndarray.tolist, found), strict=True)] == images


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_pages_give_no_places_or_places_inside_the_chunk(data: st.DataObject) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": pa.array([b"0123456789"] * 12, pa.binary())}), sink, **PLAIN)
    whole = bytearray(sink.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, 190))] = data.draw(st.integers(0, 255))
    found = value_ranges(lambda offset, length: bytes(whole[offset:][:length]), 4, 190, 12, optional=True)
    if found is not None:
        assert (found[0] >= 4).all()
        assert (found[0] + found[1] <= 190).all()


@pytest.mark.parametrize("how", [PLAIN, {}], ids=str)
def test_a_null_is_an_unusable_image_and_its_neighbours_are_none(tmp_path: Path, how: dict[str, Any]) -> None:
    path = str(write(tmp_path / "a.parquet", [b"one", None, b"three"], **how))
    assert (read_row(path, "image.bytes", 0), read_row(path, "image.bytes", 2)) == (b"one", b"three")
    with pytest.raises(ImageError, match=r"row 1 of .*a\.parquet holds no image: its image\.bytes is null"):
        read_row(path, "image.bytes", 1)


def test_a_plain_column_of_its_own_and_a_name_with_points(tmp_path: Path) -> None:
    for name in ("jpg", "image.jpg"):
        pq.write_table(pa.table({name: pa.array([b"a", b"bc"], pa.large_binary())}), tmp_path / "a.parquet")
        assert read_row(str(tmp_path / "a.parquet"), name, 1) == b"bc"


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there_is_an_image_error(tmp_path: Path, row: int) -> None:
    path = write(tmp_path / "a.parquet", [b"1", b"2", b"3"])
    with pytest.raises(ImageError, match=rf"a\.parquet has 3 rows, not row {row}"):
        read_row(str(path), "image.bytes", row)


def test_a_column_that_is_gone_or_holds_no_bytes_is_an_image_error(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.parquet", [b"1"]))
    with pytest.raises(ImageError, match=r"no column photo now; it has label, image\.bytes, image\.path"):
        read_row(path, "photo", 0)
    with pytest.raises(ImageError, match=r"column label of .* does not hold the bytes of one image a row"):
        read_row(path, "label", 0)
    pq.write_table(pa.table({"many": [[b"x", b"y"]]}), path)
    with pytest.raises(
        ImageError, match=r"column many\.list\.element of .* does not hold the bytes of one image a row"
    ):
        read_row(path, "many.list.element", 0)


@pytest.mark.parametrize("how", [PLAIN, {}], ids=str)
def test_a_file_cut_short_or_gone_is_an_image_error(tmp_path: Path, how: dict[str, Any]) -> None:
    path = write(tmp_path / "a.parquet", list(some_images(20)), **how)
    read_row(str(path), "image.bytes", 3)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError, match=r"a\.parquet is damaged, or no Parquet file now"):
        read_row(str(path), "image.bytes", 3)
    path.unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        read_row(str(path), "image.bytes", 3)


def test_bytes_damaged_inside_a_compressed_row_group_are_an_image_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", list(some_images(20)), compression="zstd")
    damaged = bytearray(path.read_bytes())
    damaged[100:2000] = bytes(1900)
    path.write_bytes(damaged)
    with pytest.raises(ImageError, match=r"a\.parquet is damaged"):
        read_row(str(path), "image.bytes", 3)


def test_a_file_written_anew_is_looked_at_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [b"old", b"older"], **PLAIN)
    assert read_row(str(path), "image.bytes", 1) == b"older"
    write(path, [b"newest", b"new"], **PLAIN)
    assert read_row(str(path), "image.bytes", 1) == b"new"


def test_a_row_group_is_decoded_once_for_all_threads_that_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = some_images(30)
    path = write(tmp_path / "a.parquet", list(images), group=30)
    opened: list[str] = []
    together = threading.Barrier(8)

    def counted(place: str) -> Any:
        opened.append(place)
        return open_parquet(place)

    monkeypatch.setattr(parquet_images, "open_parquet", counted)

    def read(row: int) -> bytes:
        if row < 8:
            together.wait()
        return read_row(str(path), "image.bytes", row)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(30))) == images
    assert len(opened) <= 8 + 1  # at worst every thread looks at the footer


def test_decoded_row_groups_are_kept_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "_KEPT_BYTES", 30_000)
    path = write(tmp_path / "a.parquet", list(some_images(60)))
    shared = parquet_images._shared(os.getpid())
    before = len(shared._groups)
    for row in range(60):
        read_row(str(path), "image.bytes", row)
    held = [group.result().num_bytes for group in shared._groups.values()]
    assert sum(held) <= 30_000 or len(held) == 1
    assert len(held) <= before + 3


def test_a_row_group_too_large_to_decode_for_one_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_images, "MAX_GROUP_BYTES", 2000)
    path = write(tmp_path / "a.parquet", list(some_images(10)))
    with pytest.raises(ImageError, match=r"row group 0 of .* bytes of images in one: write the file again"):
        read_row(str(path), "image.bytes", 3)


def test_a_value_larger_than_any_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [b"0123456789"])
    monkeypatch.setattr(file_bytes, "MAX_IMAGE_FILE_BYTES", 5)
    with pytest.raises(ImageError, match="10 bytes are more than an image file has"):
        read_row(str(path), "image.bytes", 0)


def test_a_pipe_called_like_a_parquet_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"a\.parquet is a named pipe, not a file"):
        read_row(str(tmp_path / "a.parquet"), "image", 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_reads_on(tmp_path: Path) -> None:
    images = some_images(20)
    path = write(tmp_path / "a.parquet", list(images))
    read_row(str(path), "image.bytes", 3)
    child = os.fork()
    if not child:
        right = all(read_row(str(path), "image.bytes", row) == images[row] for row in range(20))
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
