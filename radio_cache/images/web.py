"""Files on web servers: whole, by range, and their size. Addresses go out as they were written.

Through urllib3. obstore, which reads buckets, rewrites addresses (an empty folder, `%2F`, a dot), wants a length in every
answer, and keeps the status of an answer to itself.
"""

import ipaddress
import os
import random
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.client import responses
from typing import Any, final
from urllib.parse import quote, unquote, urljoin
from urllib.request import getproxies, proxy_bypass

from radio_cache.errors import ImageError, LimitError, StorageError
from radio_cache.storage import buckets as object_storage

WEB = ("http", "https")

# Scheme, authority, and all the rest but the fragment, as written.
_ADDRESS = re.compile(r"(https?)://([^/?#\\]*)([^#]*)", re.IGNORECASE | re.DOTALL)
# Sent as it is. Everything else is percent-encoded.
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)\Z")

_MOVED = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 10

_GONE = (404, 410)
_PASSING = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
"""Status codes of a server in trouble, or of too many requests, which a retry may cure. 501 and 505 are final."""

_PATIENCE_S = 9.0
"""Time limit of the retries of one request, the same as for buckets."""

_MAX_RETRY_AFTER_S = 30.0
"""Longest pause that a server can impose by Retry-After."""

_INSIDE = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "::/128",
            "::1/128",
            "fc00::/7",
            "fe80::/10",
        ),
    )
)
"""Addresses of this machine, of its network, and of the services that clouds keep beside a machine."""

# Longest wait for a connection, and for the next bytes.
_CONNECT_S, _SILENCE_S = 4.0, 20.0
_PIECE_BYTES = 1 << 20
_CONNECTIONS = 64

_TARGET = "X-Target-As-Written"  # never sent: see _connections


class RefusedError(PermissionError):
    """A server answers, and does not give this one page."""


class ServerError(StorageError):
    """A server answers with an error of its own, also after retries."""


class UnreachableError(StorageError):
    """A server does not answer, or not in HTTP, or cannot show who it is."""


@dataclass(frozen=True)
class Answer:
    """An answer to a request for a page.

    Attributes:
        data: the bytes.
        num_bytes: of the whole page; None if the server does not send it.
        changed_ns: time of the last change since 1970; None if the server does not send it.
    """

    data: bytes
    num_bytes: int | None
    changed_ns: int | None


def fetch_page(url: str, max_bytes: int) -> bytes:
    """Return a whole page.

    Raises:
        LimitError: it has more than `max_bytes` bytes; no more than that are read.
        FileNotFoundError, RefusedError: the server gives no such page.
        ImageError: the address is none.
        StorageError: the server cannot be reached, or breaks off. ServerError: it is in trouble itself.
    """
    return _ask(url, {}, max_bytes).data


