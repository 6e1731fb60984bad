"""Source files of radio-cache, copied into an exported folder so that it can be used without radio-cache.

A module and all modules of radio-cache that it imports become one flat package: `trainer.students.vit` is `students_vit.py`
there, and imports are relative. jaxtyping, which only annotates, is replaced by a file without effect.
"""

import ast
import importlib.util
from pathlib import Path

from radio_cache import __version__
from radio_cache.errors import ConfigError

_OURS = ("radio_cache", "trainer")
_SHAPES = "shapes"
_SHAPES_SOURCE = '''"""Stands for jaxtyping: an annotation with a shape is the array's type, and says nothing at run time."""

from typing import Any


class _Shaped:
    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


Bool = Float = Int = UInt8 = _Shaped
'''


def carried_files(root: str) -> dict[str, str]:
    """Return file name -> text of a module and of the modules of radio-cache that it imports.

    Raises:
        ConfigError: for an import that a flat package cannot express.
    """
    todo, files = [root], {f"{_SHAPES}.py": _SHAPES_SOURCE}
    done: set[str] = set()
    while todo:
        module = todo.pop()
        if module in done:
            continue
        done.add(module)
        text, imported = _relative(module)
        name = f"{_flat(module)}.py"
        if name in files:
            raise ConfigError(f"two modules would be called {name} in an exported folder: {module} is one of them")
        files[name] = text
        todo += imported
    return files


def carried_source(module: str) -> str:
    """Return the text of a module that imports nothing of radio-cache.

    Raises:
        ConfigError: if it does.
    """
    text, imported = _relative(module)
    if imported:
        raise ConfigError(f"{module} imports {imported[0]}, and cannot be exported alone")
    return text


def _relative(module: str) -> tuple[str, list[str]]:
    """Return a module's text with relative imports, and the modules of radio-cache that it imports."""
    source = _source(module)
    lines = source.splitlines(keepends=True)
    imported: list[str] = []
    # The syntax tree finds imports inside functions, too. Lines are edited in place, so that comments stay.
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in (*_OURS, "jaxtyping"):
                    raise ConfigError(
                        f"{module}, line {node.lineno}: write 'from {alias.name} import ...', because only names can be exported"
                    )
        # `from . import x` names no module. Packages of other libraries stay as they are.
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        number = node.lineno - 1
        if node.module == "jaxtyping":
            lines[number] = lines[number].replace("from jaxtyping import", f"from .{_SHAPES} import", 1)
        # A flat package has no submodules, so that `from package import module` cannot be expressed.
        elif node.module.partition(".")[0] in _OURS:
            for alias in node.names:
                if _is_module(f"{node.module}.{alias.name}"):
                    raise ConfigError(
                        f"{module}, line {node.lineno}: '{alias.name}' is a module: import names from it to export them"
                    )
            lines[number] = lines[number].replace(f"from {node.module} import", f"from .{_flat(node.module)} import", 1)
            imported.append(node.module)
    # The folder's copy outlives this version; its first line names where to look.
    header = f"# From radio-cache {__version__}, {module}. Apache-2.0.\n"
    return header + "".join(lines), imported


def _flat(module: str) -> str:
    """Return a module's name in the flat package: without the top package, with underscores for dots."""
    parts = module.split(".")[1:]
    return "_".join(parts[1:] if parts[0] == "carried" else parts)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()
