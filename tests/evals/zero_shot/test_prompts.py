"""What classes are called."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals.shared.image_set import image_set, open_source
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
    for text, match in (
        ("a\tx\n", "no line for 1 of the 2 classes, such as b"),
        ("x\n", "1 lines, the images have 2 classes"),
    ):
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


def test_lists_from_windows_are_read_without_their_mark(tmp_path: Path) -> None:
    images, file = folder(tmp_path / "i", "a", "b"), tmp_path / "names.txt"
    for text in ("one\r\ntwo\r\n\r\n", "a\tone\r\n\r\nb\ttwo"):
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert class_phrases(images, file) == ("one", "two")
    file.write_bytes("one {}\r\n".encode("utf-8-sig"))
    assert templates_from(file) == ("one {}",)
    file.write_bytes("café\n".encode("latin-1"))
    for read in (lambda: class_phrases(images, file), lambda: templates_from(file)):
        with pytest.raises(ConfigError, match="is not UTF-8 text"):
            read()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cat house\n\ndog house\nowl house\n", "line 2 is empty"),
        ("dog\ncat\nbig owl\n", "line 1 is 'dog', which names class 3"),
        ("big_owl: owl\ncat cat one\ndog, dog one\n", "every line begins with its class"),
        ("cat\tone\ndog two\nbig_owl\tthree\n", "some lines have a tab"),
        ("cat\tone\ndog\t\nbig_owl\tthree\n", "'dog' has no phrase"),
        ("cat\tone\ndog\ttwo\nbig_owl\tthree\ncat\tfour\n", "calls class 'cat' both 'one' and 'four'"),
    ],
)
def test_lists_that_would_give_classes_wrong_names_are_refused(tmp_path: Path, text: str, match: str) -> None:
    images, file = folder(tmp_path / "i", "big_owl", "cat", "dog"), tmp_path / "names.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        class_phrases(images, file)


def test_names_in_the_order_of_the_classes_may_be_the_classes_themselves(tmp_path: Path) -> None:
    images, file = folder(tmp_path / "i", "big_owl", "cat", "dog"), tmp_path / "names.txt"
    file.write_text("big owl\nCat\na dog\n")
    assert class_phrases(images, file) == ("big owl", "Cat", "a dog")
