import pytest
import torch

from trainer.recipes.student_table import E_RADIO_SIZES, TIMM_SIZES, VIT_SIZES, StudentSize
from trainer.students import E_RADIOS, TIMM_BACKBONES, VITS, create_student


def test_every_student_with_a_name_is_in_the_table() -> None:
    assert list(E_RADIO_SIZES) == list(E_RADIOS)
    assert list(VIT_SIZES) == list(VITS)
    assert list(TIMM_SIZES) == list(TIMM_BACKBONES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*E_RADIO_SIZES, *VIT_SIZES, *TIMM_SIZES])
def test_the_table_has_the_sizes_of_the_networks(name: str) -> None:
    with torch.device("meta"):  # without memory for the weights
        student = create_student(name)
    assert {**E_RADIO_SIZES, **VIT_SIZES, **TIMM_SIZES}[name] == StudentSize(
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        patch_px=student.patch_size,
        step_px=student.min_resolution_step,
        preferred_hw=student.preferred_resolution,
        summary_dim=student.summary_dim,
        spatial_dim=student.embed_dim,
    )
