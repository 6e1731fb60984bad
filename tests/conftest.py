"""Every test computes on one thread: the runner uses the cores for tests side by side, and sums are the same everywhere."""

import logging
import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the commands that tests start

import pytest
import torch
from torch import nn

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


class SmallDisk:
    """A file system in memory of so many bytes: when it is full the system says so, and when it is read-only, too."""

    def __init__(self, place: Path, num_bytes: int) -> None:
        self.path = place
        place.mkdir()
        try:
            self._mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place))
        except (OSError, subprocess.CalledProcessError) as exc:
            reason = (getattr(exc, "stderr", None) or str(exc)).strip()
            pytest.skip(f"no file system can be mounted here, so that a disk is only simulated: {reason}")

    def resize(self, num_bytes: int) -> None:
        self._mount("-o", f"remount,size={num_bytes}", str(self.path))

    def make_read_only(self) -> None:
        self._mount("-o", "remount,ro", str(self.path))

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)

    @staticmethod
    def _mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], SmallDisk]]:
    """Gives disks of so many bytes; skips, saying so, where none can be mounted."""
    disks: list[SmallDisk] = []

    def mount(num_bytes: int) -> SmallDisk:
        disks.append(SmallDisk(tmp_path / f"disk{len(disks)}", num_bytes))
        return disks[-1]

    yield mount
    for disk in disks:
        disk.close()


OWN_FILE = """
import torch
from torch import nn
from trainer.students.base import CLIP_MEAN, CLIP_STD

MADE = {}

def column(values):
    return torch.tensor(tuple(values)).view(1, 3, 1, 1)

class Encoder(nn.Module):
    '''A library's encoder behind a student's colours. make() -> (network, its mean, its std, call(network, images)).'''
    def __init__(self):
        super().__init__()
        self.net, self.mean, self.std, self.call = MADE["make"]()
    def forward(self, x):
        pixels = x * column(CLIP_STD) + column(CLIP_MEAN)
        return self.call(self.net, (pixels - column(self.mean)) / column(self.std))
"""

AsStudent = Callable[..., nn.Module]


@pytest.fixture
def as_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsStudent:
    """Students whose network is a big model's own encoder, and whose heads do nothing: nothing must tell them from it."""
    from trainer.model.adaptors import TeacherWidths
    from trainer.model.student import StudentConfig, build_distilled

    (tmp_path / "library_encoder.py").write_text(OWN_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "library_encoder", raising=False)

    def make(teacher: str, made, *, image_hw: tuple[int, int]) -> nn.Module:
        import library_encoder

        library_encoder.MADE["make"] = lambda: made
        overrides = {"preferred_resolution": image_hw, "fixed_resolution": True}
        config = {
            "student": "torch-module:library_encoder:Encoder",
            "overrides": overrides,
            "image_hw": image_hw,
            "fit": "squash",
            "adaptor_width": 4,
            "seed": 0,
            "steps": 1,
            "images_seen": 1,
            "cache": "",
            "run": "",
            "recipe": "",
        }
        probe = build_distilled(
            StudentConfig(teachers=(TeacherWidths(name="x", summary_dim=2, spatial_dim=2),), **config)
        )
        known = TeacherWidths(name=teacher, summary_dim=probe.summary_dim, spatial_dim=probe.embed_dim)
        model = build_distilled(StudentConfig(teachers=(known,), **config)).eval()
        model.adaptors.summary_heads[0] = nn.Identity()
        model.adaptors.spatial_heads[0] = nn.Identity()
        return model

    return make
