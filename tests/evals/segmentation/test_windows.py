"""Windows cover an image, and classes land on the pixels they belong to."""

import numpy as np
import pytest
from PIL import Image

from evals.segmentation.masks import IGNORED
from evals.segmentation.windows import Window, sliding_windows, teacher_window, window_classes, window_pixels
from radio_cache.geometry.crops import patch_geometry


@pytest.mark.parametrize("image_hw", [(30, 30), (30, 100), (200, 60), (7, 1000), (1, 1)])
def test_every_pixel_of_the_frame_is_in_a_window_and_no_window_sticks_out(image_hw: tuple[int, int]) -> None:
    windows = sliding_windows(4, image_hw, 24)
    frame = np.zeros(windows[0].frame_hw, int)
    for one in windows:
        part = frame[one.top : one.top + 24, one.left : one.left + 24]
        assert part.shape == (24, 24)
        part += 1
    assert frame.min() >= 1
    assert min(frame.shape) == 24


def test_windows_of_512_start_every_341_pixels_as_in_the_paper() -> None:
    assert [one.left for one in sliding_windows(0, (512, 1400), 512)] == [0, 341, 682, 888]


def test_pixels_and_classes_of_a_window_are_of_the_same_place() -> None:
    classes = np.zeros((20, 50), np.int16)
    classes[4:12, 30:44] = 1
    image = Image.fromarray(np.where(classes[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, axis=2))
    windows = sliding_windows(0, (20, 50), 40)
    pixels = window_pixels(image, windows, 40)
    for one, shown in zip(windows, pixels, strict=True):
        labels_in_window = window_classes(classes, one, (40, 40))
        assert ((shown[..., 0] > 127) == (labels_in_window == 1)).mean() > 0.99


def test_padding_and_what_was_cut_away_have_no_class() -> None:
    classes = np.ones((10, 20), np.int16)
    padded = teacher_window(0, (10, 20), patch_geometry(16, 4, fit="pad", interpolation="bilinear"))
    labels_in_window = window_classes(classes, padded, (16, 16))
    assert (labels_in_window[:8] == 1).all()
    assert (labels_in_window[8:] == IGNORED).all()
    cut = teacher_window(0, (10, 20), patch_geometry(16, 4, fit="crop", interpolation="bilinear"))
    assert cut == Window(0, (16, 32), 0, 8)
    assert (window_classes(classes, cut, (16, 16)) == 1).all()
