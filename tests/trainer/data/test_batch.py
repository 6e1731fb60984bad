import numpy as np
import torch

from trainer.data.batch import Batch, student_images


def batch_of(pixels: torch.Tensor, jitter: list[float] | None) -> Batch:
    factors = None if jitter is None else torch.tensor([jitter])
    return Batch(np.zeros(1, np.int64), pixels, (), jitter=factors)


def test_colours_change_by_their_factors_and_one_changes_nothing() -> None:
    pixels = torch.randint(60, 120, (1, 4, 5, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plain = student_images(batch_of(pixels, None), torch.contiguous_format)
    assert plain.shape == (1, 3, 4, 5)
    torch.testing.assert_close(student_images(batch_of(pixels, [1, 1, 1]), torch.contiguous_format), plain)
    torch.testing.assert_close(student_images(batch_of(pixels, [1.5, 1, 1]), torch.contiguous_format), plain * 1.5)
    grey = student_images(batch_of(pixels, [1, 1, 0]), torch.contiguous_format)
    assert (grey.amax(1) - grey.amin(1)).abs().max() < 1e-6
    flat = student_images(batch_of(pixels, [1, 0, 1]), torch.contiguous_format)
    assert flat.std() < 1e-6
