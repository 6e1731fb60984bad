"""`--compile`."""

from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from cache_builder.teachers import TeacherOptions, load_teacher
from radio_cache.errors import TeacherError


@pytest.mark.slow
def test_a_compiled_teacher_says_nearly_the_same_and_that_it_is_compiled() -> None:
    options = TeacherOptions(size_px=64)
    plain = load_teacher("efficientnet-lite0", options)
    compiled = load_teacher("efficientnet-lite0", TeacherOptions(size_px=64, compiled=True))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = plain(images).spatial, compiled(images).spatial
        again = compiled(images[:1]).spatial
    error = float((expected - found).abs().max() / expected.abs().max())
    assert error < 1e-3
    torch.testing.assert_close(again, expected[:1], rtol=1e-3, atol=1e-3)
    assert compiled.spec.software["torch.compile"] == "inductor"
    assert compiled.spec.differences(plain.spec) == []


def test_where_it_cannot_be_compiled_the_error_says_what_to_do(
    fake_teachers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> Any:
        def call(_: torch.Tensor) -> None:
            raise TorchDynamoException("InvalidCxxCompiler: no working C++ compiler\nmore")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    teacher = load_teacher("fake-a", TeacherOptions(compiled=True))
    with pytest.raises(TeacherError, match=r"'fake-a' cannot be compiled here \(.*no working C.*--compile"):
        teacher(torch.zeros(1, 3, 32, 32))
