"""The tree of errors, and the message for a name nobody knows."""

import inspect
import re

from radio_cache import errors
from radio_cache.errors import RadioCacheError, nearest_names, unknown_name


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        found = re.match(r"([│ ]*(?:├── |└── )?)(\w+Error)", line)
        if found:
            depth = len(found[1]) // 4
            path = [*path[:depth], found[2]]
            drawn[found[2]] = path[-2] if depth else "Exception"
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert drawn == {one.__name__: one.__bases__[0].__name__ for one in classes}
    assert all(issubclass(one, RadioCacheError) for one in classes)


def test_an_unknown_name_gets_the_nearest_one_first_and_then_all() -> None:
    message = unknown_name("teacher", "dinov2-vitl", ["sam-vit-h", "dinov2-vit-l-14", "clip"])
    assert message == (
        "no teacher is called 'dinov2-vitl'. Did you mean 'dinov2-vit-l-14'? Known: clip, dinov2-vit-l-14, sam-vit-h."
    )


def test_names_that_hold_all_that_was_typed_come_before_those_merely_spelled_like_it() -> None:
    known = ["dinov2", "dinov2-vit-l-14", "dinov3-vit-l-16", "dinov3-vit-s-16"]
    assert nearest_names("dinov3", known) == ["dinov3-vit-l-16", "dinov3-vit-s-16", "dinov2"]
    assert nearest_names("dinov2-l", known)[0] == "dinov2-vit-l-14"


def test_of_many_names_the_nearest_are_told_and_the_command_that_lists_all() -> None:
    known = [f"vit-{size}-{patch}" for size in "sblhg" for patch in (14, 16, 32)]
    assert unknown_name("student", "vit-s", known, listed_by="radio-train --student help") == (
        "no student is called 'vit-s'. Did you mean 'vit-s-14', 'vit-s-16' or 'vit-s-32'? "
        "`radio-train --student help` lists all 15."
    )
    assert "Known: a, b." in unknown_name("student", "q", ["a", "b"], listed_by="radio-train --student help")


def test_the_nearest_name_is_found_in_any_case() -> None:
    assert "Did you mean 'ViT-B'?" in unknown_name("model", "vit-b", ["ViT-B", "RN50"])
    assert "Did you mean 'sam'?" in unknown_name("teacher", "SAM", ["sam", "clip"])


def test_a_name_unlike_all_others_gets_no_suggestion() -> None:
    assert unknown_name("student", "xyz", ["a", "b"]) == "no student is called 'xyz'. Known: a, b."


def test_a_long_list_of_names_is_cut_and_counted() -> None:
    message = unknown_name("model", "q", [f"m{number:03d}" for number in range(100)])
    assert "m049, ... (100 in all)" in message
    assert "m050" not in message
