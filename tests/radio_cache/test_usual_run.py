"""How long a run is when nobody says: the numbers that docs/training.md promises."""

import pytest

from radio_cache.usual_run import UsualRun, usual_run


@pytest.mark.parametrize(
    ("num_images", "device", "steps", "batch"),
    [
        (60, "cpu", 427, 60),
        (240, "cuda", 400, 64),
        (49_999, "cuda", 23_438, 64),
        (50_000, "cuda", 5860, 256),
        (50_000, "cpu", 23_438, 64),
    ],
)
def test_thirty_epochs_of_crops_or_25_600_in_batches_that_fit(
    num_images: int, device: str, steps: int, batch: int
) -> None:
    run = usual_run(num_images, device)
    assert run == UsualRun(steps, batch)
    assert run.crops >= max(25_600, 30 * num_images)


def test_what_the_user_decides_the_other_follows() -> None:
    assert usual_run(60, "cpu", steps=7) == UsualRun(7, 60)
    assert usual_run(60, "cpu", batch_images=512) == UsualRun(50, 512)
