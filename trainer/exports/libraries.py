"""Other people's libraries that only some formats need."""

from importlib import import_module
from typing import Any

from trainer.exports.written import ExportError


def library(name: str, what: str) -> Any:
    """A library by its import name. Raises ExportError with the cure where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        raise ExportError(f"{what} needs {name}, which is not installed: pip install 'radio-cache[export]'") from exc
