from concurrent.futures import ThreadPoolExecutor

import numpy as np

from radio_cache.reader import Cache
from trainer.data.shard_cache import ShardCache


def test_rows_come_as_from_the_shards_and_each_shard_is_read_once(tiny_cache: Cache) -> None:
    teacher = tiny_cache.teachers["fake-a"]
    usable = tiny_cache.usable_rows(["fake-a"])
    read = ShardCache(usable, tiny_cache.meta.shard_images)
    rng = np.random.default_rng(0)
    asked = [rng.choice(usable, 5) for _ in range(20)]

    def ask(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *teacher.row_shape), teacher.codec.dtype)
        read(teacher, rows, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        for rows, found in zip(asked, pool.map(ask, asked), strict=True):
            np.testing.assert_array_equal(found, teacher.codes(rows))
    assert read.shards_read == 2


def test_memory_is_bounded(tiny_cache: Cache) -> None:
    teacher = tiny_cache.teachers["fake-a"]
    usable = tiny_cache.usable_rows(["fake-a"])
    read = ShardCache(usable, tiny_cache.meta.shard_images, max_bytes=1)
    out = np.empty((1, *teacher.row_shape), teacher.codec.dtype)
    for row in (0, 1, 7, 7, 0):
        read(teacher, np.array([row]), out)
    assert read.shards_read == 3  # one shard is kept at a time
