"""A run with held-out images is judged on those, by every evaluation that looks at the cache it learned from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evals.errors import EvalError
from evals.features.mode_switch import ModeSwitchConfig, run_mode_switch
from evals.features.rank import RankConfig, run_rank
from evals.knn.table import KnnConfig, run_knn
from evals.report.page import ReportConfig, write_report
from radio_cache.reader import Cache
from trainer.data.holdout import split_rows


@pytest.fixture
def run(make_cache: Callable[..., Cache], make_run: Callable[..., Path]) -> Path:
    """A run that held out about half of its twenty images."""
    bank = make_cache("bank")
    _, held_out, split = split_rows(bank, bank.usable_rows(), 0.5)
    assert 3 < len(held_out) < 17
    return make_run("run", bank.path, images=split)


def held_out_of(run: Path) -> int:
    cache = Cache(run.parent / "bank.zarr")
    return len(split_rows(cache, cache.usable_rows(), 0.5)[1])


def test_queries_of_k_nn_are_the_held_out_images_and_the_bank_the_others(run: Path) -> None:
    table = run_knn(KnnConfig(runs=(run,)))
    number = held_out_of(run)
    assert not table.leave_one_out
    assert (table.queries["images"], table.bank["images"]) == (number, 20 - number)
    assert table.trained_on == {}
    assert any(f"The queries are the {number} images of" in note for note in table.notes)
    limited = run_knn(KnnConfig(runs=(run,), limit=4))
    assert (limited.queries["images"], limited.bank["images"]) == (4, 4)


def test_queries_that_somebody_names_are_taken_as_they_are(run: Path) -> None:
    bank = run.parent / "bank.zarr"
    table = run_knn(KnnConfig(bank=bank, queries=bank, runs=(run,)))
    assert table.queries["images"] == 20
    assert table.trained_on == {"student": 20 - held_out_of(run)}


def test_other_evaluations_take_the_held_out_images_and_say_so(run: Path) -> None:
    number = held_out_of(run)
    rank, sizes = run_rank(RankConfig(runs=(run,))), run_mode_switch(ModeSwitchConfig(run=run))
    for result in (rank, sizes):
        assert result.images["images"] == number
        assert any(f"{number} images of" in note and "held out of training" in note for note in result.notes)


def test_the_page_speaks_of_test_images_and_shows_both_kinds(run: Path, tmp_path: Path) -> None:
    page = write_report(ReportConfig(run=run, out=tmp_path / "page.html", num_images=1))
    assert [group.title for group in page.groups] == [
        "Images that were held out of training",
        "Images it was trained on",
    ]
    assert f"of {held_out_of(run)} test images right" in (tmp_path / "page.html").read_text()


def test_held_out_images_of_other_classes_ask_for_queries(
    make_cache: Callable[..., Cache], make_run: Callable[..., Path]
) -> None:
    bank = make_cache("alone", [0, 1])
    _, held_out, split = split_rows(bank, bank.usable_rows(), 0.5)
    assert len(held_out) == 1
    with pytest.raises(EvalError, match="held out of training have none of the classes of the others"):
        run_knn(KnnConfig(runs=(make_run("run", bank.path, images=split),)))
