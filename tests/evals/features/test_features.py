"""rank, mode-switch, retrieve and similarity: their numbers on data whose answer is known, and the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from evals.cli import main
from evals.commands.features import print_rank
from evals.errors import EvalError
from evals.features.mode_switch import ModeSwitchConfig, run_mode_switch
from evals.features.rank import RankConfig, RankRow, RankTable, linear_cka, rank_me, run_rank
from evals.features.retrieve import RetrieveConfig, run_retrieve
from evals.features.similarity import distinct_tokens, similarity_to
from evals.shared.charts import Point, line_chart, scatter_chart
from radio_cache.errors import ConfigError


def test_rank_me_counts_equal_directions_and_cka_ignores_rotation_and_scale() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(200, 8)))[0]
    assert 8 - 1e-9 < rank_me(basis) <= 8
    assert 64 - 1e-9 < rank_me(np.eye(64)) <= 64
    assert rank_me(np.outer(rng.normal(size=50), rng.normal(size=8))) == pytest.approx(1, abs=1e-3)
    features = rng.normal(size=(300, 6)) * np.arange(1, 7)
    turned = features @ np.linalg.qr(rng.normal(size=(6, 6)))[0] * 7 + 3
    assert linear_cka(features, turned) == pytest.approx(1)
    assert linear_cka(features, rng.normal(size=(300, 6))) < 0.2
    for bad in (np.full((3, 2), np.nan), np.zeros((3, 2))):
        with pytest.raises(EvalError, match="they have no rank"):
            rank_me(bad)


def test_rows_and_teachers_keep_their_names_beside_three_teachers(capsys: pytest.CaptureFixture[str]) -> None:
    teachers = tuple(f"efficientnet-lite{number}" for number in range(3))
    rows = [
        RankRow(
            name=f"student → {name}",
            kind="student",
            about=f"prediction of {name}",
            width=1280,
            rank=18.5,
            cka=dict.fromkeys(teachers, 0.5),
        )
        for name in teachers
    ]
    print_rank(RankTable(protocol="", images={}, teachers=teachers, rows=tuple(rows), notes=()))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert all(f"student → {name} " in printed for name in teachers)


def test_every_space_has_a_rank_and_its_likeness_with_every_teacher(make_cache, make_run, make_spec) -> None:
    cache = make_cache("bank", specs=[make_spec("alpha"), make_spec("beta"), make_spec("maps", summary_dim=None)])
    run = make_run("run", cache.path, teachers=("alpha", "beta"))
    table = run_rank(RankConfig(runs=(run,)))
    assert [row.name for row in table.rows] == [
        "alpha",
        "beta",
        "student",
        "student → alpha",
        "student → beta",
        "student, untrained",
    ]
    assert table.teachers == ("alpha", "beta")
    assert table.rows[0].cka["alpha"] == pytest.approx(1)
    assert all(1 <= row.rank <= row.width for row in table.rows)
    with pytest.raises(ConfigError, match="at least 2 images"):
        run_rank(RankConfig(runs=(run,), limit=1))
    with pytest.raises(ConfigError, match="give --images PATH_OR_URL"):
        run_rank(RankConfig())


def test_mode_switch_compares_with_every_teacher_at_every_size_it_can(make_cache, make_run) -> None:
    cache = make_cache("bank")
    run = make_run("run", cache.path)
    table = run_mode_switch(ModeSwitchConfig(run=run, limit=6))
    assert [row.size_px for row in table.rows] == [32, 64]
    assert all(abs(row.cosine) < 0.5 and row.fidelity < 1.1 and row.summary_cosine is not None for row in table.rows)
    moved = run_mode_switch(ModeSwitchConfig(run=run, limit=2, sizes=(40, 96)))
    assert [row.size_px for row in moved.rows] == [32, 96]
    assert moved.notes == ("Sizes moved to the nearest that the student takes: 40 to 32.",)
    assert moved.chart().startswith("<svg")
    other = make_run("other", cache.path, teachers=("gamma",))
    with pytest.raises(EvalError, match="holds none of the student's teachers"):
        run_mode_switch(ModeSwitchConfig(run=other))


def test_the_nearest_images_stand_behind_the_query_and_never_itself(make_cache) -> None:
    rows = run_retrieve(RetrieveConfig(images=make_cache("bank").path, num_queries=2, k=3))
    assert [len(row) for row in rows] == [4, 4]
    assert rows[0][0][0] == "alpha"
    for row in rows:
        query = row[0][1][8:-8, 8:-8].astype(int)
        assert all(np.abs(picture[8:-8, 8:-8].astype(int) - query).mean() > 5 for _, picture in row[1:])
    with pytest.raises(ConfigError, match="at least 1"):
        RetrieveConfig(num_queries=0)


def test_anchors_are_unlike_each_other_and_like_themselves() -> None:
    tokens = np.zeros((4, 4, 3), np.float32)
    tokens[:2, :, 0] = tokens[2:, :2, 1] = tokens[2:, 2:, 2] = 1.0
    anchors_yx = distinct_tokens(tokens, 3)
    regions = {(int(y * 4) < 2, int(x * 4) < 2 and int(y * 4) >= 2) for y, x in anchors_yx}
    assert len(regions) == 3
    for anchor_yx in anchors_yx:
        cosines = similarity_to(tokens, anchor_yx)
        assert cosines[int(anchor_yx[0] * 4), int(anchor_yx[1] * 4)] == 1.0
        assert set(np.unique(cosines)) == {0.0, 1.0}


def test_charts_name_every_point_and_escape() -> None:
    points = scatter_chart([Point("a<b", 10, 50), Point("c", 1000, 70)], x_title="speed", y_title="top-1")
    assert "a&lt;b" in points
    assert points.count("<circle") == 2
    lines = line_chart({"one": [0.5, float("nan"), 0.7]}, ["1", "2", "3"], x_title="x", y_title="y")
    assert lines.count("<circle") == 2


def test_the_commands_print_write_and_draw(make_cache, make_run, tmp_path: Path) -> None:
    run = make_run("run", make_cache("bank").path)

    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(word) for word in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "RankMe" in invoke("rank", "--run", run, "--json", tmp_path / "rank.json")
    assert json.loads((tmp_path / "rank.json").read_text())["rows"][0]["name"] == "alpha"
    assert "fidelity" in invoke("mode-switch", "--run", run, "--limit", 3, "--plot", tmp_path / "m.svg")
    assert (tmp_path / "m.svg").read_text().startswith("<svg")
    invoke("retrieve", "--run", run, "--num-queries", 1, "-k", 2, "--out", tmp_path / "r.png")
    invoke("similarity", "--run", run, "--num-images", 1, "--anchors", 2, "--out", tmp_path / "s.png")
    for name in ("r.png", "s.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
