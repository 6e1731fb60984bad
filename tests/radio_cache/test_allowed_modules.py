"""A name in a file leads to a class only where the caller said so, and nothing is imported or called before."""

import sys
from pathlib import Path

import pytest

from radio_cache.allowed_modules import allowing_modules, import_class, refuse_unless_allowed
from radio_cache.errors import ConfigError


@pytest.mark.parametrize("allowed", [("nets",), "nets", ("nets.small",), ("nets.small:Net",), ("other", "nets.small")])
def test_a_module_its_package_or_the_class_itself_may_be_allowed(allowed: tuple[str, ...] | str) -> None:
    refuse_unless_allowed("nets.small:Net", allowed, what="a student")
    with allowing_modules(allowed):
        refuse_unless_allowed("nets.small:Net", what="a student")


@pytest.mark.parametrize(
    "allowed", [(), ("net",), ("nets.smal",), ("nets.small.deeper",), ("nets.small:Other",), ("",)]
)
def test_anything_else_is_refused_with_the_word_that_allows_it(allowed: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--allow-module nets.small, or allow_modules=\['nets.small'\]"):
        refuse_unless_allowed("nets.small:Net", allowed, what="student 'torch-module:nets.small:Net'")


def test_what_was_allowed_in_a_block_is_forgotten_after_it() -> None:
    with allowing_modules(["a"]), allowing_modules(["b"]):
        refuse_unless_allowed("a:X", what="x")
        refuse_unless_allowed("b:X", what="x")
    with pytest.raises(ConfigError):
        refuse_unless_allowed("a:X", what="x")


def test_refusing_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'never_imported'"):
        refuse_unless_allowed("never_imported:Net", what="x")
    assert "never_imported" not in sys.modules


@pytest.mark.parametrize(
    "path", ["a", "a:", ":a", "a b:C", "a:b:c", "a/b:C", "..a:B", "a.:B", "a:B()", "a:B.c", "a:B\n", ""]
)
def test_what_is_no_import_path_is_never_imported(path: str) -> None:
    with pytest.raises(ConfigError, match="takes an import path"):
        refuse_unless_allowed(path, ("a", "a b", "a/b"), what="x")
    with pytest.raises(ConfigError, match="takes an import path"):
        import_class(path, object, what="x", needed="object")


def test_only_a_class_of_the_kind_is_handed_out() -> None:
    assert import_class("fractions:Fraction", object, what="x", needed="object").__name__ == "Fraction"
    with pytest.raises(ConfigError, match="does not derive from int"):
        import_class("fractions:Fraction", int, what="x", needed="int")
    with pytest.raises(ConfigError, match="is a function, not a class of int"):
        import_class("os.path:join", int, what="x", needed="int")
