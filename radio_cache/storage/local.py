"""A cache in a folder: files written aside and renamed, synced, never through a symbolic link."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import final

from radio_cache.errors import StorageError
from radio_cache.format.paths import checked_path
from radio_cache.storage.base import Part, Storage

TEMPORARY = ".tmp-"
"""Part of the names of unfinished files and folders, some of which a killed process may leave behind."""

_MAX_PARTS = 1024  # IOV_MAX of Linux: what one writev takes
# Folders checked for symbolic links; beyond this the set is emptied, so that memory stays bounded.
_MAX_KNOWN_FOLDERS = 1 << 16


@final
class LocalStorage(Storage):
    """A folder. fsync: wait until the disk has what was written; without, only a power cut can lose or tear files."""

    is_local = True

    def __init__(self, root: str | Path, *, fsync: bool = True) -> None:
        self._root = Path(root)
        self._prefix = f"{self._root}/"
        self._fsync = fsync
        self._folders: set[str] = set()
        self.url = str(self._root)

    def __reduce__(self) -> tuple[Callable[..., "LocalStorage"], tuple[Path, bool]]:
        return (_local_storage, (self._root, self._fsync))

    def read(self, path: str) -> bytes:
        with self._named(path, "read"), self.local_path(path).open("rb") as file:
            return file.read()

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
        with self._named(path, "read"), self.local_path(path).open("rb") as file:
            return [os.pread(file.fileno(), length, offset) for offset, length in ranges]

    def read_tail(self, path: str, length: int) -> tuple[bytes, int]:
        with self._named(path, "read"), self.local_path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), min(length, size), max(0, size - length)), size

    def size(self, path: str) -> int | None:
        try:
            with self._named(path, "read"):
                file_status = self.local_path(path).stat()
        except FileNotFoundError:
            return None
        return file_status.st_size

    def write(self, path: str, parts: Sequence[Part]) -> None:
        with self._written_aside(path, parts) as (temporary, target):
            temporary.replace(target)

    def create(self, path: str, data: bytes) -> bool:
        try:
            with self._written_aside(path, [data]) as (temporary, target):
                # Unlike a rename, a link fails if the name exists, so exactly one creator wins.
                os.link(temporary, target)
        except FileExistsError:
            return False
        return True

    def write_tree(self, folder: str, files: Iterable[tuple[str, bytes]], *, last: str) -> bool:
        target = self.local_path(folder)
        with self._named(folder, "write"), contextlib.ExitStack() as stack:
            new_folders = _make_folders(target.parent)
            temporary = stack.enter_context(_own_folder(target))
            try:
                for path, data in files:
                    file = temporary / checked_path(path)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
                if self._fsync:
                    _sync_tree(temporary)
                try:
                    temporary.rename(target)
                except OSError:
                    # Another process made the same folder a moment ago; the caller compares what it holds.
                    if not (target / last).exists():
                        raise
                    return False
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            self._sync_folders([*new_folders, target.parent])
        return True

    def list_files(self, folder: str = "") -> Iterator[tuple[str, int]]:
        root = self.local_path(folder)
        listed_files: list[tuple[str, int]] = []
        with self._named(folder, "list"):
            for place, folders, files in os.walk(root, onerror=_raise_unless_gone):
                folders[:] = [name for name in folders if TEMPORARY not in name]
                for name in files:
                    with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                        if TEMPORARY not in name:
                            file = Path(place) / name
                            # lstat: a link is listed itself, and reading it raises the error about links.
                            listed_files.append((file.relative_to(self._root).as_posix(), file.lstat().st_size))
        yield from sorted(listed_files)

    def list_folders(self, folder: str = "") -> list[str]:
        try:
            with self._named(folder, "list"), os.scandir(self.local_path(folder)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir() and TEMPORARY not in entry.name)
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        with self._named(path, "delete"):
            self.local_path(path).unlink(missing_ok=True)

    def delete_tree(self, folder: str) -> None:
        target = self.local_path(folder)
        # Renamed first, so that no reader sees half of the folder. The lock moves with it, so that
        # `remove_leftovers` of another process does not take it for abandoned.
        doomed = target.with_name(f"{target.name}{_temporary_suffix()}")
        with contextlib.suppress(FileNotFoundError), self._named(folder, "delete"), locked(target, wait=False):
            target.rename(doomed)
            shutil.rmtree(doomed)
            self._sync_folders([target.parent])

    @contextlib.contextmanager
    def locked(self, folder: str, *, shared: bool = False, wait: bool = True) -> Generator[bool]:
        with contextlib.ExitStack() as stack:
            held = True
            with contextlib.suppress(FileNotFoundError), self._named(folder, "read"):
                held = stack.enter_context(locked(self.local_path(folder), shared=shared, wait=wait))
            yield held

    def remove_leftovers(self) -> int:
        """Delete partial files of killed processes and return their number.

        A process that writes a temporary file holds a lock (flock) on it, which ends with the process. Names contain an
        identifier of the kernel, because a lock may be visible on that kernel only (NFS, Lustre). Leftovers of another kernel
        are deleted when they have not changed for a day.
        """
        removed = 0
        with self._named("", "clean"):
            for leftover in _leftovers(self._root):
                writer = _NAME.match(leftover.name.rpartition(TEMPORARY)[2])
                if writer is not None and _is_abandoned(leftover, near=_is_near(writer)):
                    if leftover.is_dir():
                        shutil.rmtree(leftover, ignore_errors=True)
                    else:
                        leftover.unlink(missing_ok=True)
                    removed += 1
        return removed

    def zarr_store(self) -> str:
        return str(self.local_path())

    def local_path(self, path: str = "") -> Path:
        """Return the file in the file system.

        Raises:
            StorageError: if its path contains a symbolic link, or ends at anything but a file or a folder. An untrusted
                cache could otherwise make readers open, write or wait for any file.
        """
        if not path:
            return self._root
        place = self._prefix + checked_path(path)
        folder = place.rpartition("/")[0]
        # Once for each folder, since reads of single rows would otherwise check the whole path every time.
        if folder not in self._folders:
            self._check_folders(path.split("/")[:-1])
            if len(self._folders) >= _MAX_KNOWN_FOLDERS:
                self._folders.clear()
            self._folders.add(folder)
        self._check(place, stat.S_ISREG, stat.S_ISDIR)
        return Path(place)

    def _check_folders(self, names: Sequence[str]) -> None:
        place = str(self._root)
        for name in names:
            place = f"{place}/{name}"
            # A file in place of a folder passes: the next system call reports it.
            self._check(place, stat.S_ISDIR, stat.S_ISREG)

    def _check(self, place: str, *kinds: Callable[[int], bool]) -> None:
        try:
            mode = os.lstat(place).st_mode
        except OSError:
            return  # missing or inaccessible, which the next system call reports
        if not any(is_one(mode) for is_one in kinds):
            what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
            raise StorageError(
                f"{place} is {what}, and inside a cache those are not followed, because they may lead anywhere: put a copy of "
                "the file itself there (cp -rL copies a whole cache so), or build the cache again"
            )

    @contextlib.contextmanager
    def _written_aside(self, path: str, parts: Sequence[Part]) -> Generator[tuple[Path, Path]]:
        """Yield a complete, synced temporary file and where the caller shall put it; folders are synced afterwards."""
        target = self.local_path(path)
        with self._named(path, "write", sum(memoryview(part).nbytes for part in parts)):
            new_folders: list[Path] = []
            try:
                temporary, descriptor = _own_file(target)
            except FileNotFoundError:
                new_folders = _make_folders(target.parent)
                temporary, descriptor = _own_file(target)
            try:
                _write_all(descriptor, parts)
                if self._fsync:
                    # Before the rename: a power cut could otherwise leave the new name without its content.
                    os.fdatasync(descriptor)
                yield temporary, target
            finally:
                os.close(descriptor)  # and with it the lock: the file is in its place by now
                temporary.unlink(missing_ok=True)
            self._sync_folders([target.parent, *new_folders])

    def _sync_folders(self, folders: Iterable[Path]) -> None:
        """Make renames in these folders survive a power cut."""
        if self._fsync:
            for folder in folders:
                sync_folder(folder)

    @contextlib.contextmanager
    def _named(self, path: str, doing: str, num_bytes: int | None = None) -> Generator[None]:
        """Translate system errors, except those that callers handle.

        Args:
            path: of the file, for the message.
            doing: verb for the message.
            num_bytes: size of the file to be written; None for other operations.
        """
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except NotADirectoryError as exc:
            if doing in ("read", "list", "delete"):  # below a file there is nothing to find
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.at(path)) from exc
            raise StorageError(
                f"cannot {doing} {self.at(path)}: a file is where one of its folders should be: remove that file, and run the "
                "same command again"
            ) from exc
        except OSError as exc:
            cure = _CURES.get(exc.errno or 0, "nothing that was finished is lost; the same command goes on from there")
            room = f" ({_room(self._root, num_bytes)})" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise StorageError(f"cannot {doing} {self.at(path)}: {exc.strerror or exc}{room}: {cure}") from exc


_CURES = {
    errno.ENOSPC: "free some space and run the same command again; nothing that was finished is lost",
    errno.EDQUOT: "free some space or ask for more, and run the same command again; nothing that was finished is lost",
    errno.EROFS: "the disk can only be read: choose a place that can be written",
    errno.EACCES: "choose a place that you may use, or have its permissions changed",
    errno.EPERM: "choose a place that you may use, or have its permissions changed",
    errno.EIO: "the disk has an error: copy what can be read to another one",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}


def write_atomically(path: Path, data: Part) -> None:
    """Write a file outside any cache: after a crash it has its old content or the new one."""
    LocalStorage(path.parent).write(path.name, [data])


def refused_by_system(place: Path, exc: BaseException) -> StorageError | None:
    """Return the StorageError for an error of a library that wrote to `place`.

    Libraries turn a full disk into errors of their own, some of them without the system's error as a cause.

    Returns:
        None if nothing indicates an error of the system.
    """
    root: BaseException | None = exc
    # A library may wrap the system's error several times.
    while root is not None and not isinstance(root, OSError):
        root = root.__cause__ or root.__context__
    number = root.errno if root is not None else None
    nearest = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    # Some libraries drop the system's error. A disk without free space is the likely cause then.
    if number is None and shutil.disk_usage(nearest).free < _NO_ROOM_BYTES:
        number = errno.ENOSPC
    if number is None:
        return None
    room = f" ({_room(place, None)})" if number in (errno.ENOSPC, errno.EDQUOT) else ""
    cure = _CURES.get(number, "cure that, and run the same command again")
    return StorageError(f"cannot write {place}: {os.strerror(number)}{room}: {cure}")


_NO_ROOM_BYTES = 1 << 20
"""With less than this free, an error without a cause is taken for that of a full disk."""


def sync_folder(path: Path) -> None:
    """Make renames in this folder survive a power cut; or what was written, if it is a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _room(place: Path, num_bytes: int | None) -> str:
    """Describe the disk of a path: its mount, its free space, and the requested space."""
    while not place.exists():
        place = place.parent
    place = place.resolve()
    usage = shutil.disk_usage(place)
    while not place.is_mount():
        place = place.parent
    needed = "" if num_bytes is None else f"{num_bytes} bytes were to be written, "
    return f"{needed}{usage.free} of {usage.total} bytes are free on the disk at {place}"


