"""A WebDataset tar: files that share a name up to the first dot of its last part are one sample (img.jpg, img.cls).

The tar is read once, headers only; images are then read by offset, in any order. At a URL a header is a request for a
range: what lies between them is not read, unless it is shorter than what a request brings.
"""

import tarfile
from typing import BinaryIO

import numpy as np

from cache_builder.sources.folder import has_image_name
from cache_builder.sources.found import Found, unique_names
from cache_builder.sources.opened import open_source
from radio_cache.errors import SourceError
from radio_cache.remote_files import Tell

_BLOCK_BYTES = 512
_END_OF_ARCHIVE_BYTES = 2 * _BLOCK_BYTES
_TAIL_BYTES = 1 << 16
"""Looked at behind the last member: the end mark, the padding to tar's 10 KiB records, and what may follow it."""

_MAX_LABEL = 2**31 - 1


def list_tar(place: str, tell: Tell = lambda _: None) -> Found:
    """The images of a tar at a path or a URL, in tar order, with the class numbers of their `.cls` files.

    tell: told of each image, for at a URL every header may be a request.
    A name that comes again is kept apart as `name#2`: unpacking would silently lose the earlier one. Hidden members are
    passed over as in a folder, and members whose path leads out of the tar, as only an attacker's does.
    Raises SourceError if the tar is compressed, damaged, ends before its end-of-archive mark, or goes on behind it.
    """
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    others = end = 0
    climbing: list[str] = []
    try:
        with open_source(place) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    end = int(tar.offset)
                    headers: list[tarfile.TarInfo] = vars(tar)["members"]
                    headers.clear()  # or all of them would stay in memory
                    name = member.name
                    if not member.isfile():
                        continue
                    if name.startswith("/") or ".." in name.split("/"):
                        climbing.append(name)
                    elif _is_hidden(name):
                        continue
                    elif has_image_name(name):
                        images.append((name, member.offset_data, member.size))
                        tell(1)
                    elif name.endswith(".cls"):
                        labels[_sample(name)] = _label(file, member, place)
                    else:
                        others += 1
            _check_end(place, file, end)
    except tarfile.TarError as exc:
        if end > 0:
            raise SourceError(f"{place} is damaged or was cut short ({exc}): fetch it again") from exc
        raise SourceError(
            f"{place} is not a plain tar ({exc}); compressed tars have no random access: decompress it first"
        ) from exc
    members, repeated = unique_names([name for name, _, _ in images])
    notes: list[str] = []
    if others:
        notes.append(f"{others} file{'s' if others > 1 else ''} passed over (no image by name)")
    if climbing:
        notes.append(
            f"{len(climbing)} file{'s' if len(climbing) > 1 else ''} passed over, whose path leads out of the tar ({climbing[0]})"
        )
    notes += repeated
    return Found(
        members=members, labels=np.array([labels.get(_sample(name), -1) for name, _, _ in images], np.int32),
        class_names=None, offset=np.array([offset for _, offset, _ in images], np.int64),
        length=np.array([length for _, _, length in images], np.int64), notes=tuple(notes),
    )  # fmt: skip


def _check_end(place: str, file: BinaryIO, end: int) -> None:
    """Python's tarfile stops without a word at the end of a cut file, at a damaged header, and before a second tar."""
    file.seek(end)
    tail = file.read(_TAIL_BYTES)
    if len(tail) < _END_OF_ARCHIVE_BYTES:
        raise SourceError(
            f"{place} ends without tar's end-of-archive mark, so it was probably cut short: fetch it again"
        )
    if any(tail[:_END_OF_ARCHIVE_BYTES]):
        raise SourceError(f"{place} is damaged: there is no tar header at byte {end}: fetch it again")
    if any(tail[at + 257 : at + 262] == b"ustar" for at in range(0, len(tail), _BLOCK_BYTES)):
        raise SourceError(f"{place} holds another tar behind its end, which would be lost: pack it again as one tar")


def _sample(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def _is_hidden(name: str) -> bool:
    # Most names have no such dot, and a million of them are not taken apart.
    return (name.startswith(".") or "/." in name) and any(
        part.startswith(".") and part != "." for part in name.split("/")
    )


def _label(file: BinaryIO, member: tarfile.TarInfo, place: str) -> int:
    file.seek(member.offset_data)  # tarfile looks for the next header where that must be, wherever it left off
    text = file.read(min(64, member.size)).decode(errors="replace").strip()
    if not text.isdecimal() or int(text) > _MAX_LABEL:
        raise SourceError(f"{place}: {member.name} holds '{text}', and a .cls file holds one whole number, the class")
    return int(text)
