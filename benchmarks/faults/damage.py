"""Ways to damage the files of a cache: accidents, which disks and people cause, and forgeries, which only people do.

A cache is a mapping of paths to bytes here. An accident knows nothing of the format. A forgery does: it keeps every
checksum right, so that nothing but a check of what is said can find it.
"""

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import zstandard

from radio_cache.format.checksums import crc32c, file_crc32c

FOLDER = object()
"""In place of a file's bytes: there is a folder of that name now."""

Files = Mapping[str, bytes]
Changes = dict[str, Any]
"""Path -> new bytes, None where the file is gone, or FOLDER."""


@dataclass(frozen=True)
class Damage:
    """kind: what was done. misplaced: whole files that are right in themselves lie in another file's place."""

    kind: str
    changes: Changes
    misplaced: bool = False


def kind_of_file(path: str) -> str:
    """What a file of a cache is, in the words of docs/format.md."""
    name = path.rpartition("/")[2]
    if path == "zarr.json":
        return "root document"
    if path.startswith("receipts/"):
        return "receipt log" if name.startswith("log-") else "receipt"
    if name == "zarr.json":
        return "teacher document" if path.startswith("teachers/") and path.count("/") == 2 else "array document"
    for part in ("spatial/c", "summary/c", "stats", "transform", "index-"):
        if f"/{part}" in path:
            return {
                "spatial/c": "maps",
                "summary/c": "summaries",
                "stats": "statistics",
                "transform": "transform",
                "index-": "image index",
            }[part]
    return "image columns"


# ---------------------------------------------------------------- accidents


def _flip(rng: random.Random, data: bytearray, count: int = 1) -> None:
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _span(rng: random.Random, data: bytes | bytearray) -> tuple[int, int]:
    first = rng.randrange(len(data))
    return first, min(len(data), first + rng.choice((1, 2, 4, 16, rng.randint(1, len(data)))))


def _overwrite(rng: random.Random, data: bytearray) -> None:
    first, last = _span(rng, data)
    data[first:last] = rng.choice((bytes(last - first), b"\xff" * (last - first), rng.randbytes(last - first)))


def _delete(rng: random.Random, data: bytearray) -> None:
    first, last = _span(rng, data)
    del data[first:last]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.choice((rng.randbytes(rng.choice((1, 4, 100))), b"\0", b" ", b"9", b'"'))


def _repeat(rng: random.Random, data: bytearray) -> None:
    first, last = _span(rng, data)
    data[last:last] = data[first:last]


def _swap(rng: random.Random, data: bytearray) -> None:
    length = rng.randint(1, max(1, len(data) // 2))
    a, b = rng.randint(0, len(data) - length), rng.randint(0, len(data) - length)
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.choice((rng.randrange(len(data)), len(data) - rng.randint(1, min(16, len(data))))) :]


def _grow(rng: random.Random, data: bytearray) -> None:
    data += rng.choice((bytes(rng.choice((1, 4, 512))), rng.randbytes(rng.choice((1, 4, 512)))))


BYTES: dict[str, Callable[[random.Random, bytearray], None]] = {
    "one bit flipped": _flip,
    "several bits flipped": lambda rng, data: _flip(rng, data, rng.randint(2, 40)),
    "bytes overwritten": _overwrite,
    "bytes deleted": _delete,
    "bytes inserted": _insert,
    "bytes repeated": _repeat,
    "ranges swapped": _swap,
    "cut short": _truncate,
    "emptied": lambda _, data: data.clear(),
    "made longer": _grow,
}
"""What happens to bytes: name -> a change in place of a file that is not empty."""


def any_file(rng: random.Random, files: Files) -> str:
    """Kinds of files get equal chances, then files of a kind."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(files):
        kinds.setdefault(kind_of_file(path), []).append(path)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def accident(rng: random.Random, files: Files) -> Damage:
    """Something that happens to disks, to copying and to people."""
    path = any_file(rng, files)
    if rng.random() < 0.75:
        name = rng.choice(sorted(BYTES))
        data = bytearray(files[path])
        BYTES[name](rng, data)
        return Damage(name, {path: bytes(data)})
    match rng.randrange(7):
        case 0:
            return Damage("file deleted", {path: None})
        case 1:
            folder = "/".join(path.split("/")[: rng.randint(1, path.count("/") or 1)])
            gone = [other for other in files if other == folder or other.startswith(f"{folder}/")]
            return Damage("folder deleted", dict.fromkeys(gone))
        case 2:
            return Damage("half of the files deleted", {other: None for other in sorted(files) if rng.random() < 0.5})
        case 3:
            return Damage("folder in the place of a file", {path: FOLDER})
        case 4:
            folder = "/".join(path.split("/")[: rng.randint(1, path.count("/") or 1)])
            gone: Changes = {other: None for other in files if other.startswith(f"{folder}/")}
            return Damage("file in the place of a folder", {**gone, folder: rng.choice((b"", b"{}"))})
        case 5:
            alike = [other for other in sorted(files) if kind_of_file(other) == kind_of_file(path)]
            other = rng.choice(alike if rng.random() < 0.7 else sorted(files))
            return Damage("file copied over another", {path: files[other]}, misplaced=True)
        case _:
            alike = [other for other in sorted(files) if kind_of_file(other) == kind_of_file(path)]
            other = rng.choice(alike)
            return Damage("two files swapped", {path: files[other], other: files[path]}, misplaced=True)


def two_accidents(rng: random.Random, files: Files) -> Damage:
    """Both at once."""
    first, second = accident(rng, files), accident(rng, files)
    return Damage("two accidents", {**first.changes, **second.changes}, first.misplaced or second.misplaced)


# ---------------------------------------------------------------- forgeries

WEIRD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    255,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**4000,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "..",
    "../..",
    "/",
    "/etc/passwd",
    "a\0b",
    "a\\b",
    "\ud800",
    "\x1b[2J",
    "nan",
    "NaN",
    "9" * 400,
    "x" * 100_000,
    [],
    {},
    [[]],
    [1],
    [0, 0],
    [-1],
    [2**40],
    [2**40, 2**40],
    {"name": "x"},
    {"": 0},
)
"""Values nobody expects."""


def _seal(data: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in data.items() if key != "crc32c"}
    return rest | {"crc32c": crc32c(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())}


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as keys from the top."""
    paths = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        paths += _places(inner, (*path, key))
    return paths


def _edit(rng: random.Random, value: Any) -> Any:
    """A JSON value with one place changed."""
    copy = json.loads(json.dumps(value))
    places = [place for place in _places(copy) if place and place[-1] != "crc32c"]
    if not places:
        return rng.choice(WEIRD)
    *way, last = rng.choice(places)
    inner = copy
    for key in way:
        inner = inner[key]
    old = inner[last]
    match rng.randrange(8):
        case 0:
            del inner[last]
        case 1 if isinstance(inner, dict):
            inner[str(last) + rng.choice(("x", " ", ""))] = inner.pop(last)
            inner["more"] = rng.choice(WEIRD)
        case 2 if isinstance(old, int):
            inner[last] = rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, old * 2**20, float(old), str(old)))
        case 3 if isinstance(old, list):
            inner[last] = rng.choice((old * 2, old[::-1], old[:-1], old + old[:1], old * 1000))
        case 4 if isinstance(old, str):
            inner[last] = rng.choice((old * 2, f"../{old}", f"/{old}", old.upper(), old + "\n", old + "\x1b[31m"))
        case _:
            inner[last] = rng.choice(WEIRD)
    return copy


