import pytest
import torch

from radio_cache.errors import ConfigError
from radio_cache.torch import pick_device


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "warp-drive"])
def test_a_device_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name} cannot be used here"):
        pick_device(name)
