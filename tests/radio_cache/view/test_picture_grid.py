"""Pictures in rows: where each one lies, and what becomes of long titles."""

import numpy as np

from radio_cache.view.picture_grid import picture_grid


def plain(colour: tuple[int, int, int], hw: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (*hw, 3)).copy()


def test_every_picture_is_there_in_its_own_place() -> None:
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    made = np.asarray(picture_grid([[("", plain(red)), ("", plain(green, (10, 30)))], [("", plain(blue))]]))
    for colour, pixels in ((red, 600), (green, 300), (blue, 600)):
        assert np.all(made == colour, axis=2).sum() == pixels
    rows, columns = np.nonzero(np.all(made == blue, axis=2))
    assert rows.min() > np.nonzero(np.all(made == red, axis=2))[0].max()
    assert columns.min() == np.nonzero(np.all(made == red, axis=2))[1].min()


def test_a_title_never_runs_into_the_next_picture() -> None:
    made = np.asarray(picture_grid([[("a name much longer than its picture", plain((9, 9, 9)))] * 2]))
    gap = made[:, 8 + 30 : 8 + 30 + 8]
    assert np.all(gap == 255)
