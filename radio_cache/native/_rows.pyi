from typing_extensions import Buffer

VERSION: int
CUT_SHORT: int
OTHER_BYTES: int

def crc32c(data: Buffer, crc: int = 0, lanes: bool = False, /) -> int: ...
def read(
    descriptors: Buffer, offsets: Buffer, lengths: Buffer, places: Buffer, check: Buffer, out: Buffer, threads: int, /
) -> tuple[int, int, int] | None: ...
