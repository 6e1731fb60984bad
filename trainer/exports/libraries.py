"""Libraries that only some formats need."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from trainer.exports.written import ExportError


def library(name: str, what: str) -> Any:
    """Import a library by name.

    Raises:
        ExportError: if it is not installed, with the cure.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        raise ExportError(f"{what} needs {name}, which is not installed: pip install {name}") from exc


@contextmanager
def no_progress_bar() -> Generator[None]:
    """Turn transformers' progress bars off, and restore the setting at the end."""
    logging: Any = import_module("transformers.utils.logging")
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
