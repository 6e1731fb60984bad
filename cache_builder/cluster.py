"""Where workers come from: processes on this machine, a Dask scheduler that runs already, or a cluster that is asked for.

`dask` and `distributed` are imported when a crew is made, not before.
"""

import contextlib
import logging
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cache_builder.allocator import keeping_environment
from cache_builder.build_output import Say
from cache_builder.crew import Crew
from cache_builder.task_book import TASKS_IN_LINE
from radio_cache.errors import ClusterError, ConfigError, unknown_name

EXTRAS = {"slurm": ("dask_jobqueue", "SLURMCluster"), "kubernetes": ("dask_kubernetes.operator", "KubeCluster")}
"""Kind of cluster, also the name of the extra that installs it -> where its class is."""

_SETTINGS = {
    # Who was on a worker that died is ours to count: a death is told to us at once (`TaskBook`).
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
}
_CONNECT_S = 10


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Who builds, and what a build must know of them. crew: None for this very process. threads: of one process, for
    reading and decoding."""

    crew: Crew | None
    device: str
    threads: int


@contextlib.contextmanager
def workplace(
    *, workers: int | None, scheduler: str | None, cluster: Path | None, device: str, threads: int | None,
    say: Say = lambda _: None,
) -> Generator[Workplace]:  # fmt: skip
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
        yield Workplace(crew=None, device=device, threads=threads or cores)
        return
    if workers is not None:
        from radio_cache.torch import pick_device

        share = max(1, cores // max(1, workers))
        device = pick_device(device)
        with local_crew(workers, device=device, threads=share, say=say) as crew:
            yield Workplace(crew=crew, device=device, threads=threads or share)
        return
    making = scheduler_crew(scheduler, say=say) if scheduler is not None else cluster_crew(cast(Path, cluster), say=say)
    with making as crew:
        device = crew.device if device == "auto" else device
        yield Workplace(crew=crew, device=device, threads=threads or 2)


@contextlib.contextmanager
def local_crew(num_workers: int, *, device: str, threads: int, say: Say = lambda _: None) -> Generator[Crew]:
    """So many worker processes on this machine, on loopback; one that dies is started again.

    device: "cuda" gives each worker a GPU of its own. threads: that each worker computes on, on a CPU.
    Raises ConfigError for more workers than GPUs.
    """
    import dask.config
    from distributed import Client, Nanny, Scheduler, SpecCluster, Status

    if num_workers < 1:
        raise ConfigError(f"--workers {num_workers}: at least 1")
    on_gpus = _visible_gpus() if device.startswith("cuda") else None
    if on_gpus is not None and num_workers > len(on_gpus):
        raise ConfigError(f"--workers {num_workers}: one worker per GPU, and here are {len(on_gpus)}")
    preload = ["cache_builder.worker_signals", *dask.config.get("distributed.worker.preload")]
    environment = {"OMP_NUM_THREADS": str(threads)}
    settings: dict[str, Any] = {**_SETTINGS, **_LOCAL_SETTINGS}
    if not device.startswith("cuda"):
        # Dask's own would give every block back at once. What a process has from its start counts for all its threads.
        before = {**dask.config.get("distributed.nanny.pre-spawn-environ"), **keeping_environment()}
        settings["distributed.nanny.pre-spawn-environ"] = before
    workers = {
        number: {
            "cls": Nanny,
            "options": {
                "nthreads": TASKS_IN_LINE, "memory_limit": 0, "host": "127.0.0.1", "dashboard": False,
                "silence_logs": logging.CRITICAL, "preload": preload, "preload_argv": [[] for _ in preload],
                "env": environment | ({"CUDA_VISIBLE_DEVICES": on_gpus[number]} if on_gpus else {}),
            },
        }
        for number in range(num_workers)
    }  # fmt: skip
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }
    with (
        _quiet(), dask.config.set(settings),
        SpecCluster(workers=workers, scheduler=scheduler, silence_logs=cast(Any, logging.CRITICAL)) as made,
    ):  # fmt: skip
        cluster: Any = made

        def revive() -> None:
            """Dask gives up on a worker that dies while it is being started."""
            for number, nanny in list(cluster.workers.items()):
                if nanny.status in (Status.closed, Status.failed):
                    cluster.workers.pop(number, None)
            cluster.scale(num_workers)

        crew = Crew(lambda: Client(cluster, timeout=_CONNECT_S, set_as_default=False), wait_s=120, say=say, revive=revive)
        try:
            yield crew
        finally:
            crew.close()


@contextlib.contextmanager
def scheduler_crew(address: str, *, wait_s: float = 600, say: Say = lambda _: None) -> Generator[Crew]:
    """The workers of a Dask scheduler that runs already. Raises ClusterError if it does not answer or has none."""
    from distributed import Client

    if "://" not in address:
        raise ConfigError(f"--scheduler {address}: an address such as tcp://10.0.0.1:8786")
    with _quiet():
        crew = Crew(lambda: Client(address, timeout=_CONNECT_S, set_as_default=False), wait_s=wait_s, say=say)
        try:
            yield crew
        finally:
            crew.close()


@contextlib.contextmanager
def cluster_crew(file: Path, *, wait_s: float = 86_400, say: Say = lambda _: None) -> Generator[Crew]:
    """Workers that a cluster is asked for, by a file (docs/cluster.md); it is given back at the end."""
    import dask.config
    from distributed import Client

    settings = read_cluster_file(file)
    with _quiet(), dask.config.set(_SETTINGS), made_cluster(settings) as cluster:
        say(f"asking {settings['kind']} for {settings['workers']} workers: {cluster.scheduler_address}")
        cluster.scale(settings["workers"])
        crew = Crew(lambda: Client(cluster, timeout=_CONNECT_S, set_as_default=False), wait_s=wait_s, say=say)
        try:
            yield crew
        finally:
            crew.close()


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


def made_cluster(settings: Mapping[str, Any]) -> Any:
    """The cluster of a file, without workers yet. Raises ClusterError naming the extra that is not installed."""
    import importlib

    module, name = EXTRAS[settings["kind"]]
    try:
        made = getattr(importlib.import_module(module), name)
    except ImportError as exc:
        raise ClusterError(
            f"--cluster with kind {settings['kind']} needs {module.partition('.')[0].replace('_', '-')}: "
            f"pip install 'radio-cache[{settings['kind']}]' ({exc})"
        ) from exc
    try:
        return made(**settings["options"])
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"--cluster, options of {name}: {exc}") from exc


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one by one, on this machine."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Dask's own log lines about workers that died are ours to tell, as sentences."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado.application")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
