"""Feature maps as pictures: same place, same colours, honest cosines."""

import numpy as np
import pytest
import torch

from evals.encoders import StudentEncoder
from evals.errors import EvalError
from evals.report.pictures import feature_pictures, live_maps
from radio_cache.errors import ShapeError, UnknownTeacherError

CPU = torch.device("cpu")


@pytest.fixture
def bank_and_student(make_cache, make_run):
    cache = make_cache("bank")
    return cache, StudentEncoder.of_run(make_run("run", cache.path), name="student", trained=True, device=CPU)


def test_live_maps_equal_to_the_cache_get_its_colours_and_cosine_one(bank_and_student) -> None:
    cache, student = bank_and_student
    rows = [4, 9]
    pictures = feature_pictures(cache, rows, ["bee", "ant"], student, {"alpha": cache.teachers["alpha"].maps(rows)})
    for picture in pictures:
        (teacher,) = picture.teachers
        np.testing.assert_array_equal(teacher.live, teacher.cached)
        assert teacher.live_cosine == pytest.approx(1.0)
        assert -1 <= teacher.student_cosine <= 1
        assert teacher.cached.shape == (4, 4, 3)
        assert teacher.student.shape == (2, 2, 3)
    assert [picture.key for picture in pictures] == ["004.png", "009.png"]
    assert not np.array_equal(pictures[0].teachers[0].cached, pictures[1].teachers[0].cached)


def test_a_student_that_says_what_the_cache_says_has_cosine_one(bank_and_student, monkeypatch) -> None:
    cache, student = bank_and_student
    stored = cache.teachers["alpha"].maps([3])
    monkeypatch.setattr(student, "maps", lambda images: iter([{"alpha": stored}]))
    (picture,) = feature_pictures(cache, [3], ["ant"], student, {})
    assert picture.teachers[0].student_cosine == pytest.approx(1.0)
    np.testing.assert_array_equal(picture.teachers[0].student, picture.teachers[0].cached)


def test_without_live_maps_the_others_are_shown(bank_and_student) -> None:
    cache, student = bank_and_student
    (picture,) = feature_pictures(cache, [0], ["ant"], student, {})
    assert picture.teachers[0].live is None
    assert picture.teachers[0].live_cosine is None
    assert max(picture.image.shape[:2]) == 224


def test_student_that_sees_the_centre_is_compared_with_the_centre(bank_and_student, monkeypatch) -> None:
    cache, student = bank_and_student
    stored = cache.teachers["alpha"].maps([3])
    # The middle half of the image is the middle 2 x 2 of the 4 x 4 tokens.
    monkeypatch.setattr(student, "seen_box_xyxy", lambda image_hw: (7.0, 5.0, 21.0, 15.0))
    monkeypatch.setattr(student, "maps", lambda images: iter([{"alpha": stored[:, 1:3, 1:3]}]))
    (picture,) = feature_pictures(cache, [3], ["ant"], student, {})
    assert picture.teachers[0].student_cosine == pytest.approx(1.0)
    assert picture.image.shape == (160, 224, 3)


def test_live_maps_of_another_shape_are_refused(bank_and_student) -> None:
    cache, student = bank_and_student
    with pytest.raises(ShapeError, match=r"'alpha': live maps are \(1, 5, 5, 6\)"):
        feature_pictures(cache, [0], ["ant"], student, {"alpha": np.zeros((1, 5, 5, 6), np.float32)})


def test_cache_without_the_students_teachers_is_refused(make_cache, make_spec, bank_and_student) -> None:
    _, student = bank_and_student
    other = make_cache("other", specs=[make_spec("beta")])
    with pytest.raises(EvalError, match=r"holds no teacher of student \(alpha\)"):
        feature_pictures(other, [0], ["ant"], student, {})


def test_live_maps_of_a_teacher_nobody_can_load_raise(make_cache) -> None:
    with pytest.raises(UnknownTeacherError, match="'alpha'"):
        live_maps(make_cache("bank"), "alpha", [0], device=CPU)


def test_live_teacher_gives_the_maps_that_the_build_stored(make_cache, make_spec, monkeypatch) -> None:
    cache = make_cache("bank")

    class Colours:
        spec = cache.teachers["alpha"].spec

        def to(self, device: torch.device) -> None: ...

        def __call__(self, images: torch.Tensor):
            pooled = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)
            return type("Features", (), {"summary": None, "spatial": pooled.repeat(1, 1, 1, 2)})

    monkeypatch.setattr("evals.encoders.network.load_recorded", lambda spec: Colours())
    maps = live_maps(cache, "alpha", [2, 5], device=CPU)
    assert maps.shape == (2, 4, 4, 6)
    assert not np.array_equal(maps[0], maps[1])
