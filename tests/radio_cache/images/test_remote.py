"""Files in buckets, on web servers and behind fsspec: whole, by range, listed; and what is said when they cannot be had."""

import io
import os
import socket
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pytest
from obstore import exceptions

from radio_cache.errors import ConfigError, ImageError, LimitError, StorageError
from radio_cache.images import remote as remote_files
from radio_cache.images.files import read_path_or_url
from radio_cache.images.remote import RemoteFile, fetch, fetch_range, list_remote, remote_status
from radio_cache.storage.buckets import ObjectStorage

CONTENT = bytes(range(100))
NAMES = ("a.jpg", "b c+d%20e#f.jpg", "ü/x=1&y.jpg", "deep/er/z.jpg")


class Pages(BaseHTTPRequestHandler):
    """Serves CONTENT at every address, by range too, but for some."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Range")))
        if "/gone" in self.path or "/forbidden" in self.path:
            return self.answer(404 if "/gone" in self.path else 403, b"")
        if "/moved" in self.path:
            return self.answer(302, b"", Location="/elsewhere.jpg")
        given = self.headers.get("Range")
        if given is None or "/no-ranges" in self.path:
            return self.answer(200, CONTENT)
        first, last = (int(part) for part in given.removeprefix("bytes=").split("-"))
        data = CONTENT[first : last + 1]
        return self.answer(206, data, **{"Content-Range": f"bytes {first}-{first + len(data) - 1}/{len(CONTENT)}"})

    def do_HEAD(self) -> None:
        self.asked.append((self.path, None))
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        if "/dated" in self.path:
            self.send_header("Last-Modified", "Fri, 02 Jan 1970 00:00:00 GMT")
        self.end_headers()

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture
def web() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """The address of a web server on loopback, and what was asked of it."""
    handler = type("Handler", (Pages,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def filled(bucket: Callable[[str], str]) -> str:
    """A prefix of a bucket with some files."""
    url = bucket("photos")
    for name in NAMES:
        ObjectStorage(url).write(name, [CONTENT + name.encode()])
    return url


@pytest.fixture
def memory() -> Iterator[str]:
    """A prefix of fsspec's file system in memory."""
    fs = fsspec.filesystem("memory")
    root = f"memory://{uuid.uuid4().hex}"
    for name in NAMES:
        fs.pipe_file(f"{root}/photos/{name}", CONTENT + name.encode())
    yield f"{root}/photos"
    fs.rm(root, recursive=True)


