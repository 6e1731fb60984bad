"""Sources at URLs: the same images give the same cache wherever they lie, and every way to fail is one sentence."""

import io
import json
import shutil
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.sources import Listing, ListingRequest, Selection, list_for, list_images, record_listing
from cache_builder.teachers import TeacherOptions
from radio_cache import Cache, CacheMeta
from radio_cache.errors import ConfigError, ImageError, SourceError, StorageError
from radio_cache.images import remote as remote_files
from radio_cache.images.containers import read_image
from radio_cache.storage.base import Storage
from radio_cache.storage.buckets import ObjectStorage
from radio_cache.writer import create_cache


def tar_of(folder: Path, names: list[str], *, numbers: dict[str, int]) -> bytes:
    """A WebDataset tar of images, with their classes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in names:
            for member, data in ((name, (folder / name).read_bytes()), (f"{name[:-4]}.cls", b"%d" % numbers[name])):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def parquet_of(folder: Path, names: list[str], *, classes: list[str], **how: Any) -> bytes:
    """A Parquet file of images, as Hugging Face lays it out."""
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    rows = [{"bytes": (folder / name).read_bytes(), "path": name} for name in names]
    table = pa.table(
        {
            "image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": [classes.index(name.partition("/")[0]) for name in names],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=3, **how)
    return sink.getvalue().to_pybytes()


def fill(put: Callable[[str, bytes], object], folder: Path) -> None:
    """All kinds of sources of the images below a folder: photos/, tars/, hf/, old/, list.txt."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    classes = sorted({name.partition("/")[0] for name in names})
    for name in names:
        put(f"photos/{name}", (folder / name).read_bytes())
    put("photos/.hidden/a.png", b"")
    put("photos/readme.txt", b"x")
    numbers = {name: classes.index(name.partition("/")[0]) for name in names}
    for number, part in enumerate((names[:6], names[6:])):
        put(f"tars/train-{number:03d}.tar", tar_of(folder, part, numbers=numbers))
        put(
            f"hf/train-{number}.parquet",
            parquet_of(folder, part, classes=classes, compression="none", use_dictionary=False),
        )
        put(f"old/train-{number}.parquet", parquet_of(folder, part, classes=classes))
    put("list.txt", "".join(f"photos/{name}\t{name.partition('/')[0]}\n" for name in names).encode())


@pytest.fixture
def filled(bucket: Callable[[str], str], ten_images: Path) -> str:
    """A prefix of a bucket with all kinds of sources."""
    url = bucket("data")
    storage = ObjectStorage(url)
    fill(lambda path, data: storage.write(path, [data]), ten_images)
    return url


@pytest.fixture
def memory(ten_images: Path) -> Iterator[str]:
    """The same behind fsspec."""
    fs = fsspec.filesystem("memory")
    fill(lambda path, data: fs.pipe_file(f"memory://sources/{path}", data), ten_images)
    yield "memory://sources"
    fs.rm("memory://sources", recursive=True)


def contents(listing: Listing) -> list[bytes]:
    index = listing.index
    return [
        read_image(listing.containers[index.container[row]], key, int(index.offset[row]), int(index.length[row]))
        for row, key in enumerate(index.keys)
    ]


def classes(listing: Listing) -> list[str]:
    """Class names; those of numbers are known to be ant and bee."""
    names = listing.class_names or ("ant", "bee")
    return [names[label] for label in listing.index.labels.tolist()]


WAYS = ("photos", "photos/", "tars", "tars/train-{000..001}.tar", "hf", "hf/train-*.parquet", "old", "list.txt")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["filled", "memory"])
def test_every_kind_of_source_in_a_bucket_gives_the_images_and_classes_of_the_folder(
    request: pytest.FixtureRequest, ten_images: Path, place: str, way: str
) -> None:
    here = list_images([str(ten_images)])
    there = list_images([f"{request.getfixturevalue(place)}/{way}"])
    assert contents(there) == contents(here)
    assert classes(there) == classes(here)
    assert [key.rpartition("/")[2] for key in there.index.keys] == [key.rpartition("/")[2] for key in here.index.keys]


