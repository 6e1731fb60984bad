import pytest
import torch

from radio_cache.errors import ConfigError, TrainingError
from trainer.run.memory import checkpoint_activations, explain_out_of_memory
from trainer.students import create_student


def test_too_little_memory_names_the_settings_to_turn_down() -> None:
    with pytest.raises(TrainingError, match=r"out of memory .*--set accumulate=2"), explain_out_of_memory():
        torch.empty(1 << 60, dtype=torch.uint8)
    no_thread = pytest.raises(TrainingError, match=r"starts no more threads .*ulimit -u")
    with no_thread, explain_out_of_memory():
        raise RuntimeError("can't start new thread")
    with pytest.raises(RuntimeError, match="memory format"), explain_out_of_memory():
        raise RuntimeError("required rank 4 tensor to use this memory format")


def test_blocks_that_are_computed_twice_give_the_same_gradients() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients: list[dict[str, torch.Tensor]] = []
    for twice in (False, True):
        torch.manual_seed(0)
        student = create_student("vit-tiny-16", width=24, depth=2, heads=2)
        if twice:
            checkpoint_activations(student)
        torch.manual_seed(1)
        out = student(images)
        (out.summary.square().mean() + out.spatial.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    with pytest.raises(ConfigError, match="does not support activation checkpointing"):
        checkpoint_activations(create_student("e-radio-tiny"))
