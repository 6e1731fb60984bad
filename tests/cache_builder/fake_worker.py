"""What a Dask worker of the tests loads first: the two fake teachers, as slow or as deadly as the environment says.

FAKE_TEACHER: the path of `fake_teacher.py`, for Dask runs a copy of this file.
FAKE_CALL_SECONDS: how long a forward pass takes at least. FAKE_POISON: kill this process
when an image is all black. FAKE_BLIND: a folder that is empty for this process, as a mount that failed.
"""

import importlib.util
import os
import signal
from typing import Any

import torch

_spec = importlib.util.spec_from_file_location("fake_teacher", os.environ["FAKE_TEACHER"])
assert _spec is not None
assert _spec.loader is not None
fake: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)
fake.CALL_SECONDS = float(os.environ.get("FAKE_CALL_SECONDS", "0"))
fake.register()

_call = fake.FakeTeacher.__call__


def deadly(self: Any, images: torch.Tensor) -> Any:
    """Dies of an image whose pixels are all the same."""
    if os.environ.get("FAKE_POISON") and bool((images.flatten(1).std(dim=1) < 0.3).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    return _call(self, images)


fake.FakeTeacher.__call__ = deadly


_open = vars(os).setdefault("_open_before", os.open)  # Dask loads this file twice


def blind_open(path: Any, *arguments: Any, **options: Any) -> int:
    """Finds nothing below the folder."""
    if str(path).startswith(f"{os.environ['FAKE_BLIND']}/"):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return _open(path, *arguments, **options)


if os.environ.get("FAKE_BLIND"):
    os.open = blind_open


def dask_setup(worker: Any) -> None:
    """Nothing more to do."""
