"""What is wrong around the images condemns none of them: it is tried again, or stops the build, and the same command then ends
with the bytes of an undisturbed one."""

import errno
import http.server
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cache_builder.pipeline.scan
import cache_builder.pipeline.shards
from cache_builder.build import BuildConfig, BuildReport, build_cache
from cache_builder.cli import main
from cache_builder.pipeline import image_access
from cache_builder.pipeline.image_access import ImageAccess, Witness
from cache_builder.pipeline.scan import ScanResult
from cache_builder.sources.listing_record import LISTING_FILE as LISTING
from cache_builder.teachers import TeacherOptions
from radio_cache import Cache
from radio_cache.checks.presence import CheckedFiles
from radio_cache.errors import RadioCacheError, SourceError, StorageError
from radio_cache.format.schema import IMAGES_UNIT
from radio_cache.images import remote as remote_files
from radio_cache.receipts import read_receipt
from radio_cache.testing import write_images
from radio_cache.view.info import describe, describe_failures

Run = Callable[..., BuildReport]

FAKE_TEACHER = Path(__file__).parents[1] / "fake_teacher.py"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_access, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(remote_files, "_PAUSES_IF_REFUSED_S", (0.0, 0.0))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a loss of power, other tests show; here that is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for photos, which all tests have at the same path, and for undisturbed builds of them."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def photos(place: Path) -> Path:
    """48 images; the tests take some away."""
    shutil.rmtree(place / "photos", ignore_errors=True)
    write_images(place / "photos", per_class=24, size=24)
    return place / "photos"


@pytest.fixture
def run(fake_teachers: tuple[str, ...], tmp_path: Path, photos: Path, place: Path) -> Run:
    """run(out="name", ...) -> report of a build of the photos in shards of eight. An undisturbed.zarr is built once."""

    def build(out: str = "out.zarr", **changes: Any) -> BuildReport:
        if out != "undisturbed.zarr" or changes:
            return made(out, **changes)
        kept = place / f"{len(list(photos.rglob('*.png')))}.zarr"
        if not kept.exists():
            report = made(out)
            shutil.copytree(tmp_path / out, kept)
            return report
        shutil.copytree(kept, tmp_path / out)
        return BuildReport(Cache(tmp_path / out), (), (), 0, CheckedFiles(0, 0))

    def made(out: str, **changes: Any) -> BuildReport:
        fields: dict[str, Any] = {
            "images": (str(photos),),
            "teachers": {name: TeacherOptions() for name in fake_teachers},
            "out": tmp_path / out,
            "shard_images": 8,
            "batch_size": 4,
            "threads": 2,
        }
        return build_cache(BuildConfig(**(fields | changes)))

    return build


def tree(path: Path) -> dict[str, bytes]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != LISTING)
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@contextmanager
def unreadable(is_unreadable: Callable[[str], bool], number: int = errno.EACCES) -> Iterator[None]:
    """The system refuses to open these files; the tests run as root, whom no permission stops."""
    original = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".png") and is_unreadable(str(path)):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "open", refuse)
        yield


def even(path: str) -> bool:
    return int(Path(path).stem) % 2 == 0