def _local_storage(root: Path, fsync: bool) -> LocalStorage:
    return LocalStorage(root, fsync=fsync)


def _write_all(descriptor: int, parts: Sequence[Part]) -> None:
    """Write all parts in order, without joining them."""
    waiting = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
    first = 0
    while first < len(waiting):
        written = os.writev(descriptor, waiting[first : first + _MAX_PARTS])
        # The kernel may write less than requested: finished parts are skipped, and a part that was cut goes on.
        while first < len(waiting) and written >= waiting[first].nbytes:
            written -= waiting[first].nbytes
            first += 1
        if written:
            waiting[first] = waiting[first][written:]


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it that are missing. Returns the folders that got a new entry, innermost first."""
    changed: list[Path] = []
    missing_folder = folder
    while not missing_folder.exists():
        missing_folder = missing_folder.parent
        changed.append(missing_folder)
    folder.mkdir(parents=True, exist_ok=True)
    return changed


def _sync_tree(path: Path) -> None:
    """Sync every file and folder below `path`."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync_folder(Path(folder) / name)
        sync_folder(Path(folder))


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _leftovers(path: Path) -> Iterator[Path]:
    # Beside the root lie caches whose creation was killed.
    yield from (entry for entry in path.parent.glob(f"{path.name}{TEMPORARY}*"))
    for folder, folders, files in os.walk(path):
        for name in list(folders):
            if TEMPORARY in name:
                # Removed from the walk: the folder is one leftover, with all that it holds.
                folders.remove(name)
                yield Path(folder) / name
        yield from (Path(folder) / name for name in files if TEMPORARY in name)


