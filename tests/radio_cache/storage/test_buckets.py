"""What is said where a bucket's server refuses: what helps, and nothing that does not."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from radio_cache.errors import StorageError
from radio_cache.storage.buckets import ObjectStorage

ANSWERS = {
    "NotImplemented": 501,
    "ExpiredToken": 400,
    "InvalidToken": 400,
    "RequestTimeTooSkewed": 403,
    "AccessDenied": 403,
    "InvalidRequest": 400,
    "InsufficientStorage": 507,
    "SlowDown": 503,
    "InvalidObjectState": 409,
}


class Refuses(BaseHTTPRequestHandler):
    """Speaks S3, and answers every request with the error that the bucket is called by."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        code = next(code for code in ANSWERS if code.lower() in self.path)
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
        self.send_response(ANSWERS[code])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr("radio_cache.storage.buckets.RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "NotImplemented",
            "does not know conditional writes .If-None-Match., without which two builds could overwrite",
        ),
        ("ExpiredToken", "the credentials are valid no longer: get new ones"),
        ("InvalidToken", "the credentials are valid no longer: get new ones"),
        ("RequestTimeTooSkewed", "get new ones .or set the clock."),
        ("AccessDenied", "these credentials are not accepted or may not do this"),
        ("InvalidRequest", "does not accept such a request: check the credentials, which may have expired"),
        ("InsufficientStorage", "the server has no room left"),
        ("SlowDown", "the same command goes on from there"),
    ],
)
@pytest.mark.usefixtures("refusing")
def test_a_refused_write_says_what_helps(code: str, words: str) -> None:
    storage = ObjectStorage(f"s3://{code.lower()}/cache.zarr")
    for write in (lambda: storage.create("zarr.json", b"{}"), lambda: storage.write("zarr.json", [b"{}"])):
        with pytest.raises(StorageError, match=words) as raised:
            write()
        assert ("the same command goes on" in str(raised.value)) == (code == "SlowDown")


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidObjectState", "NotImplemented"])
@pytest.mark.usefixtures("refusing")
def test_a_refused_read_is_a_storage_error_that_promises_nothing(code: str) -> None:
    storage = ObjectStorage(f"s3://{code.lower()}/cache.zarr")
    for read in (lambda: storage.read("a"), lambda: storage.size("a"), lambda: storage.read_ranges("a", [(0, 3)])):
        with pytest.raises(StorageError, match="cannot read s3://") as raised:
            read()
        assert "the same command goes on" not in str(raised.value)
        assert "If-None-Match" not in str(raised.value)
