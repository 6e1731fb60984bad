"""Other people's libraries that only some formats need."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from trainer.exports.written import ExportError


def library(name: str, what: str) -> Any:
    """A library by its import name. Raises ExportError with the cure where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        raise ExportError(f"{what} needs {name}, which is not installed: pip install {name}") from exc


@contextmanager
def no_progress_bar() -> Generator[None]:
    """transformers loads without drawing a bar for every folder; what was set before is set again behind."""
    logging: Any = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
