"""Worker processes that make a build's shards through a Dask scheduler: handing out tasks, and following them.

A shard is done when its receipt is in the cache. So workers may die, come and go, and the scheduler may be started again.
A shard without a receipt is handed out again, and the same bytes are stored.
"""

import concurrent.futures
import contextlib
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import OnMessage, missing_shards
from cache_builder.computed_with import recorded_batch
from cache_builder.pipeline.events import BuildEvents
from cache_builder.pipeline.image_access import ImageAccess, known_witnesses
from cache_builder.pipeline.passes import TeacherResult, report_unusable_images
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.workers.heartbeats import HUNG_S, NOTICED_S, Heartbeats
from cache_builder.workers.task_queue import AbandonedTask, TaskQueue
from cache_builder.workers.worker import (
    BuildTask,
    CalibrationTask,
    ShardTask,
    TaskReport,
    WorkerFacts,
    do_task,
    worker_facts,
)
from radio_cache.errors import BlindWorkerError, ClusterError
from radio_cache.format.schema import IMAGES_UNIT, unit_group
from radio_cache.reader import Cache
from radio_cache.receipts import compact_receipts, read_receipt
from radio_cache.storage.base import absolute_path_or_url

if TYPE_CHECKING:
    from distributed import Client, Future

_T = TypeVar("_T")

_POLL_S = 0.02
_COUNT_EVERY_S = 2.0
_LISTEN_EVERY_S = 5.0
_REMIND_S = 60.0
"""Seconds until a wait is reported again; doubled each time, because a queue may take a day."""

_NAMED_IMAGES = 5
_REPORT_S = 5
_ANSWER_S = 20
_FACTS_S = 120  # workers load PyTorch before they answer
_COMPACT_EVERY = (
    4096  # finished shards: a large build that is started again lists a few logs, not a file for every shard
)

OnCompleted = Callable[[BuildTask | None, TaskReport], object]
"""Receives each completed task with its report, and now and then None, so that a progress line stays alive."""

_EMPTY_REPORT = TaskReport()


