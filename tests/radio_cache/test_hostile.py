"""A cache that somebody sent: it runs no code, reads and writes nothing outside of its folder, and gets no more memory than
what it declares, which is compared with limits first. The checksums of these forgeries are right."""

import ast
import contextlib
import json
import math
import os
import re
import shutil
import signal
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import radio_cache
from cache_builder.cli import main
from radio_cache import Cache
from radio_cache.checks.verify import drop_teacher, repair_cache, verify_cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import (
    ConfigError,
    CorruptShardError,
    ImageError,
    LimitError,
    RadioCacheError,
    StorageError,
    StoreError,
    UnsupportedFormatError,
)
from radio_cache.format.checksums import crc32c, file_crc32c
from radio_cache.format.schema import CacheMeta, Container
from radio_cache.images.index import ImageIndex
from radio_cache.shards.encoding import index_bytes
from radio_cache.storage.local import LocalStorage
from radio_cache.testing import make_tiny_cache, write_images
from radio_cache.view.info import describe, describe_failures
from radio_cache.writer import ShardWriter, create_cache

SHARD = "teachers/fake-a/spatial/c/0/1/0/0/0"


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """With the checksum that docs/format.md describes."""
    rest = {key: value for key, value in data.items() if key != "crc32c"}
    return rest | {"crc32c": crc32c(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())}