def _forged_text(rng: random.Random, text: bytes) -> bytes:
    """JSON that parsers stumble over."""
    return rng.choice(
        (
            lambda: b"[" * 100_000,
            lambda: b'{"a":' * 100_000,
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.decode(errors="replace").encode("utf-16"),
            lambda: text.decode(errors="replace").encode("utf-32"),
            lambda: text.replace(b"{", b'{"shape": [1], "shape": [2], ', 1),
            lambda: text.replace(b":", b": NaN, ", 1),
            lambda: b"1" * 100_000,
            lambda: b'"' + b"x" * 5_000_000 + b'"',
            lambda: text + text,
            lambda: b"null",
            lambda: b"[]",
            lambda: b"{}",
            lambda: b'{"attributes": []}',
            lambda: b'{"attributes": {"radio_cache": []}}',
            lambda: b'{"attributes": {"radio_cache": {}}}',
            lambda: text.replace(b"1", b"1" * 5000, 1),
            lambda: b"\0" * 64,
        )
    )()


def _forged_json(rng: random.Random, text: bytes) -> bytes:
    data = json.loads(text)
    ours = data.get("attributes", {}).get("radio_cache")
    if ours is not None and rng.random() < 0.8:
        data["attributes"]["radio_cache"] = edited = _edit(rng, ours)
        if isinstance(edited, dict) and rng.random() < 0.95:
            data["attributes"]["radio_cache"] = _seal(edited)
    elif "unit" in data:
        data = _edit(rng, data)
        data = _seal(data) if isinstance(data, dict) else data
    else:
        data = _edit(rng, data)
    return json.dumps(data).encode()


def _forged_log(rng: random.Random, text: bytes) -> bytes:
    """One receipt, the columns, or the closing line changed, and all checksums made to fit."""
    *lines, second, last = text.splitlines()
    columns, closing = json.loads(second), json.loads(last)
    match rng.randrange(3):
        case 0:
            number = rng.randrange(len(lines))
            edited = _edit(rng, json.loads(lines[number]))
            lines[number] = json.dumps(_seal(edited) if isinstance(edited, dict) else edited).encode()
            if rng.random() < 0.5:
                columns["columns"]["line_bytes"][number] = len(lines[number]) + 1
        case 1:
            columns = _edit(rng, columns)
        case _:
            closing = _edit(rng, closing)
    body = b"".join(line + b"\n" for line in lines)
    second = json.dumps(columns).encode() + b"\n"
    if isinstance(closing, dict) and rng.random() < 0.9:
        closing |= {"columns_crc32c": crc32c(second), "crc32c": crc32c(body)}
        if rng.random() < 0.8:
            closing["columns_bytes"] = len(second)
    return body + second + json.dumps(closing).encode() + b"\n"


