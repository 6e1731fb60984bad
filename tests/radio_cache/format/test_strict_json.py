"""JSON from anybody: one meaning or a named error, and dataclasses whose fields are what they say."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_cache.format.strict_json import from_json, parse_json


@dataclass(frozen=True)
class Inner:
    side: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    scale: float
    hw: tuple[int, int]
    inner: Inner
    many: tuple[Inner, ...] = ()
    width: int | None = None
    extra: dict[str, Any] | None = None


GOOD = {"name": "x", "scale": 0.5, "hw": [3, 4], "inner": {"side": 1}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "Expecting value"),
        (b"\xff", "decode"),
        ('{"a": 1}'.encode("utf-16"), "decode"),
        ('{"a": 1}'.encode("utf-32-le"), "Expecting"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested too deeply"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested too deeply"),
        (b"1" * 100_000, "integer"),
        (b"{} {}", "Extra data"),
    ],
)
def test_json_of_no_or_of_two_meanings_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_all_other_json_is_taken_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


def test_dataclasses_survive_json() -> None:
    made = Outer("x", 2, (3, 4), Inner(5, "b"), (Inner(6), Inner(7)), 8, {"any": ["thing"]})
    assert from_json(Outer, json.loads(json.dumps(asdict(made)))) == made
    assert from_json(Outer, GOOD) == Outer("x", 0.5, (3, 4), Inner(1))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": 3}, "name is 3, not a text"),
        ({"scale": "1"}, "scale is '1', not a finite number"),
        ({"scale": float("inf")}, "scale is inf, not a finite number"),
        ({"scale": True}, "scale is True, not a finite number"),
        ({"hw": [1]}, r"hw is \[1\], not a list of 2"),
        ({"hw": [1, True]}, "hw.1 is True, not a whole number"),
        ({"hw": [1, 2.0]}, "hw.1 is 2.0, not a whole number"),
        ({"hw": [1, 2**63]}, "hw.1 is 9223372036854775808, not a number that can be true"),
        ({"hw": "12"}, "hw is '12', not a list of 2"),
        ({"inner": None}, "inner is None, not an object"),
        ({"inner": {"side": 1, "kind": "c"}}, "inner.kind is 'c', not one of a, b"),
        ({"inner": {"side": 1, "kind": ["a"]}}, "inner.kind is .*, not one of a, b"),
        ({"inner": {}}, "side is not there"),
        ({"many": [{"side": 1}, {"side": []}]}, r"many.1.side is \[\], not a whole number"),
        ({"width": "1"}, "width is '1', not"),
        ({"extra": []}, "extra is .*, not"),
        ({"more": 1}, "nobody knows a field 'more'"),
        ({"name": "y" * 1000}, None),
    ],
)
def test_values_that_are_not_what_their_place_needs_are_named(change: dict[str, Any], why: str | None) -> None:
    if why is None:
        assert len(from_json(Outer, GOOD | change).name) == 1000
        return
    with pytest.raises(ValueError, match=why):
        from_json(Outer, GOOD | change)


def test_an_annotation_that_cannot_be_checked_is_a_mistake_of_ours() -> None:
    @dataclass
    class Odd:
        when: bytes

    with pytest.raises(TypeError, match="no way to check"):
        from_json(Odd, {"when": 1})
