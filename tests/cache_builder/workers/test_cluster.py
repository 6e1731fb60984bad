"""Builds by real worker processes, really killed, store the bytes of a build in one process."""

import contextlib
import inspect
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import distributed  # before its settings are changed, or they would be its only ones
import numpy as np
import pytest
import timm
import torch
from distributed import Security
from PIL import Image

import cache_builder.workers.cluster
import cache_builder.workers.pool
import cache_builder.workers.worker
from cache_builder.build import BuildConfig, build_cache
from cache_builder.pipeline.events import ReportedEvents
from cache_builder.pipeline.image_access import Witness
from cache_builder.sources.listing_record import LISTING_FILE as LISTING
from cache_builder.teachers import TeacherOptions
from cache_builder.workers.allocator import allocator_environment
from cache_builder.workers.cluster import (
    cluster_pool,
    create_cluster,
    local_pool,
    read_cluster_file,
    scheduler_pool,
    workplace,
)
from cache_builder.workers.pool import WorkerPool
from cache_builder.workers.worker import ShardTask, do_task, worker_facts
from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.errors import BlindWorkerError, ClusterError, ConfigError
from radio_cache.format.schema import IMAGES_UNIT
from radio_cache.testing import write_images

WORKER = Path(__file__).parents[1] / "fake_worker.py"
FAKE = {"FAKE_TEACHER": str(Path(__file__).parents[1] / "fake_teacher.py")}
pytestmark = [
    # Sockets of processes that were killed are closed by the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def tree(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != LISTING)  # which depends on the clock
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def settings(images: Path, out: Path, **changes: Any) -> BuildConfig:
    fields = {
        "images": (str(images),),
        "teachers": {"fake-a": TeacherOptions(), "fake-maps": TeacherOptions()},
        "out": out,
        "shard_images": 4,
        "batch_size": 2,
        "threads": 1,
    }
    return BuildConfig(**(fields | changes))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, per_class=33, size=40)  # enough to calibrate klt on; the last shard is short
    (folder / "red" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def one_process(fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path) -> dict[str, bytes]:
    """Every file of the cache that one process makes of the photos."""
    build_cache(settings(photos, tmp_path / "one.zarr"))
    return tree(tmp_path / "one.zarr")


@contextlib.contextmanager
def workers(number: int, **environment: str) -> Iterator[WorkerPool]:
    """A pool of real processes that know the fake teachers."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (FAKE | environment).items():
            patched.setenv(name, value)
        with (
            dask.config.set({"distributed.worker.preload": [str(WORKER)]}),
            local_pool(number, device="cpu", threads=1) as worker_pool,
        ):
            yield worker_pool


@contextlib.contextmanager
def killer(worker_pool: WorkerPool, receipts: Callable[[], int], at: list[int], seed: int = 0) -> Iterator[list[int]]:
    """Kill a random worker whenever so many receipts are there; yields the processes that were killed."""
    rng, killed, stop = random.Random(seed), [], threading.Event()

    def run() -> None:
        for number in at:
            while receipts() < number:
                if stop.wait(0.005):
                    return
            alive = [facts.pid for facts in worker_pool.worker_facts() if facts.pid not in killed]
            if alive:
                killed.append(rng.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def count_receipts(out: Path) -> Callable[[], int]:
    return lambda: sum(1 for _ in (out / "receipts").rglob("*.json"))


def test_workers_that_are_killed_store_the_bytes_of_one_process(
    one_process: dict[str, bytes], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pool.zarr"
    said: list[str] = []
    with workers(2, FAKE_CALL_SECONDS="0.03") as worker_pool, killer(worker_pool, count_receipts(out), [22]) as killed:
        report = build_cache(settings(photos, out), ReportedEvents(said.append), worker_pool)
    assert len(killed) == 1
    assert tree(out) == one_process
    assert [(result.name, result.images) for result in report.results] == [("fake-a", 66), ("fake-maps", 66)]
    assert report.unusable == 1
    assert any("codec klt, packed" in sentence for sentence in said)  # a worker chose it, and told
    assert all(result.stages.teacher > 0 and result.stages.decode > 0 for result in report.results)


def test_receipts_go_into_a_log_while_a_large_build_goes_on(
    one_process: dict[str, bytes], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_builder.workers.pool._COMPACT_EVERY", 5)
    out = tmp_path / "pool.zarr"
    with workers(1) as worker_pool:
        build_cache(settings(photos, out), worker_pool=worker_pool)
    for unit in (IMAGES_UNIT, "fake-a", "fake-maps"):
        assert len(list((out / "receipts" / unit).glob("log-*.jsonl"))) == 1
        assert len(list((out / "receipts" / unit).glob("*.json"))) < 5
    report = verify_cache(Cache(out), deep=True)
    assert report.ok
    assert not any(report.missing.values())
    features = {path: data for path, data in one_process.items() if not path.startswith("receipts/")}
    assert {path: data for path, data in tree(out).items() if not path.startswith("receipts/")} == features


def test_workers_build_a_librarys_model_and_its_levels_as_one_process_does(photos: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    options = TeacherOptions(weights=tmp_path / "weights.pth", size_px=64)
    level = replace(options, size_px=96, level_of="timm:test_vit")
    asked = replace(
        settings(photos, tmp_path / "one.zarr"), teachers={"timm:test_vit": options, "timm:test_vit@96": level}
    )
    build_cache(asked)
    with workers(1) as worker_pool:
        report = build_cache(replace(asked, out=tmp_path / "pool.zarr"), worker_pool=worker_pool)
    assert [result.name for result in report.results] == ["timm-test_vit", "timm-test_vit@96"]
    assert tree(tmp_path / "pool.zarr") == tree(tmp_path / "one.zarr")


@pytest.mark.usefixtures("fake_teachers")
def test_a_worker_that_dies_while_it_is_started_is_started_again(photos: Path, tmp_path: Path) -> None:
    with workers(1) as worker_pool:
        (facts,) = worker_pool.worker_facts()
        nanny = worker_pool._client.cluster.workers[0]
        worker_pool._client.cluster.sync(nanny.close)  # what Dask does then
        assert not worker_pool.worker_facts()
        report = build_cache(settings(photos, tmp_path / "pool.zarr"), worker_pool=worker_pool)
        (again,) = worker_pool.worker_facts()
    assert report.results[0].images == 66
    assert again.pid != facts.pid


def test_workers_keep_the_memory_that_passes_free() -> None:
    with workers(1) as worker_pool:
        (environment,) = worker_pool._client.run(lambda: dict(os.environ)).values()
    assert {name: environment.get(name) for name in allocator_environment()} == allocator_environment()


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_named_and_all_others_are_built(
    fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    poisoned, out = tmp_path / "images", tmp_path / "pool.zarr"
    write_images(poisoned, per_class=10, size=40)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(poisoned / "blue" / "5.png")
    config = settings(poisoned, out, teachers={"fake-a": TeacherOptions()})
    with (
        workers(2, FAKE_POISON="1") as worker_pool,
        pytest.raises(
            ClusterError, match=r"fake-a, shard 1 \(rows 4 to 7: blue/4\.png, blue/5.*3 workers died"
        ) as told,
    ):
        build_cache(config, worker_pool=worker_pool)
    assert "1 task could not be done, all others are" in str(told.value)
    cache = Cache(out)
    assert cache.usable_rows(["fake-a"]).tolist() == [row for row in range(20) if row not in range(4, 8)]
    build_cache(config)  # where nobody dies of it, the same build makes what is missing
    assert len(Cache(out).usable_rows(["fake-a"])) == 20


class Scheduler:
    """`dask scheduler` and `dask worker` as programs of their own, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._folder, self._port = folder, self.address.rpartition(":")[2]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start_scheduler()

    def start_scheduler(self) -> "subprocess.Popen[bytes]":
        self.scheduler = self._start(
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            self._port,
            "--no-dashboard",
            "--dashboard-address",
            "127.0.0.1:0",
        )
        return self.scheduler

    def start_worker(self, **environment: str) -> "subprocess.Popen[bytes]":
        return self._start(
            "distributed.cli.dask_worker",
            self.address,
            "--nthreads",
            "1",
            "--no-dashboard",
            "--memory-limit",
            "0",
            "--no-nanny",
            "--host",
            "127.0.0.1",
            "--preload",
            str(WORKER),
            "--local-directory",
            str(self._folder),
            **environment,
        )

    def _start(self, module: str, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
        env = os.environ | FAKE | {"FAKE_CALL_SECONDS": "0.03", "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "False"}
        env |= environment
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    started = Scheduler(tmp_path)
    yield started
    started.close()


@pytest.mark.slow
def test_a_scheduler_that_is_killed_and_started_again_loses_nothing(
    one_process: dict[str, bytes], photos: Path, tmp_path: Path, scheduler: Scheduler
) -> None:
    out = tmp_path / "pool.zarr"
    said: list[str] = []
    receipts = count_receipts(out)
    scheduler.start_worker()

    def restart() -> None:
        while receipts() < 25:
            time.sleep(0.01)
        scheduler.scheduler.kill()
        scheduler.scheduler.wait()
        scheduler.start_scheduler()
        scheduler.start_worker()
        scheduler.start_worker()  # and one that was not there before

    thread = threading.Thread(target=restart)
    thread.start()
    with scheduler_pool(scheduler.address, wait_s=60, on_message=said.append) as worker_pool:
        build_cache(settings(photos, out), worker_pool=worker_pool)
    thread.join()
    assert tree(out) == one_process
    assert any(sentence.startswith("the scheduler is lost") for sentence in said)


@pytest.mark.slow
def test_workers_killed_all_the_time_store_the_bytes_of_one_process(
    one_process: dict[str, bytes], photos: Path, tmp_path: Path
) -> None:
    for seed in range(3):
        out = tmp_path / f"pool{seed}.zarr"
        at = sorted(random.Random(seed).sample(range(2, 48), 12))
        with (
            workers(4, FAKE_CALL_SECONDS="0.1") as worker_pool,
            killer(worker_pool, count_receipts(out), at, seed) as killed,
            contextlib.suppress(ClusterError),  # a shard may have been there three times when a worker was killed
        ):
            build_cache(settings(photos, out), worker_pool=worker_pool)
        assert len(killed) >= 6
        build_cache(settings(photos, out))
        assert tree(out) == one_process


# ---------------------------------------------------------------- what a worker refuses


def test_a_worker_that_cannot_see_the_cache_or_the_images_says_who_and_what(
    fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    config = settings(photos, tmp_path / "nowhere.zarr")
    task = ShardTask(build="a", config=config, unit="images", shard=0)
    host = socket.gethostname()
    with pytest.raises(ClusterError, match=rf"worker on {host} \(process \d+\) sees no cache at .*nowhere\.zarr"):
        do_task(task)
    build_cache(replace(config, teachers={"fake-a": TeacherOptions()}))
    hidden = photos.rename(photos.with_name("elsewhere"))
    try:
        with pytest.raises(ClusterError, match=rf"worker on {host} .* does not see the images at {photos}"):
            do_task(replace(task, build="b"))
    finally:
        hidden.rename(photos)
    with pytest.raises(ClusterError, match="is not absolute"):
        do_task(replace(task, build="c", config=replace(config, out="nowhere.zarr")))


def test_a_worker_whose_image_folder_is_empty_condemns_no_image_and_others_do_its_work(
    one_process: dict[str, bytes], photos: Path, tmp_path: Path, scheduler: Scheduler
) -> None:
    said: list[str] = []
    scheduler.start_worker(FAKE_BLIND=str(photos))
    scheduler.start_worker()
    with scheduler_pool(scheduler.address, wait_s=60, on_message=said.append) as worker_pool:
        deadline = time.monotonic() + 60
        while worker_pool.num_workers < 2 and time.monotonic() < deadline:
            worker_pool._counted = 0.0
            worker_pool._count_workers()
            time.sleep(0.05)
        assert worker_pool.num_workers == 2
        build_cache(settings(photos, tmp_path / "pool.zarr"), worker_pool=worker_pool)
    assert tree(tmp_path / "pool.zarr") == one_process
    blind = [sentence for sentence in said if "does not see the images" in sentence]
    assert len(blind) == 1
    assert blind[0].endswith("other workers do its tasks")


def test_where_no_worker_sees_the_images_the_build_stops_and_condemns_none(
    fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    with (
        workers(2, FAKE_BLIND=str(photos)) as worker_pool,
        pytest.raises(ClusterError, match=r"worker on .* does not see the images: no image of .* can be read now"),
    ):
        build_cache(settings(photos, out), worker_pool=worker_pool)
    assert Cache(out).receipts(IMAGES_UNIT) == [None] * Cache(out).meta.num_shards


def test_a_worker_whose_images_go_away_between_two_tasks_is_blind_and_no_shard_is_given_up(
    fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_thread = threading.get_ident()  # threads that decode have no worker to ask for its address
    monkeypatch.setattr(
        cache_builder.workers.worker, "_own_address", lambda: "tcp://w" if threading.get_ident() == task_thread else ""
    )
    config = settings(photos, tmp_path / "out.zarr")
    build_cache(replace(config, teachers={"fake-a": TeacherOptions()}))
    cache = Cache(tmp_path / "out.zarr")
    (tmp_path / "out.zarr/receipts/fake-a/000002.json").unlink()
    witnesses = (Witness(0, cache.digests[0].tobytes()),)
    task = ShardTask(build="e", config=config, unit="fake-a", shard=1, witnesses=witnesses)
    do_task(task)
    hidden = photos.rename(photos.with_name("elsewhere"))
    photos.mkdir()  # what a mount leaves
    try:
        with pytest.raises(BlindWorkerError, match="does not see the images: no image of") as caught:
            do_task(replace(task, shard=2))
        assert caught.value.worker == "tcp://w"
        with pytest.raises(BlindWorkerError, match="does not see the images: no image of"):
            do_task(replace(task, build="f", shard=2))
    finally:
        photos.rmdir()
        hidden.rename(photos)
    do_task(replace(task, shard=2))


def test_a_worker_with_other_weights_refuses_to_mix_them(
    fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    config = settings(photos, tmp_path / "out.zarr", limit=4)
    build_cache(config)
    other = tmp_path / "other.bin"
    other.write_bytes(b"other")
    (tmp_path / "out.zarr/receipts/fake-a/000000.json").unlink()
    config = replace(config, teachers={"fake-a": TeacherOptions(weights=other)})
    with pytest.raises(ClusterError, match=r"would store something else: .*weights"):
        do_task(ShardTask(build="d", config=config, unit="fake-a", shard=0))


class OddClient:
    """A client whose workers say what they are told to."""

    status = "running"
    scheduler = None

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def nthreads(self) -> dict[str, int]:
        return dict.fromkeys(self.facts, 2)

    def run(self, *_: Any, **__: Any) -> dict[str, Any]:
        return self.facts

    def close(self, timeout: float) -> None: ...


def test_workers_of_another_version_or_kind_are_named() -> None:
    def refused(**facts: Any) -> str:
        client: Any = OddClient(**facts)
        with pytest.raises(ClusterError) as told:
            WorkerPool(lambda: client, wait_s=1)
        return str(told.value)

    own = worker_facts()
    assert f"worker b on far has radio-cache 0.0.1, this command {own.radio_cache}" in refused(
        a=own, b=replace(own, radio_cache="0.0.1", host="far")
    )
    assert "worker b on far has torch 1.0" in refused(a=own, b=replace(own, torch="1.0", host="far"))
    assert "one has a GPU, one has none" in refused(a=own, b=replace(own, has_gpu=not own.has_gpu, host="far"))
    assert "worker a cannot load radio-cache" in refused(a=ModuleNotFoundError("No module named 'cache_builder'"))
    client: Any = OddClient()
    with pytest.raises(ClusterError, match=r"no worker came to .* within 0 s"):
        WorkerPool(lambda: client, wait_s=0.1)


def test_a_scheduler_that_does_not_answer_is_an_error_of_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_builder.workers.cluster, "_CONNECT_S", 0.3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with (
        pytest.raises(ClusterError, match="the scheduler does not answer"),
        scheduler_pool(address, wait_s=0.1),
    ):
        pass
    with pytest.raises(ConfigError, match="an address such as tcp://"), scheduler_pool("somewhere"):
        pass


def test_an_address_that_can_reach_nobody_is_refused_at_once() -> None:
    def refused(address: str) -> str:
        with pytest.raises(ConfigError) as told, scheduler_pool(address):
            pass
        return str(told.value)

    assert "no machine called nobody.invalid is known here" in refused("tcp://nobody.invalid:8786")
    assert "missing port number" in refused("tcp://127.0.0.1")
    assert "there is no port 99999" in refused("tcp://127.0.0.1:99999")
    assert "unknown address scheme 'http'" in refused("http://127.0.0.1:8786")
    assert "tls needs this command's certificates" in refused("tls://127.0.0.1:8786")


def test_a_scheduler_that_is_not_there_is_named_before_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_builder.workers.cluster, "_CONNECT_S", 0.3)
    monkeypatch.setattr(cache_builder.workers.cluster, "_FIRST_S", 0.1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    said: list[str] = []
    with (
        pytest.raises(ClusterError, match="the scheduler does not answer"),
        scheduler_pool(address, wait_s=600, on_message=said.append),  # ten minutes are for a scheduler that was there
    ):
        pass
    assert said == [f"--scheduler {address}: no scheduler answers there (Connection refused); trying for 0 s"]


def test_what_listens_and_is_no_scheduler_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the port of a scheduler's web page: Dask's own client waits without an end."""
    monkeypatch.setattr(cache_builder.workers.pool, "_ANSWER_S", 0.5)
    monkeypatch.setattr(cache_builder.workers.cluster, "_FIRST_S", 0.1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"does not answer .*the port of its web page"), scheduler_pool(address):
            pass


def test_workers_of_this_machine_listen_to_this_build_alone() -> None:
    with workers(1) as worker_pool:
        address = worker_pool._address
        about = worker_pool._client.scheduler_info(n_workers=-1)
        places = [address, *about["workers"], *(worker["nanny"] for worker in about["workers"].values())]
        pages = [about["services"]["dashboard"], *(one["services"]["dashboard"] for one in about["workers"].values())]
        assert all(place.startswith("tls://127.0.0.1:") for place in places)
        for scheme, stranger in (("tcp", Security()), ("tls", Security.temporary())):
            with pytest.raises(OSError):
                distributed.Client(
                    f"{scheme}://{address.partition('://')[2]}", security=stranger, timeout=1, set_as_default=False
                )
        for port in pages:
            for page in ("info/main/workers.html", "json/index.html", "metrics", "health"):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=5)


def test_a_worker_that_hangs_is_named_then_ended_and_another_started(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with workers(1) as worker_pool:
        worker_pool._on_message = said.append
        hung = worker_pool.facts.pid
        os.kill(hung, signal.SIGSTOP)
        # Not before: on a busy machine a worker that starts is silent for longer, and would be ended, too.
        with monkeypatch.context() as patched:
            for name, seconds in {"NOTICED_S": 1, "HUNG_S": 2, "_LISTEN_EVERY_S": 0.2, "_COUNT_EVERY_S": 0.1}.items():
                patched.setattr(cache_builder.workers.pool, name, seconds)
            while not any("hangs: it is ended" in text for text in said):
                worker_pool._count_workers()
                time.sleep(0.1)
        again = [hung]
        while again in ([hung], []):
            time.sleep(0.1)
            again = [facts.pid for facts in worker_pool.worker_facts()]
    assert "has not been heard of for" in said[0]


# ---------------------------------------------------------------- cluster files


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for Slurm, whose commands run jobs on this machine; REFUSE in the environment makes it refuse them."""
    pytest.importorskip("dask_jobqueue", reason="pip install 'radio-cache[slurm]'")
    commands = {
        "sbatch": '[ -z "$REFUSE" ] || { echo "invalid partition specified: gpu" >&2; exit 1; }\n'
        'bash "$1" >/dev/null 2>&1 &\necho "Submitted batch job $!"',
        "scancel": 'kill "$1"',
    }
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = (
        f"{{cores: 1, processes: 1, memory: 2GB, interface: lo, python: {sys.executable}, log_directory: {tmp_path}}}"
    )
    (tmp_path / "slurm.yaml").write_text(f"kind: slurm\nworkers: 1\noptions: {options}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "slurm.yaml"


def test_slurm_that_takes_no_jobs_is_quoted_at_once(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSE", "1")
    with (
        pytest.raises(ClusterError, match=r"does not take the jobs: .*invalid partition specified: gpu"),
        cluster_pool(slurm),
    ):
        pass
    monkeypatch.setenv("PATH", str(slurm.parent / "nothing"))
    with pytest.raises(ClusterError, match="there is no command sbatch on this machine"), cluster_pool(slurm):
        pass


@pytest.mark.slow
def test_workers_of_slurm_speak_tls_with_keys_of_their_build(slurm: Path) -> None:
    with cluster_pool(slurm, wait_s=120) as worker_pool:
        assert worker_pool._address.startswith("tls://")
        assert worker_pool.num_workers == 1
    assert not list(slurm.parent.glob(".dask-jobqueue*"))  # the keys


def test_cluster_files_are_checked_key_by_key(tmp_path: Path) -> None:
    def refused(text: str) -> str:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError) as told:
            read_cluster_file(tmp_path / "c.yaml")
        return str(told.value)

    assert "its keys are kind, workers and options" in refused("workers: 2")
    assert "its keys are kind, workers and options" in refused("kind: slurm\nnodes: 2")
    assert "no kind of cluster is called 'slrum'. Did you mean 'slurm'?" in refused("kind: slrum")
    assert "workers must be a whole number of at least 1, not 0" in refused("kind: slurm\nworkers: 0")
    assert "options must be names and values" in refused("kind: slurm\noptions: [a]")
    assert "is not YAML" in refused("kind: [slurm")
    with pytest.raises(ConfigError, match="No such file"):
        read_cluster_file(tmp_path / "missing.yaml")


FILES = Path(__file__).parents[3] / "docs/cluster"


def test_the_file_for_slurm_in_the_docs_asks_for_what_it_says() -> None:
    pytest.importorskip("dask_jobqueue", reason="pip install 'radio-cache[slurm]'")
    settings = read_cluster_file(FILES / "slurm.yaml")
    local = {"scheduler_options": {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}}
    with create_cluster({**settings, "options": settings["options"] | local}) as cluster:
        script = cluster.job_script()
    assert settings["workers"] == 16
    for line in ("#SBATCH -p gpu", "#SBATCH --cpus-per-task=8", "#SBATCH --gres=gpu:1", "#SBATCH -t 04:00:00"):
        assert line in script.splitlines()
    assert f"dask_worker {cluster.scheduler_address}" in script
    assert "--nthreads 4" in script


def test_the_file_for_kubernetes_in_the_docs_makes_a_valid_cluster() -> None:
    operator = pytest.importorskip("dask_kubernetes.operator", reason="pip install 'radio-cache[kubernetes]'")
    settings = read_cluster_file(FILES / "kubernetes.yaml")
    known = inspect.signature(operator.KubeCluster.__init__).parameters
    assert settings["options"].keys() <= known.keys()
    options = {name: value for name, value in settings["options"].items() if name != "namespace"}
    spec = operator.make_cluster_spec(**options, n_workers=settings["workers"])
    assert spec["kind"] == "DaskCluster"
    assert spec["spec"]["worker"]["replicas"] == 16
    (container,) = spec["spec"]["worker"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["args"][:4] == ["dask", "worker", "--nthreads", "4"]


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_the_docs_show_the_files_as_they_are(name: str) -> None:
    assert (FILES / f"{name}.yaml").read_text() in (FILES.parent / "cluster.md").read_text()


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ClusterError, match=r"needs dask-jobqueue: pip install 'radio-cache\[slurm\]'"):
        create_cluster({"kind": "slurm", "workers": 1, "options": {}})


def test_two_places_to_build_in_are_one_too_many() -> None:
    with (
        pytest.raises(ConfigError, match="--workers and --scheduler: take one of them"),
        workplace(workers=2, scheduler="tcp://127.0.0.1:1", cluster=None, device="cpu", threads=None),
    ):
        pass