def forge(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change our attributes of a group, or a receipt, and seal them again."""
    data = json.loads(file.read_bytes())
    ours = data["attributes"]["radio_cache"] if "attributes" in data else data
    change(ours)
    if "attributes" in data:
        data["attributes"]["radio_cache"] = sealed(ours)
    file.write_text(json.dumps(data if "attributes" in data else sealed(ours)))


@contextlib.contextmanager
def within(*, megabytes: float = 16, seconds: int = 20) -> Iterator[None]:
    """Fails if what is done inside allocates more, or takes longer: whoever waits for a pipe waits for ever."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        assert peak < megabytes, f"{peak:.0f} MB"
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_everything(cache: Cache) -> None:
    """All that commands and training read of a cache."""
    with (Path(os.devnull)).open("w") as nowhere:
        Console(file=nowhere).print(describe(cache), describe_failures(cache))
    list(cache.index.keys)
    for _ in (cache.sizes_hw, cache.digests):
        pass
    for teacher in cache.teachers.values():
        rows = cache.usable_rows([teacher.name])
        teacher.maps(rows)
        teacher.spatial_mean_std()
        if teacher.spec.summary_dim:
            teacher.summaries(rows)


def open_and_read(path: Path) -> None:
    """The same, and more of fake-a, which may be unreadable alone."""
    cache = Cache(path)
    read_everything(cache)
    cache.teachers["fake-a"].codes([4])


# ---------------------------------------------------------------- code


def test_nothing_in_the_store_can_turn_data_into_code() -> None:
    """No pickle, no eval, no import by name; neither np.load nor torch.load."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "importlib", "runpy", "subprocess", "ctypes"}
    calls = {"eval", "exec", "compile", "__import__", "load", "system", "popen"}
    for file in Path(radio_cache.__file__).parent.rglob("*.py"):
        if file.name in ("allowed_modules.py", "start.py"):  # the gate to modules that a caller named; names of our own
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, file
            elif isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
                harmless = (owner, name) in (("re", "compile"), ("image", "load"))  # an image of PIL
                assert harmless or name not in calls, f"{file}:{node.lineno}"


def test_what_a_cache_says_of_itself_cannot_steer_the_terminal(cache_path: Path) -> None:
    evil = "\x1b]52;c;cm0gLXJmIH4=\x07\x1b[2J\r\n\u202eerror: all is fine\ud800"
    forge(
        cache_path / "zarr.json",
        lambda data: data.update(creator=evil, containers=[{**data["containers"][0], "path": evil}]),
    )
    forge(cache_path / "teachers/fake-a/zarr.json", lambda data: data.update(model=evil, licence=evil, weights=evil))
    for receipt in (cache_path / "receipts/images").iterdir():
        forge(receipt, lambda data: [failure.update(reason=evil) for failure in data["failures"]])
    forge(cache_path / "receipts/fake-a/000001.json", lambda data: data.update(unit=evil))
    for command in (["info"], ["info", "--failures"], ["verify", "--deep"]):
        told = CliRunner().invoke(main, [*command, str(cache_path)])
        assert not set("\x1b\x07\r\u202e\ud800") & set(told.output), command
        assert "\\x1b" in told.output


# ---------------------------------------------------------------- links, pipes and devices


@pytest.mark.parametrize(
    "link",
    [
        "zarr.json",
        SHARD,
        "receipts/fake-a/000001.json",
        "teachers/fake-a/summary/c/0/1/0",
        "images/size_hw/c/1/0",
        "teachers/fake-a/zarr.json",
        "images/size_hw/zarr.json",
    ],
)
@pytest.mark.parametrize("to", ["inside", "outside", "/dev/zero", "nowhere"])
def test_links_to_files_are_not_followed(cache_path: Path, tmp_path: Path, link: str, to: str) -> None:
    file = cache_path / link
    target = {"inside": file.with_name("moved"), "outside": tmp_path / "outside"}.get(to, Path(to))
    if to in ("inside", "outside"):
        file.rename(target)
    else:
        file.unlink()
    file.symlink_to(target)
    with within(), pytest.raises(StoreError, match=rf"{file} is a symbolic link, .* not followed.*cp -rL"):
        open_and_read(cache_path)


@pytest.mark.parametrize(
    "folder", ["images", "teachers/fake-a", "teachers/fake-a/spatial/c", "receipts/fake-a", "receipts"]
)
def test_links_to_folders_are_followed_neither_to_read_nor_to_write_nor_to_delete(
    cache_path: Path, tmp_path: Path, folder: str
) -> None:
    outside = tmp_path / "outside"
    (cache_path / folder).rename(outside)
    (cache_path / folder).symlink_to(outside)
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    storage = LocalStorage(cache_path)
    inside = f"{folder}/{next(file for file in before).relative_to(outside)}"
    for use in (
        lambda: storage.read(inside),
        lambda: storage.write(inside, [b"x"]),
        lambda: storage.write(f"{folder}/new", [b"x"]),
        lambda: storage.create(f"{folder}/new", b"x"),
        lambda: storage.delete(inside),
        lambda: storage.delete_tree(folder),
        lambda: list(storage.list_files(folder)),
        lambda: storage.list_folders(folder),
        lambda: storage.size(inside),
        lambda: storage.write_tree(f"{folder}/new", [("zarr.json", b"x")], last="zarr.json"),
        lambda: storage.read_ranges(inside, [(0, 1)]),
        lambda: storage.read_tail(inside, 1),
    ):
        with pytest.raises(StorageError, match=f"{cache_path / folder} is a symbolic link"):
            use()
    with contextlib.suppress(RadioCacheError):
        cache = Cache(cache_path)
        with contextlib.suppress(RadioCacheError):
            repair_cache(cache, verify_cache(cache, deep=True))
        with contextlib.suppress(RadioCacheError):
            drop_teacher(cache, "fake-a")
        ShardWriter(cache_path, "fake-a", 1).write_plain("summary", np.zeros((1, 4, 6), np.float16), grid=(0, 1, 0))
    assert {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("said", [7, 0.5, "none", [1], {"scale": "x"}, {}])
def test_checksums_of_a_codecs_arrays_that_are_none_are_other_checksums(tmp_path: Path, said: object) -> None:
    write_images(tmp_path / "photos")
    codecs = {"fake-a": CodecRequest(name="int8")}
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "photos", teachers={"fake-a": (6, 8)}, codecs=codecs)
    forge(cache.path / "teachers/fake-a/zarr.json", lambda data: data["codec"].update(arrays_crc32c=said))
    with pytest.raises(StoreError, match=r"c\.zarr/teachers/fake-a/transform is damaged, .*'scale' is another"):
        Cache(cache.path).teachers["fake-a"].maps([0])


def test_a_cache_whose_images_lie_in_a_kind_of_place_nobody_knows_is_named(cache_path: Path) -> None:
    forge(cache_path / "zarr.json", lambda data: data["containers"][0].update(kind="../.."))
    with pytest.raises(UnsupportedFormatError, match=rf"{cache_path}/zarr\.json: image .* of kind '\.\./\.\.'"):
        Cache(cache_path).read_file(0)


def test_the_cache_itself_may_be_reached_by_a_link(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.zarr").symlink_to(cache_path)
    read_everything(Cache(tmp_path / "link.zarr"))


@pytest.mark.parametrize("place", ["zarr.json", SHARD, "receipts/fake-a/000001.json", "images/digest/c/1/0"])
def test_nobody_waits_for_a_pipe(cache_path: Path, place: str) -> None:
    (cache_path / place).unlink()
    os.mkfifo(cache_path / place)
    with within(), pytest.raises(StorageError, match=f"{cache_path / place} is neither a file nor a folder"):
        read_everything(Cache(cache_path))


def test_a_leftover_that_is_a_link_takes_nothing_with_it(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mine").write_text("mine")
    host = os.uname().nodename
    for number, target in enumerate((tmp_path / "outside", tmp_path / "outside/mine")):
        (cache_path / f"images/x.tmp-{host}-99999999{number}-0a1b2c3d").symlink_to(target)
    (cache_path / f"images/x.tmp-{host}-nonsense-0a1b2c3d").write_text("")
    (cache_path / f"images/x.tmp-{host}-{'9' * 30}-0a1b2c3d").write_text("")
    LocalStorage(cache_path).remove_leftovers()
    assert (tmp_path / "outside/mine").read_text() == "mine"


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["../../../outside", "/etc/passwd", "summary/../../../../outside", "a\0b", "", "a//b"])
def test_receipts_cannot_name_files_outside(cache_path: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "outside").write_text("secret")
    forge(cache_path / "receipts/fake-a/000001.json", lambda data: data["files"][0].update(path=path))
    report = verify_cache(Cache(cache_path))
    if path:
        assert [damage.place for damage in report.damages] == ["receipts/fake-a/000001.json"]
        assert "is not a path inside a cache" in report.damages[0].what
    assert "secret" not in str(report)
    assert not report.ok


@pytest.mark.parametrize(
    "index", ["..", "images/../../x", "/etc", "images/index-", "images/index-0/../../..", "teachers", 3, None]
)
def test_the_list_of_images_lies_where_lists_of_images_lie(cache_path: Path, index: object) -> None:
    forge(cache_path / "zarr.json", lambda data: data.update(index=index))
    with pytest.raises(StoreError, match=rf"{cache_path}/zarr\.json"):
        Cache(cache_path)


@pytest.mark.parametrize("name", ["../fake-b", "fake-b", "images", "x/y", "", 7])
def test_a_spec_of_another_name_is_refused_and_the_other_teacher_is_as_good_as_ever(
    cache_path: Path, name: object
) -> None:
    forge(cache_path / "teachers/fake-a/zarr.json", lambda data: data.update(name=name))
    cache = Cache(cache_path)
    cache.teachers["fake-b"].maps([0])
    with pytest.raises(CorruptShardError, match=r"teachers/fake-a/zarr\.json"):
        cache.teachers["fake-a"]


# ---------------------------------------------------------------- images, which lie outside


def cache_of(tmp_path: Path, key: str, *, path: str, container: int = 0, offset: int = -1, length: int = -1) -> Cache:
    """A cache of one image that says that it lies anywhere."""
    meta = CacheMeta(
        num_images=1,
        shard_images=1,
        creator="somebody",
        class_names=(),
        max_pixels=100,
        containers=(Container(kind="folder" if offset < 0 else "tar", path=path, prefix=""),),
    )
    index = ImageIndex(
        [key],
        np.array([-1], np.int32),
        np.array([container], np.int32),
        np.array([offset], np.int64),
        np.array([length], np.int64),
    )
    create_cache(tmp_path / "evil.zarr", meta, index)
    writer = ShardWriter(tmp_path / "evil.zarr", "images", 0)
    writer.write_plain("digest", np.zeros((1, 16), np.uint8), grid=(0, 0))
    writer.commit({"first_row": 0, "num_rows": 1, "num_tokens": 0, "failures": ()})
    return Cache(tmp_path / "evil.zarr")


def test_a_file_that_is_not_the_image_is_read_but_not_handed_on(tmp_path: Path) -> None:
    """Where images lie is for the cache to say; that they are those is for their digest."""
    (tmp_path / "secret").write_text("do not tell")
    with pytest.raises(ImageError, match="secret has changed since the cache was built") as told:
        cache_of(tmp_path, "secret", path=str(tmp_path)).read_file(0)
    assert "do not tell" not in str(told.value)


@pytest.mark.parametrize(
    ("key", "place", "why"),
    [
        ("../secret", {"path": "{0}/folder"}, "'../secret' is no path below a folder"),
        ("/etc/passwd", {"path": "{0}/folder"}, "'/etc/passwd' is no path below a folder"),
        ("a/../../b", {"path": "{0}/folder"}, "is no path below a folder"),
        ("zero", {"path": "/dev"}, "/dev/zero is a device, not a file"),
        ("pipe", {"path": "{0}"}, "pipe is a named pipe, not a file"),
        ("folder", {"path": "{0}"}, "folder is a folder, not a file"),
        ("a\0b", {"path": "{0}"}, "null"),
        ("x" * 5000, {"path": "{0}"}, "too long"),
        ("x", {"path": "{0}/small", "offset": 0, "length": 1 << 61}, "small ends inside it"),
        ("x", {"path": "{0}/small", "offset": 1 << 62, "length": 5}, "small ends inside it"),
        ("x", {"path": "{0}/small", "offset": 3, "length": -1}, "small ends inside it"),
        ("x", {"path": "{0}/sparse", "offset": 0, "length": 1 << 40}, "more than an image file has"),
        ("sparse", {"path": "{0}"}, "more than an image file has"),
        ("small", {"path": "{0}", "container": 7}, "place 7 of 1"),
        ("small", {"path": "{0}", "container": -1}, "place -1 of 1"),
    ],
)
def test_images_are_files_of_a_sensible_size_below_their_folder(
    tmp_path: Path, key: str, place: dict[str, Any], why: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "small").write_text("0123456789")
    (tmp_path / "secret").write_text("secret")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 41)
    cache = cache_of(tmp_path, key, **{**place, "path": place["path"].format(tmp_path)})
    with within(), pytest.raises(ImageError, match=why):
        cache.read_file(0)


def large_png(width: int, height: int) -> bytes:
    """A valid grey PNG of one bit a pixel, all black, made row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_the_readers_own_limit_of_pixels_holds_whatever_the_cache_states(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(cache_path / "zarr.json", lambda data: data.update(max_pixels=1 << 32))
    cache = Cache(cache_path)
    data = large_png(10_000, 9_000)
    with (
        within(),
        pytest.raises(ImageError, match=r"limit of 89478485 .*; this one states 4294967296: set RADIO_CACHE"),
    ):
        cache.decode(data)
    with pytest.raises(
        LimitError, match="4294967296 pixels, and 89478485 are usual: set RADIO_CACHE_MAX_PIXELS=4294967296"
    ):
        cache.refuse_large_images()
    monkeypatch.setenv("RADIO_CACHE_MAX_PIXELS", "12000")
    assert cache.decode(large_png(120, 100)).size == (120, 100)
    with pytest.raises(ImageError, match="limit of 12000, which is as many as an image of any cache may have"):
        cache.decode(large_png(121, 100))
    monkeypatch.setenv("RADIO_CACHE_MAX_PIXELS", "100000000")
    cache.files.meta = replace(cache.meta, max_pixels=12000)
    with pytest.raises(ImageError, match="121 x 100 pixels is more than the limit of 12000; raise --max-pixels"):
        cache.decode(large_png(121, 100))
    monkeypatch.setenv("RADIO_CACHE_MAX_PIXELS", "many")
    with pytest.raises(ConfigError, match="RADIO_CACHE_MAX_PIXELS=many is no number of pixels"):
        cache.decode(large_png(12, 10))


@pytest.mark.parametrize(
    ("kind", "path", "keys", "hosts"),
    [
        ("tar", "http://user:word@one.example/a.tar", ["x"], "one.example"),
        ("parquet", "https://two.example:8443/a.parquet", ["x"], "two.example:8443"),
        (
            "list",
            "/list.txt",
            ["http://b.example/1.jpg", "HTTPS://a.example/2.jpg", "plain.jpg"],
            "a.example, b.example",
        ),
        (
            "list",
            "/list.txt",
            [f"http://h{n}.example/1.jpg" for n in range(9)],
            "h0.example, h1.example, h2.example, h3.example, h4.example and 4 more",
        ),
        ("list", "/list.txt", ["http://a\x1b[31m.example/1.jpg"], "a\\\\x1b\\[31m.example"),
        ("folder", "/photos", ["http://b.example/1.jpg"], None),
        ("tar", "s3://bucket/a.tar", ["x"], None),
    ],
)
def test_the_web_servers_that_a_cache_names_are_said(
    tmp_path: Path, kind: str, path: str, keys: list[str], hosts: str | None
) -> None:
    count = len(keys)
    meta = CacheMeta(
        num_images=count,
        shard_images=4,
        creator="somebody",
        class_names=(),
        max_pixels=100,
        containers=(Container(kind=kind, path=path, prefix=""),),
    )
    nowhere = np.full(count, -1, np.int64)
    index = ImageIndex(keys, np.full(count, -1, np.int32), np.zeros(count, np.int32), nowhere, nowhere)
    create_cache(tmp_path / "cache.zarr", meta, index)
    note = Cache(tmp_path / "cache.zarr").remote_images_note()
    if hosts is None:
        assert note == ""
    else:
        assert re.fullmatch(rf"images of .*cache\.zarr are read from the web, where the cache says: {hosts}", note), (
            note
        )


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 1 << 33},
        {"num_images": 0},
        {"num_images": -5},
        {"num_images": 1e3},
        {"num_images": "9"},
        {"num_images": True},
        {"num_images": 10**4000},
        {"shard_images": 1 << 21},
        {"shard_images": 0},
        {"num_images": 1 << 32, "shard_images": 1},
        {"max_pixels": 1 << 40},
        {"max_pixels": -1},
        {"containers": []},
        {"containers": [{"kind": "socket", "path": "", "prefix": 3}]},
        {"class_names": [["x"]]},
        {"more": 1},
    ],
    ids=str,
)
def test_impossible_sizes_of_a_cache_are_refused_before_anything_is_allocated(
    cache_path: Path, change: dict[str, Any]
) -> None:
    forge(cache_path / "zarr.json", lambda data: data.update(change))
    with within(), pytest.raises(StoreError, match=rf"{cache_path}/zarr\.json"):
        Cache(cache_path)


