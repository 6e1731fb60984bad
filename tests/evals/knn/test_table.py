"""Teachers, student and untrained student side by side."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np
import pytest

from evals.encoders import OWN, Encoder
from evals.encoders.base import Block, OnImages
from evals.errors import EvalError
from evals.knn.search import NeighbourSearch
from evals.knn.table import KnnConfig, knn_table, run_knn
from evals.knn.vote import accuracy, vote
from evals.shared.image_set import ImageSet, image_set, open_source
from radio_cache.errors import ConfigError, NotACacheError


def test_all_teachers_the_student_its_heads_and_the_untrained_have_a_row(make_cache, make_run, make_spec) -> None:
    specs = [make_spec("alpha"), make_spec("beta")]
    bank, queries = make_cache("bank", specs=specs), make_cache("queries", seed=1, specs=specs)
    run = make_run("run", bank.path, teachers=("alpha", "beta"))
    table = run_knn(KnnConfig(bank=bank.path, queries=queries.path, runs=(run,)))
    assert [(row.name, row.kind, row.width) for row in table.rows] == [
        ("alpha", "teacher", 8),
        ("beta", "teacher", 8),
        ("student", "student", 64),
        ("student → alpha", "student", 8),
        ("student → beta", "student", 8),
        ("student, untrained", "untrained", 64),
    ]
    assert max(row.share_of_best_teacher or 0 for row in table.rows if row.kind == "teacher") == 1.0
    assert "20 queries against a bank of 20 images; 3 classes" in table.protocol


def test_teacher_numbers_are_those_of_plain_knn(make_cache) -> None:
    bank, queries = make_cache("bank"), make_cache("queries", seed=1)
    (row,) = run_knn(KnnConfig(bank=bank.path, queries=queries.path, k=5)).rows
    features = [cache.teachers["alpha"].summaries(range(20)) for cache in (bank, queries)]
    search = NeighbourSearch(features[1], 5)
    search.add(np.arange(20), features[0])
    ranked = vote(search.result(), bank.index.labels, temperature=0.07)
    assert row.top1 == accuracy(ranked, queries.index.labels).top1
    assert row.top1 > 0.8


def test_without_queries_one_is_left_out_and_clamping_is_said(make_cache) -> None:
    table = run_knn(KnnConfig(bank=make_cache("bank").path))
    assert table.leave_one_out
    assert "each of 20 images against all others (leave-one-out)" in table.protocol
    assert table.k == 19
    assert any("k was lowered from 20 to 19" in note for note in table.notes)


def test_a_run_alone_uses_the_cache_it_learned_from(make_cache, make_run) -> None:
    bank = make_cache("bank")
    reported: list[tuple[str, int, int]] = []
    table = run_knn(
        KnnConfig(runs=(make_run("run", bank.path),)),
        progress=lambda name, done, total: reported.append((name, done, total)),
    )
    assert table.bank["place"] == str(bank.path)
    assert reported == [
        ("student", 0, 20),
        ("student", 20, 20),
        ("student, untrained", 0, 20),
        ("student, untrained", 20, 20),
    ]


def test_a_run_whose_cache_is_gone_asks_for_one(make_cache, make_run, tmp_path: Path) -> None:
    run = make_run("run", tmp_path / "gone.zarr")
    with pytest.raises(EvalError, match=r"gone\.zarr, which is not there now: name the bank by --bank"):
        run_knn(KnnConfig(runs=(run,)))


def test_several_runs_are_called_by_their_folders(make_cache, make_run) -> None:
    bank = make_cache("bank")
    runs = (make_run("small", bank.path), make_run("large", bank.path))
    names = [row.name for row in run_knn(KnnConfig(runs=runs)).rows]
    assert {"small", "large", "small, untrained", "large → alpha"} <= set(names)


def test_lone_classes_copies_and_leaks_are_said(make_cache) -> None:
    lone = run_knn(KnnConfig(bank=make_cache("lone", [0, 0, 0, 1, 2, 2]).path))
    assert any("1 class has only one image, which cannot be right: bee." in note for note in lone.notes)
    bank, leaked = make_cache("bank", seed=1), make_cache("leaked", seed=1)
    notes = run_knn(KnnConfig(bank=bank.path, queries=leaked.path)).notes
    assert any("20 queries are in the bank too" in note for note in notes)
    small, wide = make_cache("small", [0, 0, 1]), make_cache("wide", [0, 1, 2], seed=5)
    notes = run_knn(KnnConfig(bank=small.path, queries=wide.path)).notes
    assert any("1 query cannot be right: the bank has no image of 1 class (cat)." in note for note in notes)


@final
class Nearly(Encoder):
    """Whose summaries are one vector, but for a share of noise."""

    def __init__(self, noise: float) -> None:
        super().__init__(name="nearly", kind="model", description="made up", spaces=(OWN,))
        self._noise = noise

    def blocks(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[Block]:
        noise = np.random.default_rng(0).normal(0, self._noise, (len(images), 8))
        yield Block(np.arange(len(images)), {OWN: (1 + noise).astype(np.float32)})


@pytest.mark.parametrize(("noise", "has_note"), [(1e-4, True), (0.2, False)])
def test_accuracy_that_hangs_on_rounding_is_said_to(make_cache, noise: float, has_note: bool) -> None:
    bank = image_set(open_source(make_cache("bank").path), labelled=True)
    table = knn_table([Nearly(noise)], bank, None, k=5, temperature=0.07)
    assert (
        any(re.search(r"nearly hardly tells images apart: .* cosine above 0\.99976", n) for n in table.notes)
        == has_note
    )


def test_few_images_come_with_the_size_of_the_error(make_cache) -> None:
    assert any("known to about ±22 points" in note for note in run_knn(KnnConfig(bank=make_cache("bank").path)).notes)


def test_one_name_for_two_teachers_is_refused(make_cache, make_spec) -> None:
    bank, queries = make_cache("bank"), make_cache("queries", specs=[make_spec("alpha", weights="11")])
    with pytest.raises(EvalError, match=r"'alpha' is not the same in .*weights_sha256 is 00, there it is 11"):
        run_knn(KnnConfig(bank=bank.path, queries=queries.path))


def test_teachers_that_cannot_be_compared_are_named(make_cache, make_run, make_spec) -> None:
    bank = make_cache("bank", specs=[make_spec("alpha"), make_spec("maps", summary_dim=None)])
    queries = make_cache("queries", specs=[make_spec("alpha"), make_spec("beta")])
    run = make_run("run", bank.path, teachers=("alpha", "gamma"))
    notes = " ".join(run_knn(KnnConfig(bank=bank.path, queries=queries.path, runs=(run,))).notes)
    assert "Only one of the two caches holds beta, maps: not compared." in notes
    assert "maps: maps only, no summary to compare." in notes
    assert "student learned from gamma, which" in notes


def test_nothing_to_compare_is_one_sentence(make_cache, make_spec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give --bank PATH_OR_URL, or --run FOLDER"):
        KnnConfig()
    with pytest.raises(ConfigError, match="at least 2 images"):
        KnnConfig(bank=tmp_path, limit=1)
    with pytest.raises(EvalError, match="no cache with a teacher that has a summary, no --run, no --model"):
        run_knn(KnnConfig(bank=make_cache("bank", specs=[make_spec("maps", summary_dim=None)]).path))
    with pytest.raises(NotACacheError, match="does not exist"):
        run_knn(KnnConfig(bank=tmp_path / "nowhere.zarr"))
    with pytest.raises(NotACacheError, match="holds no trained student"):
        run_knn(KnnConfig(runs=(tmp_path,)))


def test_a_folder_of_queries_runs_the_recorded_teacher_and_agrees_with_the_cache(tmp_path: Path) -> None:
    """The teacher of a cached bank is run on images that are in no cache: the same rows as with both cached."""
    from cache_builder.build import BuildConfig, build_cache
    from cache_builder.teachers import TeacherOptions
    from radio_cache.testing import write_images

    for name, seed in (("bank", 0), ("queries", 1)):
        write_images(tmp_path / name, per_class=3, size=64, seed=seed)
        build_cache(
            BuildConfig(
                images=(str(tmp_path / name),),
                out=tmp_path / f"{name}.zarr",
                teachers={"efficientnet-lite0": TeacherOptions(size_px=64)},
            )
        )
    (tmp_path / "queries/red/broken.png").write_bytes(b"nothing")
    tables = [
        run_knn(KnnConfig(bank=tmp_path / bank, queries=tmp_path / queries, k=3, sweep=(1,)))
        for bank, queries in (("bank.zarr", "queries.zarr"), ("bank.zarr", "queries"), ("bank", "queries.zarr"))
    ]
    assert [row.name for table in tables for row in table.rows] == ["efficientnet-lite0"] * 3
    assert len({(table.rows[0].top1, table.rows[0].top5) for table in tables}) == 1
    assert tables[0].rows[0].by_k.keys() == {1, 3}
    assert tables[1].queries["images"] == 6
    assert any("1 image of" in note and "red/broken.png" in note for note in tables[1].notes)


def test_models_stand_beside_the_teachers_on_folders_alone(make_cache, tmp_path: Path) -> None:
    from radio_cache.testing import write_images

    write_images(tmp_path / "images", per_class=4, size=32)
    reported: list[tuple[str, int, int]] = []
    table = run_knn(
        KnnConfig(bank=tmp_path / "images", models=("tiny=timm:vit_tiny_patch16_224@32",), weights=("random",), k=3),
        progress=lambda name, done, total: reported.append((name, done, total)),
    )
    assert [(row.name, row.kind, row.width) for row in table.rows] == [("tiny", "model", 192)]
    assert table.rows[0].share_of_best_teacher is None
    assert reported == [("tiny", 0, 8), ("tiny", 8, 8)]
    with pytest.raises(EvalError, match="no cache with a teacher"):
        run_knn(KnnConfig(bank=tmp_path / "images"))


def test_accuracy_by_k_is_that_of_a_table_with_that_k(make_cache) -> None:
    bank, queries = make_cache("bank"), make_cache("queries", seed=1)
    (swept,) = run_knn(KnnConfig(bank=bank.path, queries=queries.path, k=5, sweep=(1, 10))).rows
    for k in (1, 5, 10):
        (alone,) = run_knn(KnnConfig(bank=bank.path, queries=queries.path, k=k)).rows
        assert (swept.by_k[k].top1, swept.by_k[k].top5) == (alone.top1, alone.top5)
    with pytest.raises(ConfigError, match="got k = 0"):
        KnnConfig(bank=bank.path, sweep=(0,))


def test_published_rows_stand_beside_what_was_measured_on_imagenet_alone() -> None:
    from evals.shared.published import is_imagenet_validation

    assert is_imagenet_validation(classes=1000, images=50_000)
    assert not is_imagenet_validation(classes=1000, images=10_000)


def test_where_no_answer_can_be_right_there_is_no_table_of_zeros(make_cache) -> None:
    alone = make_cache("alone", [0, 1, 2])
    with pytest.raises(EvalError, match=r"each of its 3 images is the only one of its class.*give labelled --queries"):
        run_knn(KnnConfig(bank=alone.path))
    with pytest.raises(EvalError, match=r"none of the classes of those drawn.*higher --limit"):
        run_knn(KnnConfig(bank=make_cache("ants", [0, 0, 0]).path, queries=make_cache("bees", [1, 1]).path))
    assert len(run_knn(KnnConfig(bank=alone.path, queries=make_cache("more", [0, 2]).path)).rows) == 1


def test_a_model_called_like_a_cached_teacher_is_asked_for_another_name(make_cache) -> None:
    twin = {"models": ("alpha=timm:vit_tiny_patch16_224@32",), "weights": ("random",)}
    with pytest.raises(ConfigError, match="two encoders are called alpha: name one, as in --model OTHER=WHAT"):
        run_knn(KnnConfig(bank=make_cache("bank").path, **twin))


def test_top_5_where_fewer_than_five_classes_got_votes_is_said(make_cache) -> None:
    notes = run_knn(KnnConfig(bank=make_cache("bank").path)).notes  # three classes in all
    assert any("For up to 20 of 20 images the neighbours are of fewer than five classes" in note for note in notes)
