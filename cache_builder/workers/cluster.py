"""Where workers come from: processes on this machine, a Dask scheduler that runs already, or a cluster that is asked for.

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
"""Kind of cluster, also the name of the extra that installs it -> where its class is."""

_SETTINGS = {
    # Who was on a worker that died is ours to count: a death is told to us at once (`TaskQueue`).
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
    # Pages about the build, which other users of the machine could read: nobody here looks at them.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.nanny.http.routes": [],
}
_CONNECT_S = 10
_FIRST_S = 60
"""How long a build waits for a scheduler that has never answered: it is more likely another address than one that starts."""

_SUBMIT = {"slurm": "sbatch"}
"""Kind of cluster -> the command that hands in its jobs, which dask-jobqueue misses only after it has promised workers."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Who builds, and what a build must know of them. crew: None for this very process. threads: of one process, for
    reading and decoding."""

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
    say: OnMessage = lambda _: None,
) -> Generator[Workplace]:
    """This process, or the workers that were asked for by one of the first three.

    device: "auto" is a GPU wherever the work is done, if there is one. threads: None is as many as there are cores
    for a process; workers elsewhere get two unless told otherwise.
    Raises ConfigError if more than one is asked for.
    """
    asked = {"--workers": workers, "--scheduler": scheduler, "--cluster": cluster}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: take one of them")
    cores = os.cpu_count() or 1
    if not given:
        yield Workplace(worker_pool=None, device=pick_device(device), threads=cores if threads is None else threads)
        return
    if workers is not None:
        share = max(1, cores // max(1, workers))
        device = pick_device(device)
        with local_pool(workers, device=device, threads=share, say=say) as worker_pool:
            yield Workplace(worker_pool=worker_pool, device=device, threads=threads or share)
        return
    making = scheduler_pool(scheduler, say=say) if scheduler is not None else cluster_pool(cast(Path, cluster), say=say)
    with making as worker_pool:
        device = worker_pool.device if device == "auto" else device
        yield Workplace(worker_pool=worker_pool, device=device, threads=threads or 2)


@contextlib.contextmanager
def local_pool(
    num_workers: int, *, device: str, threads: int, say: OnMessage = lambda _: None
) -> Generator[WorkerPool]:
    """So many worker processes on this machine, on loopback; one that dies is started again.

    They and this process speak TLS with keys that are made for this build and kept in memory: a Dask scheduler runs what it is
    sent, and every user of a machine can reach its loopback.

    device: "cuda" gives each worker a GPU of its own. threads: that each worker computes on, on a CPU.
    Raises ConfigError for more workers than GPUs.
    """
    import dask.config
    from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Status

    if num_workers < 1:
        raise ConfigError(f"--workers {num_workers}: at least 1")
    on_gpus = _visible_gpus() if device.startswith("cuda") else None
    if on_gpus is not None and num_workers > len(on_gpus):
        raise ConfigError(f"--workers {num_workers}: one worker per GPU, and here are {len(on_gpus)}")
    preload = ["cache_builder.workers.signals", *dask.config.get("distributed.worker.preload")]
    environment = {"OMP_NUM_THREADS": str(threads)}
    settings: dict[str, Any] = {**_SETTINGS, **_LOCAL_SETTINGS}
    if not device.startswith("cuda"):
        # Dask's own would give every block back at once. What a process has from its start counts for all its threads.
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
                "env": environment | ({"CUDA_VISIBLE_DEVICES": on_gpus[number]} if on_gpus else {}),
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
        ) as made,
    ):
        cluster: Any = made

        def revive() -> None:
            """Dask gives up on a worker that dies while it is being started."""
            for number, nanny in list(cluster.workers.items()):
                if nanny.status in (Status.closed, Status.failed):
                    cluster.workers.pop(number, None)
            cluster.scale(num_workers)

        def kill(address: str) -> None:
            """Its parent process notices, and starts another."""
            for nanny in list(cluster.workers.values()):
                if nanny.worker_address == address and nanny.pid is not None:
                    os.kill(nanny.pid, signal.SIGKILL)

        worker_pool = WorkerPool(
            lambda: Client(cluster, timeout=_CONNECT_S, set_as_default=False),
            wait_s=120,
            say=say,
            revive=revive,
            kill=kill,
        )
        try:
            yield worker_pool
        finally:
            worker_pool.close()


@contextlib.contextmanager
def scheduler_pool(address: str, *, wait_s: float = 600, say: OnMessage = lambda _: None) -> Generator[WorkerPool]:
    """The workers of a Dask scheduler that runs already. wait_s: how long a scheduler that answered once may be away.

    Raises ConfigError for what is no address, ClusterError if nobody answers there within a minute, or there are no workers.
    """
    from distributed import Client

    refuse_odd_address(address)
    if (why := unreachable(address)) is not None:
        say(f"--scheduler {address}: nobody answers there ({why}); trying for {min(wait_s, _FIRST_S):.0f} s")
    with _quiet():
        worker_pool = WorkerPool(
            lambda: Client(address, timeout=_CONNECT_S, set_as_default=False), wait_s=wait_s, first_s=_FIRST_S, say=say
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
        scheme, place = parse_address(address, strict=True)
        get_backend(scheme)
        _, port = parse_host_port(place) if scheme in _SOCKETS else (place, 1)
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
    """Why nobody can be reached at a scheduler's address just now; None if somebody can, or Dask alone may know.

    Raises ConfigError for the name of a machine that nobody knows.
    """
    from distributed.comm.addressing import parse_address, parse_host_port

    scheme, place = parse_address(address)
    if scheme not in _SOCKETS:
        return None
    host, port = parse_host_port(place)
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
    except socket.gaierror as exc:
        raise ConfigError(f"--scheduler {address}: no machine called {host} is known here ({exc.strerror})") from exc
    except OSError as exc:
        return exc.strerror or str(exc)
    return None


_SOCKETS = ("tcp", "tls", "ws", "wss")
_PROBE_S = 3


@contextlib.contextmanager
def cluster_pool(file: Path, *, wait_s: float = 86_400, say: OnMessage = lambda _: None) -> Generator[WorkerPool]:
    """Workers that a cluster is asked for, by a file (docs/cluster.md); it is given back at the end."""
    import dask.config
    from distributed import Client

    settings = read_cluster_file(file)
    submit = _SUBMIT.get(settings["kind"])
    if submit is not None and shutil.which(submit) is None:
        raise ClusterError(
            f"--cluster {file} with kind {settings['kind']}: there is no command {submit} on this machine: run the build on a "
            "login node of the cluster"
        )
    with _quiet(), dask.config.set(_SETTINGS), create_cluster(settings) as cluster:
        say(f"asking {settings['kind']} for {settings['workers']} workers: {cluster.scheduler_address}")
        request_workers(cluster, settings)
        worker_pool = WorkerPool(
            lambda: Client(cluster, timeout=_CONNECT_S, set_as_default=False), wait_s=wait_s, say=say
        )
        try:
            yield worker_pool
        finally:
            worker_pool.close()


def read_cluster_file(file: Path) -> dict[str, Any]:
    """kind ("slurm" or "kubernetes"), workers (a count), options (of dask-jobqueue's or dask-kubernetes' class).

    Raises ConfigError naming the file and what is wrong in it.
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
    """The cluster of a file, without workers yet. Raises ClusterError naming the extra that is not installed."""
    import importlib

    kind = settings["kind"]
    module, name = EXTRAS[kind]
    try:
        made = getattr(importlib.import_module(module), name)
    except ImportError as exc:
        raise ClusterError(
            f"--cluster with kind {kind} needs {module.partition('.')[0].replace('_', '-')}: "
            f"pip install 'radio-cache[{kind}]' ({exc})"
        ) from exc
    options = dict(settings["options"])
    if kind == "slurm":
        # Else whoever reaches the scheduler's port could have the workers run anything.
        options = {"security": True, "shared_temp_directory": str(Path.cwd())} | options
        options["security"] = options["security"] or None
    instances: set[Any] = getattr(made, "_instances", set[Any]())
    before = set(instances)
    try:
        return made(**options)
    except Exception as exc:  # whatever Slurm's or Kubernetes' client makes of a cluster that is not there
        for one in set(instances) - before:
            instances.discard(one)  # KubeCluster would close it when Python ends, with a traceback
        if isinstance(exc, TypeError | ValueError):
            raise ConfigError(
                f"--cluster, options of {name}: {exc}. Mend the file, or set up the client of {kind} on this machine"
            ) from exc
        raise ClusterError(f"--cluster with kind {kind}: {name} could not be started: {first_line(exc)}") from exc


def request_workers(cluster: Any, settings: Mapping[str, Any]) -> None:
    """Ask a cluster for its workers. Raises ClusterError with the cluster's own words if it takes no job."""
    from distributed import Status

    async def submit() -> None:
        cluster.scale(settings["workers"])
        if hasattr(
            cluster, "_correct_state"
        ):  # of dask-jobqueue: hands in the jobs, whose errors nobody sees otherwise
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
"""Characters of another program's message that are shown."""


def first_line(error: BaseException) -> str:
    """An error of another library in a line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one by one, on this machine."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Dask's own log lines about workers that died are ours to tell, as sentences."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado.application", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
