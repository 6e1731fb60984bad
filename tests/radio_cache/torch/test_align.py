"""Sampling on the device: the same numbers as PIL and as numpy, in the order the student's tokens have."""

import numpy as np
import torch
from PIL import Image

from radio_cache.geometry.crops import crop_weights, patch_geometry
from radio_cache.torch import crop_maps


def test_cropped_maps_equal_pil_for_every_image_and_channel() -> None:
    geometry = patch_geometry(56, 8, fit="squash", interpolation="bilinear")
    maps = np.random.default_rng(0).normal(size=(3, 7, 7, 2)).astype(np.float32)
    boxes, hw = [(0.0, 0.0, 56.0, 56.0), (8.0, 16.0, 40.0, 56.0), (3.0, 1.0, 50.0, 31.0)], (56, 56)
    weights = crop_weights(boxes, [hw] * 3, geometry, out_hw=(4, 6))
    out = crop_maps(*(torch.from_numpy(array) for array in (maps, weights.rows, weights.columns)))
    assert out.shape == (3, 24, 2)
    for image, box in enumerate(boxes):
        for channel in range(2):
            expected = Image.fromarray(maps[image, :, :, channel]).resize(
                (6, 4), Image.Resampling.BILINEAR, box=tuple(side / 8 for side in box)
            )
            np.testing.assert_allclose(out[image, :, channel].reshape(4, 6), np.asarray(expected), atol=1e-5)


def test_rows_and_columns_of_a_map_that_is_not_square_stay_apart() -> None:
    maps = torch.arange(6, dtype=torch.float32).reshape(1, 2, 3, 1)
    out = crop_maps(maps, torch.eye(2)[None], torch.eye(3)[None])
    assert out[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
