import numpy as np
import pytest

from radio_cache.errors import ConfigError
from trainer.data.sampler import BlockSampler, FullSampler

ROWS = np.array([row for row in range(40) if row not in (3, 17, 18)])  # shards of 8; the last ones are not all usable


def test_a_full_shuffle_shows_every_image_once_an_epoch_in_a_new_order() -> None:
    order = FullSampler(ROWS, (7,), 10)
    rows = np.concatenate([order.rows(number, 0, 10) for number in range(12)])
    epochs = [rows[n * len(ROWS) : (n + 1) * len(ROWS)] for n in range(3)]
    assert all(sorted(epoch) == ROWS.tolist() for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    np.testing.assert_array_equal(order.rows(5, 3, 8), rows[53:58])


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_blocks_show_every_image_once_an_epoch_a_few_shards_at_a_time(readers: int) -> None:
    batch = 10
    order = BlockSampler(ROWS, 8, (7,), batch, window=2, readers=readers)
    share = batch // readers
    for reader in range(readers):
        stream = np.concatenate(
            [
                BlockSampler(ROWS, 8, (7,), batch, window=2, readers=readers).rows(
                    n, reader * share, (reader + 1) * share
                )
                for n in range(60)
            ]
        )
        jumps = [np.unique(stream[at : at + 8] // 8).size for at in range(0, len(stream) - 8, 8)]
        assert max(jumps) <= 4  # the end of one block of two shards and the beginning of the next
        again = np.concatenate([order.rows(n, reader * share, (reader + 1) * share) for n in range(60)])
        np.testing.assert_array_equal(stream, again)
    first: list[int] = []
    for reader in range(readers):
        length = sum(len(order._by_shard[s]) for s in order._shards_of(reader, 0))
        stream = [order.rows(n, reader * share, (reader + 1) * share) for n in range(40)]
        first += np.concatenate(stream)[:length].tolist()
    assert sorted(first) == ROWS.tolist()


def test_one_reader_may_ask_for_the_shares_of_several() -> None:
    order = BlockSampler(ROWS, 8, (0,), 10, window=2, readers=2)
    np.testing.assert_array_equal(order.rows(3, 0, 10), np.concatenate([order.rows(3, 0, 5), order.rows(3, 5, 10)]))


def test_more_processes_than_shards_are_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"6 processes cannot share 5 shards of images: --set shuffle=full"):
        BlockSampler(ROWS, 8, (0,), 12, window=2, readers=6)
