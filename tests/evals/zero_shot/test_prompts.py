"""What classes are called."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals.image_set import image_set, open_source
from evals.zero_shot.prompts import PAPER_TEMPLATES, class_phrases, sentences, templates_from
from radio_cache.errors import ConfigError


def folder(root: Path, *names: str):
    from radio_cache.testing import write_images

    write_images(root, classes=names, per_class=1, size=8)
    return image_set(open_source(root), labelled=True)


def test_imagenet_folders_have_the_names_clips_authors_gave_them(tmp_path: Path) -> None:
    images = folder(tmp_path, "n01440764", "n01494475_hammerhead", "n99999999_made_up", "living_room")
    assert class_phrases(images, None) == ("living room", "tench", "hammerhead shark", "made up")


def test_names_come_from_a_file_by_class_or_in_order(tmp_path: Path) -> None:
    images, file = folder(tmp_path / "i", "a", "b"), tmp_path / "names.txt"
    file.write_text("b\tbanana\na\tapple tree\n")
    assert class_phrases(images, file) == ("apple tree", "banana")
    file.write_text("one\ntwo\n")
    assert class_phrases(images, file) == ("one", "two")
    for text, match in (("a\tx\n", "no line for 1 of the 2 classes, such as b"), ("x\n", "1 lines, the images have 2 classes")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=match):
            class_phrases(images, file)


def test_classes_that_are_mere_numbers_need_a_file(make_cache) -> None:
    images = image_set(open_source(make_cache("bank", class_names=()).path), labelled=True)
    with pytest.raises(ConfigError, match="numbers its 3 classes and does not name them"):
        class_phrases(images, None)
    assert int(np.max(images.labels)) == 2


def test_numbers_that_are_identifiers_take_no_memory(make_cache, tmp_path: Path) -> None:
    images = image_set(open_source(make_cache("bank", class_names=()).path), labelled=True)
    images = replace(images, labels=images.labels + 10**9)
    (tmp_path / "names.tsv").write_text("1000000000\ta\n1000000001\tb\n1000000002\tc\n")
    for file in (None, tmp_path / "names.tsv"):
        with pytest.raises(ConfigError, match="up to 1000000002"):
            class_phrases(images, file)


def test_the_papers_80_templates_or_the_users(tmp_path: Path) -> None:
    assert len(PAPER_TEMPLATES) == 80 == len(templates_from(None))
    assert sentences("tench", PAPER_TEMPLATES[:1]) == ["a bad photo of a tench."]
    file = tmp_path / "t.txt"
    file.write_text("a {} in the sea\n\n")
    assert templates_from(file) == ("a {} in the sea",)
    for text, match in (("", "holds no sentence"), ("a fish", "has no {} where")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=match):
            templates_from(file)
