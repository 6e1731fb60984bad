"""The files of a tar and the offsets of their bytes, from one pass over its headers.

Hard links and sparse files are resolved. Damaged and hostile headers are refused.
"""

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
"""Bytes read at once behind the last member: the end mark, the padding to tar's 10 KiB records, and a possible second tar."""

_MAX_HEADER_BYTES = 1 << 24
"""Limit of the headers of one member. The map of a sparse file may take megabytes. tarfile itself reads a header of any size."""

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
    (b"<!doctype", "a web page: check the address and the login, and fetch it again"),
    (b"<html", "a web page: check the address and the login, and fetch it again"),
    (b"<?xml", "an XML document, such as the error of a bucket: check the address and the login, and fetch it again"),
    (b"{", "a JSON document, such as the error of a server: check the address and the login, and fetch it again"),
)
"""First bytes of files that are mistaken for tars, text in lower case -> their format and the cure."""


class TarMember(NamedTuple):
    """A file in a tar."""

    name: str

    offset: int
    """Position of its first byte; of a sparse file, of its first header."""

    length: int
    """Number of its bytes. Negative for a sparse file, whose range includes its headers (`radio_cache.images.sparse_members`)."""


@dataclass
class SkippedMembers:
    """Names of skipped members, in tar order: those that are no files, or lead out of the tar.

    Links are written as "name -> target".
    """

    outside: list[str] = field(default_factory=list[str])
    symbolic_links: list[str] = field(default_factory=list[str])
    broken_links: list[str] = field(default_factory=list[str])
    special: list[str] = field(default_factory=list[str])


def tar_members(path_or_url: str, file: BinaryIO, skipped: SkippedMembers) -> Iterator[TarMember]:
    """Yield the files of a tar in tar order. A hard link has the offset of its target. Hidden members are left out.

    Args:
        path_or_url: location of the tar, for messages.
        file: the open tar. The caller may read other parts of it between two members.
        skipped: receives the names of skipped members.

    Raises:
        SourceError: the tar is compressed, is no tar, is damaged, ends before its end-of-archive mark, or goes on behind it.
    """
    headers = _HeaderReader(path_or_url, file)
    by_name: dict[str, TarMember] = {}  # targets of hard links, which always precede the link
    end = 0
    try:
        with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:", tarinfo=_TarInfo) as tar:
            while (info := tar.next()) is not None:
                # A negative size would send tarfile backwards, into an endless loop.
                if info.size < 0 or not tar.offset > end:
                    raise tarfile.ReadError(f"impossible size of {info.name:.80}")
                end = int(tar.offset)
                headers.num_bytes = 0
                # tarfile collects every header: a million of them would fill the memory.
                tarfile_members: list[tarfile.TarInfo] = vars(tar)["members"]
                tarfile_members.clear()
                if info.isdir():
                    continue
                if info.issparse():  # tarfile may report the name of GNU tar's placeholder
                    info.name = info.pax_headers.get("GNU.sparse.name", info.name)
                # Hidden files and files outside of the tar can be targets of links, so they are located before they are skipped.
                member = _located(info, end, by_name)
                if member is not None:
                    by_name[_normalised(member.name)] = member
                if _is_hidden(info.name):
                    continue
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    skipped.outside.append(info.name)
                elif member is not None:
                    yield member
                elif info.issym():
                    skipped.symbolic_links.append(f"{info.name} -> {info.linkname}")
                elif info.islnk():
                    skipped.broken_links.append(f"{info.name} -> {info.linkname}")
                elif has_image_name(info.name):
                    skipped.special.append(f"{info.name} ({_KINDS.get(info.type, f'a member of type {info.type!r}')})")
        _check_end(path_or_url, file, end)
    except HEADER_ERRORS as exc:
        if end > 0:
            raise SourceError(f"{path_or_url} is damaged or was cut short ({exc}): fetch it again") from exc
        raise SourceError(f"{path_or_url} is not a plain tar{_format_suffix(file, exc)}") from exc


def read_member(file: BinaryIO, member: TarMember) -> bytes:
    """Return the content of a small member.

    Raises:
        ImageError: a sparse member is damaged.
    """
    # tarfile seeks to the next header itself, so the position after this does not matter.
    file.seek(member.offset)
    data = file.read(abs(member.length))
    return data if member.length >= 0 else expanded(data)


