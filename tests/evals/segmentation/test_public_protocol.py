"""mIoU as mmsegmentation computes it, over random masks with ignored pixels and classes that are not there."""

import numpy as np
import pytest

from evals.segmentation.masks import IGNORED
from evals.segmentation.predict import Confusion


@pytest.mark.parametrize("seed", range(3))
def test_miou_equals_intersect_and_union_of_mmsegmentation(seed: int) -> None:
    """Histograms of agreeing, predicted and true pixels without the ignored ones, summed over images, then the mean of ratios."""
    rng, classes = np.random.default_rng(seed), 7
    confusion, intersect, predicted, true = Confusion(classes), *np.zeros((3, classes))
    for _ in range(4):
        label = rng.integers(0, classes - 1, (30, 40)).astype(np.int16)  # the last class is nowhere
        answer = np.where(rng.random((30, 40)) < 0.6, label, rng.integers(0, classes - 2, (30, 40))).astype(np.int16)
        label[rng.random((30, 40)) < 0.1] = IGNORED
        confusion.add(label, answer)
        counted = label != IGNORED
        label, answer = label[counted], answer[counted]
        intersect += np.histogram(answer[answer == label], bins=classes, range=(0, classes - 1))[0]
        predicted += np.histogram(answer, bins=classes, range=(0, classes - 1))[0]
        true += np.histogram(label, bins=classes, range=(0, classes - 1))[0]
    with np.errstate(invalid="ignore"):
        iou = intersect / (predicted + true - intersect)
    scores = confusion.scores()
    assert scores.mean_iou == pytest.approx(np.nanmean(iou), abs=1e-12)
    assert scores.iou[-1] is None
    assert scores.pixel_accuracy == pytest.approx(intersect.sum() / true.sum(), abs=1e-12)
