"""Untrusted JSON: parsed with one meaning or not at all, and turned into dataclasses by their annotations.

Python's own parser accepts NaN, uses the last of two equal keys, and returns whatever types it finds. Other tools read a cache,
too, and may see another value. A number in place of a string causes an error far from its cause.
"""

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_INTEGER = 1 << 62
"""Larger whole numbers are implausible, and overflow 64-bit arithmetic."""

_MAX_DEPTH = 64
"""Deepest accepted nesting of lists and objects, so that a parsed document can be printed and written, too."""

Check = Callable[[Any], Any]


class _WrongError(ValueError):
    """A value that is not what its place needs; the keys that lead to it are added on the way up."""

    def __init__(self, value: Any, needed: str) -> None:
        self.value, self.needed, self.keys = value, needed, list[str]()

    def __str__(self) -> str:
        return f"{'.'.join(reversed(self.keys)) or 'it'} is {self.value!r:.60}, not {self.needed}"


def parse_json(text: bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: if it is not UTF-8 or not JSON, too deep, or has a duplicate key or NaN.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    # An upper bound of the depth, so that most documents need no second pass.
    if text.count(b"[") + text.count(b"{") > _MAX_DEPTH:
        _refuse_depth(value)
    return value


def from_json(kind: type[T], data: Any) -> T:
    """Build a dataclass from parsed JSON, with every field checked against its annotation, at every depth.

    Known annotations: int (no bool, at most 2^62), float (finite; whole numbers are accepted), str, bool, Any, Literal,
    unions, tuple[x, ...], tuple[x, y], dict[str, x], other dataclasses. Lists become tuples. Fields with a default may be absent,
    and unknown fields are errors.

    Raises:
        ValueError: with the field and the value.
    """
    return cast(T, _check(kind)(data))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    # Python keeps the last of equal keys, other parsers the first: two tools would read two caches.
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.40} is there twice")
    return document


def _refuse_depth(value: Any) -> None:
    # Level by level, because recursion would overflow the stack on hostile nesting.
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        inner = [node.values() if type(node) is dict else node for node in level if type(node) in (dict, list)]
        level = [node for children in inner for node in children]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


@cache
def _check(kind: Any) -> Check:
    """Return the function that checks and converts values of an annotation."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind is Any:
        return lambda value: value
    if origin is Literal:
        return lambda value: _one_of(value, inner)
    if origin is Union or origin is types.UnionType:
        return _union([_check(argument) for argument in inner])
    if origin is tuple:
        return _tuple(inner)
    if origin is dict:
        return _dict(_check(inner[1]))
    if is_dataclass(kind):
        return _dataclass(cast(type, kind))
    raise TypeError(f"no way to check {kind} is known")


def _integer(value: Any) -> int:
    # Not isinstance: True is an int, too.
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise _WrongError(value, "a whole number" if type(value) is not int else "a number that can be true")
    return value


def _number(value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and abs(value) <= MAX_INTEGER:
        return value  # stays an int, so that a document is written again with the same bytes
    raise _WrongError(value, "a finite number")


def _exactly(kind: type, needed: str) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _WrongError(value, needed)
        return value

    return check


_SCALARS: Mapping[Any, Check] = {
    int: _integer,
    float: _number,
    str: _exactly(str, "a text"),
    bool: _exactly(bool, "true or false"),
    types.NoneType: _exactly(types.NoneType, "null"),
}


def _one_of(value: Any, known: tuple[Any, ...]) -> Any:
    if type(value) is not str or value not in known:
        raise _WrongError(value, f"one of {', '.join(map(str, known))}")
    return value


def _union(checks: list[Check]) -> Check:
    def check(value: Any) -> Any:
        errors: list[_WrongError] = []
        for check_branch in checks:
            try:
                return check_branch(value)
            except _WrongError as exc:
                errors.append(exc)
        raise max(errors, key=lambda error: len(error.keys))  # the error that is nested deepest

    return check


def _tuple(inner: tuple[Any, ...]) -> Check:
    # tuple[x, ...], or an annotation for each position.
    repeats = len(inner) == 2 and inner[1] is Ellipsis
    checks = [_check(element) for element in inner if element is not Ellipsis]
    needed = "a list" if repeats else f"a list of {len(checks)}"

    def check(value: Any) -> Any:
        if type(value) is not list or not (repeats or len(cast(list[Any], value)) == len(checks)):
            raise _WrongError(value, needed)
        values = cast(list[Any], value)
        checked: list[Any] = []
        for number, element in enumerate(values):
            try:
                checked.append(checks[0 if repeats else number](element))
            except _WrongError as exc:
                exc.keys.append(str(number))
                raise
        return tuple(checked)

    return check


def _dict(check_value: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise _WrongError(value, "an object")
        checked: dict[str, Any] = {}
        for key, element in cast(dict[str, Any], value).items():
            try:
                checked[key] = check_value(element)
            except _WrongError as exc:
                exc.keys.append(key)
                raise
        return checked

    return check


def _dataclass(kind: type) -> Check:
    # `fields` holds annotations as strings where a module postpones their evaluation.
    hints = get_type_hints(kind)
    checks = {field.name: _check(hints[field.name]) for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}

    def check(value: Any) -> Any:
        if type(value) is kind:
            return value  # built by its own from_json before
        if type(value) is not dict:
            raise _WrongError(value, "an object")
        data = cast(dict[str, Any], value)
        missing, unknown = sorted(needed - data.keys()), sorted(data.keys() - checks.keys())
        if missing:
            raise ValueError(f"{', '.join(missing)} is not there")
        if unknown:
            raise ValueError(f"nobody knows a field {unknown[0]!r:.40}")
        checked: dict[str, Any] = {}
        for name, element in data.items():
            try:
                # The keys are collected on the way out, innermost first.
                checked[name] = checks[name](element)
            except _WrongError as exc:
                exc.keys.append(name)
                raise
        return kind(**checked)

    return check
