from typing_extensions import Buffer

CUT_SHORT: int
OTHER_BYTES: int

def crc32c(data: Buffer, /) -> int: ...
def read(
    descriptors: Buffer, offsets: Buffer, positions: Buffer, check: Buffer, out: Buffer, row_bytes: int, /
) -> tuple[int, int, int] | None: ...