@final
class WorkerPool:
    """The workers of one Dask scheduler. Close it when done.

    Args:
        connect: makes a client; called again when the scheduler was lost.
        wait_s: seconds to wait for the scheduler to come back, or for the first worker.
        on_message: receives sentences about workers and scheduler.
        revive: called every few seconds, to start workers again that died.
        kill: ends the worker at an address, which has hung; None if the scheduler does that.
        first_s: seconds to wait for a scheduler that has never answered, if that is less.

    Raises:
        ClusterError: there is no scheduler or no worker, or the workers differ in what decides the stored bytes.
    """

    def __init__(
        self,
        connect: "Callable[[], Client]",
        *,
        wait_s: float,
        on_message: OnMessage = lambda _: None,
        revive: Callable[[], None] = lambda: None,
        kill: Callable[[str], None] | None = None,
        first_s: float | None = None,
    ) -> None:
        self._connect, self._wait_s, self._on_message, self._revive, self._kill = (
            connect,
            wait_s,
            on_message,
            revive,
            kill,
        )
        self._client = self._connected(wait_s if first_s is None else min(wait_s, first_s))
        self._blind: set[str] = set()
        self._num_workers, self._counted, self._missed_since, self._remind_s = 0, 0.0, 0.0, _REMIND_S
        self._heartbeats, self._listened, self._silent = Heartbeats(), time.monotonic(), set[str]()
        while self._num_workers == 0:
            self._count_workers()
            time.sleep(_POLL_S)
        self.facts = self._agreed_facts()

    @property
    def num_workers(self) -> int:
        """Number of workers at the last count."""
        return self._num_workers

    @property
    def device(self) -> str:
        """Device that `--device auto` selects on these workers."""
        return "cuda" if self.facts.has_gpu else "cpu"

    def worker_facts(self) -> list[WorkerFacts]:
        """Return the facts of the workers that are alive and answer."""
        return list(cast(dict[str, WorkerFacts], self._client.run(worker_facts, on_error="ignore")).values())

    def close(self) -> None:
        """Disconnect from the scheduler. Workers finish their tasks."""
        _close(self._client)

    def build(self, cache: Cache, config: BuildConfig, events: BuildEvents) -> list[TeacherResult]:
        """Scan all images of a cache and make all teachers' shards, teacher after teacher.

        Raises:
            ClusterError: some tasks could not be done. It is raised after all others are done, and lists them.
        """
        config = replace(config, out=absolute_path_or_url(config.out))
        access = ImageAccess(cache, leave_out=config.leave_out_unreadable)
        # The id keeps workers from using the state of an earlier build.
        build_id, witnesses = uuid.uuid4().hex, known_witnesses(cache, access)
        todo = missing_shards(cache, IMAGES_UNIT)
        if todo:
            with events.shard_pass(cache, IMAGES_UNIT, todo, title="checking images"):
                task = ShardTask(build=build_id, config=config, unit=IMAGES_UNIT, shard=0, witnesses=witnesses)
                # Before the pass is logged: an incomplete scan must not look complete.
                _refuse_abandoned(cache, self._do_shards(cache, task, todo, events))
        cache = cache.reopened()
        report_unusable_images(cache, events)
        results: list[TeacherResult] = []
        abandoned: list[AbandonedTask] = []
        for name in config.groups:
            started_s = time.perf_counter()
            # One task, because a codec is chosen once for all shards.
            if name not in cache.teachers:
                events.message(f"{name}: calibrating on one worker")
                calibration = CalibrationTask(build=build_id, config=config, unit=name, witnesses=witnesses)

                def report_notes(_: BuildTask | None, report: TaskReport) -> None:
                    for note in report.notes:
                        events.message(note)

                _refuse_abandoned(cache, self._do([calibration], report_notes))
                cache = cache.reopened()
                if (batch := recorded_batch(cache, name)) not in (None, config.batch_images):
                    events.message(f"{name}: batches of {batch} images, as another build has just begun it with")
            # For the report: shards of this run are the difference.
            before = len(cache.usable_rows([name]))
            stages, todo = StageSeconds(), missing_shards(cache, name)
            with (
                cache.storage.locked(unit_group(name), shared=True),
                events.shard_pass(cache, name, todo, stages=stages),
            ):
                task = ShardTask(build=build_id, config=config, unit=name, shard=0, witnesses=witnesses)
                abandoned += self._do_shards(cache, task, todo, events, stages)
                compact_receipts(cache.storage, name)
            cache = cache.reopened()
            images = len(cache.usable_rows([name])) - before
            results.append(TeacherResult(name, images, before, time.perf_counter() - started_s, stages))
        cache.storage.remove_leftovers()  # of workers on this machine that were killed while they wrote
        _refuse_abandoned(cache, abandoned)
        return results

    def _do_shards(
        self,
        cache: Cache,
        task: ShardTask,
        shards: list[int],
        events: BuildEvents,
        stages: StageSeconds | None = None,
    ) -> list[AbandonedTask]:
        """Make shards of a unit and return the tasks that were abandoned.

        Args:
            cache: the cache.
            task: a task of the unit, for any shard.
            shards: the shards to make.
            events: receives each shard that is on disk, and progress.
            stages: the workers' seconds are added to it.
        """
        # Receipts are compacted now and then, so that a large build starts quickly when it goes on.
        num_completed = itertools.count(1)
        on_shard = events.scanned if task.unit == IMAGES_UNIT else events.committed

        def advance(completed: BuildTask | None, report: TaskReport) -> None:
            workers = f"{self._num_workers} worker{'s' if self._num_workers != 1 else ''}"
            workers += f", {len(self._silent)} of them silent" if self._silent else ""
            if stages is not None:
                stages.add(report.stage_seconds)
            num_images = 0
            if isinstance(completed, ShardTask):
                num_images = len(cache.meta.shard_rows(completed.shard))
                # From the cache, not from the worker: a receipt on disk is what counts.
                if (receipt := read_receipt(cache.storage, completed.unit, completed.shard)) is not None:
                    on_shard(receipt)
                    if next(num_completed) % _COMPACT_EVERY == 0:
                        compact_receipts(cache.storage, completed.unit, from_files=1)
            events.progress(num_images, workers)

        return self._do([replace(task, shard=shard) for shard in shards], advance)

    def _do(self, tasks: Sequence[BuildTask], on_completed: OnCompleted) -> list[AbandonedTask]:
        """Do all tasks and return those that were abandoned. Raise errors that another worker would raise, too."""
        queue = TaskQueue.of(tasks)
        in_flight: dict[Future[TaskReport], BuildTask] = {}
        try:
            while in_flight or not queue.is_empty:
                try:
                    self._exchange(queue, in_flight, on_completed)
                except (OSError, TimeoutError) as exc:  # distributed's CommClosedError is one, too
                    # Their results are lost with the scheduler, and their receipts may be there.
                    queue.put_back(in_flight.values())
                    in_flight.clear()
                    self._reconnect(exc)
        finally:
            for future in in_flight:
                with contextlib.suppress(Exception):
                    # Workers must not go on with tasks of a build that has failed.
                    future.cancel()
        return queue.abandoned

    def _exchange(
        self, queue: TaskQueue, in_flight: "dict[Future[TaskReport], BuildTask]", on_completed: OnCompleted
    ) -> None:
        """Hand out tasks as far as there is room, and take in those that are completed."""
        self._count_workers()
        # Before new tasks are handed out: it is about those that may have died.
        was_alone = len(in_flight) == 1
        room = queue.room(in_flight=len(in_flight), workers=self._num_workers)
        for task in queue.take(in_flight=len(in_flight), room=room):
            key = f"radio-cache-{task.key}-{uuid.uuid4().hex}"
            # Loosely: workers that see the images may be gone by then, and those that come later are not known yet.
            where: dict[str, Any] = (
                {"workers": self._seeing_workers(), "allow_other_workers": True} if self._blind else {}
            )
            # Not pure: Dask would otherwise return the result of an equal task without doing it.
            in_flight[self._client.submit(do_task, task, key=key, pure=False, **where)] = task
        completed = [future for future in in_flight if future.status != "pending"]
        for future in completed:
            task = in_flight.pop(future)
            if future.status == "finished":
                on_completed(task, _report(future))
            elif future.status == "error" and isinstance(error := future.exception(), BlindWorkerError):
                self._note_blind(error)
                queue.put_back([task])
            elif future.status == "error":
                _record_error(queue, task, future, was_alone=was_alone)
            else:
                queue.put_back([task])  # the scheduler has forgotten it
        if self._client.status != "running":
            raise OSError("the connection broke")
        if not completed:
            on_completed(None, _EMPTY_REPORT)
            time.sleep(_POLL_S)

    def _seeing_workers(self) -> list[str]:
        """Return the addresses of the workers that are not known to be blind."""
        addresses = cast(dict[str, int], self._client.nthreads())
        return [address for address in addresses if address not in self._blind]

    def _note_blind(self, error: BlindWorkerError) -> None:
        """Give no more tasks to a worker that does not see the images.

        Raises:
            BlindWorkerError: the error itself, if there is no other worker, or if it does not name the worker. The tasks might
                go to the same one again then.
        """
        if not error.worker:
            raise error
        if error.worker not in self._blind:
            self._blind.add(error.worker)
            self._on_message(f"{error}; other workers do its tasks")
        if not self._seeing_workers():
            raise error

    def _count_workers(self) -> None:
        now = time.monotonic()
        if now - self._counted < _COUNT_EVERY_S and self._num_workers > 0:
            return
        self._counted = now
        self._revive()
        self._num_workers = len(cast(dict[str, int], self._client.nthreads()))
        if self._num_workers > 0:
            self._missed_since = 0.0
            self._listen(now)
            return
        if self._missed_since == 0.0:
            self._missed_since, self._remind_s = now, _REMIND_S
            self._on_message("no worker is there yet, or any more: waiting")
        if now - self._missed_since > self._remind_s:
            self._on_message(f"no worker has come to {self._address} for {self._remind_s:.0f} s: still waiting")
            # Queues of clusters take hours: a line a minute would bury the rest.
            self._remind_s *= 2
        if now - self._missed_since > self._wait_s:
            raise ClusterError(
                f"no worker came to {self._address} within {self._wait_s:.0f} s: start some (dask worker {self._address}); "
                "the same command goes on"
            )

    def _listen(self, now: float) -> None:
        """Report workers whose heartbeat has stopped, and end those of this machine, which would be waited for without end."""
        if now - self._listened < _LISTEN_EVERY_S:
            return
        self._listened = now
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        last_seen = {address: about["last_seen"] for address, about in workers.items() if "last_seen" in about}
        silent = self._heartbeats.silent_s(last_seen)
        late = {address for address, seconds in silent.items() if seconds > NOTICED_S}
        for address in sorted(late - self._silent):
            consequence = f"; it is started again if that lasts {HUNG_S} s" if self._kill else ""
            self._on_message(f"the worker at {address} has not been heard of for {silent[address]:.0f} s{consequence}")
        for address in sorted(self._silent - late):
            self._on_message(f"the worker at {address} {'is back' if address in silent else 'is gone'}")
        self._silent = late
        for address in late:
            if self._kill is not None and silent[address] > HUNG_S:
                self._on_message(f"the worker at {address} hangs: it is ended, and its shards are handed out again")
                self._kill(address)

    @property
    def _address(self) -> str:
        scheduler = self._client.scheduler
        return str(scheduler.address) if scheduler is not None else "the scheduler"

    def _connected(self, wait_s: float) -> "Client":
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return _call_in_time(self._connect, _ANSWER_S)
            except (OSError, TimeoutError) as exc:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the scheduler does not answer ({(str(exc).splitlines() or [repr(exc)])[0]}): start it, or give the "
                        "address that `dask scheduler` prints; the same command goes on"
                    ) from exc
                time.sleep(0.5)

    def _reconnect(self, cause: Exception) -> None:
        self._on_message(f"the scheduler is lost ({cause}): waiting for it to come back")
        _close(self._client)
        self._client = self._connected(self._wait_s)
        self._num_workers, self._missed_since = 0, 0.0
        while self._num_workers == 0:
            self._count_workers()
            time.sleep(_POLL_S)
        self._on_message("the scheduler is back: going on with what has no receipt")

    def _facts_by_address(self) -> dict[str, WorkerFacts | BaseException]:
        return cast(dict[str, WorkerFacts | BaseException], self._client.run(worker_facts, on_error="return"))

    def _agreed_facts(self) -> WorkerFacts:
        """Return the facts that all workers share. Raise ClusterError if they differ from each other or from this process."""
        try:
            facts_by_address = _call_in_time(self._facts_by_address, _FACTS_S)
        except _NoAnswerError as exc:
            raise ClusterError(
                f"not all of the {self._num_workers} workers at {self._address} answer within {_FACTS_S} s: one of them hangs, "
                "or cannot be reached from here. End it, and run the same command again"
            ) from exc
        local, first = worker_facts(), None
        for address, facts in facts_by_address.items():
            if not isinstance(facts, WorkerFacts):
                raise ClusterError(
                    f"worker {address} cannot load radio-cache {local.radio_cache} ({type(facts).__name__}: {facts}): install "
                    "the same version there as here"
                )
            for package in ("radio_cache", "torch"):
                theirs, ours = getattr(facts, package), getattr(local, package)
                if theirs != ours:
                    raise ClusterError(
                        f"worker {address} on {facts.host} has {package.replace('_', '-')} {theirs}, this command {ours}: "
                        "install the same there"
                    )
            # Workers are compared with the first one: any two kinds would show.
            first = first or facts
            if facts.has_gpu != first.has_gpu:
                raise ClusterError(
                    f"workers {address} on {facts.host} and the one on {first.host} would not store the same bytes: one has "
                    "a GPU, one has none. Take workers of one kind"
                )
        assert first is not None, "there is a worker"
        return first


