"""`radio-cache view` as a user meets it."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from cache_builder.cli import main
from radio_cache import Cache
from radio_cache.testing import make_tiny_cache, write_images


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    write_images(folder / "photos")
    return make_tiny_cache(folder / "cache.zarr", folder / "photos").path


def test_a_picture_is_written_and_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(main, ["view", str(cache), "--num-images", "3"])
    assert told.exit_code == 0, told.output
    assert told.output == "cache-view.png: 3 images, fake-a, fake-b\n"
    with Image.open("cache-view.png") as picture:
        assert picture.width > 3 * 224
        assert picture.height > 3 * 224


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--teacher", "sam"], "no cached teacher is called 'sam'. Known: fake-a, fake-b."),
        (["--out", "picture.txt"], "'picture.txt' should end in .png or .jpg or .jpeg"),
        (["--images", "0"], "--images"),
    ],
)
def test_what_cannot_be_done_is_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(main, ["view", str(cache), *options])
    assert told.exit_code not in (0, None)
    assert said in told.output
    assert "Traceback" not in told.output
    assert isinstance(told.exception, SystemExit)


def test_web_servers_that_are_asked_for_the_images_are_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Cache, "remote_images_note", lambda self: f"images of {self.url} are read from the web")
    told = CliRunner().invoke(main, ["view", str(cache), "--num-images", "1"])
    assert told.stderr == f"images of {cache} are read from the web\n"
