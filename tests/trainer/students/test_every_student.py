"""Every student that has a name learns and leaves the house: one optimisation step, and one forward of what was exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.exports import Card, export_student
from trainer.model.adaptors import TeacherWidths
from trainer.model.files import save_student
from trainer.model.student import StudentConfig, backbone_and_heads, build_distilled
from trainer.students import STUDENTS, create_student

GIANTS = ("vit-h", "vit-so400m", "vit-g", "vit-l")
"""Two blocks of them are as good as all, and fit any machine."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_one_step_moves_the_weights_and_the_exported_student_gives_the_same_features(name: str, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"depth": 2} if name.startswith(GIANTS) else {}
    with torch.device("meta"):
        student = create_student(name, **overrides)
    image_hw = student.fixed_resolution or student.nearest_supported_resolution(64, 64)
    config = StudentConfig(
        student=name,
        overrides=overrides,
        image_hw=image_hw,
        fit="squash",
        adaptor_width=16,
        seed=0,
        steps=1,
        images_seen=2,
        teachers=(TeacherWidths(name="t", summary_dim=4, spatial_dim=4),),
        cache="",
        run="",
        recipe="",
    )
    model = build_distilled(config).train()
    torch.manual_seed(0)
    images = torch.rand(2, 3, *image_hw)
    target = torch.randn(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.student.parameters()]

    def loss() -> torch.Tensor:
        _, heads = backbone_and_heads(model(images))
        assert heads["t"].summary is not None
        return (heads["t"].summary - target).square().mean() + (heads["t"].spatial - target).square().mean()

    loss().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.student.parameters(), strict=True))
    assert loss().isfinite()
    del before
    save_student(model, tmp_path / "run")
    (report,) = export_student(tmp_path / "run", tmp_path / "out", card=Card(pictures=())).exported
    assert report.change < 1e-5
