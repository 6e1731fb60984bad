"""Sources of workers: processes on this machine, a running Dask scheduler, or a cluster that is requested.

`dask` and `distributed` are imported when a crew is made, not before.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cache_builder.build_output import OnMessage
from cache_builder.workers.allocator import allocator_environment
from cache_builder.workers.pool import WorkerPool
from cache_builder.workers.task_queue import TASKS_PER_WORKER
from radio_cache.errors import ClusterError, ConfigError, unknown_name
from radio_cache.torch import pick_device

EXTRAS = {"slurm": ("dask_jobqueue", "SLURMCluster"), "kubernetes": ("dask_kubernetes.operator", "KubeCluster")}
"""Kind of cluster, also the name of the extra that installs it -> module and name of its class."""

_SETTINGS = {
    # Deaths are counted by `TaskQueue`, so the scheduler reports each of them at once.
    "distributed.scheduler.allowed-failures": 0,
    # Shards wait here, not in workers that may die.
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
}
_LOCAL_SETTINGS = {
    # A worker that dies here is noticed by its parent process; one that was silent for minutes has slept, as laptops do.
    "distributed.scheduler.worker-ttl": None,
    # No web pages about the build: other users of the machine could read them.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.nanny.http.routes": [],
}
_CONNECT_S = 10
_FIRST_S = 60
"""Seconds to wait for a scheduler that has never answered. More likely the address is wrong than the scheduler starting."""

_SUBMIT = {"slurm": "sbatch"}
"""Kind of cluster -> command that submits its jobs. dask-jobqueue misses it only after it has promised workers."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """The processes that build.

    Attributes:
        worker_pool: worker processes; None for this process.
        device: device of the teachers.
        threads: threads of one process that read and decode.
    """

    worker_pool: WorkerPool | None
    device: str
    threads: int


@contextlib.contextmanager
def workplace(
    *,
    workers: int | None,
    scheduler: str | None,
    cluster: Path | None,
    device: str,
    threads: int | None,
    on_message: OnMessage = lambda _: None,
) -> Generator[Workplace]:
    """Open the workers that one of the first three arguments requests, or this process if none does.

    Args:
        workers: number of processes on this machine.
        scheduler: address of a Dask scheduler.
        cluster: file that describes a cluster.
        device: device of the teachers; "auto" is a GPU if there is one where the work is done.
        threads: threads of one process; None for one per core on this machine, two elsewhere.
        on_message: receives sentences about the workers.

    Raises:
        ConfigError: more than one is requested, or the device does not exist.
    """
    sources = {"--workers": workers, "--scheduler": scheduler, "--cluster": cluster}
    requested = [name for name, value in sources.items() if value is not None]
    if len(requested) > 1:
        raise ConfigError(f"{' and '.join(requested)}: take one of them")
    # The system may not know the number.
    cores = os.cpu_count() or 1
    if not requested:
        yield Workplace(worker_pool=None, device=pick_device(device), threads=cores if threads is None else threads)
        return
    if workers is not None:
        # Workers share the cores: more threads than cores would only take turns.
        share = max(1, cores // max(1, workers))
        device = pick_device(device)
        with local_pool(workers, device=device, threads=share, on_message=on_message) as worker_pool:
            yield Workplace(worker_pool=worker_pool, device=device, threads=threads or share)
        return
    if scheduler is not None:
        opening = scheduler_pool(scheduler, on_message=on_message)
    else:
        opening = cluster_pool(cast(Path, cluster), on_message=on_message)
    with opening as worker_pool:
        device = worker_pool.device if device == "auto" else device
        yield Workplace(worker_pool=worker_pool, device=device, threads=threads or 2)


@contextlib.contextmanager
def local_pool(
    num_workers: int, *, device: str, threads: int, on_message: OnMessage = lambda _: None
) -> Generator[WorkerPool]:
    """Start worker processes on this machine, on loopback. One that dies is started again.

    They and this process use TLS with keys that are made for this build and kept in memory. A Dask scheduler runs any code that
    it is sent, and every user of a machine can reach its loopback.

    Args:
        num_workers: number of processes.
        device: "cuda" gives each worker a GPU of its own.
        threads: threads that each worker computes on, on a CPU.
        on_message: receives sentences about the workers.

    Raises:
        ConfigError: there are fewer GPUs than workers.
    """
    import dask.config
    from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Status

    if num_workers < 1:
        raise ConfigError(f"--workers {num_workers}: at least 1")
    gpus = _visible_gpus() if device.startswith("cuda") else None
    if gpus is not None and num_workers > len(gpus):
        raise ConfigError(f"--workers {num_workers}: one worker per GPU, and here are {len(gpus)}")
    preload = ["cache_builder.workers.signals", *dask.config.get("distributed.worker.preload")]
    environment = {"OMP_NUM_THREADS": str(threads)}
    settings: dict[str, Any] = {**_SETTINGS, **_LOCAL_SETTINGS}
    if not device.startswith("cuda"):
        # Dask's own setting would return every block at once. Settings from the start of a process hold for all its threads.
        before = {**dask.config.get("distributed.nanny.pre-spawn-environ"), **allocator_environment()}
        settings["distributed.nanny.pre-spawn-environ"] = before
    keys = Security.temporary()
    workers = {
        number: {
            "cls": Nanny,
            "options": {
                "security": keys,
                "protocol": "tls://",
                "nthreads": TASKS_PER_WORKER,
                "memory_limit": 0,
                "host": "127.0.0.1",
                "dashboard": False,
                "silence_logs": logging.CRITICAL,
                "preload": preload,
                "preload_argv": [[] for _ in preload],
                "env": environment | ({"CUDA_VISIBLE_DEVICES": gpus[number]} if gpus else {}),
            },
        }
        for number in range(num_workers)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "security": keys,
            "protocol": "tls://",
            "host": "127.0.0.1",
            "port": 0,
            "dashboard": False,
            "dashboard_address": "127.0.0.1:0",
        },
    }
    with (
        _quiet(),
        dask.config.set(settings),
        SpecCluster(
            workers=workers, scheduler=scheduler, security=keys, silence_logs=cast(Any, logging.CRITICAL)
        ) as opened,
    ):
        cluster: Any = opened

        def revive() -> None:
            """Start workers again that died while they were being started, which Dask gives up on."""
            for number, nanny in list(cluster.workers.items()):
                if nanny.status in (Status.closed, Status.failed):
                    cluster.workers.pop(number, None)
            # Starts as many new processes as were removed.
            cluster.scale(num_workers)

        def kill(address: str) -> None:
            """End the worker at an address. Its parent process notices, and starts another."""
            for nanny in list(cluster.workers.values()):
                if nanny.worker_address == address and nanny.pid is not None:
                    # A process that hangs does not react to a milder signal.
                    os.kill(nanny.pid, signal.SIGKILL)

        worker_pool = WorkerPool(
            lambda: Client(cluster, timeout=_CONNECT_S, set_as_default=False),
            wait_s=120,
            on_message=on_message,
            revive=revive,
            kill=kill,
        )
        try:
            yield worker_pool
        finally:
            worker_pool.close()


@contextlib.contextmanager
def scheduler_pool(
    address: str, *, wait_s: float = 600, on_message: OnMessage = lambda _: None
) -> Generator[WorkerPool]:
    """Open the workers of a running Dask scheduler.

    Args:
        address: address of the scheduler.
        wait_s: seconds that a scheduler may be away after it has answered once.
        on_message: receives sentences about the workers.

    Raises:
        ConfigError: the address is not valid.
        ClusterError: no scheduler answers within a minute, or there are no workers.
    """
    from distributed import Client

    refuse_odd_address(address)
    if (reason := unreachable(address)) is not None:
        on_message(
            f"--scheduler {address}: no scheduler answers there ({reason}); trying for {min(wait_s, _FIRST_S):.0f} s"
        )
    with _quiet():
        worker_pool = WorkerPool(
            lambda: Client(address, timeout=_CONNECT_S, set_as_default=False),
            wait_s=wait_s,
            first_s=_FIRST_S,
            on_message=on_message,
        )
        try:
            yield worker_pool
        finally:
            worker_pool.close()


def refuse_odd_address(address: str) -> None:
    """Raise ConfigError for an address of a scheduler that Dask does not understand, or that lacks its certificates."""
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.registry import get_backend
    from distributed.security import Security

    example = "an address such as tcp://10.0.0.1:8786, which `dask scheduler` prints"
    try:
        scheme, host_port = parse_address(address, strict=True)
        get_backend(scheme)
        _, port = parse_host_port(host_port) if scheme in _SOCKETS else (host_port, 1)
    except ValueError as exc:
        raise ConfigError(f"--scheduler {address}: {exc}: {example}") from exc
    if not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--scheduler {address}: there is no port {port}: {example}")
    if scheme in ("tls", "wss") and Security().get_connection_args("client").get("ssl_context") is None:
        raise ConfigError(
            f"--scheduler {address}: {scheme} needs this command's certificates: set distributed.comm.tls.ca-file, client.cert "
            "and client.key in Dask's configuration (docs/cluster.md)"
        )


def unreachable(address: str) -> str | None:
    """Return why no connection to a scheduler's address is possible now; None if one is, or only Dask can find out.

    Raises:
        ConfigError: the name of the machine cannot be resolved.
    """
    from distributed.comm.addressing import parse_address, parse_host_port

    scheme, host_port = parse_address(address)
    if scheme not in _SOCKETS:
        return None
    host, port = parse_host_port(host_port)
    try:
        # A plain connection answers in milliseconds; Dask's client would retry for minutes.
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
    except socket.gaierror as exc:
        raise ConfigError(f"--scheduler {address}: no machine called {host} is known here ({exc.strerror})") from exc
    except OSError as exc:
        return exc.strerror or str(exc)
    return None


_SOCKETS = ("tcp", "tls", "ws", "wss")
_PROBE_S = 3


@contextlib.contextmanager
def cluster_pool(
    file: Path, *, wait_s: float = 86_400, on_message: OnMessage = lambda _: None
) -> Generator[WorkerPool]:
    """Request workers from a cluster that a file describes (docs/cluster.md), and release them at the end."""
    import dask.config
    from distributed import Client

    settings = read_cluster_file(file)
    submit = _SUBMIT.get(settings["kind"])
    # dask-jobqueue would find out only after it has promised workers.
    if submit is not None and shutil.which(submit) is None:
        raise ClusterError(
            f"--cluster {file} with kind {settings['kind']}: there is no command {submit} on this machine: run the build on a "
            "login node of the cluster"
        )
    with _quiet(), dask.config.set(_SETTINGS), create_cluster(settings) as cluster:
        on_message(f"requesting {settings['workers']} workers from {settings['kind']}: {cluster.scheduler_address}")
        request_workers(cluster, settings)
        worker_pool = WorkerPool(
            lambda: Client(cluster, timeout=_CONNECT_S, set_as_default=False), wait_s=wait_s, on_message=on_message
        )
        try:
            yield worker_pool
        finally:
            worker_pool.close()


def read_cluster_file(file: Path) -> dict[str, Any]:
    """Return the settings of a cluster file.

    Returns:
        kind ("slurm" or "kubernetes"), workers (a number), and options of the class of dask-jobqueue or dask-kubernetes.

    Raises:
        ConfigError: the file cannot be read, or has other settings.
    """
    import yaml

    try:
        loaded: Any = yaml.safe_load(file.read_text())
    except OSError as exc:
        raise ConfigError(f"--cluster {file}: {exc.strerror or exc}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"--cluster {file} is not YAML: {' '.join(str(exc).split())}") from exc
    known = {"kind", "workers", "options"}
    if not isinstance(loaded, Mapping) or set(cast(Mapping[str, Any], loaded)) - known or "kind" not in loaded:
        raise ConfigError(f"--cluster {file}: its keys are kind, workers and options (docs/cluster.md)")
    settings: dict[str, Any] = {"workers": 1, "options": {}, **cast(Mapping[str, Any], loaded)}
    if settings["kind"] not in EXTRAS:
        raise ConfigError(f"--cluster {file}: {unknown_name('kind of cluster', str(settings['kind']), EXTRAS)}")
    if type(settings["workers"]) is not int or settings["workers"] < 1:
        raise ConfigError(f"--cluster {file}: workers must be a whole number of at least 1, not {settings['workers']}")
    if not isinstance(settings["options"], Mapping):
        raise ConfigError(f"--cluster {file}: options must be names and values, not {settings['options']!r:.60}")
    return settings


def create_cluster(settings: Mapping[str, Any]) -> Any:
    """Return the cluster of a file, without workers yet. Raise ClusterError if its extra is not installed."""
    import importlib

    kind = settings["kind"]
    module, name = EXTRAS[kind]
    try:
        cluster_class = getattr(importlib.import_module(module), name)
    except ImportError as exc:
        raise ClusterError(
            f"--cluster with kind {kind} needs {module.partition('.')[0].replace('_', '-')}: "
            f"pip install 'radio-cache[{kind}]' ({exc})"
        ) from exc
    options = dict(settings["options"])
    if kind == "slurm":
        # Without TLS, any program that reaches the scheduler's port could run code on the workers.
        options = {"security": True, "shared_temp_directory": str(Path.cwd())} | options
        options["security"] = options["security"] or None
    # Dask remembers all clusters to close them at exit, also those that failed to start.
    instances: set[Any] = getattr(cluster_class, "_instances", set[Any]())
    before = set(instances)
    try:
        return cluster_class(**options)
    except Exception as exc:  # the clients of Slurm and Kubernetes raise many types
        for instance in set(instances) - before:
            instances.discard(instance)  # KubeCluster would close it when Python ends, with a traceback
        if isinstance(exc, TypeError | ValueError):
            raise ConfigError(
                f"--cluster, options of {name}: {exc}. Mend the file, or set up the client of {kind} on this machine"
            ) from exc
        raise ClusterError(f"--cluster with kind {kind}: {name} could not be started: {first_line(exc)}") from exc


def request_workers(cluster: Any, settings: Mapping[str, Any]) -> None:
    """Request a cluster's workers. Raise ClusterError with the cluster's own message if it accepts no job."""
    from distributed import Status

    async def submit() -> None:
        cluster.scale(settings["workers"])
        if hasattr(cluster, "_correct_state"):  # of dask-jobqueue: submits the jobs, whose errors are lost otherwise
            await cluster._correct_state()

    try:
        if hasattr(cluster, "_correct_state"):
            cluster.sync(submit)
        else:
            cluster.scale(settings["workers"])
    except Exception as exc:  # of a command that failed, or of a client of Kubernetes
        for job in list(getattr(cluster, "_created", ())):
            if job.status == Status.created:
                job.status = Status.closed  # there is no job to cancel, and closing the cluster insists on a state
        raise ClusterError(
            f"--cluster: {settings['kind']} does not take the jobs: {' '.join(str(exc).split())[:_WORDS]}: mend the options in "
            "the file, and run the same command again"
        ) from exc


_WORDS = 600
"""Characters of another program's message that are printed."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, after its type."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _visible_gpus() -> list[str]:
    """Return the values of CUDA_VISIBLE_DEVICES that each select one GPU of this machine."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence Dask's log lines about workers that died, which `WorkerPool` reports as sentences."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado.application", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