def _located(info: tarfile.TarInfo, end: int, by_name: dict[str, TarMember]) -> TarMember | None:
    """Return the member of a file, or of a hard link to one; None for other members and for broken links."""
    if info.isreg():
        if info.issparse():
            # Headers, map and data together: the holes are filled when the image is read.
            return TarMember(info.name, info.offset, info.offset - end)
        return TarMember(info.name, info.offset_data, info.size)
    target = by_name.get(_normalised(info.linkname)) if info.islnk() else None
    return target and target._replace(name=info.name)


def _normalised(name: str) -> str:
    """Return the spelling of a name that hard links are resolved by."""
    # Nearly all names are normal already, and splitting a million of them would take seconds.
    return posixpath.normpath(name) if "./" in name or "//" in name else name


_GNU_MAGIC = b"ustar  \0"


@final
class _TarInfo(tarfile.TarInfo):
    """The header of a member, with the names of incremental GNU archives (`tar -g`) mended.

    GNU tar stores times where POSIX has the beginning of a long name. tarfile takes them for a folder of every file.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header block."""
        info = super().frombuf(buf, encoding, errors)
        if (
            buf[257:265] == _GNU_MAGIC
            and buf[345]
            and info.type in (*tarfile.REGULAR_TYPES, tarfile.LNKTYPE, tarfile.SYMTYPE)
        ):
            info.name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
        return info


class _HeaderReader:
    """The file that tarfile reads headers from, with a limit on the headers of one member.

    `num_bytes` counts the bytes read since the last member; the caller resets it.
    """

    def __init__(self, path_or_url: str, file: BinaryIO) -> None:
        self._path_or_url, self._file, self.num_bytes = path_or_url, file, 0
        self.tell, self.seek = file.tell, file.seek

    def read(self, num_bytes: int) -> bytes:
        """Read bytes of a header.

        Raises:
            SourceError: the headers of one member are longer than any real ones.
        """
        self.num_bytes += num_bytes
        if self.num_bytes > _MAX_HEADER_BYTES:
            raise SourceError(
                f"{self._path_or_url} is damaged or hostile: the header before byte {self._file.tell()} has {self.num_bytes:,} "
                f"bytes or more, and none is longer than {_MAX_HEADER_BYTES:,}"
            )
        return self._file.read(num_bytes)


def _format_suffix(file: BinaryIO, exc: Exception) -> str:
    """Return a suffix for "is not a plain tar" with the file's real format and the cure."""
    file.seek(0)
    head = file.read(_BLOCK_BYTES)
    if not head:
        return " but an empty file (0 bytes): fetch it again"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, description in _OTHER_FORMATS:
        if head.startswith(magic) or text.startswith(magic):
            return f" but {description}"
    return f" ({exc}): fetch it again, or pack it with tar"


def _check_end(path_or_url: str, file: BinaryIO, end: int) -> None:
    """Raise SourceError unless the tar ends at byte `end` with an end-of-archive mark, and nothing follows it.

    Python's tarfile silently stops at the end of a truncated file, at a damaged header, and before a second tar.
    """
    file.seek(end)
    tail = file.read(_TAIL_BYTES)
    if len(tail) < _END_OF_ARCHIVE_BYTES:
        raise SourceError(
            f"{path_or_url} ends without tar's end-of-archive mark, so it was probably cut short: fetch it again"
        )
    if any(tail[:_END_OF_ARCHIVE_BYTES]):
        raise SourceError(f"{path_or_url} is damaged: there is no tar header at byte {end}: fetch it again")
    # `tar -b` pads with megabytes of zeros: read on until something else comes, or the file ends.
    while len(tail) == _TAIL_BYTES and not any(tail):
        tail = file.read(_TAIL_BYTES)
    if any(_is_header(tail[at : at + _BLOCK_BYTES]) for at in range(0, len(tail), _BLOCK_BYTES)):
        raise SourceError(
            f"{path_or_url} holds another tar behind its end, which would be lost: pack it again as one tar"
        )


def _is_header(block: bytes) -> bool:
    """Return whether a block is the header of a member, in any format. The v7 format has a checksum and no magic."""
    if block[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except HEADER_ERRORS:
        return False
    return True


def _is_hidden(name: str) -> bool:
    """Return whether a member or a folder above it is hidden."""
    # Most names have no such dot, and splitting a million of them would take seconds.
    return (name.startswith(".") or "/." in name) and any(
        part.startswith(".") and part not in (".", "..") for part in name.split("/")
    )


__all__ = ["SkippedMembers", "TarMember", "read_member", "tar_members"]
