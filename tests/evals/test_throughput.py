"""Throughput: counts that are known, every mode a row, and what fails is told."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from evals.cli import main
from evals.encoders.gathered import live_encoders
from evals.errors import EvalError
from evals.throughput import ThroughputConfig, gflops, run_throughput
from radio_cache.errors import ConfigError

CPU = torch.device("cpu")
MODEL = {"models": ("net=timm:vit_tiny_patch16_224@32",), "weights": ("random",)}


def test_parameters_and_flops_are_those_of_the_network(make_run, tmp_path: Path) -> None:
    (encoder,) = live_encoders((), MODEL["models"], MODEL["weights"], device=CPU)
    network = encoder.measurable()
    # 12 blocks of width 192 on 5 tokens, 4 of them from 16 px patches; 2 operations a multiply-add.
    dense = 12 * 12 * 192**2 * 5 + 4 * 3 * 16**2 * 192
    attention = 12 * 2 * 5 * 5 * 192
    assert gflops(encoder, network, CPU) == pytest.approx(2 * (dense + attention) / 1e9, rel=0.02)
    table = run_throughput(
        ThroughputConfig(runs=(make_run("run", tmp_path / "c.zarr"),), batches=(1,), repeats=1, warmup=0)
    )
    (row,) = table.rows
    assert (row.name, row.batch, row.input_px) == ("student", 1, 32)
    assert row.slowest <= row.images_per_s <= row.fastest
    assert row.params_m == pytest.approx(0.05, rel=2)


def test_every_mode_precision_and_batch_is_a_row() -> None:
    config = ThroughputConfig(
        **MODEL,
        batches=(1, 2),
        modes=("eager", "channels-last"),
        precisions=("float32", "bfloat16"),
        repeats=1,
        warmup=0,
    )
    rows = run_throughput(config).rows
    assert len({(row.mode, row.precision, row.batch) for row in rows}) == 8
    assert all(row.images_per_s > 0 and row.peak_mb is None for row in rows)


def test_quality_over_speed_needs_common_names(tmp_path: Path) -> None:
    file = tmp_path / "knn.json"
    file.write_text(json.dumps({"rows": [{"name": "net", "top1": 0.5}]}))
    arguments = [
        "throughput",
        "--model",
        *MODEL["models"],
        "--weights",
        "random",
        "--batch-size",
        "1",
        "--repeats",
        "1",
    ]
    result = CliRunner().invoke(main, [*arguments, "--quality", str(file), "--plot", str(tmp_path / "p.svg")])
    assert result.exit_code == 0, result.output
    assert ">net<" in (tmp_path / "p.svg").read_text()
    table = run_throughput(ThroughputConfig(**MODEL, batches=(1,), repeats=1, warmup=0))
    with pytest.raises(EvalError, match=r"no network was both timed \(net\) and evaluated \(other\)"):
        table.quality_chart({"other": 1.0}, "top-1")
    file.write_text("{}")
    for extra in (["--plot", "p.svg"], ["--quality", str(file), "--plot", "p.svg"]):
        result = CliRunner().invoke(main, [*arguments, *extra])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: --")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"models": ()}, "nothing to time"),
        ({"batches": (0,)}, "at least 1"),
        ({"modes": ("fast",)}, "'fast' is none of eager"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ThroughputConfig(**{**MODEL, **settings})
