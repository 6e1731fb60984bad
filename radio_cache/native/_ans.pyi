from typing_extensions import Buffer

VERSION: int

def decode(rows: Buffer, runs: Buffer, order: Buffer, tables: Buffer, lanes: int, out: Buffer, /) -> int: ...
def encode(
    values: Buffer,
    runs: Buffer,
    order: Buffer,
    frequencies: Buffer,
    starts: Buffer,
    lanes: int,
    out: Buffer,
    lengths: Buffer,
    /,
) -> None: ...