def _forged_shard(rng: random.Random, data: bytes, shard_images: int, row_bytes: int) -> bytes:
    """Other chunks, or an index that lies, with the checksums that belong to them."""
    body, index = bytearray(data[: -16 * shard_images - 4]), bytearray(data[-16 * shard_images - 4 : -4])
    number = rng.randrange(shard_images)
    offset, length = struct.unpack_from("<QQ", index, 16 * number)
    there = offset < len(body)
    match rng.randrange(4):
        case 0:
            numbers = (
                0,
                1,
                4,
                5,
                len(body),
                len(body) + 1,
                2**31,
                2**32,
                2**62,
                2**63 - 1,
                2**63,
                2**64 - 1,
                offset,
                length,
            )
            struct.pack_into("<QQ", index, 16 * number, rng.choice(numbers), rng.choice(numbers))
        case 1 if there:
            chunk = bytearray(body[offset : offset + length - 4])
            _flip(rng, chunk, rng.randint(1, 8))
            body[offset : offset + length] = bytes(chunk) + crc32c(bytes(chunk)).to_bytes(4, "little")
        case 2:
            chunk = rng.choice(_bombs(row_bytes))
            struct.pack_into("<QQ", index, 16 * number, len(body), len(chunk) + 4)
            body += chunk + crc32c(chunk).to_bytes(4, "little")
        case _:
            other = rng.randrange(shard_images)
            index[16 * number : 16 * number + 16] = index[16 * other : 16 * other + 16]
    return bytes(body + index) + crc32c(bytes(index)).to_bytes(4, "little")


def zstd_frame(declared: int, blocks: tuple[int, ...], window_log: int = 17) -> bytes:
    """A frame that says it holds `declared` bytes and needs a window of 2^window_log, and holds runs of zeros so long."""
    made = struct.pack("<IBBQ", 0xFD2FB528, 0b1100_0000, (window_log - 10) << 3, declared)
    for number, length in enumerate(blocks):
        header = length << 3 | 1 << 1 | (number == len(blocks) - 1)
        made += header.to_bytes(3, "little") + b"\0"
    return made


def _bombs(row_bytes: int) -> tuple[bytes, ...]:
    gigabyte = (1 << 17,) * (1 << 13)  # 32 kB
    return (
        zstd_frame(1 << 30, gigabyte),
        zstd_frame(row_bytes, gigabyte),
        zstd_frame(row_bytes, (row_bytes,), window_log=31),
        zstd_frame(row_bytes, (row_bytes,), window_log=27),
        zstd_frame(2**64 - 1, (row_bytes,)),
        zstd_frame(row_bytes, (row_bytes - 1,)),
        zstd_frame(row_bytes, ()),
        b"",
        b"\x28\xb5\x2f\xfd",
        zstandard.compress(bytes(row_bytes)) * 1000,
    )


def _forged_plain(rng: random.Random, data: bytes) -> bytes:
    body = bytearray(data[:-4])
    if body:
        BYTES[rng.choice(("one bit flipped", "several bits flipped", "bytes overwritten"))](rng, body)
    return bytes(body) + crc32c(bytes(body)).to_bytes(4, "little")


def forgery(rng: random.Random, files: Files, shard_images: int, row_bytes: int) -> Damage:
    """Somebody wrote this on purpose. row_bytes: of one map that is compressed."""
    path = any_file(rng, files)
    data = files[path]
    kind = kind_of_file(path)
    if kind == "receipt log":
        return Damage("forged log", {path: _forged_log(rng, data)})
    if path.endswith(".json"):
        if rng.random() < 0.15:
            return Damage("forged text", {path: _forged_text(rng, data)})
        return Damage("forged JSON", {path: _forged_json(rng, data)})
    if kind == "maps":
        name, data_out = "forged shard", _forged_shard(rng, data, shard_images, row_bytes)
    else:
        name, data_out = "forged chunk", _forged_plain(rng, data)
    changes: Changes = {path: data_out}
    if rng.random() < 0.7:
        changes |= _receipts_that_fit(path, data_out, files)
    return Damage(name, changes)


def _receipts_that_fit(path: str, data: bytes, files: Files) -> Changes:
    """The receipts that name a file, with its new size and checksum."""
    unit = "images" if path.startswith("images/") else path.split("/")[1]
    below = path.removeprefix("images/" if unit == "images" else f"teachers/{unit}/")
    changes: Changes = {}
    for place, text in files.items():
        if place.startswith(f"receipts/{unit}/") and kind_of_file(place) == "receipt":
            receipt = json.loads(text)
            for file in receipt["files"]:
                if file["path"] == below:
                    file |= {"num_bytes": len(data), "crc32c": file_crc32c(data)}
                    changes[place] = json.dumps(_seal(receipt)).encode()
    return changes
