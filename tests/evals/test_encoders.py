"""Encoders: what comes from the cache, what is computed, and from which pixels."""

import numpy as np
import pytest
import torch

from evals.encoders import SUMMARY, CachedTeacherEncoder, StudentEncoder
from evals.errors import EvalError
from evals.pixels import decoded_image, pixel_batches
from trainer.data import student_pixels
from trainer.export import load_student

CPU = torch.device("cpu")


def test_cached_teacher_gives_the_stored_summaries_in_the_order_asked(make_cache) -> None:
    cache = make_cache("bank")
    rows = [7, 2, 19]
    found = CachedTeacherEncoder(cache.teachers["alpha"]).summaries(cache, rows)
    np.testing.assert_array_equal(found, cache.teachers["alpha"].summaries(rows))
    assert found.dtype == np.float32


def test_cached_teacher_without_summary_is_refused(make_cache, make_spec) -> None:
    cache = make_cache("bank", specs=[make_spec("maps", summary_dim=None)])
    with pytest.raises(EvalError, match="'maps' has no summary"):
        CachedTeacherEncoder(cache.teachers["maps"])


def test_cached_teacher_in_a_cache_without_it_names_those_there(make_cache, make_spec) -> None:
    bank, other = make_cache("bank"), make_cache("other", specs=[make_spec("beta")])
    with pytest.raises(EvalError, match="no teacher 'alpha': it has beta"):
        CachedTeacherEncoder(bank.teachers["alpha"]).summaries(other, [0])


def test_student_features_are_those_of_its_own_forward_pass(make_cache, make_run, monkeypatch) -> None:
    cache = make_cache("bank")
    run = make_run("run", cache.path)
    monkeypatch.setattr("evals.encoders._BATCH_IMAGES", 2)  # three rows: a full batch and a short one
    told: list[int] = []
    rows = [3, 11, 4]
    found = StudentEncoder.of_run(run, name="s", trained=True, device=CPU).encode(cache, rows, on_images=told.append)
    pixels = np.stack([student_pixels(decoded_image(cache, row), (32, 32)) for row in rows])
    with torch.inference_mode():
        own, heads = load_student(run)(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(found[SUMMARY], own.summary.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["alpha"], heads["alpha"].summary.numpy(), rtol=1e-4, atol=1e-5)
    assert list(found) == [SUMMARY, "alpha"]
    assert told == [2, 1]


def test_student_maps_are_row_major_on_its_own_grid(make_cache, make_run) -> None:
    cache = make_cache("bank")
    run = make_run("run", cache.path)
    maps = StudentEncoder.of_run(run, name="s", trained=True, device=CPU).teacher_maps(cache, [5])
    pixels = student_pixels(decoded_image(cache, 5), (32, 32))
    with torch.inference_mode():
        _, heads = load_student(run)(torch.from_numpy(pixels[None].copy()).permute(0, 3, 1, 2).float() / 255)
    assert maps["alpha"].shape == (1, 2, 2, 6)
    np.testing.assert_allclose(
        maps["alpha"].reshape(4, 6), heads["alpha"].spatial.numpy()[0], rtol=1e-4, atol=1e-5
    )  # fmt: skip


def test_untrained_student_has_other_features_every_time_the_same(make_cache, make_run) -> None:
    cache = make_cache("bank")
    run = make_run("run", cache.path)
    trained = StudentEncoder.of_run(run, name="s", trained=True, device=CPU)
    untrained = StudentEncoder.of_run(run, name="u", trained=False, device=CPU)
    again = StudentEncoder.of_run(run, name="u", trained=False, device=CPU)
    features = untrained.summaries(cache, [0, 1])
    assert not np.allclose(features, trained.summaries(cache, [0, 1]))
    np.testing.assert_array_equal(features, again.summaries(cache, [0, 1]))
    assert (trained.kind, untrained.kind) == ("student", "untrained")
    assert "12 steps, 48 images seen" in trained.about
    assert "never trained" in untrained.about


def test_unknown_feature_space_names_those_there(make_cache, make_run) -> None:
    cache = make_cache("bank")
    student = StudentEncoder.of_run(make_run("run", cache.path), name="s", trained=True, device=CPU)
    assert student.summaries(cache, [0], space="alpha").shape == (1, 8)
    with pytest.raises(EvalError, match="'sam': it has summary, alpha"):
        student.summaries(cache, [0], space="sam")


def test_pixel_batches_keep_the_order_and_the_rest(make_cache) -> None:
    cache = make_cache("bank")
    rows = [9, 1, 17, 4, 0]
    batches = list(pixel_batches(cache, rows, lambda image: student_pixels(image, (8, 8)), batch_images=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    expected = np.stack([student_pixels(decoded_image(cache, row), (8, 8)) for row in rows])
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_image_that_is_gone_is_named(make_cache) -> None:
    cache = make_cache("bank")
    (cache.path.with_suffix(".images") / "003.png").unlink()
    with pytest.raises(EvalError, match=r"image 003\.png of .*bank\.zarr: cannot be read"):
        list(pixel_batches(cache, [2, 3], lambda image: student_pixels(image, (8, 8)), batch_images=4))