@pytest.mark.parametrize(
    ("way", "files"),
    [("photos", 12), ("tars", 12), ("tars/train-{000..001}.tar", 10), ("hf/*.parquet", 12), ("list.txt", 10)],
)
def test_files_are_counted_while_they_are_found(request: pytest.FixtureRequest, way: str, files: int) -> None:
    """What lies there, images or not, and what tars, tables and lists hold."""
    for place in ("filled", "memory"):
        counted: list[int] = []
        list_images([f"{request.getfixturevalue(place)}/{way}"], on_listed=counted.append)
        assert sum(counted) == files


@pytest.mark.parametrize("way", ["photos", "tars", "hf", "old", "list.txt"])
def test_limit_filter_and_shuffle_work_in_a_bucket_as_on_a_disk(
    filled: str, memory: str, ten_images: Path, tmp_path: Path, way: str
) -> None:
    def put(path: str, data: bytes) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)

    fill(put, ten_images)
    selection = Selection(filters=("*bee*",), shuffle_seed=5, limit=3)
    here, *there = (list_images([f"{root}/{way}"], selection=selection) for root in (tmp_path, filled, memory))
    assert len(here.index) == 3
    for one in there:
        assert one.index.keys == here.index.keys
        assert contents(one) == contents(here)
        assert one.notes[-2:] == here.notes[-2:]


