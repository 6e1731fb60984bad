"""A cache in a bucket: S3 and what speaks its language, Google, Azure; through obstore, imported when first needed.

One object is one file of the cache; a PUT is atomic, and `If-None-Match: *` makes exactly one of several creators win.
Reads give up on a silent server after seconds, not minutes; what failed for a moment is tried again.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, final

from radio_cache.errors import StorageError
from radio_cache.format.paths import checked_path
from radio_cache.storage.base import Part, Storage

RETRIES = 5
"""Of a request that failed for a moment, with growing pauses, within nine seconds."""

# Ranges with smaller gaps become one request: the wait for another costs more than the gap.
_COALESCE_BYTES = 1 << 20

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestTimeTooSkewed", "RequestExpired")
"""Error codes of S3 and compatible servers for credentials that are no longer valid."""


class _Client:
    """The process that uses obstore: its threads do not survive a fork."""

    process: ClassVar[int | None] = None


@final
class ObjectStorage(Storage):
    """A prefix of a bucket, through obstore. Credentials and endpoint come from the environment, or from `options`."""

    is_local = False

    def __init__(
        self, url: str, *, options: Mapping[str, str] | None = None, check: Callable[[str], str] = checked_path
    ) -> None:
        """Args: check: returns a path as it is, or raises for one that no file may have."""
        self.url = url.rstrip("/")
        self._options = dict(options or {})
        self._checked = check
        self._stores: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Callable[..., "ObjectStorage"], tuple[Any, ...]]:
        # Without the open stores: their connections belong to this process.
        return (_object_storage, (self.url, self._options, self._checked))

    def read(self, path: str) -> bytes:
        import obstore

        with self._named(path, "read"):
            return bytes(obstore.get(self._store("read"), self._checked(path)).bytes())

    def read_at_most(self, path: str, max_bytes: int) -> bytes:
        import obstore

        with self._named(path, "read"):
            got = obstore.get(self._store("read"), self._checked(path))
            # Known from the headers: the body of an object that is too large is never read.
            size = got.meta["size"]
            if size <= max_bytes:
                return bytes(got.bytes())
        raise self._too_large(path, size, max_bytes)

    def zarr_store(self) -> Any:
        from zarr.storage import ObjectStore

        return ObjectStore(self._store("read"), read_only=True)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
        import obstore

        if not ranges:
            return []
        store = self._store("read")
        with self._named(path, "read"):
            try:
                if all(length for _, length in ranges):
                    return _get_ranges(store, self._checked(path), ranges)
            except obstore.exceptions.BaseError as exc:
                if not _is_about_ranges(exc):
                    raise
            # One of them begins beyond the end of the object, which was cut short; or there is nothing to get.
            size = obstore.head(store, self._checked(path))["size"]
            inside = [(offset, length) for offset, length in ranges if offset < size and length]
            parts = iter(_get_ranges(store, path, inside) if inside else [])
            return [next(parts) if offset < size and length else b"" for offset, length in ranges]

    def read_tail(self, path: str, length: int) -> tuple[bytes, int]:
        import obstore

        # HTTP has no empty range, so only the size is requested for length 0.
        size = None if length else self.size(path)
        with self._named(path, "read"):
            if size is None:
                try:
                    got = obstore.get(
                        self._store("read"), self._checked(path), options={"range": {"suffix": max(length, 1)}}
                    )
                    return bytes(got.bytes())[-length:] if length else b"", got.meta["size"]
                except obstore.exceptions.BaseError as exc:
                    # Azure has no suffix ranges, and an empty object has no range at all.
                    if not _is_about_ranges(exc):
                        raise
            size = obstore.head(self._store("read"), path)["size"]
            start = max(0, size - length)
            data = bytes(obstore.get_range(self._store("read"), path, start=start, end=size)) if size > start else b""
            return data, size

    def size(self, path: str) -> int | None:
        import obstore

        try:
            with self._named(path, "read"):
                return obstore.head(self._store("read"), self._checked(path))["size"]
        except FileNotFoundError:
            return None

    def size_and_time(self, path: str) -> tuple[int, datetime]:
        """Return the size of an object and the time of its last write; 1970 if the server does not send it."""
        import obstore

        with self._named(path, "read"):
            meta = obstore.head(self._store("read"), self._checked(path))
            return meta["size"], meta["last_modified"]

    def write(self, path: str, parts: Sequence[Part]) -> None:
        import obstore

        with self._named(path, "write"):
            # One PUT is atomic. A multipart upload that is killed leaves invisible parts, which are billed.
            obstore.put(self._store("write"), self._checked(path), _joined(parts), use_multipart=False)

    def create(self, path: str, data: bytes) -> bool:
        import obstore

        try:
            with self._named(path, "write"):
                # `If-None-Match: *`: the server lets exactly one creator win.
                obstore.put(self._store("write"), self._checked(path), data, mode="create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def write_tree(self, folder: str, files: Iterable[tuple[str, bytes]], *, last: str) -> bool:
        below = f"{folder}/" if folder else ""
        # Saves the upload. Among simultaneous writers the conditional write at the end decides.
        if self.exists(below + last):
            return False
        decisive = b""
        for path, data in files:
            if path == last:
                decisive = data
            else:
                self.write(below + path, [data])
        return self.create(below + last, decisive)

    def list_files(self, folder: str = "", tell: Callable[[int], object] = lambda _: None) -> Iterator[tuple[str, int]]:
        """Yield the files as `Storage.list_files` does. `tell` is called with the number of files of each page of the bucket."""
        import obstore

        listed_files: list[tuple[str, int]] = []
        with self._named(folder, "list"):
            # Pages of 1,000, the most that S3 lists or deletes in one request.
            for batch in obstore.list(self._store("read"), self._checked(folder) or None, chunk_size=1000):
                listed_files += [(meta["path"], meta["size"]) for meta in batch]
                tell(len(batch))
        yield from sorted(listed_files)

    def list_folders(self, folder: str = "") -> list[str]:
        import obstore

        with self._named(folder, "list"):
            listing = obstore.list_with_delimiter(self._store("read"), self._checked(folder) or None)
        return sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in listing["common_prefixes"])

    def delete(self, path: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._named(path, "delete"):
            obstore.delete(self._store("write"), self._checked(path))

    def delete_tree(self, folder: str) -> None:
        import obstore

        # The documents first: without one no reader takes the remaining files for a group.
        files = sorted((path for path, _ in self.list_files(folder)), key=lambda path: not path.endswith("zarr.json"))
        for first in range(0, len(files), 1000):
            with contextlib.suppress(FileNotFoundError), self._named(folder, "delete"):
                obstore.delete(self._store("write"), files[first : first + 1000])

    def remove_leftovers(self) -> int:
        """Nothing to do: an object is there as a whole, or not at all."""
        return 0

    def _store(self, kind: str) -> Any:
        """Return the store of obstore, created on first use. Reads and writes have different timeouts."""
        if _Client.process not in (None, os.getpid()):
            raise StorageError(
                f"{self.url}: this process was forked from one that has used a bucket, and the library for it cannot follow: "
                "start worker processes with 'spawn' or 'forkserver'"
            )
        if kind not in self._stores:
            try:
                import obstore.store
            except ImportError as exc:
                raise StorageError(f"{self.url}: buckets need the package obstore: pip install obstore") from exc
            _Client.process = os.getpid()
            # Reads give up on a silent server within seconds. A PUT of a large shard may stay without an answer for minutes.
            client: dict[str, Any] = {"connect_timeout": timedelta(seconds=4), "timeout": timedelta(minutes=10)}
            if kind == "read":
                client["read_timeout"] = timedelta(seconds=20)
            # obstore refuses unencrypted endpoints by default, and servers in a local network often are.
            if self.endpoint().startswith("http://"):
                client["allow_http"] = True
            retry: Any = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=9)}
            try:
                # Its overloads, one per kind of URL, do not fit a dict of options.
                connect: Any = obstore.store.from_url
                self._stores[kind] = connect(self.url, client_options=client, retry_config=retry, **self._options)
            except (obstore.exceptions.BaseError, ValueError) as exc:
                raise StorageError(f"{self.url} cannot be opened: {_first_line(exc)}: see docs/cloud.md") from exc
        return self._stores[kind]

    def endpoint(self) -> str:
        """Return the address of the server that was named; "" for the provider's own."""
        for key in ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url"):
            if key in self._options:
                return self._options[key]
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        return next((os.environ[name] for name in names if os.environ.get(name)), "")

    @contextlib.contextmanager
    def _named(self, path: str, doing: str) -> Generator[None]:
        """Translate errors of the library into those of this package."""
        from obstore import exceptions

        try:
            yield
        except FileNotFoundError as exc:  # obstore's NotFoundError is one
            if "NoSuchBucket" in str(exc):
                raise self._error(path, doing, "there is no such bucket: create it, or check the name", exc) from exc
            if doing == "write":
                raise self._error(path, doing, "there is no such bucket: create it, or check the name", exc) from exc
            raise FileNotFoundError(errno.ENOENT, "no such object", self.at(path)) from exc
        except exceptions.AlreadyExistsError as exc:
            # obstore raises it for status 409, with which Azure also refuses reads of archived objects.
            if doing != "write":
                raise self._error(path, doing, "the bucket does not give it in the state that it is in", exc) from exc
            raise FileExistsError(errno.EEXIST, "the object exists", self.at(path)) from exc
        except exceptions.BaseError as exc:
            raise self._error(path, doing, self._cure(exc, doing), exc) from exc

    def _cure(self, exc: Exception, doing: str) -> str:
        """Return what is wrong, in words, and what to do about it."""
        from obstore import exceptions

        text = str(exc)
        status = _STATUS.search(text)
        code = int(status[1]) if status else 0
        # obstore reports most errors as text alone. The most specific signs come first.
        if any(sign in text for sign in _EXPIRED):
            return (
                "the credentials are valid no longer: get new ones (or set the clock), and run the same command again"
            )
        if isinstance(exc, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            return (
                "these credentials are not accepted or may not do this: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "what your provider uses, and the rights of that user"
            )
        if "NoSuchBucket" in text:
            return "there is no such bucket: create it, or check the name"
        # 169.254.169.254 is the clouds' metadata service, where obstore looks for credentials if none are set.
        if any(sign in text for sign in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "169.254.169.254")):
            return "no credentials, or wrong ones: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (docs/cloud.md)"
        if code == 501 and doing == "write":
            return (
                "the server does not know conditional writes (If-None-Match), without which two builds could overwrite each "
                "other: use a newer version of it or another one (docs/cloud.md), or build on a disk"
            )
        if code == 507:
            return "the server has no room left: free some, and run the same command again"
        if "LOCATION" in text or code in range(300, 400):
            return "the bucket is in another region, or at another address: set AWS_REGION, or AWS_ENDPOINT_URL"
        if any(sign in text for sign in ("onnect", "dns error", "timed out", "sending request")):
            where = self.endpoint() or "the provider's servers"
            return f"{where} cannot be reached: check AWS_ENDPOINT_URL and the network, and run the same command again"
        if (code in range(400, 500) and code not in (408, 425, 429)) or code == 501:
            return "the server does not accept such a request: check the credentials, which may have expired, and AWS_REGION"
        return "the same command goes on from there; nothing that was finished is lost"

    def _error(self, path: str, doing: str, cure: str, exc: Exception) -> StorageError:
        return StorageError(f"cannot {doing} {self.at(path)}: {cure}. ({_first_line(exc)})")


def _object_storage(url: str, options: dict[str, str], check: Callable[[str], str] = checked_path) -> ObjectStorage:
    return ObjectStorage(url, options=options, check=check)


def _get_ranges(store: Any, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
    import obstore

    buffers = obstore.get_ranges(
        store,
        path,
        starts=[offset for offset, _ in ranges],
        lengths=[length for _, length in ranges],
        coalesce=_COALESCE_BYTES,
    )
    # Views of obstore's buffers, without a copy.
    return [memoryview(part) for part in buffers]


def _joined(parts: Sequence[Part]) -> Part:
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_about_ranges(exc: Exception) -> bool:
    text = str(exc).lower()
    return "range" in text or "416" in text


def _first_line(exc: Exception) -> str:
    line = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
    return line[:300]
