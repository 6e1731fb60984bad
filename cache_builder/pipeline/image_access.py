"""Reading of image files in a build. A failed read is repeated.

A file is not marked unreadable when the disk or server is at fault. If other images can be read, the failing one counts as
unreadable: it is left out, and a later build tries it again. Where no image can be read, or many of the last ones cannot, the
build stops: a disk is not mounted, or a server refuses this client.
"""

import gc
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, TypeVar, final

import numpy as np

from radio_cache.errors import ImageError, RadioCacheError, SourceError, StorageError, UnreadableImageError
from radio_cache.format.schema import Container
from radio_cache.images.files import resolve_list_entry
from radio_cache.reader import Cache, digest
from radio_cache.storage.base import is_url

PAUSES_S = (0.2, 1.0)
"""Seconds before the second and the third attempt to read a file, or to decode it where memory is short."""

RECENT_IMAGES = 32
"""Size of the window of last images in which unreadable ones are counted."""

MAX_UNREADABLE = 16
"""Unreadable ones among the recent images at which a build stops, unless it leaves them out."""

_WITNESSES = 4
_PROBED_IMAGES = 12
_SPARE_BYTES = 64 << 20

T = TypeVar("T")


class Witness(NamedTuple):
    """An image known to be readable: reading the same bytes again shows that a process can reach the images."""

    row: int
    digest: bytes


