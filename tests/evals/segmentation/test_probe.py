"""The probe learns what a logistic regression learns, by the schedule of the papers."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evals.errors import EvalError
from evals.segmentation.masks import IGNORED
from evals.segmentation.predict import Confusion, predicted_classes
from evals.segmentation.probe import ProbeConfig, learning_rate, pixel_loss, train_probe
from evals.segmentation.windows import Window
from radio_cache.errors import ConfigError

CPU = torch.device("cpu")
WINDOWS, SIDE, WIDTH, CLASSES = 24, 8, 6, 3


def made_up(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps whose tokens lie around their class's direction, too close together to be told apart without mistakes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    labels = rng.integers(0, CLASSES, (WINDOWS, SIDE, SIDE)).astype(np.int16)
    maps = 3 + 5 * (centres[labels] + rng.normal(0, 1.4, (WINDOWS, SIDE, SIDE, WIDTH)))
    labels[:, 0] = IGNORED
    return maps.astype(np.float32), labels


def test_it_reproduces_a_logistic_regression_on_the_same_features() -> None:
    (maps, labels), (others, truth) = made_up(0), made_up(1)
    config = ProbeConfig(steps=1500, batch=12)
    probe = train_probe(
        lambda rows: (maps[rows], labels[rows]), WINDOWS, width=WIDTH, classes=CLASSES, config=config, device=CPU
    )
    with torch.inference_mode():
        found = probe(torch.from_numpy(others).permute(0, 3, 1, 2)).argmax(dim=1).numpy().astype(np.int16)
    known = labels != IGNORED
    scaler = StandardScaler().fit(maps[known])
    reference = LogisticRegression(C=1e6, max_iter=500).fit(scaler.transform(maps[known]), labels[known])
    wanted = reference.predict(scaler.transform(others.reshape(-1, WIDTH))).reshape(truth.shape).astype(np.int16)
    scores = []
    for predicted in (found, wanted):
        confusion = Confusion(CLASSES)
        confusion.add(truth, predicted)
        scores.append(confusion.scores())
    assert 0.4 < scores[1].mean_iou < 0.9
    assert abs(scores[0].mean_iou - scores[1].mean_iou) < 0.01
    assert (found == wanted).mean() > 0.97


def test_the_same_seed_gives_the_same_probe_and_another_one_another() -> None:
    maps, labels = made_up(0)

    def weights(seed: int) -> torch.Tensor:
        read = lambda rows: (maps[rows], labels[rows])  # noqa: E731
        config = ProbeConfig(steps=5, seed=seed)
        return train_probe(read, WINDOWS, width=WIDTH, classes=CLASSES, config=config, device=CPU).classify.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_rate_rises_from_1e_6_in_1500_steps_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 80_000, 1_500) for step in (0, 750, 1_500, 40_750, 80_000)]
    np.testing.assert_allclose(rates, [1e-6, 0.5, 1.0, 0.5, 0.0], atol=1e-6)
    assert ProbeConfig().steps_for(10**6) == 80_000
    assert ProbeConfig().steps_for(160) == 1_000
    assert ProbeConfig().steps_for(1) == 300
    with pytest.raises(ConfigError, match="at least one step"):
        ProbeConfig(steps=0)


def test_the_loss_is_that_of_the_labelled_pixels_at_their_own_resolution() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, :, 1] = 8.0
    labels = torch.full((1, 8, 8), IGNORED, dtype=torch.int16)
    labels[0, :, 0], labels[0, :, 7] = 0, 1
    assert pixel_loss(logits, labels).item() == pytest.approx((np.log(2) + np.log1p(np.exp(-8))) / 2, abs=1e-4)


def test_unusable_training_data_is_one_sentence() -> None:
    maps, labels = made_up(0)
    nobody, bad = np.full_like(labels, IGNORED), maps * np.float32(np.inf)
    settings = {"width": WIDTH, "classes": CLASSES, "config": ProbeConfig(steps=2), "device": CPU}
    with pytest.raises(EvalError, match="no pixel of the training masks has a class"):
        train_probe(lambda rows: (maps[rows], nobody[rows]), WINDOWS, **settings)
    with pytest.raises(EvalError, match="not finite"):
        train_probe(lambda rows: (bad[rows], labels[rows]), WINDOWS, **settings)


def test_windows_are_stitched_where_they_belong_and_unseen_pixels_have_no_class() -> None:
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 1, :, :2] = 5.0  # the left half of the left window
    windows = [Window(0, (8, 16), 0, 0), Window(0, (8, 16), 0, 6)]
    found = predicted_classes(logits, windows, (8, 8), (16, 32))
    assert found.shape == (16, 32)
    assert (found[:, :6] == 1).all()
    assert (found[:, 12:28] == 0).all()
    assert (found[:, 28:] == IGNORED).all()


def test_iou_is_over_the_classes_that_are_there() -> None:
    confusion = Confusion(4)
    truth = np.array([[0, 0, 1, IGNORED]], np.int16)
    confusion.add(truth, np.array([[0, 1, 1, 3]], np.int16))
    scores = confusion.scores()
    assert scores.iou == (0.5, 0.5, None, None)
    assert (scores.mean_iou, scores.pixel_accuracy, scores.pixels) == (0.5, 2 / 3, (2, 1, 0, 0))
