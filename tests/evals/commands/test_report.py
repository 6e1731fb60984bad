"""radio-eval all: every part or the reason why not, on a page that a phone's browser shows without scrolling sideways."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from evals.cli import main
from evals.commands.report import EVALUATIONS
from evals.report.sections import SECTIONS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def page(make_cache, make_run, tmp_path: Path, monkeypatch) -> Path:
    """The page of a run whose cache has labels; its teacher is no CLIP, and there are no masks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    run = make_run("run", make_cache("bank").path)
    printed = " ".join(invoke("all", "--run", run, "--num-images", 2).split())
    assert re.search(
        r"By its nearest neighbours, [a-z0-9-]+ gets \d+\.\d% of the 20 images it was trained on right, among", printed
    )
    return run / "report.html"


def test_every_evaluation_is_on_the_page_or_its_reason(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for title in (
        "k-NN classification",
        "Nearest images",
        "Rank and similarity of features",
        "At other resolutions",
        "Speed",
    ):
        assert f"<h2>{title}</h2>" in text
    assert re.search(r"<dt>zero-shot</dt><dd>no encoder has a text tower", text)
    assert re.search(r"<dt>segment</dt><dd>there are no masks: give --masks", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|url\(|@import", text)
    record = json.loads(page.with_suffix(".json").read_text())
    assert set(record["not_run"]) == {"zero-shot", "segment"}
    assert {"knn", "rank", "mode-switch", "throughput", "versions", "hardware", "commands"} <= record.keys()
    assert "radio-eval all --run" in text


def test_without_labels_the_page_is_made_all_the_same(make_cache, make_run, tmp_path: Path) -> None:
    run = make_run("run", make_cache("plain", [-1] * 8).path)
    out = tmp_path / "a" / "page.html"
    skipped = [word for name in EVALUATIONS if name != "rank" for word in ("--skip", name)]
    result = CliRunner().invoke(main, ["all", "--run", str(run), "--shown", "1", "--out", str(out), *skipped])
    assert result.exit_code == 0, result.output
    assert "not run: knn:" in result.stdout
    assert "has no labels" in " ".join(result.stdout.split())
    assert "--shown is called --num-images now" in result.stderr
    # Keys of records keep their spelling.
    assert json.loads(out.with_suffix(".json").read_text())["settings"]["shown"] == 1
    assert "<h2>k-NN classification</h2>" not in out.read_text(encoding="utf-8")
    assert json.loads(out.with_suffix(".json").read_text())["knn"] is None


def test_masks_give_a_segmentation_section(make_cache, make_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    for below in ("i", "m"):
        (tmp_path / below).mkdir()
    for number in range(4):
        ids = np.zeros((32, 32), np.uint8)
        ids[:, 16:] = 1
        Image.fromarray(ids).save(tmp_path / "m" / f"{number}.png")
        Image.fromarray((ids * 200)[..., None].repeat(3, axis=2)).save(tmp_path / "i" / f"{number}.png")
    run = make_run("run", make_cache("bank").path)
    skipped = [word for name in EVALUATIONS if name != "segment" for word in ("--skip", name)]
    masks = ("--masks", tmp_path / "i", tmp_path / "m", "--classes", "left,right")
    invoke("all", "--run", run, "--num-images", 0, *masks, *skipped)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2>Segmentation</h2>" in text
    assert "--classes left,right" in text


def test_names_of_evaluations_are_those_there_are(make_run, tmp_path: Path) -> None:
    assert tuple(SECTIONS) == EVALUATIONS
    result = CliRunner().invoke(main, ["all", "--run", str(make_run("run", tmp_path)), "--skip", "knnn"])
    assert result.exit_code == 1
    assert "no evaluation is called 'knnn'. Known: mode-switch, rank," in result.stderr


def test_a_phones_browser_shows_the_page_without_scrolling_sideways(page: Path, tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed, so that no browser has seen the page")
    # A phone's width as a frame: headless windows are never narrower than 500 px.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe src="{page.as_uri()}" style="width:390px;height:800px;border:0" onload="'
        "const d = this.contentDocument;"
        "document.title = [d.documentElement.scrollWidth, [...d.images].filter(i => !i.naturalWidth).length, "
        "d.images.length, d.querySelector('h1').textContent].join('|')\"></iframe>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--virtual-time-budget=8000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    match = re.search(r"<title>(\d+)\|(\d+)\|(\d+)\|(.*?)</title>", done.stdout)
    assert match is not None, done.stderr[-2000:]
    width, broken, images, heading = match.groups()
    assert int(width) <= 390
    assert (broken, heading) == ("0", "radio-cache report")
    assert int(images) >= 6