@final
class ImageAccess:
    """Reads the images of a cache, in any thread.

    Args:
        cache: whose images are read; it need not be the latest view of its receipts.
        leave_out: go on however many images cannot be read, as long as others can.
        witnesses: images that another process has read.
        blind: makes the exception raised if this process can read no image, from a message.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        leave_out: bool = False,
        witnesses: Sequence[Witness] = (),
        blind: Callable[[str], RadioCacheError] = SourceError,
    ) -> None:
        self.cache, self._leave_out, self._blind = cache, leave_out, blind
        self._lock, self._one_at_a_time = threading.Lock(), threading.RLock()
        self._witnesses: dict[str, deque[Witness]] = {}
        # True for an image that could not be read.
        self._recent: deque[bool] = deque(maxlen=RECENT_IMAGES)
        for witness in witnesses:
            self._keep(witness)

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        """Images that were read, some of every place."""
        with self._lock:
            return tuple(witness for recent in self._witnesses.values() for witness in recent)

    def file(self, row: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            UnreadableImageError: this file cannot be read now, and others can.
            ImageError: no image can lie at the recorded place.
            SourceError: no image can be read, or too many cannot; or what `blind` makes.
            StorageError: there is no memory or no descriptor left.
        """
        try:
            data = self._read(row)
        except UnreadableImageError as exc:
            self._prove_sight(row, exc)
            try:
                data = self.cache.read_unchecked(row)  # what was wrong may have passed meanwhile
            except (UnreadableImageError, StorageError) as last:
                self._count_unreadable(row, exc)
                raise exc from last
        self._keep(Witness(row, digest(data)))
        return data

    def decode(self, row: int, data: bytes, decode: Callable[[bytes], T]) -> T:
        """Return what `decode` makes of an image file, tried again as by `with_memory`.

        Raises:
            ImageError: as `decode` does.
            UnreadableImageError: there is no memory for this image, and enough for another one: it is too large, or requests more
                than it needs.
            StorageError: there is no memory for any.
        """
        try:
            return self.with_memory(row, lambda: decode(data))
        except StorageError as exc:
            if not isinstance(exc.__cause__, ImageError | MemoryError) or not self._can_decode_another(row, decode):
                raise
        error = UnreadableImageError("not enough memory to decode it, and enough for other images")
        self._count_unreadable(row, error)
        raise error

    def _can_decode_another(self, row: int, decode: Callable[[bytes], T]) -> bool:
        other_rows = [witness.row for witness in self.witnesses if witness.row != row]
        with self._one_at_a_time:
            for other in other_rows[-_WITNESSES:]:
                try:
                    decode(self.cache.read_unchecked(other))
                except (ImageError, StorageError, MemoryError):
                    continue
                return True
        return False

    def with_memory(self, row: int, make: Callable[[], T]) -> T:
        """Return what `make` makes of an image; where that fails, try again, one thread at a time.

        A library that gets no memory may call an image broken. A broken image is so a second time, with memory to spare.
        Raises StorageError if there is no memory after all tries.
        """
        error: Exception
        try:
            return make()
        except (ImageError, MemoryError) as exc:
            error = exc
        for pause in (0.0, *PAUSES_S):
            time.sleep(pause)
            with self._one_at_a_time:
                try:
                    return make()
                except ImageError as exc:
                    if _has_memory():
                        raise
                    error = exc
                except MemoryError as exc:
                    error = exc
                    gc.collect()
        raise StorageError(
            f"no memory to decode image {self.cache.index.key(row)}: free some, or take fewer --threads or a smaller "
            "--batch-size, and run the same command again"
        ) from error

    def prove_sight(self) -> None:
        """Raise what `blind` makes if there are witnesses, and none of them can be read."""
        known = self.witnesses
        if known and not any(self._is_readable(witness) for witness in known):
            self._refuse(known[0].row, "it cannot be read, or is another file")

    def _read(self, row: int) -> bytes:
        """Return the bytes of a file, tried several times."""
        for pause in (*PAUSES_S, None):
            try:
                return self.cache.read_unchecked(row)
            except UnreadableImageError:
                if pause is None or is_url(self._path_or_url(row)):  # as below
                    raise
            except StorageError as exc:
                if is_url(self._path_or_url(row)):  # it has tried again already
                    if not is_listed_file(self.cache, row):
                        raise
                    raise UnreadableImageError(f"cannot be read: {exc}") from exc  # one server of many
                if pause is None:
                    raise
            except MemoryError as exc:
                if pause is None:
                    raise StorageError(f"no memory to read image {self.cache.index.key(row)}: free some") from exc
            time.sleep(pause)
        raise AssertionError

    def _prove_sight(self, row: int, error: ImageError) -> None:
        """Raise what `blind` makes unless another image can be read now, one from the same origin if one is known."""
        origin = self._origin(row)
        with self._lock:
            near = [witness for witness in self._witnesses.get(origin, ()) if witness.row != row]
            far = [witness for other, witnesses in self._witnesses.items() if other != origin for witness in witnesses]
        if near or far:
            known = near or far
            if not any(self._is_readable(witness) for witness in known):
                self._refuse(row, str(error))
            return
        for other in self._spread_rows(row):
            try:
                self._keep(Witness(other, digest(self.cache.read_unchecked(other))))
            except (ImageError, StorageError):
                continue
            return
        self._refuse(row, str(error))

    def _refuse(self, row: int, reason: str) -> NoReturn:
        container = self._container(row)
        gone = not is_url(container.path) and not os.path.exists(container.path)  # noqa: PTH110
        problem = f"{container.path} is gone" if gone else f"no image of {container.path} can be read now"
        raise self._blind(
            f"{problem} ({self.cache.index.key(row)}: {reason}): mount it, or make it readable again, and run the same command; "
            "nothing that was finished is lost"
        )

    def _spread_rows(self, row: int) -> list[int]:
        """Return rows all over the cache, those from the same container first."""
        numbers = self.cache.index.container
        near = np.flatnonzero(numbers == numbers[row])
        near, every = near[near != row], np.arange(len(numbers))
        rows: list[int] = []
        for candidates in (near, every):
            if len(candidates):
                rows += candidates[np.linspace(0, len(candidates) - 1, _PROBED_IMAGES).astype(int)].tolist()
        return [other for other in dict.fromkeys(rows) if other != row]

    def _is_readable(self, witness: Witness) -> bool:
        try:
            return digest(self.cache.read_unchecked(witness.row)) == witness.digest
        except (ImageError, StorageError):
            return False

    def _keep(self, witness: Witness) -> None:
        origin = self._origin(witness.row)
        with self._lock:
            self._witnesses.setdefault(origin, deque(maxlen=_WITNESSES)).append(witness)
            self._recent.append(False)

    def _count_unreadable(self, row: int, error: ImageError) -> None:
        with self._lock:
            self._recent.append(True)
            unreadable, recent = sum(self._recent), len(self._recent)
        if unreadable >= MAX_UNREADABLE and not self._leave_out:
            raise SourceError(
                f"{unreadable} of the last {recent} images cannot be read, the last is {self.cache.index.key(row)}: {error}. "
                "Make them readable and run the same command again; --leave-out-unreadable builds without them"
            )

    def _container(self, row: int) -> Container:
        return self.cache.meta.containers[int(self.cache.index.container[row])]

    def _path_or_url(self, row: int) -> str:
        container = self._container(row)
        if container.kind == "list":
            return resolve_list_entry(container.path, self.cache.index.key(row).removeprefix(container.prefix))
        return container.path

    def _origin(self, row: int) -> str:
        """Return the container of an image; for a listed file its server, or its disk as far as the path shows."""
        if self._container(row).kind != "list":
            return self._container(row).path
        return "/".join(self._path_or_url(row).split("/")[:3])


def known_witnesses(cache: Cache, access: ImageAccess, count: int = 8) -> tuple[Witness, ...]:
    """Return images for other processes to prove by that they see the same: recorded ones, or else some that are read now.

    Raises as `ImageAccess.file` does.
    """
    usable = cache.usable_rows()
    if len(usable):
        rows = usable[np.linspace(0, len(usable) - 1, count).astype(int)]
        return tuple(Witness(row, cache.digests[row].tobytes()) for row in dict.fromkeys(rows.tolist()))
    rows = np.linspace(0, cache.num_images - 1, count).astype(int)
    witnesses: list[Witness] = []
    for row in dict.fromkeys(rows.tolist()):
        try:
            witnesses.append(Witness(row, digest(access.file(row))))
        except ImageError:
            continue
    return tuple(witnesses)


def is_listed_file(cache: Cache, row: int) -> bool:
    """Return whether an image was named by a list, which may name what is not there, rather than found where it lies."""
    return cache.meta.containers[int(cache.index.container[row])].kind == "list"


def _has_memory() -> bool:
    try:
        # More than a decoder needs for most images, and not touched, so it costs nothing.
        np.empty(_SPARE_BYTES, np.uint8)
    except MemoryError:
        return False
    return True


__all__ = ["ImageAccess", "Witness", "is_listed_file", "known_witnesses"]