_NAME = re.compile(r"(?P<host>.+?)(-(?P<kernel>[0-9a-f]{8}))?-(?P<process>[0-9]{1,9})-[0-9a-f]{8}\Z")
"""Behind TEMPORARY: host, kernel, process and a random number; earlier versions had no kernel, and held no locks."""


def _temporary_suffix() -> str:
    kernel = _this_kernel() or "0" * _KERNEL_DIGITS
    return f"{TEMPORARY}{socket.gethostname()}-{kernel}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@functools.cache
def _this_kernel() -> str:
    """Return eight digits that identify this kernel since its start, the same in all containers; "" if the system has none."""
    try:
        return _BOOT_ID.read_text()[:_KERNEL_DIGITS]
    except OSError:
        return ""


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KERNEL_DIGITS = 8


def _is_near(writer: re.Match[str]) -> bool:
    """Return whether a lock of the process that chose this temporary name would be visible to this one."""
    if writer["kernel"] is None:
        # Earlier versions held no locks: on the same host the process number shows whether the writer still runs.
        return writer["host"] == socket.gethostname() and not _is_running(int(writer["process"]))
    return writer["kernel"] == _this_kernel()


def _own_file(target: Path) -> tuple[Path, int]:
    """Return a new, locked file beside `target`, opened for writing. Raises FileNotFoundError if the folder is not there."""
    for left in reversed(range(_LOCK_TRIES)):
        path = target.with_name(f"{target.name}{_temporary_suffix()}")
        # Until it is locked, another process may take the file for a leftover and delete it. Then the next name is tried.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock_new(path, descriptor) or (left == 0 and path.exists()):
            return path, descriptor
        os.close(descriptor)
        path.unlink(missing_ok=True)
    raise StorageError(
        f"cannot write {target}: what is written beside it disappears: another program cleans that folder"
    )


