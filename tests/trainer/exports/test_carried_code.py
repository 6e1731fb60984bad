"""Copied code is whole, imports nothing of ours, and refuses what it cannot carry."""

import ast
import sys
from pathlib import Path

import pytest

from radio_cache.errors import ConfigError
from trainer.exports.carried_code import carried_files


@pytest.mark.parametrize("root", ["modeling_radio_student", "timm_radio_student"])
def test_files_import_each_other_and_nothing_of_ours(root: str) -> None:
    files = carried_files(f"trainer.carried.{root}")
    assert {f"{root}.py", "students_eradio.py", "shapes.py"} <= files.keys()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert f"{node.module}.py" in files
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not {name.split(".")[0] for name in names} & {"radio_cache", "trainer", "jaxtyping"}
    # Not jaxtyping's own names alone: every shape that is used must be in the file that stands for it.
    used = {
        alias.name
        for text in files.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "shapes"
        for alias in node.names
    }
    assert all(name in files["shapes.py"] for name in used)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("from trainer.students import base", "'base' is a module"),
        ("import radio_cache.errors", "only names can be exported"),
    ],
)
def test_imports_that_have_no_place_in_a_flat_package_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, complaint: str
) -> None:
    (tmp_path / "a_root_of_mine.py").write_text(f"{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        carried_files("a_root_of_mine")
    assert "a_root_of_mine" not in sys.modules