def test_a_disk_unmounted_in_mid_build_stops_it_and_the_same_command_ends_with_the_same_bytes(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("undisturbed.zarr")
    original, written = cache_builder.pipeline.shards.write_shard, [0]

    def unmount(*arguments: Any) -> Any:
        written[0] += 1
        if written[0] == 2:
            photos.rename(tmp_path / "elsewhere")
            photos.mkdir()  # what a mount leaves
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(cache_builder.pipeline.shards, "write_shard", unmount)
        with pytest.raises(SourceError, match=r"no image of .*photos can be read now \(.*run the same command"):
            run()
    stopped = Cache(tmp_path / "out.zarr")
    assert stopped.failures() == []
    assert len([one for one in stopped.receipts("fake-a") if one]) >= 2
    photos.rmdir()
    (tmp_path / "elsewhere").rename(photos)
    assert run().is_complete
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


@pytest.mark.parametrize("kind", ["tar", "parquet", "list"])
def test_a_file_of_images_that_goes_away_in_mid_build_stops_it(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    files = sorted(photos.rglob("*.png"))
    gone = source = tmp_path / f"images.{kind}"
    if kind == "tar":
        with tarfile.open(source, "w") as tar:
            for path in files:
                tar.add(path, path.relative_to(photos))
    elif kind == "parquet":
        table = pa.table({"image": [path.read_bytes() for path in files]})
        pq.write_table(table, source, row_group_size=6, compression="NONE", use_dictionary=False)
    else:
        source = tmp_path / "list.txt"
        source.write_text("\n".join(map(str, files)))
        gone = photos
    images = (str(source),)
    run("undisturbed.zarr", images=images)
    original, written = cache_builder.pipeline.shards.write_shard, [0]

    def remove(*arguments: Any) -> Any:
        written[0] += 1
        if written[0] == 2:
            gone.rename(tmp_path / "away")
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(cache_builder.pipeline.shards, "write_shard", remove)
        with pytest.raises(SourceError, match=r"run the same command"):
            run(images=images)
    assert Cache(tmp_path / "out.zarr").failures() == []
    (tmp_path / "away").rename(gone)
    run(images=images)
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT])
def test_many_unreadable_images_are_not_condemned_and_the_build_is_not_complete(
    run: Run, tmp_path: Path, number: int
) -> None:
    run("undisturbed.zarr")
    with unreadable(lambda path: even(path) and "blue" in path, number):
        report = run()
    assert (report.is_complete, report.unreadable) == (False, 12)
    cache = Cache(tmp_path / "out.zarr")
    assert {failure.kind for failure in cache.failures()} == {"surroundings"}
    assert len(cache.usable_rows(["fake-a"])) == 36
    assert "12 unusable (12 of them could not be read" in text_of(describe(cache))
    assert "The last 12 could not be read" in text_of(describe_failures(cache))
    assert run().is_complete
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def text_of(renderable: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return " ".join(captured.get().split())


def test_sixteen_unreadable_images_of_the_last_ones_stop_a_build_unless_it_may_leave_them_out(
    run: Run, tmp_path: Path
) -> None:
    run("undisturbed.zarr")
    with unreadable(even):
        with pytest.raises(SourceError, match=r"16 of the last \d+ images cannot be read.*--leave-out-unreadable"):
            run()
        report = run(leave_out_unreadable=True)
        assert (report.is_complete, report.unreadable) == (True, 24)
    assert run(leave_out_unreadable=True).unreadable == 24  # not looked at again
    assert run(leave_out_unreadable=True, retry_unusable=True).unreadable == 0
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_one_unreadable_image_is_left_out_named_and_looked_at_again(
    run: Run, tmp_path: Path, photos: Path, fake_teachers: tuple[str, ...]
) -> None:
    run("undisturbed.zarr")
    original, gone = photos / "blue/3.png", tmp_path / "3.png"
    shutil.move(original, gone)
    original.symlink_to(gone)  # listed, and leads nowhere once its disk is gone
    gone.rename(tmp_path / "away")
    arguments = ["build", "--images", str(photos), "--out", str(tmp_path / "out.zarr"), "--shard-images", "8"]
    arguments += ["--batch-size", "4", *(word for name in fake_teachers for word in ("--teacher", name))]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 of them could not be read, and may be fine (blue/3.png: cannot be read: No such file" in result.stderr
    assert "is complete but for 1 image that could not be read" in result.stdout
    assert len(Cache(tmp_path / "out.zarr").usable_rows(fake_teachers)) == 47
    (tmp_path / "away").rename(gone)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 images that could not be used were looked at again: 1 can be used now" in result.stderr
    assert "out.zarr is complete. " in result.stdout
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_a_command_that_lacks_many_images_exits_with_1(run: Run, tmp_path: Path, photos: Path) -> None:
    with unreadable(lambda path: even(path) and "blue" in path):
        result = CliRunner().invoke(
            main, ["build", "--images", str(photos), "--out", str(tmp_path / "out.zarr"), "--teacher", "fake-a"]
        )
    assert result.exit_code == 1, result.output
    assert "is not complete: 12 images could not be read" in result.stdout
    assert "is complete" not in result.stdout


def test_what_passes_within_the_tries_leaves_no_trace(run: Run, tmp_path: Path) -> None:
    run("undisturbed.zarr")
    tries: dict[str, int] = {}

    def twice(path: str) -> bool:
        tries[path] = tries.get(path, 0) + 1
        return tries[path] <= 2

    for number in (errno.EMFILE, errno.ESTALE):
        tries.clear()
        with unreadable(twice, number):
            run(f"{number}.zarr")
        assert tree(tmp_path / f"{number}.zarr") == tree(tmp_path / "undisturbed.zarr")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_without_descriptors_or_memory_stops(run: Run, tmp_path: Path, number: int) -> None:
    run("undisturbed.zarr")
    with (
        unreadable(lambda path: "red/1" in path, number),
        pytest.raises(StorageError, match="run the same command again"),
    ):
        run()
    assert Cache(tmp_path / "out.zarr").failures() == []
    run()
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_few_descriptors_condemn_no_image(run: Run, tmp_path: Path, photos: Path) -> None:
    run("undisturbed.zarr")
    script = f"""
import os, resource, runpy, sys
import torch, cache_builder.cli, cache_builder.build
import cache_builder.commands.build_options, PIL.Image, cache_builder.workers.cluster, radio_cache.checks.fidelity_loss
sys.path.insert(0, {str(FAKE_TEACHER.parent)!r})
import fake_teacher
fake_teacher.register()
import cache_builder.pipeline.image_access as access
access.PAUSES_S = (0.0, 0.0)
PIL.Image.init()
used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
cache_builder.cli.main(sys.argv[1:])
"""
    arguments = ["build", "--images", str(photos), "--out", str(tmp_path / "out.zarr"), "--shard-images", "8"]
    arguments += ["--batch-size", "4", "--threads", "12", "--teacher", "fake-a", "--teacher", "fake-maps"]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    assert result.returncode == 0 or "oo many" in result.stderr, result.stderr
    if (tmp_path / "out.zarr").exists():
        assert Cache(tmp_path / "out.zarr").failures() == []
    run()
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_no_memory_while_decoding_is_tried_again_and_then_stops(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("undisturbed.zarr")
    original, failed = cache_builder.pipeline.scan.decode_image, [0]

    def fails_twice(data: bytes, **options: Any) -> Any:
        failed[0] += 1
        if failed[0] in (5, 6):
            raise MemoryError
        return original(data, **options)

    def fails_always(data: bytes, **options: Any) -> Any:
        failed[0] += 1
        if failed[0] > 20:
            raise MemoryError
        return original(data, **options)

    with monkeypatch.context() as patched:
        patched.setattr(cache_builder.pipeline.scan, "decode_image", fails_twice)
        run("twice.zarr")
    assert tree(tmp_path / "twice.zarr") == tree(tmp_path / "undisturbed.zarr")
    failed[0] = 0
    with monkeypatch.context() as patched:
        patched.setattr(cache_builder.pipeline.scan, "decode_image", fails_always)
        with pytest.raises(StorageError, match=r"no memory to decode image \w+/\d+\.png: free some.*same command"):
            run()
    assert Cache(tmp_path / "out.zarr").failures() == []
    run()
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_an_image_that_alone_asks_for_too_much_memory_is_left_out(
    run: Run, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("undisturbed.zarr")
    original, hungry = cache_builder.pipeline.scan.decode_image, (photos / "blue/5.png").read_bytes()

    def fails_for_one(data: bytes, **options: Any) -> Any:
        if data == hungry:
            raise MemoryError
        return original(data, **options)

    with monkeypatch.context() as patched:
        patched.setattr(cache_builder.pipeline.scan, "decode_image", fails_for_one)
        report = run()
    assert (report.unreadable, report.is_complete) == (1, True)
    (failure,) = report.cache.failures()
    assert failure.reason == "not enough memory to decode it, and enough for other images"
    run()
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


class Pages(http.server.BaseHTTPRequestHandler):
    """Images of a folder; `answers` has what else to say to the n-th request."""

    folder: Path
    requests: int
    answers: Callable[[int, str], int]

    def do_GET(self) -> None:
        cls = type(self)
        cls.requests += 1
        status = cls.answers(cls.requests, self.path)
        data = (cls.folder / self.path.lstrip("/")).read_bytes() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def pages(photos: Path) -> Iterator[type[Pages]]:
    handler = type("Handler", (Pages,), {"folder": photos, "requests": 0, "answers": lambda number, path: 200})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_that_refuses_after_some_requests_stops_a_build(
    run: Run, tmp_path: Path, photos: Path, pages: Any, status: int
) -> None:
    keys = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    (tmp_path / "urls.txt").write_text("\n".join(f"{pages.url}/{key}" for key in keys))
    images = (str(tmp_path / "urls.txt"),)
    run("undisturbed.zarr", images=images)
    pages.requests, pages.answers = 0, lambda number, path: status if number > 20 else 200
    with pytest.raises(SourceError, match=r"no image of .*urls\.txt can be read now"):
        run(images=images)
    assert Cache(tmp_path / "out.zarr").failures() == []
    # For a moment: the first two requests of each image fail.
    seen: dict[str, int] = {}

    def for_a_moment(number: int, path: str) -> int:
        seen[path] = seen.get(path, 0) + 1
        return status if seen[path] <= 2 else 200

    pages.answers = for_a_moment
    run(images=images)
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_dead_links_in_a_list_are_left_out_and_do_not_stop_a_build(
    run: Run, tmp_path: Path, photos: Path, pages: Any
) -> None:
    keys = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    (tmp_path / "urls.txt").write_text("\n".join(f"{pages.url}/{key}" for key in keys))
    pages.answers = lambda number, path: 404 if path.endswith("/7.png") else 200
    report = run(images=(str(tmp_path / "urls.txt"),))
    assert (report.is_complete, report.unreadable) == (True, 2)


# ---------------------------------------------------------------- what is recorded


def recorded_as(reason: str, row: int) -> Callable[[ImageAccess, int], Any]:
    """A look that finds one image unusable, as builds of before recorded it."""
    original = cache_builder.pipeline.scan.scan_image

    def look(access: ImageAccess, at: int) -> Any:
        return (ScanResult(bytes(16), (0, 0), reason), None) if at == row else original(access, at)

    return look


@pytest.mark.parametrize(
    "reason", ["cannot be read: Permission denied", "cannot be read: there is nothing at http://h/a.jpg"]
)
def test_a_cache_without_kinds_has_its_unreadable_images_looked_at_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    run("undisturbed.zarr")
    with monkeypatch.context() as patched:
        for module in (cache_builder.pipeline.scan, cache_builder.pipeline.views):
            patched.setattr(module, "scan_image", recorded_as(reason, 9))
        run()
    receipt = read_receipt(tmp_path / "out.zarr", IMAGES_UNIT, 1)
    assert receipt is not None
    assert "kind" not in str(receipt.to_json())
    assert run().unusable == 0
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_all_that_is_recorded_is_looked_at_again_when_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("undisturbed.zarr")
    with monkeypatch.context() as patched:
        for module in (cache_builder.pipeline.scan, cache_builder.pipeline.views):
            patched.setattr(module, "scan_image", recorded_as("cannot be decoded: broken data stream", 9))
        run()
    before = tree(tmp_path / "out.zarr")
    assert run().unusable == 1
    assert tree(tmp_path / "out.zarr") == before
    assert run(retry_unusable=True).unusable == 0
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_a_teacher_that_is_not_asked_for_keeps_its_features_and_is_made_again_later(run: Run, tmp_path: Path) -> None:
    run("undisturbed.zarr")
    with unreadable(lambda path: path.endswith("blue/3.png")):
        run()
    run(teachers={"fake-a": TeacherOptions()})
    cache = Cache(tmp_path / "out.zarr")
    assert len(cache.usable_rows(["fake-a"])) == 48
    assert len(cache.usable_rows(["fake-maps"])) == 47
    assert len(cache.usable_rows(cache.teachers)) == 47
    run()
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_kept_pixels_and_broken_neighbours_stay_as_they_are(run: Run, tmp_path: Path, photos: Path) -> None:
    from radio_cache.format.pixels import PixelStore

    (photos / "blue/1.png").write_bytes(b"no image")
    pixels = PixelStore(side_px=16, format="jpeg", quality=90)
    run("undisturbed.zarr", pixels=pixels)
    with unreadable(lambda path: path.endswith("blue/10.png")):
        run(pixels=pixels)
    assert run(pixels=pixels).unusable == 1
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_a_codec_is_not_calibrated_without_an_image_that_cannot_be_read_just_now(
    run: Run, tmp_path: Path, photos: Path
) -> None:
    write_images(photos, per_class=40, size=24)
    run("undisturbed.zarr")
    message = r"image red/3\.png, one of those that the codec of 'fake-\w+' is chosen by"
    with unreadable(lambda path: path.endswith("red/3.png")), pytest.raises(SourceError, match=message):
        run()
    run()
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "undisturbed.zarr")


# ---------------------------------------------------------------- the proof itself


def test_a_process_that_reads_other_bytes_than_the_witnesses_does_not_see_the_images(run: Run, tmp_path: Path) -> None:
    run()
    cache = Cache(tmp_path / "out.zarr")
    right = Witness(0, cache.digests[0].tobytes())
    ImageAccess(cache, witnesses=[right]).prove_sight()
    ImageAccess(cache).prove_sight()
    with pytest.raises(RadioCacheError, match="is another file"):
        ImageAccess(cache, witnesses=[right._replace(digest=bytes(16))]).prove_sight()
