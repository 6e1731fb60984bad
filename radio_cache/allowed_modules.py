"""Import of classes that a file names: only from allowed modules, and only of the needed kind.

An untrusted file (student.json, recipe.json) may name any module, and importing a module runs it. So a recorded name
is imported only with explicit permission: `allow_modules=...` in Python, `--allow-module NAME` on a command line.
A name that the user types as an argument is such a permission by itself.
"""

import contextlib
import re
from collections.abc import Generator, Iterable
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

from radio_cache.errors import ConfigError

C = TypeVar("C")

# Identifiers only, so that no other text of a file reaches `import_module`.
_PATH = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")

# A context variable: one thread's permissions do not hold in another.
_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed_modules", default=())


@contextlib.contextmanager
def allowing_modules(names: Iterable[str]) -> Generator[None]:
    """Allow these modules to everything that is loaded inside of the `with` block, beside those allowed already.

    Args:
        names: as `refuse_unless_allowed` takes them.
    """
    token = _allowed.set((*_allowed.get(), *_as_names(names)))
    try:
        yield
    finally:
        _allowed.reset(token)


def refuse_unless_allowed(path: str, allow_modules: Iterable[str] = (), *, what: str) -> None:
    """Raise ConfigError unless the caller allowed the module of an import path that stands in a file. Imports nothing.

    Args:
        path: "package.module:Class".
        allow_modules: modules ("package.module"), packages with all their modules ("package"), or single classes
            ("package.module:Class"), beside those of `allowing_modules`.
        what: the thing that the path names, for the message ("student 'torch-module:package.module:Class'").
    """
    module, _ = split_path(path, what=what)
    for name in (*_as_names(allow_modules), *_allowed.get()):
        # With the point, "pack" allows "pack.net" and not "package".
        if name in (path, module) or module.startswith(f"{name}."):
            return
    raise ConfigError(
        f"{what} is code of the module '{module}', named by a file: loading it runs whatever that module holds, so it has to be "
        f"allowed by you. If you know the module and trust it: --allow-module {module}, or allow_modules=['{module}'] in Python"
    )


def import_class(path: str, kind: type[C], *, what: str, needed: str) -> type[C]:
    """Import the class of "package.module:Class", without calling anything.

    Args:
        path: an import path that the caller typed, or that `refuse_unless_allowed` let pass.
        kind: the class that it has to derive from.
        what: the thing that the path names, for messages.
        needed: what users call `kind` ("nn.Module").

    Raises:
        ConfigError: the path is no import path, leads nowhere, or leads to anything but a class of that kind.
    """
    module, attribute = split_path(path, what=what)
    try:
        value: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"{what} cannot be imported ({exc}): is it installed, or its folder on PYTHONPATH?") from exc
    except Exception as exc:  # a user's module may fail in any way while it is imported
        raise ConfigError(f"{what} cannot be imported: its module raises {type(exc).__name__}: {exc}") from exc
    if not isinstance(value, type):
        raise ConfigError(
            f"{what} is a {type(value).__name__}, not a class of {needed}: what a function builds can be built in the __init__ "
            "of such a class"
        )
    if not issubclass(value, kind):
        raise ConfigError(f"{what} is a class that does not derive from {needed}: name one that does")
    return value


def split_path(path: str, *, what: str) -> tuple[str, str]:
    """Return module and class of "package.module:Class". Raises ConfigError for anything else."""
    match = _PATH.fullmatch(path)
    if match is None:
        raise ConfigError(f"{what} takes an import path such as 'my_package.my_file:MyNet', got '{path}'.")
    return match[1], match[2]


def _as_names(names: Iterable[str]) -> tuple[str, ...]:
    # A single name is a sequence of letters, too.
    return (names,) if isinstance(names, str) else tuple(names)
