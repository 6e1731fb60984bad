from pathlib import Path

import pytest
from click.testing import CliRunner

from cache_builder.cli import main
from cache_builder.demo import run as demo
from cache_builder.demo.run import DemoConfig, run_demo
from radio_cache.errors import NotACacheError, RadioCacheError


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the demo would run, instead of running them."""
    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "_run", seen.append)
    return seen


def test_the_demo_runs_the_commands_a_user_would(tmp_path: Path, commands: list[list[str]]) -> None:
    said: list[str] = []
    report = run_demo(DemoConfig(out=tmp_path / "out"), said.append)
    assert [command[:2] for command in commands] == [
        ["radio-cache", "build"],
        ["radio-cache", "build"],
        ["radio-train", "--cache"],
        ["radio-eval", "all"],
    ]
    assert report.page == tmp_path / "out/report.html"
    assert any("16 photographs that ship with scikit-image and scikit-learn" in text for text in said)
    assert sum("$ radio-" in text for text in said) == 4
    assert len(list((tmp_path / "out/images/train").rglob("*.png"))) == 16 * 12


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path, commands: list[list[str]]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(NotACacheError, match="exists and is not a demo's folder"):
        run_demo(DemoConfig(out=tmp_path), print)
    assert not commands
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_step_that_fails_stops_the_demo_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RadioCacheError, match="ended with exit code 1; its message is above"):
        demo._run(["radio-cache", "info", str(tmp_path / "nowhere.zarr")])
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    with pytest.raises(RadioCacheError, match="the command radio-nothing is not installed"):
        demo._run(["radio-nothing"])


def test_a_missing_folder_of_photos_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--images", str(tmp_path / "gone"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "error: " in result.output
    assert "gone is not a folder: --images takes a folder of at least two photos" in result.output


@pytest.mark.slow
def test_the_demo_works_on_own_photos(tmp_path: Path) -> None:
    """The real thing, end to end, on two photographs: about a minute and a half."""
    from cache_builder.demo.images import bundled_photos

    (tmp_path / "photos").mkdir()
    for name, data in list(bundled_photos().items())[:2]:
        (tmp_path / f"photos/{name}.png").write_bytes(data)
    result = CliRunner().invoke(main, ["demo", "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out/report.html").read_text()
    assert "efficientnet-lite2" in page
    assert "Images it never saw" in page
