"""The files of a tar and the places of their bytes, from one pass over its headers; links, holes and hostile headers included."""

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, Self, cast, final

from cache_builder.sources.folder import has_image_name
from radio_cache.errors import SourceError
from radio_cache.images.sparse_members import HEADER_ERRORS, expanded

_BLOCK_BYTES = 512
_END_OF_ARCHIVE_BYTES = 2 * _BLOCK_BYTES
_TAIL_BYTES = 1 << 16
"""Looked at behind the last member: the end mark, the padding to tar's 10 KiB records, and what may follow it."""

_MAX_HEADER_BYTES = 1 << 24
"""Of the headers of one member; the map of a sparse file may take megabytes. tarfile reads a header at once, of any size."""

_KINDS = {
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}

_OTHER_FORMATS = (
    (b"\x1f\x8b", "compressed with gzip, which has no random access: decompress it first"),
    (b"BZh", "compressed with bzip2, which has no random access: decompress it first"),
    (b"\xfd7zXZ\x00", "compressed with xz, which has no random access: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd, which has no random access: decompress it first"),
    (b"PK\x03\x04", "a zip archive: unpack it and name the folder, or pack it as a tar"),
    (b"PAR1", "a Parquet file: give it the ending .parquet"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself (git lfs pull)"),
    (b"<!doctype", "a web page: look at the address and the login, and fetch it again"),
    (b"<html", "a web page: look at the address and the login, and fetch it again"),
    (b"<?xml", "an XML document, such as the error of a bucket: look at the address and the login, and fetch it again"),
    (b"{", "a JSON document, such as the error of a server: look at the address and the login, and fetch it again"),
)
"""Beginnings, in lower case where they are text, of what is found under the name of a tar; and what to do then."""


class TarMember(NamedTuple):
    """A file in a tar. offset, length: of its bytes; of a sparse file the range from its first header on, length negated
    (`radio_cache.images.sparse_members`)."""

    name: str
    offset: int
    length: int


@dataclass
class PassedOver:
    """Names of members that are no files, or must not be used, in tar order. Links are written as "name -> target"."""

    outside: list[str] = field(default_factory=list[str])
    symbolic_links: list[str] = field(default_factory=list[str])
    broken_links: list[str] = field(default_factory=list[str])
    special: list[str] = field(default_factory=list[str])


def tar_members(place: str, file: BinaryIO, passed: PassedOver) -> Iterator[TarMember]:
    """Yield the files of a tar in tar order, hard links with the place of the file they lead to. Hidden members are left out.

    Args:
        place: path or URL of the tar, for messages.
        file: may be read from elsewhere between two members.
        passed: takes the names of members that are passed over.

    Raises:
        SourceError: the tar is compressed, is no tar, is damaged, ends before its end-of-archive mark, or goes on behind it.
    """
    headers = _HeaderReader(place, file)
    places: dict[str, TarMember] = {}  # a hard link leads to an earlier member
    end = 0
    try:
        with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:", tarinfo=_TarInfo) as tar:
            while (info := tar.next()) is not None:
                if info.size < 0 or not tar.offset > end:
                    raise tarfile.ReadError(f"impossible size of {info.name:.80}")
                end = int(tar.offset)
                headers.num_bytes = 0
                kept: list[tarfile.TarInfo] = vars(tar)["members"]
                kept.clear()  # or all of them would stay in memory
                if info.isdir():
                    continue
                if info.issparse():  # tarfile may keep the name of GNU tar's stand-in
                    info.name = info.pax_headers.get("GNU.sparse.name", info.name)
                member = _placed(info, end, places)
                if member is not None:
                    places[_plain(member.name)] = member
                if _is_hidden(info.name):
                    continue
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    passed.outside.append(info.name)
                elif member is not None:
                    yield member
                elif info.issym():
                    passed.symbolic_links.append(f"{info.name} -> {info.linkname}")
                elif info.islnk():
                    passed.broken_links.append(f"{info.name} -> {info.linkname}")
                elif has_image_name(info.name):
                    passed.special.append(f"{info.name} ({_KINDS.get(info.type, f'a member of type {info.type!r}')})")
        _check_end(place, file, end)
    except HEADER_ERRORS as exc:
        if end > 0:
            raise SourceError(f"{place} is damaged or was cut short ({exc}): fetch it again") from exc
        raise SourceError(f"{place} is not a plain tar{_instead(file, exc)}") from exc


def read_member(file: BinaryIO, member: TarMember) -> bytes:
    """Return the content of a small member. Raises ImageError for a damaged sparse one."""
    file.seek(member.offset)  # tarfile looks for the next header where that must be, wherever this leaves off
    data = file.read(abs(member.length))
    return data if member.length >= 0 else expanded(data)


def _placed(info: tarfile.TarInfo, end: int, places: dict[str, TarMember]) -> TarMember | None:
    """The place of a file or of a hard link to one; None for other members, and links to what is not there."""
    if info.isreg():
        if info.issparse():
            return TarMember(info.name, info.offset, info.offset - end)
        return TarMember(info.name, info.offset_data, info.size)
    target = places.get(_plain(info.linkname)) if info.islnk() else None
    return target and target._replace(name=info.name)


def _plain(name: str) -> str:
    """The name by which links find a member. Most have nothing to change, and a million of them are not taken apart."""
    return posixpath.normpath(name) if "./" in name or "//" in name else name


_GNU_MAGIC = b"ustar  \0"


@final
class _TarInfo(tarfile.TarInfo):
    """Header of a member. GNU tar keeps times (`tar -g`) where POSIX has the beginning of a long name, and tarfile takes them for
    one: every file would lie in a folder of its own."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if (
            buf[257:265] == _GNU_MAGIC
            and buf[345]
            and info.type in (*tarfile.REGULAR_TYPES, tarfile.LNKTYPE, tarfile.SYMTYPE)
        ):
            info.name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
        return info


class _HeaderReader:
    """The file as tarfile reads it: headers alone, and no more of them than any member needs.

    num_bytes: read since the last member; set to 0 by the caller.
    """

    def __init__(self, place: str, file: BinaryIO) -> None:
        self._place, self._file, self.num_bytes = place, file, 0
        self.tell, self.seek = file.tell, file.seek

    def read(self, num_bytes: int) -> bytes:
        self.num_bytes += num_bytes
        if self.num_bytes > _MAX_HEADER_BYTES:
            raise SourceError(
                f"{self._place} is damaged, or made to hurt: the header before byte {self._file.tell()} has {self.num_bytes:,} "
                f"bytes or more, and none is longer than {_MAX_HEADER_BYTES:,}"
            )
        return self._file.read(num_bytes)


def _instead(file: BinaryIO, exc: Exception) -> str:
    """What a file is that is no tar, and what to do, to stand behind "is not a plain tar"."""
    file.seek(0)
    head = file.read(_BLOCK_BYTES)
    if not head:
        return " but an empty file (0 bytes): fetch it again"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for begin, sentence in _OTHER_FORMATS:
        if head.startswith(begin) or text.startswith(begin):
            return f" but {sentence}"
    return f" ({exc}): fetch it again, or pack it with tar"


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
    while len(tail) == _TAIL_BYTES and not any(tail):  # tar -b pads with megabytes of zeros
        tail = file.read(_TAIL_BYTES)
    if any(_is_header(tail[at : at + _BLOCK_BYTES]) for at in range(0, len(tail), _BLOCK_BYTES)):
        raise SourceError(f"{place} holds another tar behind its end, which would be lost: pack it again as one tar")


def _is_header(block: bytes) -> bool:
    """Return whether a block is the header of a member, of any format: v7 has a checksum and no magic."""
    if block[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except HEADER_ERRORS:
        return False
    return True


def _is_hidden(name: str) -> bool:
    # Most names have no such dot, and a million of them are not taken apart.
    return (name.startswith(".") or "/." in name) and any(
        part.startswith(".") and part not in (".", "..") for part in name.split("/")
    )


__all__ = ["PassedOver", "TarMember", "read_member", "tar_members"]
