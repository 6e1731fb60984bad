"""Pages of web servers: addresses go out as written, whatever answer comes has a name, and passing trouble condemns no image."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from radio_cache.errors import ImageError, LimitError, StorageError
from radio_cache.images import remote as remote_files
from radio_cache.images import web as web_files
from radio_cache.images.files import read_path_or_url
from radio_cache.images.remote import RemoteFile, fetch, fetch_range, remote_status

CONTENT = bytes(range(100))

Answer = tuple[int, dict[str, str], bytes | None]
"""Status, headers, and the body; None for CONTENT in chunks, without a length."""


class Site:
    """A web server on loopback. answer: (path, how often it was asked for it before) -> its answer, None for CONTENT."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.count: Counter[str] = Counter()
        self.answer: Callable[[str, int], Answer | None] = lambda path, before: None
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.requestline.split(" ")[1]  # self.path has lost an empty folder at the front
                site.asked.append((self.command, path))
                status, headers, body = site.answer(path, site.count[path]) or (200, {}, CONTENT)
                site.count[path] += 1
                wanted = self.headers.get("Range")
                if status == 200 and body is not None and wanted:
                    first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                    headers = {"Content-Range": f"bytes {first}-{last}/{len(body)}", **headers}
                    status, body = 206, body[first : last + 1]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                chunked = body is None
                if chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                elif "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT) if chunked else body or b"")

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: Any) -> None:
                """Tests are quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(remote_files, "_PAUSES_IF_REFUSED_S", (0.0, 0.0))
    monkeypatch.setattr("radio_cache.storage.buckets.RETRIES", 2)
    monkeypatch.setattr(remote_files._WebServer, "_read_anywhere", None)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Site()
    yield made
    made.close()


def status(code: int, **headers: str) -> Answer:
    return code, headers, b""


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "path",
    [
        "/img//a.jpg",
        "//a.jpg",
        "/proxy/https%3A%2F%2Fcdn.example.org%2Fa.jpg",
        "/resolve/refs%2Fconvert%2Fparquet/a.jpg",
        "/a%5Cb.jpg",
        "/a\\b.jpg",
        "/a/./b/../c.jpg",
        "/%2e%2e/a.jpg",
        "/lower%2f.jpg",
        "/100%.jpg",
        "/a%zz.jpg",
        "/a%09b.jpg",
        "/a|b^c`d{e}.jpg",
        "/a.jpg?next=//b/../c&x=%2f",
        "/folder/",
        "/a;b=1,c.jpg",
        "/",
        "/a'b\"<c>.jpg",
    ],
)
def test_an_address_goes_out_as_it_was_written(site: Site, path: str) -> None:
    assert read_path_or_url(site.url + path) == CONTENT
    assert read_path_or_url(site.url + path, 10, 5) == CONTENT[10:15]
    assert {asked for _, asked in site.asked} == {path}


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("/a b.jpg", "/a%20b.jpg"),
        ("/ü.jpg", "/%C3%BC.jpg"),
        ("/caf\udce9.jpg", "/caf%E9.jpg"),
        ("/a\x01b", "/a%01b"),
        ("/a.jpg#part", "/a.jpg"),
        ("", "/"),
        ("?id=7", "/?id=7"),
    ],
)
def test_what_no_request_can_hold_is_escaped(site: Site, written: str, sent: str) -> None:
    assert read_path_or_url(site.url + written) == CONTENT
    assert site.asked == [("GET", sent)]


def test_connections_are_used_again(site: Site) -> None:
    ports: set[int] = set()
    original = site.server.finish_request
    site.server.finish_request = lambda request, address: (ports.add(address[1]), original(request, address))[1]  # type: ignore[method-assign]
    for _ in range(5):
        assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
        read_path_or_url(f"{site.url}/a.jpg", 2, 5)
    assert len(ports) == 1


def test_a_name_and_a_password_in_the_address_are_sent_as_such(site: Site) -> None:
    heads: list[str | None] = []
    handler: Any = site.server.RequestHandlerClass
    original = handler.do_GET
    handler.do_GET = lambda self: (heads.append(self.headers.get("Authorization")), original(self))[1]
    assert read_path_or_url(site.url.replace("//", "//me:p%40ss@") + "/a.jpg") == CONTENT
    assert heads == ["Basic bWU6cEBzcw=="]


def test_plain_requests_go_through_the_proxy_of_the_environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    monkeypatch.setenv("no_proxy", "")
    assert read_path_or_url("http://pictures.invalid/img//a%2F.jpg") == CONTENT
    assert site.asked == [("GET", "http://pictures.invalid/img//a%2F.jpg")]


@pytest.mark.parametrize(
    "url", ["http:///a.jpg", "http://host:99999/a", "http://[::1/a.jpg", "http://?x", "http://a b/c.jpg"]
)
def test_what_is_no_address_is_one_unusable_image(url: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be read: .* is no address of a web page"):
        read_path_or_url(url)


# ---------------------------------------------------------------- answers


def test_a_page_in_chunks_without_a_length_is_read_and_limited(site: Site) -> None:
    site.answer = lambda path, before: (200, {}, None)
    assert read_path_or_url(f"{site.url}/live.jpg") == CONTENT
    assert fetch(f"{site.url}/live.jpg", max_bytes=100) == CONTENT
    with pytest.raises(LimitError, match="more than 99 bytes"):
        fetch(f"{site.url}/live.jpg", max_bytes=99)
    assert remote_status(f"{site.url}/live.jpg").num_bytes is None
    with pytest.raises(StorageError, match="does not say how long it is: fetch it, and name the copy"):
        RemoteFile(f"{site.url}/live.tar")


def test_a_range_behind_the_end_is_empty(site: Site) -> None:
    site.answer = lambda path, before: status(416, **{"Content-Range": "bytes */100"})
    assert fetch_range(f"{site.url}/a.tar", 100, 5) == b""
    with pytest.raises(ImageError, match="ends inside it"):
        read_path_or_url(f"{site.url}/a.tar", 100, 5)


@pytest.mark.parametrize("code", [403, 404, 405, 501])
def test_the_size_of_a_page_is_found_where_head_is_not_allowed(site: Site, code: int) -> None:
    site.answer = lambda path, before: status(code) if site.asked[-1][0] == "HEAD" else None
    assert remote_status(f"{site.url}/signed.tar?Signature=x").num_bytes == 100
    with RemoteFile(f"{site.url}/signed.tar?Signature=x") as file:
        file.seek(90)
        assert file.read(5) == CONTENT[90:95]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (404, "there is nothing at"),
        (410, "there is nothing at"),
        *(
            (code, "the server refuses")
            for code in (400, 401, 402, 403, 405, 406, 409, 412, 414, 418, 422, 423, 431, 451, 501, 304)
        ),
    ],
)
def test_a_page_that_the_server_does_not_give_is_one_unusable_image(site: Site, code: int, words: str) -> None:
    site.answer = lambda path, before: status(code) if path == "/odd.jpg" else None
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
    with pytest.raises(ImageError, match=f"cannot be read: {words} {site.url}/odd.jpg"):
        read_path_or_url(f"{site.url}/odd.jpg")


@pytest.mark.parametrize(
    "target", ["/b.jpg", "https:///x", "ftp://elsewhere/a.jpg", "file:///etc/hostname", "mailto:x"]
)
def test_redirects_that_lead_nowhere_are_one_unusable_image(site: Site, target: str) -> None:
    site.answer = lambda path, before: status(302, Location=target) if path in ("/b.jpg", "/c.jpg") else None
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
    with pytest.raises(ImageError, match=f"the server refuses {site.url}/c.jpg"):
        read_path_or_url(f"{site.url}/c.jpg")


@pytest.mark.parametrize("target", ["b%2Fc.jpg", "/b%2Fc.jpg", "//127.0.0.1:PORT/b%2Fc.jpg"])
def test_redirects_on_one_server_are_followed_as_they_are_written(site: Site, target: str) -> None:
    target = target.replace("PORT", str(site.server.server_port))
    site.answer = lambda path, before: status(307, Location=target) if path == "/a.jpg" else None
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
    assert site.asked[-1][1] == "/b%2Fc.jpg"


def test_a_redirect_to_another_server_inside_the_network_is_not_followed(site: Site) -> None:
    other = Site()
    try:
        for target in (other.url, f"http://localhost:{other.server.server_port}"):
            site.answer = lambda path, before, target=target: (
                status(302, Location=f"{target}/b.jpg") if path == "/a.jpg" else None
            )
            with pytest.raises(
                PermissionError, match=r"redirected to .* a server inside this network: name that address itself"
            ):
                web_files.fetch_page(f"{site.url}/a.jpg", 1000)
        assert other.asked == []
    finally:
        other.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07::1", True),
        ("198.18.0.7", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.20.0.1", False),
        ("192.168.7.7", False),
        ("169.254.1.1", False),
        ("100.100.1.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::7", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_addresses_inside_the_network_are_known(address: str, public: bool) -> None:
    assert web_files._is_public("some.host", 80, lambda *_, **__: [(0, 0, 0, "", (address, 80))]) is public


# ---------------------------------------------------------------- passing trouble


@pytest.mark.parametrize("code", [401, 403, 404, 408, 425, 429, 500, 502, 503, 504, 520])
def test_what_a_server_answers_for_a_moment_is_asked_again(site: Site, code: int) -> None:
    site.answer = lambda path, before: status(code) if before < 2 else None
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT


def test_the_pause_that_a_server_asks_for_is_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(web_files.time, "sleep", pauses.append)
    answers = [status(429, **{"Retry-After": "20"}), status(503, **{"Retry-After": "9999"}), None]
    site.answer = lambda path, before: answers[before]
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
    assert [pause for pause in pauses if pause] == [20, 30]


@pytest.mark.parametrize("code", [401, 403, 404, 410, 429, 500, 503])
def test_a_server_that_no_longer_gives_what_it_gave_is_the_reason_and_not_the_image(site: Site, code: int) -> None:
    site.answer = lambda path, before: status(code) if len(site.asked) > 20 else None
    for number in range(20):
        assert read_path_or_url(f"{site.url}/{number}.jpg") == CONTENT
    with pytest.raises(StorageError, match=r"20\.jpg .*/19\.jpg, which was read before, cannot be had now either"):
        read_path_or_url(f"{site.url}/20.jpg")


def test_a_page_in_lasting_trouble_beside_good_ones_is_one_unusable_image(site: Site) -> None:
    site.answer = lambda path, before: status(503) if path == "/odd.jpg" else None
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
    with pytest.raises(ImageError, match=f"the server refuses {site.url}/odd.jpg"):
        read_path_or_url(f"{site.url}/odd.jpg")


def test_a_server_that_has_refused_everything_is_the_reason_and_not_the_images(site: Site) -> None:
    site.answer = lambda path, before: status(403)
    for number in range(2):
        with pytest.raises(ImageError, match="the server refuses"):
            read_path_or_url(f"{site.url}/{number}.jpg")
    with pytest.raises(StorageError, match=f"{site.url} has refused all that was asked of it so far: .*403 Forbidden"):
        read_path_or_url(f"{site.url}/2.jpg")


def test_a_server_in_trouble_from_the_start_is_no_unusable_image(site: Site) -> None:
    site.answer = lambda path, before: status(503)
    with pytest.raises(StorageError, match="the server answers 503 Service Unavailable, however often it is asked"):
        read_path_or_url(f"{site.url}/a.jpg")


def test_an_answer_that_breaks_off_is_asked_for_again(site: Site) -> None:
    site.answer = lambda path, before: (
        (200, {"Content-Length": "1000", "Connection": "close"}, CONTENT) if before < 1 else None
    )
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
    assert site.count["/a.jpg"] == 2


@pytest.mark.parametrize("trouble", ["refused", "no name", "503"])
def test_a_server_that_is_gone_is_one_unusable_image_while_others_answer(site: Site, trouble: str) -> None:
    other = Site()
    gone = {"refused": other.url, "no name": "http://no-such-host.invalid", "503": other.url}[trouble]
    other.answer = lambda path, before: status(503)
    if trouble == "refused":
        other.close()
    try:
        with pytest.raises(StorageError):
            read_path_or_url(f"{gone}/a.jpg")
        assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
        with pytest.raises(ImageError, match=f"the server refuses {gone}/b.jpg"):
            read_path_or_url(f"{gone}/b.jpg")
        site.answer = lambda path, before: status(503)
        with pytest.raises(StorageError):
            read_path_or_url(f"{gone}/c.jpg")
    finally:
        if trouble != "refused":
            other.close()


def test_a_server_that_answered_and_went_away_is_no_unusable_image(site: Site) -> None:
    other = Site()
    assert read_path_or_url(f"{other.url}/a.jpg") == CONTENT
    assert read_path_or_url(f"{site.url}/a.jpg") == CONTENT
    other.close()
    web_files._connections_of.cache_clear()  # a thread of the server still holds the old one
    with pytest.raises(StorageError, match="cannot be reached"):
        read_path_or_url(f"{other.url}/b.jpg")
