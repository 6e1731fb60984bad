"""k-NN against a reference that is written the long way."""

from collections.abc import Iterator
from typing import final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evals.encoders import OWN, Encoder
from evals.encoders.base import Block, OnImages
from evals.errors import EvalError
from evals.knn.classify import SpaceVotes, classify_images
from evals.knn.search import NeighbourSearch, merged
from evals.knn.table import knn_table
from evals.knn.vote import NO_CLASS, accuracy, lone_classes, vote
from evals.shared.devices import Device
from evals.shared.image_set import ImageSet, ImageSource
from radio_cache.errors import ConfigError, ShapeError


@final
class RowsSource(ImageSource):
    """Images that exist only as rows of features."""

    def __init__(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        self.location, self.class_names = "rows", ()
        self.features, self.labels = features, labels

    def key(self, row: int) -> str:
        return str(row)

    def decoded(self, row: int) -> None:
        raise NotImplementedError

    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([np.frombuffer(self.features[row].tobytes(), np.uint8) for row in rows])


@final
class RowsEncoder(Encoder):
    """Gives the features that the source of the images holds, in blocks of 64."""

    def __init__(self) -> None:
        super().__init__(name="rows", kind="model", description="rows of features", spaces=(OWN,), runs_a_model=False)

    def blocks(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[Block]:
        assert isinstance(images.source, RowsSource)
        for positions in np.split(np.arange(len(images)), range(64, len(images), 64)):
            yield Block(positions, {OWN: images.source.features[images.rows[positions]]})


def image_set_of(features: NDArray[np.float32], labels: NDArray[np.int64]) -> ImageSet:
    return ImageSet(RowsSource(features, labels), np.arange(len(features)), labels, ())


def classify(
    bank: NDArray[np.float32],
    labels: NDArray[np.int64],
    queries: NDArray[np.float32] | None,
    *,
    k: int,
    temperature: float,
    device: Device = "auto",
) -> SpaceVotes:
    """Classify rows of features as `knn_table` classifies the images of an encoder; None for leave-one-out."""
    query_set = None if queries is None else image_set_of(queries, np.zeros(len(queries), np.int64))
    bank_set = image_set_of(bank, labels)
    return classify_images(RowsEncoder(), bank_set, query_set, ks=[k], temperature=temperature, device=device)[OWN]


def top5(result: SpaceVotes) -> NDArray[np.int64]:
    (ranked,) = result.ranked.values()
    return ranked


def reference(
    bank: NDArray[np.float32],
    labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    k: int,
    temperature: float,
    leave_one_out: bool,
) -> list[list[int]]:
    """Classes by falling vote for every query, one pair at a time, in float64."""
    unit = [row / np.linalg.norm(row) for row in bank.astype(np.float64)]
    ranked: list[list[int]] = []
    for number, query in enumerate(queries.astype(np.float64)):
        query = query / np.linalg.norm(query)
        pairs = [
            (float(row @ query), -position)
            for position, row in enumerate(unit)
            if not (leave_one_out and position == number)
        ]
        votes: dict[int, float] = {}
        for similarity, position in sorted(pairs, reverse=True)[:k]:
            label = int(labels[-position])
            votes[label] = votes.get(label, 0.0) + np.exp(similarity / temperature)
        ranked.append(sorted(votes, key=lambda label: (-votes[label], label))[:5])
    return ranked


@pytest.fixture
def clouds() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Seven overlapping classes with uneven sizes and labels that are neither dense nor sorted."""
    rng = np.random.default_rng(3)
    names = np.array([4, 11, 2, 30, 7, 8, 19])
    centres = rng.normal(size=(7, 12))
    bank_class, query_class = rng.integers(0, 7, 150), rng.integers(0, 7, 45)
    bank = (centres[bank_class] + rng.normal(size=(150, 12))).astype(np.float32)
    queries = (centres[query_class] + rng.normal(size=(45, 12))).astype(np.float32)
    return bank, names[bank_class], queries, names[query_class]


@pytest.mark.parametrize("k", [1, 5, 20, 149])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_queries_are_ranked_as_by_the_reference(clouds, k: int, temperature: float) -> None:
    bank, labels, queries, _ = clouds
    ranked = top5(classify(bank, labels, queries, k=k, temperature=temperature))
    expected = reference(bank, labels, queries, k, temperature, leave_one_out=False)
    assert [[c for c in row if c != NO_CLASS] for row in ranked.tolist()] == expected


@pytest.mark.parametrize("k", [1, 20])
def test_leave_one_out_is_ranked_as_by_the_reference(clouds, k: int) -> None:
    bank, labels, _, _ = clouds
    ranked = top5(classify(bank, labels, None, k=k, temperature=0.07))
    expected = reference(bank, labels, bank, k, 0.07, leave_one_out=True)
    assert [[c for c in row if c != NO_CLASS] for row in ranked.tolist()] == expected


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_table_has_the_accuracy_of_the_reference_for_every_k(clouds, leave_one_out: bool) -> None:
    bank, labels, queries, query_labels = clouds
    query_set = None if leave_one_out else image_set_of(queries, query_labels)
    table = knn_table([RowsEncoder()], image_set_of(bank, labels), query_set, k=20, sweep=(1, 5), temperature=0.07)
    (row,) = table.rows
    features, truth = (bank, labels) if leave_one_out else (queries, query_labels)
    for k in (1, 5, 20):
        expected = reference(bank, labels, features, k, 0.07, leave_one_out)
        hits = [ranks.index(label) if label in ranks else None for ranks, label in zip(expected, truth, strict=True)]
        assert row.by_k[k].top1 == np.mean([hit == 0 for hit in hits])
        assert row.by_k[k].top5 == np.mean([hit is not None for hit in hits])
    assert (row.top1, row.top5) == (row.by_k[20].top1, row.by_k[20].top5)


def test_scale_of_the_rows_does_not_matter(clouds) -> None:
    bank, labels, queries, _ = clouds
    scales = np.random.default_rng(0).uniform(0.01, 100, (len(bank), 1)).astype(np.float32)
    plain = classify(bank, labels, queries, k=20, temperature=0.07)
    scaled = classify(bank * scales, labels, queries * 7, k=20, temperature=0.07)
    np.testing.assert_array_equal(top5(plain), top5(scaled))


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_bank_in_pieces_gives_the_same_as_in_one(clouds, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _, queries, _ = clouds
    whole = NeighbourSearch(queries, 20)
    whole.add(np.arange(150), bank)
    monkeypatch.setattr("evals.knn.search._BLOCK_BYTES", 4 * 12 * 40)  # a block holds 40 rows of 12
    monkeypatch.setattr("evals.knn.search._QUERY_BATCH", 8)
    pieces = NeighbourSearch(queries, 20)
    for rows in np.split(np.random.default_rng(0).permutation(150), range(piece, 150, piece)):
        pieces.add(rows, bank[rows])
    np.testing.assert_array_equal(whole.result().rows, pieces.result().rows)
    np.testing.assert_allclose(whole.result().similarity, pieces.result().similarity, atol=2e-6)
    assert pieces.num_rows == 150


def test_shards_searched_apart_and_merged_are_the_whole(clouds) -> None:
    bank, labels, queries, _ = clouds
    whole = NeighbourSearch(queries, 20)
    whole.add(np.arange(150), bank)
    halves = []
    for rows in (np.arange(0, 150, 2), np.arange(1, 150, 2), np.arange(0)):  # a shard may be empty
        half = NeighbourSearch(queries, 20)
        half.add(rows, bank[rows])
        halves.append(half.result())
    np.testing.assert_array_equal(merged(halves, 20).rows, whole.result().rows)
    ranked = vote(merged(halves, 20), labels, temperature=0.07)
    assert [[c for c in row if c != NO_CLASS] for row in ranked.tolist()] == reference(
        bank, labels, queries, 20, 0.07, leave_one_out=False
    )


def test_fewer_rows_than_neighbours_leave_places_empty() -> None:
    search = NeighbourSearch(np.eye(3, dtype=np.float32), 5)
    search.add(np.array([7, 9]), np.eye(3, dtype=np.float32)[:2])
    neighbours = search.result()
    assert neighbours.rows.tolist() == [[7, 9, -1, -1, -1], [9, 7, -1, -1, -1], [7, 9, -1, -1, -1]]
    assert np.isneginf(neighbours.similarity[:, 2:]).all()
    assert vote(neighbours, np.arange(10), temperature=0.07)[0].tolist() == [7, 9, NO_CLASS, NO_CLASS, NO_CLASS]
    assert vote(neighbours.first(1), np.arange(10), temperature=0.07)[1].tolist() == [9, *[NO_CLASS] * 4]


def test_pieces_of_another_width_or_not_finite_are_refused() -> None:
    search = NeighbourSearch(np.eye(3, dtype=np.float32), 1)
    with pytest.raises(ShapeError, match=r"the bank is \(2, 4\), the queries are \(3, 3\)"):
        search.add(np.arange(2), np.zeros((2, 4), np.float32))
    with pytest.raises(EvalError, match="1 summaries of the bank hold NaN"):
        search.add(np.arange(2), np.array([[1, 2, 3], [1, np.inf, 0]], np.float32))


def test_votes_are_counted_the_same_in_small_batches(clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, queries, _ = clouds
    whole = top5(classify(bank, labels, queries, k=20, temperature=0.07))
    monkeypatch.setattr("evals.knn.vote._VOTE_CELLS", 20)
    np.testing.assert_array_equal(whole, top5(classify(bank, labels, queries, k=20, temperature=0.07)))


def test_a_row_does_not_vote_for_itself_but_its_duplicate_does() -> None:
    bank = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=np.float32)
    labels = np.array([0, 1, 2, 3])
    ranked = top5(classify(bank, labels, None, k=1, temperature=0.07))
    assert ranked[:, 0].tolist() == [1, 0, 3, 2]


def test_equal_neighbours_at_the_border_are_taken_in_row_order() -> None:
    bank = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (12, 1))
    labels = np.arange(12)[::-1].copy()
    ranked = top5(classify(bank, labels, None, k=3, temperature=0.07))
    # Rows 0 to 3 carry the labels 11 to 8; each query leaves itself out, and equal votes go to the lower label.
    assert ranked[0].tolist() == [8, 9, 10, NO_CLASS, NO_CLASS]
    assert ranked[1].tolist() == [8, 9, 11, NO_CLASS, NO_CLASS]
    assert ranked[11].tolist() == [9, 10, 11, NO_CLASS, NO_CLASS]


def test_k_beyond_the_bank_is_clamped_and_said() -> None:
    bank = np.eye(4, dtype=np.float32)
    labels = np.array([0, 0, 1, 1])
    assert classify(bank, labels, bank, k=20, temperature=0.07).num_voters == 4
    assert classify(bank, labels, None, k=20, temperature=0.07).num_voters == 3


def test_tiny_temperature_does_not_overflow() -> None:
    bank = np.eye(3, dtype=np.float32)
    ranked = top5(classify(bank, np.array([5, 6, 7]), bank, k=3, temperature=1e-6))
    assert ranked[:, 0].tolist() == [5, 6, 7]


def test_a_row_of_zeros_is_no_error() -> None:
    bank = np.array([[0, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert top5(classify(bank, np.array([0, 1, 2]), bank[1:], k=1, temperature=0.07))[:, 0].tolist() == [1, 2]


def test_classes_with_one_image_are_named() -> None:
    assert lone_classes(np.array([3, 3, 9, 4, 4, 1])).tolist() == [1, 9]


def test_accuracy_counts_places() -> None:
    ranked = np.array([[1, 2, NO_CLASS, NO_CLASS, NO_CLASS], [2, 1, 3, 4, 5], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5]])
    result = accuracy(ranked, np.array([1, 5, 1, 6]))
    assert (result.top1, result.top5) == (0.25, 0.5)


def test_bad_input_is_refused_in_words() -> None:
    bank, labels = np.eye(3, dtype=np.float32), np.arange(3)
    with pytest.raises(ShapeError, match=r"\(3, 3\).*\(3, 2\)"):
        classify(bank, labels, bank[:, :2], k=1, temperature=0.07)
    with pytest.raises(ShapeError, match="one label per bank row"):
        classify(bank, labels[:2], bank, k=1, temperature=0.07)
    with pytest.raises(ShapeError, match="bank itself"):
        NeighbourSearch(bank[:2], 1, excluded_rows=labels)
    with pytest.raises(EvalError, match="the queries 0"):
        classify(bank, labels, bank[:0], k=1, temperature=0.07)
    with pytest.raises(EvalError, match="needs two"):
        classify(bank[:1], labels[:1], None, k=1, temperature=0.07)
    with pytest.raises(EvalError, match="1 summaries of the bank hold NaN"):
        classify(np.array([[np.nan, 1], [1, 1]], np.float32), labels[:2], bank[:, :2], k=1, temperature=0.07)
    with pytest.raises(ConfigError, match="k = 0"):
        classify(bank, labels, bank, k=0, temperature=0.07)
    with pytest.raises(ConfigError, match="positive, got 0"):
        classify(bank, labels, bank, k=1, temperature=0.0)
    with pytest.raises(ShapeError, match="0 predictions"):
        accuracy(np.empty((0, 5), np.int64), np.empty(0, np.int64))


@pytest.mark.gpu
def test_gpu_ranks_as_the_cpu_does(clouds) -> None:
    bank, labels, queries, _ = clouds
    ranked = [
        top5(classify(bank, labels, queries, k=20, temperature=0.07, device=device)) for device in ("cpu", "cuda")
    ]
    np.testing.assert_array_equal(*ranked)


def test_gpu_that_is_not_there_is_said(clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, queries, _ = clouds
    monkeypatch.setattr("faiss.get_num_gpus", lambda: 0)
    with pytest.raises(ConfigError, match="FAISS sees none: use --device cpu"):
        classify(bank, labels, queries, k=20, temperature=0.07, device="cuda")


def test_top_1_equals_dinov2s_votes_and_top_5_does_where_five_classes_got_some() -> None:
    """DINOv2's script weights one-hot labels by softmax(similarity / T) over the k neighbours, sums and takes the largest."""
    rng = np.random.default_rng(3)
    bank, queries = rng.normal(size=(400, 16)).astype(np.float32), rng.normal(size=(100, 16)).astype(np.float32)
    labels = rng.integers(0, 12, 400)
    unit_bank, unit_queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, queries))
    nearest, rows = torch.from_numpy(unit_queries @ unit_bank.T).topk(20, dim=1)
    weights = torch.softmax(nearest / 0.07, dim=1)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels)[rows], 12)
    votes = (one_hot * weights[:, :, None]).sum(dim=1)
    ranked = top5(classify(bank, labels, queries, k=20, temperature=0.07))
    np.testing.assert_array_equal(ranked[:, 0], votes.argmax(dim=1).numpy())
    whole = (ranked != NO_CLASS).all(axis=1)
    assert whole.sum() > 50
    np.testing.assert_array_equal(ranked[whole], votes.topk(5, dim=1).indices.numpy()[whole])