@contextlib.contextmanager
def _own_folder(target: Path) -> Generator[Path]:
    """Yield a new, locked folder beside `target`."""
    for left in reversed(range(_LOCK_TRIES)):
        path = target.with_name(f"{target.name}{_temporary_suffix()}")
        path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # removed before it was locked
            continue
        if _lock_new(path, descriptor) or (left == 0 and path.exists()):
            break
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
    else:
        raise StorageError(
            f"cannot write {target}: what is written beside it disappears: another program cleans that folder"
        )
    try:
        yield path
    finally:
        os.close(descriptor)


_LOCK_TRIES = 20
"""After this many failures the cause is not another process, but a file system that grants no locks (some NFS servers)."""


def _lock_new(path: Path, descriptor: int) -> bool:
    """Lock a new file or folder. Return False if another process deleted it as a leftover before it was locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: leftovers are recognised by age alone
    try:
        # The name may have been deleted and used again between the open and the lock.
        return os.path.samestat(os.stat(path), os.fstat(descriptor))  # noqa: PTH116  # beside fstat
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Generator[bool]:
    """Lock an existing file or folder and yield whether this process has the lock.

    The lock ends with the process at the latest. It holds against processes on this kernel; on a network file system perhaps
    against no others. On a file system without locks every process gets it.

    Args:
        path: of the file or folder.
        shared: hold it together with other shared holders.
        wait: until others release it; else yield False at once.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError:
            held = True
        yield held
    finally:
        os.close(descriptor)


def _is_running(process: int) -> bool:
    try:
        # Signal 0 only looks the process up; PermissionError means that another user runs it.
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_abandoned(leftover: Path, *, near: bool) -> bool:
    """Return whether no process writes it any more. near: whether a lock of its writer would be visible here."""
    try:
        if not near and time.time() - leftover.lstat().st_mtime < _FOREIGN_S:
            return False
        descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False  # gone by now, or of another user
    try:
        # Shared: NFS grants an exclusive lock only for a file that is open for writing.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(descriptor).st_mtime >= _FOREIGN_S
    finally:
        os.close(descriptor)
    return True


_FOREIGN_S = 86_400
"""Age at which an unlocked leftover counts as abandoned. A file is written in seconds, and clocks differ by less than a day."""
