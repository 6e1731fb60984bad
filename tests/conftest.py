"""Every test computes on one thread: the runner uses the cores for tests side by side, and sums are the same everywhere."""

import logging
import os
import urllib.request
import uuid
from collections.abc import Callable, Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the commands that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server on loopback that speaks S3, with one empty bucket called `bucket`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Gives URLs of places in an S3 bucket that nobody has used; the environment holds what it takes to use them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    return lambda name: f"s3://bucket/{uuid.uuid4().hex}/{name}"