def test_a_cache_that_lists_fewer_images_than_it_says_it_has_gets_no_memory_for_them(cache_path: Path) -> None:
    forge(cache_path / "zarr.json", lambda data: data.update(num_images=1 << 31, shard_images=1 << 20))
    for document in cache_path.rglob("zarr.json"):  # arrays may be longer than the cache says, so that it can grow
        data = json.loads(document.read_bytes())
        if data["node_type"] == "array" and 10 in data["shape"]:
            data["shape"] = [1 << 31 if side == 10 else side for side in data["shape"]]
            grid = data["chunk_grid"]["configuration"]
            grid["chunk_shape"] = [1 << 20 if side == 10 else side for side in grid["chunk_shape"]]
            document.write_text(json.dumps(data))
    cache = Cache(cache_path)
    with within():
        for read in (
            cache.usable_rows,
            lambda: cache.sizes_hw,
            lambda: cache.digests,
            lambda: cache.teachers["fake-a"].summaries([0]),
        ):
            with pytest.raises(
                StoreError, match=r"key_ends/zarr.json .*\(2147483648,\) uint64, and only 84 bytes are stored"
            ):
                read()
    with within(megabytes=64):
        assert not verify_cache(cache).ok


@pytest.mark.parametrize(
    "change",
    [
        {"views": 1 << 20},
        {"views": 0},
        {"spatial_dim": 1 << 21},
        {"spatial_dim": -1},
        {"summary_dim": 1 << 30},
        {"summary_dim": 0},
        {"geometry.grid_hw": [1 << 14, 1 << 14]},
        {"geometry.grid_hw": [4]},
        {"geometry.input_hw": [1 << 20, 8]},
        {"geometry.resize_px": 1 << 20},
        {"geometry.stride_px": "8"},
        {"geometry.fit": "stretch"},
        {"codec": {}},
        {"codec": {"name": ["half"]}},
        {"codec": None},
        {"normalisation.mean": [0.5]},
        {"software": {"torch": 2}},
    ],
    ids=str,
)
def test_impossible_specs_are_refused_by_name_before_anything_is_allocated(
    cache_path: Path, change: dict[str, Any]
) -> None:
    def edit(data: dict[str, Any]) -> None:
        for key, value in change.items():
            *way, last = key.split(".")
            inner = data
            for step in way:
                inner = inner[step]
            inner[last] = value

    forge(cache_path / "teachers/fake-a/zarr.json", edit)
    with within():
        cache = Cache(cache_path)
        with pytest.raises(StoreError, match=r"teachers/fake-a/zarr\.json"):
            cache.teachers["fake-a"]
        assert not verify_cache(cache).ok


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a teacher under klt and zstd."""
    folder = tmp_path_factory.mktemp("compressed")
    write_images(folder / "photos", per_class=4)
    make_tiny_cache(
        folder / "c.zarr", folder / "photos", teachers={"z": (None, 8)}, codecs={"z": CodecRequest(packing="zstd")}
    )
    return folder / "c.zarr"


@pytest.mark.parametrize("array", ["mean", "basis"])
def test_arrays_of_a_codec_are_no_larger_than_what_is_stored(compressed: Path, tmp_path: Path, array: str) -> None:
    path = Path(shutil.copytree(compressed, tmp_path / "c.zarr"))
    document = path / f"teachers/z/transform/{array}/zarr.json"
    data = json.loads(document.read_bytes())
    for shape, chunks in (
        ([1 << 15] * 2, [1 << 14] * 2),
        ([1 << 20] * 2, [1 << 20] * 2),
        ([1 << 60], [1 << 60]),
        ([1 << 40], [1]),
        ([1 << 61], [8]),
        ([0], [8]),
        ([8] * 40, [8] * 40),
    ):
        data["shape"], data["chunk_grid"]["configuration"]["chunk_shape"] = shape, chunks
        document.write_text(json.dumps(data))
        with within(), pytest.raises(StoreError, match="teachers/z/transform"):
            Cache(path).teachers["z"].maps([0])


def frame(declared: int, blocks: int, block_bytes: int, window_log: int) -> bytes:
    """A zstd frame of runs of zeros (RFC 8878): what it says it holds, what it does hold, and the window it asks for."""
    made = struct.pack("<IBBQ", 0xFD2FB528, 0b1100_0000, (window_log - 10) << 3, declared)
    for number in range(blocks):
        made += (block_bytes << 3 | 1 << 1 | (number == blocks - 1)).to_bytes(3, "little") + b"\0"
    return made


def peak_mb(work: Callable[[], object]) -> float:
    """By how much a process that does this grows: zstd's memory is not Python's."""

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here to measure memory with")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024


ROW_BYTES = -1
"""Stands for what a row has."""


@pytest.mark.parametrize(
    ("declared", "blocks", "block_bytes", "window_log"),
    [
        (1 << 30, 8192, 1 << 17, 17),
        (ROW_BYTES, 8192, 1 << 17, 17),
        (ROW_BYTES, 1, ROW_BYTES, 31),
        (ROW_BYTES, 1, 8, 17),
        (2**64 - 1, 1, ROW_BYTES, 17),
        (ROW_BYTES, 1, ROW_BYTES, 27),
    ],
    ids=["a gigabyte", "a gigabyte that says it is a row", "a window of 2 GiB", "less than a row", "no end", "128 MiB"],
)
def test_bombs_get_the_memory_of_a_row(
    compressed: Path, tmp_path: Path, declared: int, blocks: int, block_bytes: int, window_log: int
) -> None:
    path = Path(shutil.copytree(compressed, tmp_path / "c.zarr"))
    row_shape = Cache(path).teachers["z"].row_shape
    row_bytes = math.prod(row_shape)
    declared, block_bytes = (row_bytes if size == ROW_BYTES else size for size in (declared, block_bytes))
    file = path / "teachers/z/spatial/c/0/0" / "/".join("0" for _ in row_shape)
    good = file.read_bytes()
    chunk = frame(declared, blocks, block_bytes, window_log)
    body = good[: -index_bytes(4)] + chunk + crc32c(chunk).to_bytes(4, "little")
    index = bytearray(good[-index_bytes(4) : -4])
    struct.pack_into("<QQ", index, 0, len(good) - index_bytes(4), len(chunk) + 4)
    data = body + bytes(index) + crc32c(bytes(index)).to_bytes(4, "little")
    file.write_bytes(data)
    now = {"num_bytes": len(data), "crc32c": file_crc32c(data)}
    forge(path / "receipts/z/000000.json", lambda receipt: receipt["files"][0].update(now))
    cache = Cache(path)
    cache.teachers["z"].codes([1])

    def read() -> None:
        if (declared, blocks * block_bytes) == (row_bytes, row_bytes):  # unusual, and right: no window is needed
            assert not cache.teachers["z"].codes([0]).any()
        else:
            with pytest.raises(CorruptShardError, match=rf"{file}: row 0 "):
                cache.teachers["z"].codes([0])

    assert peak_mb(read) < 16


def test_documents_and_receipts_are_not_read_without_end(cache_path: Path) -> None:
    for place in ("zarr.json", "teachers/fake-a/zarr.json", "images/size_hw/zarr.json", "receipts/fake-a/000001.json"):
        file = cache_path / place
        good = file.read_bytes()
        os.truncate(file, 1 << 40)
        with (
            within(megabytes=600),
            pytest.raises(StoreError, match=rf"{file} (has 1099511627776 bytes|.*1099511627776)"),
        ):
            open_and_read(cache_path)
        file.unlink()
        file.write_bytes(good)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"attributes":' * 10_000,
        b'{"attributes": {"radio_cache": {"a": NaN}}}',
        b"9" * 200_000,
        b'{"attributes": 1, "attributes": 2}',
        '{"attributes": {}}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
    ],
    ids=["deep lists", "deep objects", "NaN", "a long number", "a key twice", "UTF-16", "BOM"],
)
@pytest.mark.parametrize(
    "place",
    [
        "zarr.json",
        "teachers/fake-a/zarr.json",
        "images/digest/zarr.json",
        "teachers/fake-a/spatial/zarr.json",
        "receipts/fake-a/000001.json",
    ],
)
def test_json_that_parsers_stumble_over_is_named(cache_path: Path, place: str, text: bytes) -> None:
    (cache_path / place).write_bytes(text)
    with within(megabytes=64), pytest.raises(StoreError, match=str(cache_path)) as told:
        open_and_read(cache_path)
    assert place in str(told.value)