@pytest.fixture(params=["filled", "memory"])
def place(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------- what is there


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_whole_by_range_and_as_a_file_object(place: str, name: str) -> None:
    url, whole = f"{place}/{name}", CONTENT + name.encode()
    assert fetch(url, max_bytes=1000) == whole
    assert fetch_range(url, 90, 15) == whole[90:105]
    assert fetch_range(url, 3, 0) == b""
    assert fetch_range(url, len(whole) - 2, 50) == whole[-2:]
    assert remote_status(url).num_bytes == len(whole)
    with RemoteFile(url) as file:
        file.seek(-5, io.SEEK_END)
        assert file.read(3) == whole[-5:-2]
        assert file.read() == whole[-2:]
        assert file.read(3) == b""


def test_files_below_a_prefix_are_listed_in_order_and_no_others(place: str) -> None:
    assert list_remote(place) == sorted((name, len(CONTENT + name.encode())) for name in NAMES)
    assert list_remote(f"{place}/deep/") == [("er/z.jpg", len(CONTENT) + len("deep/er/z.jpg"))]
    assert list_remote(f"{place}/dee") == []


def test_the_age_of_an_object_is_told_and_of_a_page_where_the_server_says_it(
    filled: str, web: tuple[str, list[tuple[str, str | None]]]
) -> None:
    changed = remote_status(f"{filled}/a.jpg").changed_ns
    assert changed is not None
    assert abs(changed / 1e9 - time.time()) < 100
    assert remote_status(f"{web[0]}/dated.jpg").changed_ns == 86_400 * 10**9
    assert remote_status(f"{web[0]}/a.jpg").changed_ns is None


@pytest.mark.parametrize("path", ["a.jpg", "b%20c.jpg", "sig%2Bned.jpg?key=a%2Fb&x=1", "moved"])
def test_pages_of_a_web_server_are_read_at_the_address_they_were_given_by(
    web: tuple[str, list[tuple[str, str | None]]], path: str
) -> None:
    host, asked = web
    assert read_path_or_url(f"{host}/{path}") == CONTENT
    assert read_path_or_url(f"{host}/{path}", 10, 5) == CONTENT[10:15]
    assert asked[0] == (f"/{path}", None)
    assert (f"/{path}", "bytes=10-14") in asked or path == "moved"


# ---------------------------------------------------------------- what is not


@pytest.mark.parametrize("place", ["filled", "memory"], indirect=True)
def test_what_is_not_there_is_an_image_error(place: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be read: there is nothing at .*/photos/no\.jpg"):
        read_path_or_url(f"{place}/no.jpg")
    with pytest.raises(ImageError, match=r"there is nothing at .*/photos/no\.jpg"):
        read_path_or_url(f"{place}/no.jpg", 3, 4)
    with pytest.raises(ImageError, match=r"photos/a\.jpg ends inside it"):
        read_path_or_url(f"{place}/a.jpg", 100, 50)


def test_a_file_larger_than_any_image_is_refused_before_it_is_read(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitError, match=r"a\.jpg has 105 bytes; the longest that can be true has 50"):
        fetch(f"{place}/a.jpg", max_bytes=50)
    monkeypatch.setattr("radio_cache.images.files.MAX_IMAGE_FILE_BYTES", 50)
    with pytest.raises(ImageError, match=r"cannot be read: .* has 105 bytes"):
        read_path_or_url(f"{place}/a.jpg")
    with pytest.raises(ImageError, match="60 bytes are more than an image file has"):
        read_path_or_url(f"{place}/a.jpg", 0, 60)


@pytest.mark.parametrize(
    ("path", "reason"), [("gone.jpg", "there is nothing at"), ("forbidden.jpg", "the server refuses")]
)
def test_a_page_that_a_server_refuses_is_one_unusable_image(
    web: tuple[str, list[tuple[str, str | None]]], path: str, reason: str
) -> None:
    with pytest.raises(ImageError, match=f"cannot be read: {reason} {web[0]}/{path}"):
        read_path_or_url(f"{web[0]}/{path}")


def test_a_server_without_ranges_is_named(web: tuple[str, list[tuple[str, str | None]]]) -> None:
    with pytest.raises(StorageError, match=r"cannot read http.*/no-ranges\.tar: "):
        read_path_or_url(f"{web[0]}/no-ranges.tar", 10, 5)


def test_a_web_server_lists_nothing_and_says_what_to_name(web: tuple[str, list[tuple[str, str | None]]]) -> None:
    with pytest.raises(ConfigError, match="a web server does not list its folders: name tars, Parquet files or a list"):
        list_remote(f"{web[0]}/photos")


def test_a_bucket_that_does_not_exist_is_no_unusable_image(bucket: Callable[[str], str]) -> None:
    for ask in (lambda: read_path_or_url("s3://no-such-bucket/a.jpg"), lambda: list_remote("s3://no-such-bucket/a")):
        with pytest.raises(StorageError, match="there is no such bucket: create it, or check the name"):
            ask()


def test_a_server_that_cannot_be_reached_is_no_unusable_image(monkeypatch: pytest.MonkeyPatch) -> None:
    host = f"http://127.0.0.1:{unused_port()}"
    monkeypatch.setattr("radio_cache.storage.buckets.RETRIES", 0)
    with pytest.raises(StorageError, match=f"{host} cannot be reached: check the address and the network") as raised:
        read_path_or_url(f"{host}/a.jpg")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "key", ["x//y.jpg", "/y.jpg", "./y.jpg", "x/../y.jpg", "x\ty.jpg", "x\x7fy.jpg", "x/", "x\udce9.jpg"]
)
def test_a_key_that_cannot_be_expressed_is_one_unusable_image(bucket: Callable[[str], str], key: str) -> None:
    url = f"{bucket('photos')}/{key}"
    with pytest.raises(
        ImageError, match=r"cannot be read: no object can be reached by the key '.*': parts that are empty"
    ):
        read_path_or_url(url)
    with pytest.raises(ImageError, match="no object can be reached by the key"):
        read_path_or_url(url, 3, 4)


@pytest.mark.parametrize("key", ["a\\b.jpg", "%2Fa%3A.jpg", "a?b=#c.jpg", '~[x]{y}|^`"<>.jpg', "...", "a..b"])
def test_odd_keys_that_can_be_expressed_are_read(bucket: Callable[[str], str], s3_endpoint: str, key: str) -> None:
    url = bucket("photos")
    put(s3_endpoint, f"{url}/{key}")
    assert read_path_or_url(f"{url}/{key}") == CONTENT
    assert list_remote(url) == [(key, len(CONTENT))]


def put(endpoint: str, url: str) -> None:
    """Store CONTENT in a bucket of moto, whatever the key."""
    path = quote(url.removeprefix("s3://"), safe="/")
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{path}", CONTENT, headers, method="PUT")).close()


def test_a_key_that_cannot_be_expressed_does_not_stop_a_listing(bucket: Callable[[str], str], s3_endpoint: str) -> None:
    url = bucket("photos")
    names = sorted(["a.jpg", "x//y.jpg", "./z.jpg", "t\tb.jpg", "x/ü.jpg"])
    for name in names:
        put(s3_endpoint, f"{url}/{name}")
    assert list_remote(url) == [(name, len(CONTENT)) for name in names]
    assert list_remote(f"{url}/x") == [("/y.jpg", len(CONTENT)), ("ü.jpg", len(CONTENT))]


def test_an_object_that_is_not_there_for_a_moment_is_read(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "_PAUSES_IF_REFUSED_S", (0.0, 0.0))
    failures: list[Exception] = [FileNotFoundError(), PermissionError()]
    original = ObjectStorage.read_at_most

    def read(self: ObjectStorage, path: str, max_bytes: int) -> bytes:
        if failures:
            raise failures.pop()
        return original(self, path, max_bytes)

    monkeypatch.setattr(ObjectStorage, "read_at_most", read)
    assert fetch(f"{filled}/a.jpg", max_bytes=1000) == CONTENT + b"a.jpg"


def test_a_bucket_that_no_longer_gives_what_it_gave_is_the_reason_and_not_the_image(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_PAUSES_IF_REFUSED_S", (0.0, 0.0))
    fetch(f"{filled}/a.jpg", max_bytes=1000)
    ObjectStorage(filled).delete("a.jpg")
    with pytest.raises(StorageError, match=r"no\.jpg .*/a\.jpg, which was read before, cannot be had now either"):
        fetch(f"{filled}/no.jpg", max_bytes=1000)


def test_an_object_that_is_refused_beside_others_is_one_unusable_image(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_PAUSES_IF_REFUSED_S", (0.0, 0.0))
    original = ObjectStorage.read_at_most

    def read(self: ObjectStorage, path: str, max_bytes: int) -> bytes:
        if path.endswith("z.jpg"):
            with self._named(path, "read"):
                raise exceptions.PermissionDeniedError("status code: 403")
        return original(self, path, max_bytes)

    monkeypatch.setattr(ObjectStorage, "read_at_most", read)
    remote_files._place.cache_clear()
    with pytest.raises(StorageError, match="s3://bucket has refused all that was asked of it so far"):
        read_path_or_url(f"{filled}/deep/er/z.jpg")
    read_path_or_url(f"{filled}/a.jpg")
    with pytest.raises(ImageError, match=r"the server refuses .*z\.jpg"):
        read_path_or_url(f"{filled}/deep/er/z.jpg")


@pytest.mark.parametrize(
    "url", ["ipfs://x/a.jpg", "file:///etc/passwd", "local://x", "memory::s3://b/x", "zip://a::memory://b"]
)
def test_a_kind_of_url_that_nobody_reads_is_named_with_those_that_are(url: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing here reads such URLs; known are s3, .*, http, https, hf, "):
        fetch(url, max_bytes=10)


class Flaky:
    """A file system that fails some times, and then works."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures

    def cat_file(self, _: str, **__: Any) -> bytes:
        if self.failures:
            raise self.failures.pop()
        return b"there"


def test_what_fails_for_a_moment_behind_fsspec_is_tried_again(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    monkeypatch.setattr(remote_files, "_PAUSES_S", (0.0, 0.0))
    place = remote_files._FileSystem("memory://x")
    for failures, expected in (
        ([OSError("busy")] * 2, None),
        ([OSError("busy")] * 3, "cannot read memory://x/a: OSError: busy: check the network"),
        ([PermissionError("no")], "these credentials may not do this"),
    ):
        place._fs = Flaky(list(failures))
        if expected is None:
            assert place.fetch_range("a", 0, 5) == b"there"
        else:
            with pytest.raises(StorageError, match=expected):
                place.fetch_range("a", 0, 5)
    place._fs = Flaky([FileNotFoundError(), OSError()])
    with pytest.raises(FileNotFoundError):
        place.fetch_range("a", 0, 5)


def test_connections_are_kept_for_a_process_and_not_taken_into_a_fork(filled: str) -> None:
    fetch(f"{filled}/a.jpg", max_bytes=1000)
    kept = remote_files._found(f"{filled}/a.jpg")[0]
    assert remote_files._found(f"{filled}/deep/er/z.jpg")[0] is kept
    assert remote_files._place("s3", "bucket", os.getpid() + 1, ()) is not kept


def test_a_local_path_is_no_url(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert read_path_or_url(str(tmp_path / "a")) == b"x"
