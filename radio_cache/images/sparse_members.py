"""Sparse members of a tar (GNU `tar -S`): only the parts that are not zero are stored, after a map of where they belong.

The image index places such a member by the range from its first header to the end of what is stored of it, with the length
negated, so that an image costs one read wherever the tar lies. An older radio-cache refuses the negative length.
"""

import io
import tarfile
from typing import Any, cast

from radio_cache.errors import ImageError
from radio_cache.images.files import refuse_large

# tarfile expects two empty blocks behind the last member.
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)

HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError)
"""What Python's tarfile raises for headers that are damaged, or made to hurt."""


def expanded(stored: bytes) -> bytes:
    """Return the file whose headers and stored parts are `stored`, its holes filled with zeros.

    Reads all formats of GNU tar: the old one, and 0.0, 0.1 and 1.0 within PAX headers.

    Raises:
        ImageError: the headers are damaged, or the file is larger than any image.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(stored + _END_OF_ARCHIVE), mode="r:") as tar:
            member = tar.next()
            parts: list[tuple[int, int]] | None = None if member is None else cast(Any, member).sparse
    except HEADER_ERRORS as exc:
        raise ImageError(f"cannot be read: the header of a sparse tar member is damaged ({exc})") from exc
    if member is None or parts is None:
        raise ImageError("cannot be read: the tar has no sparse member at its place any more")
    # The header may declare any size, so this comes before the allocation.
    refuse_large(member.size)
    # tarfile's own reader never ends where a position is in no part of the map.
    file, read = bytearray(max(0, member.size)), member.offset_data
    end = 0
    for offset, length in parts:
        if length == 0:  # the old format pads its map with these
            continue
        if length < 0 or offset < end or offset + length > len(file) or read + length > len(stored):
            raise ImageError("cannot be read: the map of a sparse tar member does not fit what is stored of it")
        file[offset : offset + length] = stored[read : read + length]
        read += length
        end = offset + length
    return bytes(file)