class _NoAnswerError(TimeoutError):
    """A call that has neither returned nor raised in time."""


def _call_in_time(call: Callable[[], _T], seconds: float) -> _T:
    """Return what `call` returns, or raise what it raises. Raise _NoAnswerError if it does neither in time.

    Dask waits without end for a worker that hangs, and for a program that listens at an address and is no scheduler, such as
    its own web page.
    """
    answer = concurrent.futures.Future[_T]()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as exc:  # raised again in the thread that waits
            answer.set_exception(exc)

    # A daemon, because the call may never return and must not keep the process alive.
    threading.Thread(target=run, daemon=True).start()
    done, _ = concurrent.futures.wait([answer], timeout=seconds)
    if not done:
        raise _NoAnswerError("something listens there and does not speak as a scheduler: the port of its web page?")
    return answer.result()


def _report(future: "Future[TaskReport]") -> TaskReport:
    """Return the report of a completed task, or an empty one if its worker has died since. Its receipt is there either way."""
    try:
        return future.result(timeout=_REPORT_S)
    except Exception:  # of many types; a lost scheduler is noticed right after
        return _EMPTY_REPORT


def _record_error(queue: TaskQueue, task: BuildTask, future: "Future[TaskReport]", *, was_alone: bool) -> None:
    from distributed import KilledWorker

    error = cast(BaseException | None, future.exception())
    if isinstance(error, KilledWorker):
        queue.record_worker_deaths(task, error.allowed_failures + 1, was_alone=was_alone)
    elif error is not None:
        queue.record_failure(task, error)


def _refuse_abandoned(cache: Cache, abandoned: Sequence[AbandonedTask]) -> None:
    """Raise ClusterError with every abandoned task, its images and the reason, if there are any."""
    if not abandoned:
        return
    lines: list[str] = []
    for item in abandoned:
        task = item.task
        if not isinstance(task, ShardTask):
            lines.append(f"{task.unit}, choosing its codec: {item.reason}")
            continue
        rows = cache.meta.shard_rows(task.shard)
        keys = [cache.index.key(row) for row in rows[:_NAMED_IMAGES]]
        more = f" and {len(rows) - len(keys)} more" if len(rows) > len(keys) else ""
        lines.append(
            f"{task.unit}, shard {task.shard} (rows {rows[0]} to {rows[-1]}: {', '.join(keys)}{more}): {item.reason}"
        )
    raise ClusterError(
        f"{cache.url}: {len(abandoned)} task{'s' if len(abandoned) > 1 else ''} could not be done, all others are; the same "
        "command tries again:\n  " + "\n  ".join(lines)
    )


def _close(client: "Client") -> None:
    with contextlib.suppress(Exception):  # of a scheduler that is gone
        client.close(timeout=2)
