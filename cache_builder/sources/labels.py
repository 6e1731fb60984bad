"""One rule for the classes of all sources: a value of a file becomes a class number, a class name, or no class.

Whole numbers are class numbers, also where they are written as floats (`3.0`). Negative numbers, null, NaN and empty text are
no class. Other text is a class name. If one class of a source is a name, all its classes are names.
"""

import math
import re
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.columns import numbered

MAX_LABEL = 2**31 - 1
"""The highest class number that an index can hold."""

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\Z")
_MISSING = frozenset({"", "nan", "-nan", "null", "<na>"})
_MISSING_AMONG_NUMBERS = frozenset({"none", "na", "n/a"})
"""Also possible class names (`none`), so they count as missing only where all other labels are numbers."""


def parse_label(value: object) -> int | str | None:
    """Return the class number, the class name, or None for no class.

    Raises:
        ValueError: neither a whole number nor a name, or a number beyond `MAX_LABEL`. The message continues a sentence that
            names the file.
    """
    if value is None or isinstance(value, str):
        return _parse_text(value or "")
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{value}, which is no whole number")
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"a {type(value).__name__}, which is neither a number nor a name")  # noqa: TRY004  # data, not a call
    # bool is an int: False and True are the classes 0 and 1.
    if value > MAX_LABEL:
        raise ValueError(f"{value}, which is higher than the highest class number, {MAX_LABEL}")
    return int(value) if value >= 0 else None


def _parse_text(text: str) -> int | str | None:
    """Return the class that a text stands for. A number that cannot be a class number is a name."""
    text = text.strip()
    if text.lower() in _MISSING:
        return None
    if not _NUMBER.match(text):
        return text
    # A decimal integer of any length stays exact; a float would round it.
    number = int(text) if text.isdecimal() else float(text)
    if number < 0:
        return None
    return int(number) if number <= MAX_LABEL and number == int(number) else text


def parse_labels(values: Sequence[object]) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """Return (n,) class numbers, -1 for no class, and the class names that they index; None if all labels are numbers.

    Raises:
        ValueError: as `parse_label`.
    """
    # Each distinct value is parsed once: a column of a million rows has few classes.
    parsed = {value: parse_label(value) for value in dict.fromkeys(values)}
    names = {label for label in parsed.values() if isinstance(label, str)}
    numbers = {label for label in parsed.values() if isinstance(label, int)}
    if numbers:
        names = {name for name in names if name.lower() not in _MISSING_AMONG_NUMBERS}
    if names:
        # Numbers among names are names, as they are written.
        text = {value: None if label is None else str(value).strip() for value, label in parsed.items()}
        return numbered([text[value] for value in values])
    column = [label if isinstance(label := parsed[value], int) else -1 for value in values]
    return np.array(column, np.int32), None
