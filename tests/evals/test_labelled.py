"""Which images are compared, and whether two caches speak of the same classes."""

import numpy as np
import pytest

from evals.errors import EvalError
from evals.labelled import in_classes_of, labelled_images


def test_rows_without_label_or_with_an_unusable_image_are_left_out(make_cache) -> None:
    cache = make_cache("bank", [0, -1, 1, 2, 0], unusable=[3])
    images = labelled_images(cache, teachers=["alpha"])
    assert images.rows.tolist() == [0, 2, 4]
    assert images.labels.tolist() == [0, 1, 0]


def test_limit_draws_the_same_images_every_time_and_keeps_order(make_cache) -> None:
    cache = make_cache("bank", [0] * 10 + [1] * 10)
    first, again = (labelled_images(cache, teachers=[], limit=8) for _ in range(2))
    assert first.rows.tolist() == again.rows.tolist() == sorted(set(first.rows.tolist()))
    assert set(first.labels.tolist()) == {0, 1}
    assert len(labelled_images(cache, teachers=[], limit=50)) == 20


def test_cache_without_labels_or_without_images_is_refused(make_cache) -> None:
    with pytest.raises(EvalError, match=r"has no labels.*one subfolder per class"):
        labelled_images(make_cache("bare", [-1, -1], class_names=()), teachers=[])
    with pytest.raises(EvalError, match=r"no finished images for alpha \(2 are listed\)"):
        labelled_images(make_cache("broken", [0, 1], unusable=[0, 1]), teachers=["alpha"])


def test_classes_are_matched_by_name(make_cache) -> None:
    bank = labelled_images(make_cache("bank", [0, 1, 2], class_names=("ant", "bee", "cat")), teachers=[])
    queries = labelled_images(make_cache("queries", [0, 1, 1], class_names=("cat", "ant", "dog")), teachers=[])
    assert in_classes_of(bank, queries).labels.tolist() == [2, 0, 0]
    assert in_classes_of(bank, queries).name_of(2) == "cat"


def test_classes_the_bank_does_not_know_are_named(make_cache) -> None:
    bank = labelled_images(make_cache("bank", [0, 1]), teachers=[])
    queries = labelled_images(make_cache("queries", [0, 1], class_names=("ant", "dog")), teachers=[])
    with pytest.raises(EvalError, match=r"1 of the 2 classes of .*queries.* \(dog\)"):
        in_classes_of(bank, queries)


def test_names_on_one_side_only_are_refused_and_numbers_on_both_are_kept(make_cache) -> None:
    named = labelled_images(make_cache("named", [0, 1]), teachers=[])
    numbered = labelled_images(make_cache("numbered", [1, 7], class_names=()), teachers=[])
    with pytest.raises(EvalError, match=r"named\.zarr names its classes and .*numbered"):
        in_classes_of(named, numbered)
    with pytest.raises(EvalError, match=r"named\.zarr names its classes and .*numbered"):
        in_classes_of(numbered, named)
    assert in_classes_of(numbered, numbered).labels.tolist() == [1, 7]
    assert numbered.name_of(7) == "class 7"


def test_identity_changes_with_the_images(make_cache) -> None:
    one = labelled_images(make_cache("one", seed=1), teachers=[]).identity()
    two = labelled_images(make_cache("two", seed=2), teachers=[]).identity()
    same = labelled_images(make_cache("same", seed=1), teachers=[]).identity()
    assert one["sha256_of_image_digests"] != two["sha256_of_image_digests"]
    assert one["sha256_of_image_digests"] == same["sha256_of_image_digests"]
    assert (one["images"], one["images_in_cache"]) == (20, 20)


def test_images_in_both_caches_and_copies_are_counted(make_cache) -> None:
    one = labelled_images(make_cache("one", seed=1), teachers=[])
    same = labelled_images(make_cache("same", seed=1), teachers=[], limit=5)
    other = labelled_images(make_cache("other", seed=2), teachers=[])
    assert same.shared_with(one) == 5
    assert other.shared_with(one) == 0
    assert one.copies() == 0
    assert np.all(one.rows == np.arange(20))
