"""`radio-cache plan`: the tables and sentences a user sees."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import cache_builder.planning.plan
from cache_builder.cli import main
from cache_builder.commands.build import build, human_seconds

Plan = Callable[..., Result]


@pytest.fixture
def plan(fake_teachers: tuple[str, ...], ten_images: Path, tmp_path: Path) -> Plan:
    def run(*options: str) -> Result:
        chosen = [word for name in fake_teachers for word in ("--teacher", name)]
        arguments = ["plan", "--images", str(ten_images), "--out", str(tmp_path / "out.zarr"), *chosen]
        return CliRunner().invoke(main, [*arguments, "--probe-seconds", "0.1", *options])

    return run


def test_a_plan_says_what_it_costs_and_when_it_pays(plan: Plan, tmp_path: Path) -> None:
    result = plan(
        "--devices", "2", "--dollars-per-hour", "3", "--shard-images", "4", "--json", str(tmp_path / "plan.json")
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("fake")] == ["fake-a", "fake-maps"] * 2
    assert "images   10 in 3 shards of 4" in lines
    assert any(line.startswith("time ") and " on 1 device, " in line and " on 2, " in line for line in lines)
    assert any(line.startswith("dollars ") for line in lines)
    assert any(line.startswith("pays     from student run 1 on") for line in lines)
    assert any(line.endswith(": fits") for line in lines)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["images"] == 10
    assert written["fits"] is True
    assert [teacher["name"] for teacher in written["teachers"]] == ["fake-a", "fake-maps"]
    assert {cost["request"]["name"] for cost in written["teachers"][0]["codecs"]} == {"half", "int8", "klt"}
    assert not (tmp_path / "out.zarr").exists()


def test_a_disk_that_is_too_small_is_said_so(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_builder.planning.plan, "free_bytes", lambda place: 10)
    assert ": DOES NOT FIT" in plan().stdout


def test_a_plan_takes_every_option_that_says_what_is_built() -> None:
    ours = {parameter.name for parameter in main.commands["plan"].params}
    assert {option.name for option in build.params} - ours <= {"workers", "scheduler", "cluster", "log_json"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (90, "90.0 s"), (600, "10.0 min"), (9000, "2.5 h"), (400_000, "4.6 days")]
)
def test_times_are_written_in_the_unit_people_think_in(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