def fetch_page_range(url: str, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset` on, fewer where the page ends. Raises as `fetch_page` does."""
    return _ask(url, {"Range": f"bytes={offset}-{offset + length - 1}"}, length, offset=offset).data


def page_status(url: str) -> Answer:
    """Return the size and the age of a page, without its data. Raises as `fetch_page` does."""
    try:
        answer = _ask(url, {}, 0, method="HEAD")
        if answer.num_bytes is not None:
            return answer
    except (OSError, ServerError):
        pass  # the address is signed for GET alone, or the server does not know HEAD
    return _ask(url, {"Range": "bytes=0-0"}, 0, method="GET")


def can_connect(url: str) -> bool:
    """Return whether the server of a page, or the proxy before it, takes a new connection; those that are kept prove little."""
    try:
        host, port = _host_port(url)
        proxy = "" if proxy_bypass(host) else getproxies().get(url.partition(":")[0].lower(), "")
        if proxy:
            host, port = _host_port(proxy if "://" in proxy else f"http://{proxy}")
        socket.create_connection((host.strip("[]"), port), _CONNECT_S).close()
    except (OSError, UnicodeError):
        return False
    return True


def _ask(url: str, headers: dict[str, str], max_bytes: int, *, offset: int = -1, method: str = "GET") -> Answer:
    """Request a page until there is an answer, for a limited time.

    Args:
        url: of the page.
        headers: of the request.
        max_bytes: longest accepted answer.
        offset: of the requested range; -1 for the whole page.
        method: GET or HEAD.
    """
    began, pause_s = time.monotonic(), 0.1
    for tries_left in range(object_storage.RETRIES, -1, -1):
        wait_s = pause_s * (0.5 + random.random())  # so that threads do not retry all at once
        try:
            return _asked_once(url, headers, max_bytes, offset, method)
        except _PassingError as exc:
            wait_s = wait_s if exc.retry_after_s is None else min(exc.retry_after_s, _MAX_RETRY_AFTER_S)
            # A pause that the server requests does not count against the time limit.
            over = exc.retry_after_s is None and time.monotonic() - began + wait_s > _PATIENCE_S
            if not tries_left or over:
                raise exc.error from exc.__cause__
        time.sleep(wait_s)
        pause_s *= 2
    raise AssertionError


class _PassingError(Exception):
    """An error that a retry may cure.

    Attributes:
        error: to raise after the last retry.
        retry_after_s: pause that the server requests.
    """

    def __init__(self, error: StorageError | RefusedError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.retry_after_s = error, retry_after_s


def _asked_once(url: str, headers: dict[str, str], max_bytes: int, offset: int, method: str) -> Answer:
    from urllib3 import exceptions

    followed = _Followed(url, method, headers)
    try:
        with followed as response:
            return _answer(url, response, max_bytes, offset, method)
    except (exceptions.LocationValueError, UnicodeError) as exc:  # also LocationParseError
        raise ImageError(f"cannot be read: {url!r:.200} is no address of a web page ({exc})") from exc
    except exceptions.DecodeError as exc:
        raise ImageError(f"cannot be read: the server sends {url:.200} compressed, and wrongly ({exc})") from exc
    except exceptions.HTTPError as exc:
        host = "/".join(url.split("/", 3)[:3])
        reason = " ".join(str(exc).split())[:200]
        # The named server answers, and redirects to one that does not: this page is at fault.
        if not _same_server(url, followed.url):
            raise _PassingError(
                RefusedError(f"{url} is redirected to {followed.url:.200}, which cannot be reached ({reason})")
            ) from exc
        raise _PassingError(
            UnreachableError(
                f"cannot read {url}: {host} cannot be reached: check the address and the network, and run the same command "
                f"again. ({type(exc).__name__}: {reason})"
            )
        ) from exc


def _answer(url: str, response: Any, max_bytes: int, offset: int, method: str) -> Answer:
    status = int(response.status)
    headers: Mapping[str, str] = response.headers
    if status == 416:  # the range begins behind the end
        first = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        return Answer(b"", int(first[2]) if first and first[2] != "*" else 0, None)
    if status not in (200, 203, 206):
        raise _refusal(url, status, headers)
    num_bytes = _whole_size(headers, status)
    changed_ns = _changed_ns(headers.get("Last-Modified", ""))
    if method == "HEAD" or (offset < 0 and max_bytes == 0):
        return Answer(b"", num_bytes, changed_ns)
    if offset >= 0:
        first = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if status != 206 or first is None or int(first[1] or -1) != offset:
            raise StorageError(
                f"cannot read {url}: its server gives whole files only (it ignores Range): fetch it, and name the copy"
            )
    # Refused by its header, before the body is read.
    elif num_bytes is not None and num_bytes > max_bytes:
        raise LimitError(f"{url} has {num_bytes} bytes; the longest that can be true has {max_bytes}")
    data = bytearray()
    # One byte more than allowed is read, to notice a longer body: the header may be missing or wrong.
    while piece := response.read(min(_PIECE_BYTES, max_bytes + 1 - len(data))):
        data += piece
        if len(data) > max_bytes:
            if offset >= 0:
                break
            raise LimitError(f"{url} has more than {max_bytes} bytes, and nothing longer can be true")
    return Answer(bytes(data[:max_bytes]), num_bytes, changed_ns)


def _refusal(url: str, status: int, headers: Mapping[str, str]) -> Exception:
    status_line = f"{status} {responses.get(status, '')}".strip()
    if status in _GONE:
        return FileNotFoundError(f"{url}: {status_line}")
    if status in _PASSING:
        return _PassingError(
            ServerError(
                f"cannot read {url}: the server answers {status_line}, however often it is asked: "
                "run the same command again when it is well"
            ),
            _retry_after_s(headers.get("Retry-After", "")),
        )
    return RefusedError(f"the server answers {status_line} for {url}")


def _whole_size(headers: Mapping[str, str], status: int) -> int | None:
    if status == 206:
        ranges = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        return None if ranges is None or ranges[2] == "*" else int(ranges[2])
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and headers.get("Content-Encoding", "identity") == "identity" else None


def _changed_ns(date: str) -> int | None:
    try:
        return round(parsedate_to_datetime(date).timestamp() * 1e9) or None
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _retry_after_s(seconds: str) -> float | None:
    # The header may hold a date instead, which depends on the server's clock and is ignored.
    return float(seconds) if seconds.isdecimal() and len(seconds) < 9 else None


@final
class _Followed:
    """The answer at the end of all redirects, to be read inside `with`. Raises RefusedError where they lead nowhere."""

    def __init__(self, url: str, method: str, headers: dict[str, str]) -> None:
        self._first, self._method, self._headers = url, method, headers
        self.url = url
        self._response: Any = None

    def __enter__(self) -> Any:
        for _ in range(_MAX_REDIRECTS + 1):
            self._response = _sent(self.url, self._method, self._headers)
            location = self._response.headers.get("Location", "")
            if self._response.status not in _MOVED or not location:
                return self._response
            self.__exit__()
            # Servers write them in UTF-8, and http.client reads them in Latin-1.
            following = urljoin(self.url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
            _refuse_odd_redirect(self._first, self.url, following)
            self.url = following
        raise RefusedError(f"{self._first} is redirected more than {_MAX_REDIRECTS} times, to {self.url:.200} at last")

    def __exit__(self, *_: object) -> None:
        # Small answers of servers that go on are read to their end, so that the connection can be used again.
        length = self._response.headers.get("Content-Length", "")
        if self._method == "HEAD" or (length.isdecimal() and int(length) < 1 << 16):
            self._response.drain_conn()
        else:
            self._response.close()
        self._response.release_conn()


def _sent(url: str, method: str, headers: dict[str, str]) -> Any:
    """Send one request and return the response after its headers, before its body."""
    from urllib3.exceptions import LocationValueError
    from urllib3.util import Timeout, make_headers

    address = _ADDRESS.match(url)
    if address is None or not address[2]:
        raise LocationValueError("no host")
    scheme, authority, target = address.groups()
    login, _, host = authority.rpartition("@")
    target = quote(target.encode("utf-8", "surrogateescape"), safe=_PRINTABLE)
    target = target if target.startswith("/") else f"/{target}"
    more = {"Accept-Encoding": "identity", "User-Agent": "radio-cache", **headers}
    if login:
        more |= make_headers(basic_auth=unquote(login))
    bare = f"{scheme.lower()}://{host}"
    proxy = "" if proxy_bypass(host) else getproxies().get(scheme.lower(), "")
    # urllib3 would normalise the path, which breaks signed addresses. So the target travels as a header that
    # `_connections_of` takes out again. Redirects and retries are those of `_Followed` and `_ask`.
    return _connections(proxy).request(
        method,
        f"{bare}/",
        headers={**more, _TARGET: target},
        preload_content=False,
        redirect=False,
        retries=False,
        timeout=Timeout(connect=_CONNECT_S, read=_SILENCE_S),
    )


@lru_cache(maxsize=8)
def _connections_of(proxy: str, process: int) -> Any:  # connections do not survive a fork
    """Return urllib3's pool of open connections. It sends the target of a request as written."""
    import urllib3
    from urllib3.connection import HTTPConnection, HTTPSConnection

    def as_written(kind: Any) -> Any:
        class Connection(kind):
            def request(self, method: str, url: str, body: Any = None, headers: Any = None, **more: Any) -> None:
                headers = dict(headers or {})
                target: str = headers.pop(_TARGET, "/")
                # A proxy that passes plain requests on is given the whole address.
                super().request(method, url.rstrip("/") + target, body=body, headers=headers, **more)

        return Connection

    if proxy:
        manager: Any = urllib3.ProxyManager(
            proxy if "://" in proxy else f"http://{proxy}", num_pools=64, maxsize=_CONNECTIONS
        )
    else:
        manager = urllib3.PoolManager(num_pools=64, maxsize=_CONNECTIONS)
    pools = {
        "http": type("HttpPool", (urllib3.HTTPConnectionPool,), {"ConnectionCls": as_written(HTTPConnection)}),
        "https": type("HttpsPool", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": as_written(HTTPSConnection)}),
    }
    manager.pool_classes_by_scheme = pools
    return manager


def _connections(proxy: str) -> Any:
    return _connections_of(proxy, os.getpid())


def _refuse_odd_redirect(first: str, url: str, following: str) -> None:
    """Raise RefusedError for a redirect from outside into the network of this machine.

    Redirects to public hosts are followed. Addresses may come from an untrusted cache, which must not reach servers that it does
    not name.
    """
    match = _ADDRESS.match(following)
    if match is None or not match[2]:
        raise RefusedError(f"{first} is redirected to {following:.200}, which is no web page")
    if _same_server(url, following):
        return
    host, port = _host_port(following)
    if not _is_public(host, port):
        raise RefusedError(
            f"{first} is redirected to {following:.200}, a server inside this network: name that address itself if it is meant"
        )


def _same_server(first_url: str, second_url: str) -> bool:
    (host, port), (second_host, second_port) = _host_port(first_url), _host_port(second_url)
    # http and https of a host are one server; another port may be another service.
    return host == second_host and (port == second_port or {port, second_port} <= {80, 443})


def _host_port(url: str) -> tuple[str, int]:
    from urllib3.util import parse_url

    parsed = parse_url(url)
    return (parsed.host or "").lower(), parsed.port or (443 if parsed.scheme == "https" else 80)


def _is_public(host: str, port: int, resolve: Callable[..., Any] = socket.getaddrinfo) -> bool:
    """Return whether all addresses of a host are outside this network; also of one that only a proxy can find."""
    try:
        addresses = {
            str(entry[4][0]).partition("%")[0] for entry in resolve(host.strip("[]"), port, type=socket.SOCK_STREAM)
        }
    except OSError:
        return True  # a request to it fails by itself, or goes through a proxy
    # All have to be public, since the connection may go to any of them.
    return not any(_is_inside(ipaddress.ip_address(address)) for address in addresses)


def _is_inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    # ::ffff:10.0.0.1 leads to 10.0.0.1.
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in _INSIDE)
