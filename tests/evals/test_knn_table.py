"""Teachers, student and untrained student side by side."""

from pathlib import Path

import pytest

from evals.errors import EvalError
from evals.knn import accuracy, classify
from evals.knn_table import KnnConfig, run_knn
from radio_cache.errors import ConfigError, NotACacheError


def test_all_teachers_the_student_its_heads_and_the_untrained_have_a_row(make_cache, make_run, make_spec) -> None:
    specs = [make_spec("alpha"), make_spec("beta")]
    bank, queries = make_cache("bank", specs=specs), make_cache("queries", seed=1, specs=specs)
    run = make_run("run", bank.path, teachers=("alpha", "beta"))
    table = run_knn(KnnConfig(cache=bank.path, queries=queries.path, runs=(run,)))
    assert [(row.name, row.kind, row.width) for row in table.rows] == [
        ("alpha", "teacher", 8), ("beta", "teacher", 8), ("student", "student", 64),
        ("student → alpha", "student", 8), ("student → beta", "student", 8), ("student, untrained", "untrained", 64),
    ]  # fmt: skip
    assert max(row.share_of_best_teacher or 0 for row in table.rows if row.kind == "teacher") == 1.0
    assert "20 queries against a bank of 20 images; 3 classes" in table.protocol


def test_teacher_numbers_are_those_of_plain_knn(make_cache) -> None:
    bank, queries = make_cache("bank"), make_cache("queries", seed=1)
    (row,) = run_knn(KnnConfig(cache=bank.path, queries=queries.path, k=5)).rows
    features = [cache.teachers["alpha"].summaries(range(20)) for cache in (bank, queries)]
    found = classify(features[0], bank.index.labels, features[1], k=5, temperature=0.07)
    assert row.top1 == accuracy(found.ranked, queries.index.labels).top1
    assert row.top1 > 0.8


def test_without_queries_one_is_left_out_and_clamping_is_said(make_cache) -> None:
    table = run_knn(KnnConfig(cache=make_cache("bank").path))
    assert table.leave_one_out
    assert "each of 20 images against all others (leave-one-out)" in table.protocol
    assert table.k == 19
    assert any("k was lowered from 20 to 19" in note for note in table.notes)


def test_a_run_alone_uses_the_cache_it_learned_from(make_cache, make_run) -> None:
    bank = make_cache("bank")
    told: list[tuple[str, int, int]] = []
    table = run_knn(
        KnnConfig(runs=(make_run("run", bank.path),)),
        progress=lambda name, done, total: told.append((name, done, total)),
    )
    assert table.bank["cache"] == str(bank.path)
    assert told == [("student", 20, 20), ("student, untrained", 20, 20)]


def test_a_run_whose_cache_is_gone_asks_for_one(make_cache, make_run, tmp_path: Path) -> None:
    run = make_run("run", tmp_path / "gone.zarr")
    with pytest.raises(EvalError, match=r"gone\.zarr, which is not there now: name the bank by --cache"):
        run_knn(KnnConfig(runs=(run,)))


def test_several_runs_are_called_by_their_folders(make_cache, make_run) -> None:
    bank = make_cache("bank")
    runs = (make_run("small", bank.path), make_run("large", bank.path))
    names = [row.name for row in run_knn(KnnConfig(runs=runs)).rows]
    assert {"small", "large", "small, untrained", "large → alpha"} <= set(names)


def test_lone_classes_copies_and_leaks_are_said(make_cache) -> None:
    lone = run_knn(KnnConfig(cache=make_cache("lone", [0, 0, 0, 1, 2, 2]).path))
    assert any("1 class has only one image, which cannot be right: bee." in note for note in lone.notes)
    bank, leaked = make_cache("bank", seed=1), make_cache("leaked", seed=1)
    notes = run_knn(KnnConfig(cache=bank.path, queries=leaked.path)).notes
    assert any("20 queries are in the bank too" in note for note in notes)
    small, wide = make_cache("small", [0, 0, 1]), make_cache("wide", [0, 1, 2], seed=5)
    notes = run_knn(KnnConfig(cache=small.path, queries=wide.path)).notes
    assert any("1 query cannot be right: the bank has no image of 1 class (cat)." in note for note in notes)


def test_few_images_come_with_the_size_of_the_error(make_cache) -> None:
    assert any("known to about ±22 points" in note for note in run_knn(KnnConfig(cache=make_cache("bank").path)).notes)


def test_one_name_for_two_teachers_is_refused(make_cache, make_spec) -> None:
    bank, queries = make_cache("bank"), make_cache("queries", specs=[make_spec("alpha", weights="11")])
    with pytest.raises(EvalError, match=r"'alpha' is not the same in .*weights_sha256 is 00, there it is 11"):
        run_knn(KnnConfig(cache=bank.path, queries=queries.path))


def test_teachers_that_cannot_be_compared_are_named(make_cache, make_run, make_spec) -> None:
    bank = make_cache("bank", specs=[make_spec("alpha"), make_spec("maps", summary_dim=None)])
    queries = make_cache("queries", specs=[make_spec("alpha"), make_spec("beta")])
    run = make_run("run", bank.path, teachers=("alpha", "gamma"))
    notes = " ".join(run_knn(KnnConfig(cache=bank.path, queries=queries.path, runs=(run,))).notes)
    assert "Only one of the two caches holds beta, maps: not compared." in notes
    assert "maps: maps only, no summary to compare." in notes
    assert "student learned from gamma, which" in notes


def test_nothing_to_compare_is_one_sentence(make_cache, make_spec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give --cache BANK\.zarr, or --run RUN"):
        KnnConfig()
    with pytest.raises(ConfigError, match="at least 2 images"):
        KnnConfig(cache=tmp_path, limit=1)
    with pytest.raises(EvalError, match="no teacher with a summary, and no --run"):
        run_knn(KnnConfig(cache=make_cache("bank", specs=[make_spec("maps", summary_dim=None)]).path))
    with pytest.raises(NotACacheError, match="does not exist"):
        run_knn(KnnConfig(cache=tmp_path / "nowhere.zarr"))
    with pytest.raises(NotACacheError, match="holds no trained student"):
        run_knn(KnnConfig(runs=(tmp_path,)))
