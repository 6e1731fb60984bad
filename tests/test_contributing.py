"""Paths and links of CONTRIBUTING.md, README.md and CHANGELOG.md exist, and the drawing of the folders is complete."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("radio_cache", "cache_builder", "trainer", "evals")
DOCUMENTS = ("CONTRIBUTING.md", "README.md", "CHANGELOG.md")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "docs", "findings", ".ci")
PLACEHOLDER = re.compile(r"[A-Z]+\.\w+")
"""A file name that the reader replaces: `NAME.py`."""


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def named_paths(text: str) -> list[str]:
    """Return the paths in a document that look like files or folders of this repository.

    In code font and in fenced lists, these begin with one of `FOLDERS`, or are files of the root. Python examples are left out:
    they name files that the reader would add.
    """
    text = re.sub(r"^```python\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    fenced = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    listed = re.findall(r"^([\w./-]+\.py): ", "".join(fenced), re.MULTILINE)
    inline = re.findall(r"`([\w./-]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    in_folders = [path for path in inline if "/" in path and path.split("/")[0] in FOLDERS]
    in_root = [path for path in inline if re.fullmatch(r"\w+\.(py|md|toml|txt)", path)]
    in_prose = re.findall(r"\((docs/[\w./-]+\.md)\)", text)
    return listed + in_folders + in_root + in_prose


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_named_path_exists(document: str) -> None:
    for path in named_paths(read(document)):
        target = ROOT / path
        if PLACEHOLDER.fullmatch(target.name) and not target.exists():
            target = target.parent
        assert target.exists(), f"{document} names {path}"


def test_paths_in_lists_in_sentences_and_in_links_are_found() -> None:
    text = "`docs/a.md` `pyproject.toml` `a/b`\n\n```\nevals/x.py: f  # note\n```\n```python\n`docs/b.md`\n```\n(docs/c.md)"
    assert named_paths(text) == ["evals/x.py", "docs/a.md", "pyproject.toml", "docs/c.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(document)):
        assert "://" in link or (ROOT / link).exists(), f"{document} links to {link}"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_drawing_has_every_folder_and_file_of_a_package(package: str) -> None:
    block = re.search(rf"^{package}/ .*?(?=^\w|^```)", read("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    assert block is not None, f"CONTRIBUTING.md does not draw {package}"
    files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", block[0])) == files
    folders = {
        path.name for path in (ROOT / package).iterdir() if path.is_dir() and any(map(Path.is_file, path.iterdir()))
    }
    assert set(re.findall(r"(?:^  |  +)(\w+)/ ", block[0], re.MULTILINE)) == folders
