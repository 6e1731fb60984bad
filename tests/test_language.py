"""The project's language, measured by `benchmarks/language.py`: names, docstrings, comments and docs."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "language.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("language", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


language = _load_script()
MEASURES = {measure.title: measure for measure in language.measures()}


def test_no_name_is_a_bare_participle_or_pronoun() -> None:
    measure = MEASURES["functions with a bare participle or pronoun for a name"]
    assert not measure.cases, "name what the variable holds: " + "; ".join(measure.cases[:5])


@pytest.mark.parametrize(
    ("title", "largest"),
    [
        ("docstrings that open with What, Of, How ...", 1.0),
        ("say, tell, ask in docstrings", 3.0),
        ("nobody, whoever, somebody in docstrings", 0.5),
        ("semicolons in docs", 20.0),
        ("mean sentence of the docs", 21.0),
    ],
)
def test_docstrings_and_docs_are_plain(title: str, largest: float) -> None:
    measure = MEASURES[title]
    assert measure.value <= largest, f"{measure.value:.2f}: " + "; ".join(measure.cases[:5])


def test_code_has_comments() -> None:
    assert MEASURES["comments a line of code"].value >= 0.04


def test_the_script_finds_bare_names() -> None:
    (function,) = language.functions(language.ast.parse("def f(told):\n    found, kept_rows = told\n"))
    assert language.bare_names(function) == {"found", "told"}
