"""radio-eval segment, from folders to table, record and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from evals.cli import main
from evals.errors import EvalError
from evals.segmentation import SegmentConfig, run_segment
from evals.segmentation.pictures import class_colours
from evals.segmentation.probe import ProbeConfig
from radio_cache.errors import ConfigError
from radio_cache.reader import Cache

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


def write_pairs(root: Path, count: int, *, seed: int = 0) -> tuple[Path, Path]:
    """Photos of rectangles in the colours of their classes, with noise; a border nobody labelled."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number in range(count):
        ids = np.zeros((40, 64), np.uint8)
        for value in (1, 2):
            top, left = rng.integers(0, 20), rng.integers(0, 40)
            ids[top : top + 18, left : left + 22] = value
        pixels = (COLOURS[ids] + rng.normal(0, 20, (40, 64, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        ids[:2] = 255
        Image.fromarray(ids).save(root / "masks" / f"{number}.png")
    return root / "images", root / "masks"


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, Path]:
    return write_pairs(tmp_path / "train", 10)


MODEL = ("net=timm:vit_tiny_patch16_224@32",)


def quick(pairs: tuple[Path, Path], tmp_path: Path, **settings: object) -> SegmentConfig:
    defaults = {
        "models": MODEL,
        "weights": ("random",),
        "crop_px": 32,
        "probe": ProbeConfig(steps=60, lr=1e-2),
        **settings,
    }
    return SegmentConfig(train=pairs, features=tmp_path / "features", **defaults)


def test_students_models_and_cached_teachers_stand_side_by_side(make_run, pairs, tmp_path: Path) -> None:
    from radio_cache.testing import make_tiny_cache

    cache = make_tiny_cache(tmp_path / "t.zarr", pairs[0].parent)
    run = make_run("run", cache.path)
    table = run_segment(quick(pairs, tmp_path, runs=(run,), cache=cache.path, pictures=2))
    names = [(row.name, row.kind) for row in table.rows]
    assert names == [
        ("fake-a", "teacher"),
        ("fake-b", "teacher"),
        ("net", "model"),
        ("student", "student"),
        ("student, untrained", "untrained"),
    ]
    # The fake teachers' maps are the colours of the patches, and so are the classes.
    assert table.rows[0].scores.mean_iou > 0.45
    assert table.class_names == ("class 0", "class 1", "class 2")
    assert [title for title, _ in table.pictures[0].panes[1:]] == ["truth", *(name for name, _ in names)]
    assert (table.train["images"], table.test["images"]) == (8, 2)


def test_maps_are_computed_once_and_again_only_for_another_network(pairs, tmp_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []

    def progress(name: str, done: int, total: int, /, *, unit: str = "images") -> None:
        if unit == "windows":
            reported.append((name, done, total))

    first = run_segment(quick(pairs, tmp_path), progress=progress)
    assert reported
    windows = reported[-1][2]
    stored_files = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert len(stored_files) == 2  # training and test images
    assert {Cache(tmp_path / "features" / name).num_images for name in stored_files} >= {windows}
    reported.clear()
    assert run_segment(quick(pairs, tmp_path), progress=progress).rows == first.rows
    assert reported == []
    run_segment(quick(pairs, tmp_path, models=("net=timm:vit_tiny_patch16_224@48",), crop_px=48), progress=progress)
    assert reported


def test_a_stopped_run_goes_on_with_the_shards_that_are_missing(pairs, tmp_path: Path) -> None:
    first = run_segment(quick(pairs, tmp_path))
    lost = list((tmp_path / "features").glob("*.zarr/receipts/net/*.json"))
    lost[0].unlink()
    assert run_segment(quick(pairs, tmp_path)).rows == first.rows
    assert lost[0].exists()


def test_the_command_prints_writes_and_draws(pairs, tmp_path: Path) -> None:
    test = write_pairs(tmp_path / "test", 3, seed=1)
    arguments = [
        "--train",
        *pairs,
        "--test",
        *test,
        "--model",
        *MODEL,
        "--weights",
        "random",
        "--crop",
        32,
        "--steps",
        20,
    ]
    arguments += ["--classes", "red,green,blue,grey", "--features", tmp_path / "f", "--json", tmp_path / "out.json"]
    arguments += ["--pictures", tmp_path / "p.png", "--num-images", 2]
    result = CliRunner().invoke(main, ["segment", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "mIoU" in result.stdout
    assert "1 class is in no test image (grey)" in " ".join(result.stdout.split())
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["rows"][0]["scores"]["pixels"][3] == 0
    assert {"protocol", "versions", "train", "test"} <= record.keys()
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.height > 150


def test_a_teacher_of_a_cache_of_other_images_is_refused(make_cache, pairs, tmp_path: Path) -> None:
    cache = make_cache("bank")
    with pytest.raises(EvalError, match=r"lacks 8 of the 8 images of .* for teacher 'alpha', such as"):
        run_segment(quick(pairs, tmp_path, models=(), weights=(), cache=cache.path))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"train": None}, "one of --ade20k DIR"),
        ({"models": (), "weights": ()}, "nothing to evaluate"),
        ({"crop_px": 0}, "--crop is at least 1 pixel"),
    ],
)
def test_settings_that_make_no_sense_are_refused(pairs, settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SegmentConfig(**{"train": pairs, "models": MODEL, **settings})


def test_two_encoders_of_one_name_and_a_missing_class_are_named(make_run, pairs, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"holds the id 2 .* the list of classes ends at 1"):
        run_segment(quick(pairs, tmp_path, classes="2"))
    run = make_run("run", tmp_path / "none.zarr")
    with pytest.raises(ConfigError, match="two encoders are called student"):
        run_segment(quick(pairs, tmp_path, models=(f"student={run}",), weights=(), runs=(run,)))


def test_colours_are_those_of_the_voc_palette() -> None:
    assert class_colours(4).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
