"""Images held out of training: which, and how an evaluation learns of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache
from trainer.cli import main
from trainer.data.holdout import ImagesOfRun, split_rows
from trainer.export_cli import main as export_main
from trainer.model.image_split import ImageSplit
from trainer.model.student import StudentConfig
from trainer.recipes.presets import quick

SMALL = ["--image-size", "32", "--steps", "2", "--batch-size", "2", "--set", "adaptor_width=8", "--device", "cpu"]


def write_images(folder: Path, names: list[str], *, copies: int = 1) -> None:
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        for copy in range(copies):
            (folder / f"class{copy}").mkdir(parents=True, exist_ok=True)
            image.save(folder / f"class{copy}" / f"{name}.png")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """300 images, each of them twice, in two classes."""
    write_images(tmp_path / "images", [f"{number:03}" for number in range(300)], copies=2)
    return make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images", shard_images=64)


def keys_of(cache: Cache, rows: np.ndarray) -> set[str]:
    return {cache.index.key(int(row)) for row in rows}


def test_copies_of_one_file_stay_together_and_the_share_is_about_what_was_asked_for(cache: Cache) -> None:
    rows = cache.usable_rows()
    trained, held_out, split = split_rows(cache, rows, 0.1)
    assert sorted([*trained, *held_out]) == rows.tolist()
    assert (split.trained_on, split.held_out) == (len(trained), len(held_out))
    assert 30 < len(held_out) < 95
    names = [{key.split("/")[1] for key in keys_of(cache, part)} for part in (trained, held_out)]
    assert not names[0] & names[1]
    assert len(held_out) == 2 * len(names[1])
    assert split.is_held_out(cache.digests[held_out]).all()
    assert not split.is_held_out(cache.digests[trained]).any()
    assert not split.is_held_out(np.zeros((1, 16), np.uint8)).any()


def test_a_cache_that_grows_holds_out_the_same_images(cache: Cache, tmp_path: Path) -> None:
    _, before, _ = split_rows(cache, cache.usable_rows(), 0.1)
    write_images(tmp_path / "more", [f"{number:03}" for number in range(310)])
    grown = make_tiny_cache(tmp_path / "grown.zarr", tmp_path / "more")
    _, after, _ = split_rows(grown, grown.usable_rows(), 0.1)
    assert {key.split("/")[1] for key in keys_of(cache, before)} == {
        name for key in keys_of(grown, after) if (name := key.split("/")[1]) < "300.png"
    }


@pytest.mark.parametrize("share", [1e-30, 1 - 1e-12])
def test_something_is_held_out_and_something_trained_on(cache: Cache, share: float) -> None:
    trained, held_out, _ = split_rows(cache, cache.usable_rows(), share)
    assert min(len(trained), len(held_out)) == 2  # one file, and its copy
    [image] = [row for row in cache.usable_rows() if cache.index.key(int(row)) == "class0/000.png"]
    with pytest.raises(ConfigError, match="has 1 images to train on, and all are of one file"):
        split_rows(cache, np.array([image]), share)


def test_a_run_records_what_it_held_out_and_evaluations_are_told(cache: Cache, tmp_path: Path) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    command = ["--cache", str(cache.path), "--out", str(run), "--holdout", "0.1", *SMALL]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    trained, held_out, split = split_rows(cache, cache.usable_rows(), 0.1)
    assert f"{len(trained)} of 600 images ({len(held_out)} held out)" in result.output
    assert json.loads((run / "run.json").read_text())["images"]["held_out"] == len(held_out)
    result = CliRunner().invoke(export_main, ["--run", str(run), "--out", str(export), "--no-picture"])
    assert result.exit_code == 0, result.output
    for folder in (run, export):
        config = StudentConfig.from_json(json.loads((folder / "student.json").read_text()))
        assert config.images == split
        images = ImagesOfRun(config)
        assert images.trained_on(cache.digests[trained]).all()
        assert not images.trained_on(cache.digests[held_out]).any()
        np.testing.assert_array_equal(images.held_out(cache.digests), split.is_held_out(cache.digests))
    # Images that came later were not trained on; a cache elsewhere is told apart by nothing but its images.
    shutil.move(cache.path, tmp_path / "moved.zarr")
    earlier = replace(config, images=replace(split, in_cache=300))
    told = ImagesOfRun(earlier, Cache(tmp_path / "moved.zarr")).trained_on(cache.digests[trained])
    assert told.all()  # the second half are copies of the first
    fewer = ImagesOfRun(replace(config, images=replace(split, in_cache=100)), Cache(tmp_path / "moved.zarr"))
    assert fewer.trained_on(cache.digests[trained]).sum() == 2 * np.count_nonzero(trained < 100)


def test_a_student_that_recorded_nothing_counts_as_trained_on_its_whole_cache(cache: Cache, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--cache", str(cache.path), "--out", str(tmp_path / "run"), *SMALL])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "run/student.json").read_text())
    assert document["images"] == {"in_cache": 600, "trained_on": 600, "held_out": 0, "held_out_to": None}
    del document["images"]
    images = ImagesOfRun(StudentConfig.from_json(document))
    assert images.trained_on(cache.digests).all()
    assert not images.held_out(cache.digests).any()


def test_a_run_does_not_go_on_with_another_share(cache: Cache, tmp_path: Path) -> None:
    command = ["--cache", str(cache.path), "--out", str(tmp_path / "run"), *SMALL]
    assert CliRunner().invoke(main, [*command, "--holdout", "0.1"]).exit_code == 0
    result = CliRunner().invoke(main, [*command, "--holdout", "0.2"])
    assert result.exit_code == 1
    assert "recipe.holdout was 0.1, now 0.2" in result.output


@pytest.mark.parametrize("share", [-0.1, 1.0, 10.0, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="holdout must be at least 0 and below 1"):
        replace(quick(), holdout=share)


@pytest.mark.parametrize("change", [{"held_out_to": "12"}, {"held_out_to": 5}, {"in_cache": -1}, {"trained_on": "3"}])
def test_an_odd_record_is_named(change: dict[str, object]) -> None:
    whole: dict[str, object] = {"in_cache": 3, "trained_on": 2, "held_out": 1, "held_out_to": "0" * 31 + "1"}
    assert ImageSplit(**whole).held_out == 1  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=f"images.{next(iter(change))}"):
        ImageSplit(**whole | change)  # pyright: ignore[reportArgumentType]
