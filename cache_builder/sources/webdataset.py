"""A WebDataset tar: files that share a name up to the first dot of its last part are one sample (img.jpg, img.cls).

The tar is read once, headers only; images are then read by offset, in any order.
"""

import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from radio_cache.errors import SourceError
from radio_cache.images import EXTENSIONS

_BLOCK_BYTES = 512
_END_OF_ARCHIVE_BYTES = 2 * _BLOCK_BYTES
_TAIL_BYTES = 1 << 16
"""Looked at behind the last member: the end mark, the padding to tar's 10 KiB records, and what may follow it."""

_MAX_LABEL = 2**31 - 1


@dataclass(frozen=True)
class TarImage:
    """One image member: its name (made unique), the bytes it occupies in the tar, and the number in its `.cls`."""

    member: str
    offset: int
    length: int
    label: int | None


def list_tar(path: Path) -> tuple[list[TarImage], int, int]:
    """The images of a tar in tar order, how many other members there are, and how many names came twice.

    A name that comes again is kept apart as `name#2`: unpacking would silently lose the earlier one.
    Raises SourceError if the tar is compressed, damaged, ends before its end-of-archive mark, or goes on behind it.
    """
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    others = end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = int(tar.offset)
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                if name.suffix.lower() in EXTENSIONS:
                    images.append((member.name, member.offset_data, member.size))
                elif name.suffix == ".cls":
                    labels[_sample(member.name)] = _label(tar, member, path)
                else:
                    others += 1
    except tarfile.TarError as exc:
        if end > 0:
            raise SourceError(f"{path} is damaged or was cut short ({exc}): fetch it again") from exc
        raise SourceError(
            f"{path} is not a plain tar ({exc}); compressed tars have no random access: decompress it first"
        ) from exc
    except OSError as exc:
        raise SourceError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    _check_end(path, end)
    return (
        _with_unique_names(images, labels),
        others,
        sum(n - 1 for n in Counter(name for name, _, _ in images).values()),
    )


def _check_end(path: Path, end: int) -> None:
    """Python's tarfile stops without a word at the end of a cut file, at a damaged header, and before a second tar."""
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read(_TAIL_BYTES)
    if len(tail) < _END_OF_ARCHIVE_BYTES:
        raise SourceError(
            f"{path} ends without tar's end-of-archive mark, so it was probably cut short: fetch it again"
        )
    if any(tail[:_END_OF_ARCHIVE_BYTES]):
        raise SourceError(f"{path} is damaged: there is no tar header at byte {end}: fetch it again")
    if any(tail[at + 257 : at + 262] == b"ustar" for at in range(0, len(tail), _BLOCK_BYTES)):
        raise SourceError(f"{path} holds another tar behind its end, which would be lost: pack it again as one tar")


def _with_unique_names(images: list[tuple[str, int, int]], labels: dict[str, int]) -> list[TarImage]:
    count: Counter[str] = Counter()
    unique: list[TarImage] = []
    for name, offset, length in images:
        count[name] += 1
        member = name if count[name] == 1 else f"{name}#{count[name]}"
        unique.append(TarImage(member, offset, length, labels.get(_sample(name))))
    return unique


def _sample(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    text = file.read(64).decode(errors="replace").strip() if file else ""
    if not text.isdecimal() or int(text) > _MAX_LABEL:
        raise SourceError(f"{path}: {member.name} holds '{text}', and a .cls file holds one whole number, the class")
    return int(text)
