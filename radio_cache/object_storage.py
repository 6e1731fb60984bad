"""A cache in a bucket: S3 and what speaks its language, Google, Azure; through obstore, imported when first needed.

One object is one file of the cache; a PUT is atomic, and `If-None-Match: *` makes exactly one of several creators win.
Reads give up on a silent server after seconds, not minutes; what failed for a moment is tried again.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, final

from radio_cache.errors import StorageError
from radio_cache.storage import Part, Storage, checked_path

RETRIES = 5
"""Of a request that failed for a moment, with growing pauses, within nine seconds."""

_COALESCE_BYTES = 1 << 20


class _Client:
    """The process that uses obstore: its threads do not survive a fork."""

    process: ClassVar[int | None] = None


@final
class ObjectStorage(Storage):
    """A prefix of a bucket, through obstore. Credentials and endpoint come from the environment, or from `options`."""

    is_local = False

    def __init__(self, url: str, *, options: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._options = dict(options or {})
        self._stores: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Callable[..., "ObjectStorage"], tuple[str, dict[str, str]]]:
        return (_object_storage, (self.url, self._options))

    def read(self, path: str) -> bytes:
        import obstore

        with self._named(path, "read"):
            return bytes(obstore.get(self._store("read"), checked_path(path)).bytes())

    def read_at_most(self, path: str, most: int) -> bytes:
        import obstore

        with self._named(path, "read"):
            got = obstore.get(self._store("read"), checked_path(path))
            size = got.meta["size"]
            if size <= most:
                return bytes(got.bytes())
        raise self._too_large(path, size, most)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
        import obstore

        if not ranges:
            return []
        store = self._store("read")
        with self._named(path, "read"):
            try:
                if all(length for _, length in ranges):
                    return _get_ranges(store, checked_path(path), ranges)
            except obstore.exceptions.BaseError as exc:
                if not _is_about_ranges(exc):
                    raise
            # One of them begins beyond the end of the object, which was cut short; or there is nothing to get.
            size = obstore.head(store, checked_path(path))["size"]
            inside = [(offset, length) for offset, length in ranges if offset < size and length]
            found = iter(_get_ranges(store, path, inside) if inside else [])
            return [next(found) if offset < size and length else b"" for offset, length in ranges]

    def read_tail(self, path: str, length: int) -> tuple[bytes, int]:
        import obstore

        size = None if length else self.size(path)
        with self._named(path, "read"):
            if size is None:
                try:
                    got = obstore.get(
                        self._store("read"), checked_path(path), options={"range": {"suffix": max(length, 1)}}
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
                return obstore.head(self._store("read"), checked_path(path))["size"]
        except FileNotFoundError:
            return None

    def size_and_time(self, path: str) -> tuple[int, datetime]:
        """Bytes in an object, and when it was written; 1970 where the server does not say."""
        import obstore

        with self._named(path, "read"):
            meta = obstore.head(self._store("read"), checked_path(path))
            return meta["size"], meta["last_modified"]

    def write(self, path: str, parts: Sequence[Part]) -> None:
        import obstore

        with self._named(path, "write"):
            obstore.put(self._store("write"), checked_path(path), _joined(parts), use_multipart=False)

    def create(self, path: str, data: bytes) -> bool:
        import obstore

        try:
            with self._named(path, "write"):
                obstore.put(self._store("write"), checked_path(path), data, mode="create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def write_tree(self, folder: str, files: Iterable[tuple[str, bytes]], *, last: str) -> bool:
        below = f"{folder}/" if folder else ""
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
        """As any storage does. tell: told of every page that the bucket sends how many files it names."""
        import obstore

        found: list[tuple[str, int]] = []
        with self._named(folder, "list"):
            for batch in obstore.list(self._store("read"), checked_path(folder) or None, chunk_size=1000):
                found += [(meta["path"], meta["size"]) for meta in batch]
                tell(len(batch))
        yield from sorted(found)

    def list_folders(self, folder: str = "") -> list[str]:
        import obstore

        with self._named(folder, "list"):
            found = obstore.list_with_delimiter(self._store("read"), checked_path(folder) or None)
        return sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in found["common_prefixes"])

    def delete(self, path: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._named(path, "delete"):
            obstore.delete(self._store("write"), checked_path(path))

    def delete_tree(self, folder: str) -> None:
        import obstore

        # The document first: without it nobody takes what is left for a group.
        files = sorted((path for path, _ in self.list_files(folder)), key=lambda path: not path.endswith("zarr.json"))
        for first in range(0, len(files), 1000):
            with contextlib.suppress(FileNotFoundError), self._named(folder, "delete"):
                obstore.delete(self._store("write"), files[first : first + 1000])

    def remove_leftovers(self) -> int:
        """Nothing to do: an object is there as a whole, or not at all."""
        return 0

    def _store(self, kind: str) -> Any:
        """obstore's store, made when first needed. Reads and writes wait differently: a long upload is silent."""
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
            client: dict[str, Any] = {"connect_timeout": timedelta(seconds=4), "timeout": timedelta(minutes=10)}
            if kind == "read":
                client["read_timeout"] = timedelta(seconds=20)
            if self._endpoint().startswith("http://"):
                client["allow_http"] = True
            retry: Any = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=9)}
            try:
                # Its overloads, one per kind of URL, do not fit a dict of options.
                connect: Any = obstore.store.HTTPStore.from_url if self._is_web else obstore.store.from_url
                self._stores[kind] = connect(self.url, client_options=client, retry_config=retry, **self._options)
            except (obstore.exceptions.BaseError, ValueError) as exc:
                raise StorageError(f"{self.url} cannot be opened: {_first_line(exc)}: see docs/cloud.md") from exc
        return self._stores[kind]

    @property
    def _is_web(self) -> bool:
        """Whether this is a web server, whoever runs it: image files may lie there."""
        return self.url.startswith(("http://", "https://"))

    def _endpoint(self) -> str:
        if self._is_web:
            return self.url
        for key in ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url"):
            if key in self._options:
                return self._options[key]
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        return next((os.environ[name] for name in names if os.environ.get(name)), "")

    @contextlib.contextmanager
    def _named(self, path: str, doing: str) -> Generator[None]:
        """Turn the library's words into ours."""
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
            raise FileExistsError(errno.EEXIST, "the object exists", self.at(path)) from exc
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as exc:
            raise self._error(
                path, doing, "these credentials are not accepted or may not do this: check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or what your provider uses, and the rights of that user", exc,
            ) from exc  # fmt: skip
        except exceptions.BaseError as exc:
            text = str(exc)
            if "NoSuchBucket" in text:
                cure = "there is no such bucket: create it, or check the name"
            elif "InvalidAccessKeyId" in text or "SignatureDoesNotMatch" in text or "169.254.169.254" in text:
                cure = "no credentials, or wrong ones: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (docs/cloud.md)"
            elif any(sign in text for sign in ("onnect", "dns error", "timed out", "sending request")):
                where = self._endpoint() or "the provider's servers"
                check = "the address" if self._is_web else "AWS_ENDPOINT_URL"
                cure = f"{where} cannot be reached: check {check} and the network, and run the same command again"
            else:
                cure = "the same command goes on from there; nothing that was finished is lost"
            raise self._error(path, doing, cure, exc) from exc

    def _error(self, path: str, doing: str, cure: str, exc: Exception) -> StorageError:
        return StorageError(f"cannot {doing} {self.at(path)}: {cure}. ({_first_line(exc)})")


def _object_storage(url: str, options: dict[str, str]) -> ObjectStorage:
    return ObjectStorage(url, options=options)


def _get_ranges(store: Any, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
    import obstore

    found = obstore.get_ranges(
        store, path, starts=[offset for offset, _ in ranges], lengths=[length for _, length in ranges],
        coalesce=_COALESCE_BYTES,
    )  # fmt: skip
    return [memoryview(part) for part in found]


def _joined(parts: Sequence[Part]) -> Part:
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_about_ranges(exc: Exception) -> bool:
    text = str(exc).lower()
    return "range" in text or "416" in text


def _first_line(exc: Exception) -> str:
    line = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
    return line[:300]