def test_a_local_list_may_name_urls_and_paths(filled: str, ten_images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{filled}/photos/ant/0.png\tant\n{ten_images}/bee/0.png\tbee\n")
    listing = list_images([f"{tmp_path}/list.txt"])
    assert contents(listing) == [(ten_images / name).read_bytes() for name in ("ant/0.png", "bee/0.png")]


def arrays(cache: Cache) -> list[np.ndarray[Any, Any]]:
    rows = cache.usable_rows()
    found = [cache.digests, cache.sizes_hw]
    for teacher in cache.teachers.values():
        found.append(teacher.codes(rows))
        found += [] if teacher.spec.summary_dim is None else [teacher.summaries(rows)]
    return found


def test_a_build_from_any_source_has_the_bytes_of_the_build_from_the_folder(
    filled: str, ten_images: Path, tmp_path: Path, fake_teachers: tuple[str, ...]
) -> None:
    def build(source: str, name: str) -> Cache:
        return build_cache(
            BuildConfig(
                images=(source,),
                teachers=dict.fromkeys(fake_teachers, TeacherOptions()),
                out=tmp_path / name,
                shard_images=3,
                batch_size=2,
                threads=2,
            )
        ).cache

    expected = arrays(build(str(ten_images), "folder.zarr"))
    for number, way in enumerate(("photos", "tars", "hf", "old", "list.txt")):
        cache = build(f"{filled}/{way}", f"{number}.zarr")
        for found, wanted in zip(arrays(cache), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert all(cache.read_file(row) for row in range(10)), "pixels are read again for training"


# ---------------------------------------------------------------- what is asked for


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, length) of every range that a bucket is asked for."""
    seen: list[tuple[int, int]] = []
    original = ObjectStorage.read_ranges

    def watched(self: Storage, path: str, ranges: list[tuple[int, int]]) -> Any:
        seen.extend(ranges)
        return original(self, path, ranges)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ObjectStorage, "read_ranges", watched)
    return seen


def big_images(folder: Path, count: int, num_bytes: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(np.random.default_rng(number).bytes(num_bytes))
    return folder


def test_a_tar_in_a_bucket_is_listed_by_its_headers_and_read_by_range(
    bucket: Callable[[str], str], tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    names = [f"{number}.png" for number in range(6)]
    data = tar_of(big_images(tmp_path / "x", 6, 500_000), names, numbers=dict.fromkeys(names, 1))
    url = bucket("big.tar")
    ObjectStorage(url.rpartition("/")[0]).write("big.tar", [data])
    listing = list_images([url])
    assert sum(length for _, length in asked) < 0.35 * len(data)
    asked.clear()
    assert contents(listing)[3] == (tmp_path / "x/3.png").read_bytes()
    assert [length for _, length in asked] == [500_000] * 6


@pytest.mark.parametrize("plain", [True, False])
def test_a_parquet_file_in_a_bucket_is_listed_without_its_images(
    bucket: Callable[[str], str], tmp_path: Path, asked: list[tuple[int, int]], plain: bool
) -> None:
    names = [f"{number}.png" for number in range(6)]
    how: dict[str, Any] = {"compression": "none", "use_dictionary": False} if plain else {}
    data = parquet_of(big_images(tmp_path / "x", 6, 300_000), names, classes=names, **how)
    # One class a file name: `partition("/")` of a name without a folder is the name.
    url = bucket("big.parquet")
    ObjectStorage(url.rpartition("/")[0]).write("big.parquet", [data])
    listing = list_images([url])
    assert sum(length for _, length in asked) < 0.2 * len(data)
    asked.clear()
    wanted = [(tmp_path / f"x/{number}.png").read_bytes() for number in range(6)]
    assert contents(listing) == wanted
    assert sum(length for _, length in asked) < 1.3 * len(data), "each row group once"
    if plain:
        remote_parquet = remote_files.list_remote(url.rpartition("/")[0])
        assert [name for name, _ in remote_parquet] == ["big.parquet"]


def cache_of(place: Path, source: str) -> tuple[Cache, ListingRequest]:
    request = ListingRequest(sources=(source,), selection=Selection())
    listing = list_for(request, None)
    meta = CacheMeta(
        num_images=len(listing.index),
        shard_images=4,
        creator="test",
        containers=listing.containers,
        class_names=listing.class_names,
        max_pixels=10_000,
    )
    create_cache(place, meta, listing.index)
    record_listing(Cache(place), request, listing)
    return Cache(place), request


@pytest.mark.parametrize(
    ("way", "trusted"), [("tars", True), ("hf/*.parquet", True), ("list.txt", True), ("photos", False)]
)
def test_what_lies_in_a_bucket_is_listed_again_only_if_it_may_have_changed(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, trusted: bool
) -> None:
    monkeypatch.setattr(
        "cache_builder.sources.listing_record._SETTLED_NS", -(10**18)
    )  # what was written just now is settled
    cache, request = cache_of(tmp_path / "c.zarr", f"{filled}/{way}")
    assert list_for(request, cache).from_cache is trusted
    name = {"tars": "tars/train-001.tar", "hf/*.parquet": "hf/train-1.parquet"}.get(way, "list.txt")
    storage = ObjectStorage(filled)
    other = storage.read("hf/train-0.parquet") if name.endswith("parquet") else storage.read(name) + b"\0" * 512
    storage.write(name, [other.replace(b"\0", b"\n") if name == "list.txt" else other])
    assert not list_for(request, cache).from_cache


# ---------------------------------------------------------------- what is wrong


def test_an_object_that_changed_since_is_an_image_error(
    filled: str, tmp_path: Path, fake_teachers: tuple[str, ...]
) -> None:
    config = BuildConfig(
        images=(f"{filled}/photos",), teachers={fake_teachers[0]: TeacherOptions()}, out=tmp_path / "c.zarr", threads=1
    )
    cache = build_cache(config).cache
    ObjectStorage(filled).write("photos/ant/1.png", [ObjectStorage(filled).read("photos/bee/1.png")])
    ObjectStorage(filled).delete("photos/ant/2.png")
    with pytest.raises(ImageError, match=r"ant/1\.png has changed since the cache was built: build the cache again"):
        cache.read_file(1)
    with pytest.raises(ImageError, match=r"there is nothing at s3://.*/photos/ant/2\.png"):
        cache.read_file(2)


def test_an_object_missing_from_a_list_is_left_out_and_named(
    filled: str, tmp_path: Path, fake_teachers: tuple[str, ...]
) -> None:
    ObjectStorage(filled).delete("photos/ant/2.png")
    config = BuildConfig(
        images=(f"{filled}/list.txt",),
        teachers={fake_teachers[0]: TeacherOptions()},
        out=tmp_path / "c.zarr",
        threads=1,
    )
    report = build_cache(config)
    assert report.unusable == 1
    (failure,) = report.cache.failures()
    assert failure.reason == f"cannot be read: there is nothing at {filled}/photos/ant/2.png"


@pytest.mark.parametrize("where", ["filled", "memory"])
def test_images_by_path_in_parquet_are_read_from_beside_it(
    where: str, ten_images: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(where)
    names = ["../photos/ant/2.png", f"{root}/photos/bee/1.png"]
    rows = pa.array(
        [{"bytes": None, "path": name} for name in names], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": rows}), sink)
    data = sink.getvalue().to_pybytes()
    if where == "filled":
        ObjectStorage(root).write("paths/a.parquet", [data])
    else:
        fsspec.filesystem("memory").pipe_file(f"{root}/paths/a.parquet", data)
    listing = list_images([f"{root}/paths/a.parquet"])
    assert listing.index.keys == [f"a.parquet/{name}" for name in names]
    assert contents(listing) == [(ten_images / name).read_bytes() for name in ("ant/2.png", "bee/1.png")]


def test_odd_keys_below_a_prefix_are_unusable_images_by_name(
    filled: str, s3_endpoint: str, ten_images: Path, tmp_path: Path, fake_teachers: tuple[str, ...]
) -> None:
    data = (ten_images / "ant/2.png").read_bytes()
    for key in ("ant//x.png", "ant/../y.png", "t%09z.png"):
        address = f"{s3_endpoint}/{filled.removeprefix('s3://')}/photos/{key}"
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(address, data, headers, method="PUT")).close()
    config = BuildConfig(
        images=(f"{filled}/photos",), teachers={fake_teachers[0]: TeacherOptions()}, out=tmp_path / "c.zarr", threads=2
    )
    report = build_cache(config)
    index = report.cache.index
    reasons = {index.key(failure.row): failure.reason for failure in report.cache.failures()}
    assert sorted(reasons) == ["ant/../y.png", "ant//x.png", "t\tz.png"]
    assert all(reason.startswith("cannot be read: ") for reason in reasons.values())
    assert report.cache.num_images == 13


def test_odd_addresses_in_a_list_are_unusable_images_by_name(
    ten_images: Path, tmp_path: Path, fake_teachers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_PAUSES_IF_REFUSED_S", (0.0,))
    monkeypatch.setattr("radio_cache.storage.buckets.RETRIES", 0)
    files = sorted(ten_images.rglob("*.png"))
    data = dict(enumerate(file.read_bytes() for file in files))
    codes = {"/gone.png": 410, "/bad.png": 400, "/law.png": 451, "/none.png": 404, "/broken.png": 500}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = codes.get(self.path, 302 if self.path == "/round.png" else 200)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", self.path)
            self.end_headers()
            good = {"/a//2.png": 2, "/refs%2Fx/3.png": 3, "/4.png": 4}.get(self.path)
            self.wfile.write(data[good] if good else b"")  # no length: HTTP/1.0 ends with the connection

        def log_message(self, *_: Any) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        host = f"http://127.0.0.1:{server.server_port}"
        good = [f"{host}/a//2.png", f"{host}/refs%2Fx/3.png", f"{host}/4.png", f"file://{files[1]}"]
        odd = [
            *(host + path for path in codes),
            f"{host}/round.png",
            "ipfs://x/y.png",
            "http://ho st/x.png",
            "s3://b//x.png",
        ]
        (tmp_path / "list.txt").write_text("\n".join(good + odd))
        config = BuildConfig(
            images=(str(tmp_path / "list.txt"),),
            teachers={fake_teachers[0]: TeacherOptions()},
            out=tmp_path / "c.zarr",
            threads=1,
        )
        cache = build_cache(config).cache
        assert [cache.index.key(failure.row) for failure in cache.failures()] == odd
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_prefix_that_holds_nothing_is_named(filled: str) -> None:
    with pytest.raises(
        SourceError, match=r"data/Photos holds nothing: check the bucket, the prefix, and the case of both"
    ):
        list_images([f"{filled}/Photos"])
    with pytest.raises(SourceError, match=r"no object matches 's3://.*/tars/test-\*\.tar'"):
        list_images([f"{filled}/tars/test-*.tar"])
    for name in ("tars/train-007.tar", "hf/train-7.parquet", "other.txt"):
        with pytest.raises(SourceError, match=rf"{name} does not exist$"):
            list_images([f"{filled}/{name}"])


def test_a_bucket_that_does_not_exist_is_named(bucket: Callable[[str], str]) -> None:
    for source in ("s3://no-such-bucket/photos", "s3://no-such-bucket/a-*.tar", "s3://no-such-bucket/a.tar"):
        with pytest.raises((StorageError, SourceError), match=r"there is no such bucket|does not exist"):
            list_images([source])


@pytest.mark.parametrize("name", ["broken.tar", "broken.parquet"])
def test_a_file_cut_short_in_a_bucket_is_named(filled: str, name: str) -> None:
    whole = ObjectStorage(filled).read({"broken.tar": "tars/train-000.tar"}.get(name, "hf/train-0.parquet"))
    ObjectStorage(filled).write(name, [whole[: len(whole) // 2]])
    with pytest.raises(SourceError, match=rf"{name} .*cut short.*: fetch it again"):
        list_images([f"{filled}/{name}"])


class Refusing(BaseHTTPRequestHandler):
    """Says to whoever asks what S3 says to wrong credentials."""

    def do_GET(self) -> None:
        said = (
            b"<?xml version='1.0'?><Error><Code>InvalidAccessKeyId</Code><Message>It does not exist.</Message></Error>"
        )
        self.send_response(403)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    remote_files._place.cache_clear()
    yield
    remote_files._place.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    "source", ["s3://bucket/photos", "s3://bucket/a.tar", "s3://bucket/*.parquet", "s3://bucket/a.txt"]
)
def test_wrong_credentials_are_one_sentence_at_once(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(StorageError, match="credentials") as raised:
        list_images([source])
    assert time.perf_counter() - started < 3
    assert "AWS_ACCESS_KEY_ID" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bucket_that_fails_in_the_middle_stops_the_build_and_blames_no_image(
    filled: str, tmp_path: Path, fake_teachers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BuildConfig(
        images=(f"{filled}/photos",),
        teachers={fake_teachers[0]: TeacherOptions()},
        out=tmp_path / "c.zarr",
        threads=1,
        shard_images=3,
    )
    original = ObjectStorage.read_at_most
    reads = 0

    def failing(self: ObjectStorage, path: str, most: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads == 5:
            raise StorageError("cannot read: the bucket went away")
        return original(self, path, most)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStorage, "read_at_most", failing)
        with pytest.raises(StorageError, match="the bucket went away"):
            build_cache(config)
    report = build_cache(config)
    assert report.unusable == 0


def test_columns_of_parquet_files_at_urls(filled: str) -> None:
    listing = list_images([f"{filled}/hf/*.parquet#image,label"])
    assert {container.column for container in listing.containers} == {"image.bytes"}
    with pytest.raises(SourceError, match=r"column photo does not exist; the columns are image\.bytes"):
        list_images([f"{filled}/hf/#photo"])


def test_a_folder_of_a_web_server_is_refused_with_the_cure() -> None:
    with pytest.raises(ConfigError, match="a web server does not list its folders: name tars"):
        list_images(["https://example.invalid/photos"])


def test_a_file_url_is_a_path(ten_images: Path, tmp_path: Path) -> None:
    shutil.copytree(ten_images, tmp_path / "x")
    listing = list_images([f"file://{tmp_path}/x"])
    assert listing.containers[0].path == f"{tmp_path}/x"
