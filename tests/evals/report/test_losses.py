"""Loss charts: numbers from a log, coordinates for a picture."""

import json
from pathlib import Path

import pytest

from evals.errors import EvalError
from evals.report.losses import loss_charts, read_metrics
from evals.shared.charts import nice_ticks


def log(run: Path, *lines: dict[str, object]) -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def line(step: int, summary: float | None, spatial: float, images_per_s: float = 10.0) -> dict[str, object]:
    teachers = {"sam": {"summary": None, "spatial": spatial}, "clip": {"summary": summary, "spatial": spatial}}
    return {"step": step, "loss": 1.0, "lr": 0.1, "images_per_s": images_per_s, "data_wait": 0.25, "teachers": teachers}


def test_every_teacher_has_a_chart_and_every_loss_it_has_a_curve(tmp_path: Path) -> None:
    metrics = read_metrics(log(tmp_path, line(10, 1.0, 0.5, 30.0), line(20, 0.5, 0.25, 40.0), line(40, 0.2, 0.1, 10.0)))
    assert metrics is not None
    assert (metrics.images_per_s, metrics.data_wait) == (30.0, 0.25)
    sam, clip = loss_charts(metrics)
    assert [curve.part for curve in sam.curves] == ["spatial"]
    assert [curve.part for curve in clip.curves] == ["summary", "spatial"]
    assert clip.curves[0].last == 0.2


def test_points_lie_where_their_numbers_are(tmp_path: Path) -> None:
    metrics = read_metrics(log(tmp_path, line(10, 1.0, 0.5), line(40, 0.0, 0.25)))
    assert metrics is not None
    clip = loss_charts(metrics)[1]
    (first_x, first_y), (last_x, last_y) = (map(float, p.split(",")) for p in clip.curves[0].points.split())
    at = {tick.text: tick.at for tick in (*clip.x_ticks,)}
    assert (first_x, last_x) == (at["10"], at["40"])
    heights = {tick.text: tick.at for tick in clip.y_ticks}
    assert (first_y, last_y) == (heights["1"], heights["0"])


def test_a_loss_that_was_not_finite_leaves_its_point_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(line(1, 0.5, 0.5)) + "\n" + json.dumps(line(2, float("nan"), 0.4)) + "\n"
    )
    metrics = read_metrics(tmp_path)
    assert metrics is not None
    assert len(loss_charts(metrics)[1].curves[0].points.split()) == 1


def test_single_line_is_drawn(tmp_path: Path) -> None:
    metrics = read_metrics(log(tmp_path, line(1, 0.0, 0.0)))
    assert metrics is not None
    assert loss_charts(metrics)[0].curves[0].points


def test_no_log_is_none_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) is None
    assert read_metrics(log(tmp_path)) is None
    with pytest.raises(EvalError, match=r"metrics\.jsonl lacks 'teachers'"):
        read_metrics(log(tmp_path, {"step": 1}))
    (tmp_path / "metrics.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(EvalError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


def test_a_torn_last_line_is_left_out_and_odd_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = b'{"step": 1, "images_per_s": 2.0, "data_wait": 0.1, "teachers": {"a": {"summary": 0.5, "spatial": null}}}\n'
    file.write_bytes(line + line[:30])
    metrics = read_metrics(tmp_path)
    assert metrics is not None
    assert metrics.steps == (1,)
    file.write_bytes(b"")
    assert read_metrics(tmp_path) is None
    for odd in (
        b"\xff\xfe{}\n",
        b"[" * 100_000 + b"\n",
        line[:30] + b"\n" + line,
        b"null\n",
        line.replace(b"2.0", b'"fast"'),
    ):
        file.write_bytes(odd)
        with pytest.raises(EvalError, match="metrics"):
            read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(1.0, [0, 0.5, 1.0]), (0.93, [0, 0.5, 1.0]), (40, [0, 10, 20, 30, 40]), (2.0, [0, 0.5, 1, 1.5, 2])],
)
def test_ticks_are_round_numbers_that_cover_the_range(largest: float, expected: list[float]) -> None:
    assert nice_ticks(largest, at_most=4) == expected


def test_steps_are_whole_numbers() -> None:
    assert nice_ticks(2, at_most=5, whole=True) == [0, 1, 2]
