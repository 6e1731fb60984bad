"""`hf://`: a stand-in for the hub on loopback answers what huggingface_hub asks, in processes told of it from their start."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPO = "/api/datasets/me/pets"
RESOLVED = "/datasets/me/pets/resolve/main/"
REVISION = "0" * 40

LISTED = """
import json, sys
from cache_builder.sources import list_images
from radio_cache.images.containers import read_image
from radio_cache.errors import RadioCacheError
try:
    listing = list_images(sys.argv[1:])
    (container,), index = listing.containers, listing.index
    places = zip(index.keys, index.offset.tolist(), index.length.tolist(), strict=True)
    data = [read_image(container, *place).hex() for place in places]
    print(json.dumps([list(index.keys), index.labels.tolist(), data]))
except RadioCacheError as exc:
    print(json.dumps(f"{type(exc).__name__}: {exc}"))
"""


@pytest.fixture(scope="module")
def files(ten_images: Path) -> dict[str, bytes]:
    """Of a dataset: images in class folders, and the same in a Parquet file of which each is read by itself."""
    paths = sorted(ten_images.rglob("*.png"))
    found = {f"photos/{path.relative_to(ten_images).as_posix()}": path.read_bytes() for path in paths}
    table = pa.table({"jpg": list(found.values()), "label": list(range(10))})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    return found | {"data/train-0.parquet": sink.getvalue()}


@pytest.fixture(scope="module")
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """Its address."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content_Length": str(len(body))}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"{REPO}/tree/main"):
                below = path.removeprefix(f"{REPO}/tree/main/")
                entries = [
                    {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
                    for name, data in files.items()
                    if name.startswith(f"{below}/")
                ]
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif path == REPO:
                about = {"id": "me/pets", "sha": REVISION, "private": False, "tags": [], "siblings": []}
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif (data := files.get(path.removeprefix(RESOLVED))) is not None:
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": REVISION}
                first, last, code = 0, len(data) - 1, 200
                if asked := self.headers.get("Range"):
                    begin, _, end = asked.removeprefix("bytes=").partition("-")
                    first, last, code = int(begin), min(int(end or last), last), 206
                    headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
                self.answer(code, data[first : last + 1], **headers)
            else:
                self.answer(
                    404, b'{"error": "not found"}', X_Error_Code="RepoNotFound", Content_Type="application/json"
                )

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def listed(hub: str, tmp_path: Path) -> Callable[[str], Any]:
    """What a process that knows the stand-in finds at a source."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(source: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", LISTED, source], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_pattern_of_parquet_files_and_a_folder_of_the_hub_are_listed_and_read(
    listed: Callable[[str], Any], files: dict[str, bytes]
) -> None:
    photos = [data.hex() for name, data in files.items() if name.startswith("photos/")]
    keys, labels, data = listed("hf://datasets/me/pets/data/train-*.parquet")
    assert keys == [f"train-0.parquet/{row}" for row in range(10)]
    assert (labels, data) == (list(range(10)), photos)
    keys, labels, data = listed("hf://datasets/me/pets/photos")
    assert [f"photos/{key}" for key in keys] == [name for name in files if name.startswith("photos/")]
    assert (labels, data) == ([0] * 4 + [1] * 6, photos)


def test_a_dataset_that_is_not_there_is_one_sentence(listed: Callable[[str], Any]) -> None:
    said = listed("hf://datasets/me/none/data")
    assert said.startswith("SourceError: hf://datasets/me/none/data ")
    assert "HF_TOKEN" in said
