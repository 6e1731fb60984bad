"""Measure the project's language: names, docstrings, comments and docs, as one table.

Run: python benchmarks/language.py [--list NAME]. `--list` prints where a measure's cases are.
"""

import argparse
import ast
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("radio_cache", "cache_builder", "trainer", "evals")

BARE = frozenset(
    [
        "found",
        "told",
        "kept",
        "shown",
        "here",
        "there",
        "asked",
        "wanted",
        "given",
        "own",
        "said",
        "made",
        "seen",
        "most",
        "some",
        "one",
    ]
)
"""Words that say only that something was found, told or kept, not what it is."""

OPENERS = ("What", "Of", "How", "Whether", "Which", "Where")
_SPEECH = re.compile(r"\b(?:say|says|said|saying|tell|tells|told|telling|ask|asks|asked|asking)\b", re.IGNORECASE)
_ANYBODY = re.compile(r"\b(?:nobody|whoever|somebody)\b", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


@dataclass
class Measure:
    """One measure: its value, the bar, and where its cases are."""

    title: str
    bar: str
    value: float = 0.0
    unit: str = ""
    cases: list[str] = field(default_factory=list)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Yield the files of the four packages and their syntax trees."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def bare_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Return the bare words that a function, without the functions in it, uses as a local or a parameter."""
    stored: set[str] = set()
    waiting: list[ast.AST] = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.add(node.id)
        waiting.extend(ast.iter_child_nodes(node))
    arguments = function.args
    stored |= {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    return stored & BARE


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def comments_and_code(path: Path) -> tuple[int, int]:
    """Return the number of comments and of lines with code; directives to tools are neither."""
    comments, lines = 0, set[int]()
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                comments += not re.match(r"#\s*(?:fmt|type|pyright|noqa|ruff)\b", token.string)
            elif token.type not in skipped:
                lines.update(range(token.start[0], token.end[0] + 1))
    return comments, len(lines)


def sentences_of_docs() -> Iterator[tuple[Path, list[str]]]:
    """Yield the words of every sentence of README and docs; code, tables, headings and links are left out."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        if page.name in ("log.md", "discovery.md"):
            continue
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line for line in text.splitlines() if not re.match(r"\s*(?:\||#|!\[)", line)]
        joined = re.sub(r"\n(?=\s*(?:[-*]|\d+\.)\s)", "\n\n", "\n".join(lines))
        for paragraph in re.split(r"\n\s*\n", joined):
            flat = re.sub(r"`[^`]*`", "code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph))
            flat = re.sub(r"\b(?:e\.g|i\.e|vs|al|Eq|approx)\.", "", flat)
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z`(\"'*])", flat.replace("\n", " ")):
                words = _WORD.findall(sentence)
                if len(words) > 2:
                    yield page, words


def measures() -> list[Measure]:
    """Return all measures of the tree as it stands."""
    bare = Measure("functions with a bare participle or pronoun for a name", "< 0.5", unit="%")
    openers = Measure("docstrings that open with What, Of, How ...", "< 1", unit="%")
    speech = Measure("say, tell, ask in docstrings", "< 3", unit=" per 10,000 words")
    anybody = Measure("nobody, whoever, somebody in docstrings", "< 0.5", unit=" per 10,000 words")
    remarks = Measure("comments a line of code", ">= 0.04")
    semicolons = Measure("semicolons in docs", "< 20", unit=" per 10,000 words")
    length = Measure("mean sentence of the docs", "<= 21", unit=" words")
    num_functions = num_docstrings = num_words = num_comments = num_lines = 0
    for path, tree in sources():
        place = path.relative_to(ROOT)
        for function in functions(tree):
            num_functions += 1
            if names := bare_names(function):
                bare.cases.append(f"{place}:{function.lineno} {function.name}: {', '.join(sorted(names))}")
        for line, text in docstrings(tree):
            num_docstrings += 1
            words = _WORD.findall(text)
            num_words += len(words)
            if words and words[0] in OPENERS:
                openers.cases.append(f"{place}:{line} {text.splitlines()[0][:80]}")
            speech.cases += [f"{place}:{line} {match[0]}" for match in _SPEECH.finditer(text)]
            anybody.cases += [f"{place}:{line} {match[0]}" for match in _ANYBODY.finditer(text)]
        comments, lines = comments_and_code(path)
        num_comments, num_lines = num_comments + comments, num_lines + lines
    all_words, num_sentences, num_semicolons = 0, 0, 0
    for page in {page for page, _ in sentences_of_docs()}:
        num_semicolons += re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).count(";")
    for page, words in sentences_of_docs():
        all_words, num_sentences = all_words + len(words), num_sentences + 1
        if len(words) > 40:
            length.cases.append(f"{page.relative_to(ROOT)}: {' '.join(words[:12])} ... ({len(words)} words)")
    bare.value = 100 * len(bare.cases) / num_functions
    openers.value = 100 * len(openers.cases) / num_docstrings
    speech.value = 1e4 * len(speech.cases) / num_words
    anybody.value = 1e4 * len(anybody.cases) / num_words
    remarks.value = num_comments / num_lines
    semicolons.value = 1e4 * num_semicolons / all_words
    length.value = all_words / num_sentences
    return [bare, openers, speech, anybody, remarks, semicolons, length]


def main() -> None:
    """Print the table, or the cases of one measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", metavar="WORD", help="print the cases of the measure whose title holds WORD")
    arguments = parser.parse_args()
    for measure in measures():
        if arguments.list is None:
            print(f"{measure.title:54} {measure.value:8.3f}{measure.unit:20} bar {measure.bar}")
        elif arguments.list in measure.title:
            print("\n".join(measure.cases))


if __name__ == "__main__":
    main()
