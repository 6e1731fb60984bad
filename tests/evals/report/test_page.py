"""The page: complete, self-contained, escaped."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.cli import main
from evals.report.page import ReportConfig, varied_rows, write_report
from evals.shared.image_set import CacheImages, image_set
from radio_cache.errors import ConfigError


class Balanced(HTMLParser):
    """Complains about tags that are closed in the wrong order or never."""

    _VOID = frozenset({"meta", "img", "br", "line", "polyline", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_holds_the_numbers_and_reaches_for_nothing(make_cache, make_run, tmp_path: Path) -> None:
    bank, queries = make_cache("bank"), make_cache("queries", seed=1)
    run = make_run("run", bank.path)
    out = tmp_path / "page.html"
    arguments = ["--run", run, "--cache", bank.path, "--queries", queries.path, "--out", out, "--num-images", 3]
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert f"{out} (" in result.stdout.replace("\n", "")
    text = out.read_text(encoding="utf-8")
    page = Balanced()
    page.feed(text)
    assert page.open == []
    # Three of each cache: photo, cache and student; the teacher does not exist, so no live map.
    assert len(page.sources) == 2 * 3 * 3
    assert text.index("Images it never saw") < text.index("Images it was trained on")
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?://|<script|url\(|@import", text)
    assert "e-radio-tiny gets" in text
    assert "The live maps of alpha are missing" in text
    assert "student → alpha" in text
    assert text.count("<polyline") == 2
    assert "radio-cache build --images" in text
    assert "--teacher alpha --size alpha=32" in text
    assert "20 queries against a bank of 20 images" in text


def test_page_without_queries_says_that_its_images_were_trained_on(make_cache, make_run, tmp_path: Path) -> None:
    bank = make_cache("bank")
    run = make_run("run", bank.path)
    (run / "metrics.jsonl").unlink()
    page = write_report(ReportConfig(run=run, out=tmp_path / "a" / "page.html", num_images=1))
    text = (tmp_path / "a" / "page.html").read_text(encoding="utf-8")
    assert page.table is not None
    assert page.table.leave_one_out
    assert "Images it was trained on" in text
    assert "Images it never saw" not in text
    assert "has no training log" in text
    # All usable images of the bank are the training set: the headline, the protocol and a note say so.
    assert page.table.trained_on == {"student": 20}
    assert "of the 20 images it was trained on right" in text
    assert "student was trained on 20 of them" in page.table.protocol
    assert "student was trained on all images that are classified here" in page.table.notes[0]


def test_queries_that_were_trained_on_are_said_to_be(make_cache, make_run, tmp_path: Path) -> None:
    bank, other = make_cache("bank"), make_cache("other", seed=1)
    run = make_run("run", bank.path)
    page = write_report(
        ReportConfig(run=run, cache=other.path, queries=bank.path, out=tmp_path / "page.html", num_images=1)
    )
    assert page.table is not None
    assert page.table.trained_on == {"student": 20}
    assert page.groups[0].title == "Images it was trained on, as queries"
    held_out = write_report(ReportConfig(run=run, queries=other.path, out=tmp_path / "page.html", num_images=1))
    assert held_out.table is not None
    assert held_out.table.trained_on == {}
    assert "20 test images right" in (tmp_path / "page.html").read_text()


def test_a_moved_cache_is_asked_for_and_taken_where_it_is(make_cache, make_run, tmp_path: Path) -> None:
    cache = make_cache("bank").path
    config = ReportConfig(run=make_run("run", cache), out=tmp_path / "page.html", num_images=0)
    moved = cache.rename(tmp_path / "moved.zarr")
    with pytest.raises(
        ConfigError, match=r"is not at .*bank\.zarr now: if it was moved, name its new path: --cache NEW"
    ):
        write_report(config)
    assert write_report(replace(config, cache=moved)).cache == str(moved)


def test_page_may_go_without_pictures(make_cache, make_run, tmp_path: Path) -> None:
    bank = make_cache("bank")
    write_report(ReportConfig(run=make_run("run", bank.path), out=tmp_path / "page.html", num_images=0))
    assert "Feature maps" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="0 or more, not -1"):
        ReportConfig(run=tmp_path, out=tmp_path, num_images=-1)


def test_names_from_the_data_are_escaped(make_cache, make_run, tmp_path: Path) -> None:
    bank = make_cache("bank", class_names=("<script>alert(1)</script>", "bee", "cat"))
    write_report(ReportConfig(run=make_run("run", bank.path), out=tmp_path / "page.html", num_images=3))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_pictures_show_one_image_of_each_class_before_a_second(make_cache) -> None:
    images = image_set(CacheImages(make_cache("bank", [0] * 12 + [1, 1, 2])))
    assert sorted(varied_rows(images, 3).labels.tolist()) == [0, 1, 2]
    assert sorted(varied_rows(images, 5).labels.tolist()) == [0, 0, 1, 1, 2]
    assert len(varied_rows(images, 100)) == 15
    assert varied_rows(images, 3).rows.tolist() == varied_rows(images, 3).rows.tolist()
