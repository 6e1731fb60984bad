import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.checks.align_error import AlignRequest, measure
from cache_builder.cli import main
from cache_builder.teachers import TeacherOptions
from radio_cache.checks.verify import drop_teacher
from radio_cache.errors import ConfigError
from radio_cache.reader import Cache


@pytest.fixture
def cache(tmp_path: Path, fake_teachers: tuple[str, ...]) -> Cache:
    """Smooth pictures, lighter to the right, with a spot: seen at 32 and at 64 pixels by a teacher of colours."""
    (tmp_path / "images/a").mkdir(parents=True)
    y, x = np.mgrid[0:96, 0:128]
    for number in range(4):
        spot = 120 * np.exp(-((x - 30 - 20 * number) ** 2 + (y - 40) ** 2) / 600)
        Image.fromarray(np.stack([x, spot, 200 - y], -1).astype(np.uint8)).save(tmp_path / f"images/a/{number}.png")
    teachers = {
        "fake-maps": TeacherOptions(size_px=32),
        "fake-maps@64": TeacherOptions(size_px=64, level_of="fake-maps"),
    }
    config = BuildConfig(images=(str(tmp_path / "images"),), teachers=teachers, out=tmp_path / "c.zarr", threads=1)
    return build_cache(config).cache


def test_a_teacher_of_colours_agrees_with_its_map_and_best_at_the_level_of_the_crops_magnification(
    cache: Cache,
) -> None:
    errors = measure(cache, AlignRequest(limit=4, scales=(1.0, 0.5)))
    found = {(e.level_px, e.mirrored, e.scale): e.cosine for e in errors}
    assert len(found) == 2 * 2 * 2
    assert found[32, False, 1.0] > 0.999
    assert found[64, False, 0.5] > found[32, False, 0.5] > 0.8
    # Colours know no left and right: a mirrored map is the map of the mirrored image.
    for key, cosine in found.items():
        assert cosine == pytest.approx(found[key[0], not key[1], key[2]], abs=0.02)


def test_a_map_compared_at_the_wrong_place_is_seen(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure(cache, AlignRequest(limit=4, scales=(0.5,)))
    from cache_builder.checks import align_error

    cached = align_error._cached
    monkeypatch.setattr(
        align_error, "_cached", lambda f, level, box, hw, out: cached(f, level, (0, 0, hw[1] / 2, hw[0] / 2), hw, out)
    )
    wrong = measure(cache, AlignRequest(limit=4, scales=(0.5,)))
    assert all(b.cosine < a.cosine - 0.1 for a, b in zip(right, wrong, strict=True))


def test_the_command_prints_a_table_and_writes_figures_and_a_plot(cache: Cache, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "e.json"), "--plot", str(tmp_path / "e.png")]
    arguments = ["align-error", str(cache.path), "--limit", "2", "--scales", "1,0.5", "--device", "cpu", *files]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "64 px" in result.output
    assert len(json.loads((tmp_path / "e.json").read_text())) == 8
    with Image.open(tmp_path / "e.png") as plot:
        assert plot.size[0] > 100
    for wrong, said in ((["--scales", "1,x"], "--scales 1,x"), (["--teacher", "fake-map"], "Did you mean 'fake-maps'")):
        result = CliRunner().invoke(main, ["align-error", str(cache.path), "--limit", "2", "--device", "cpu", *wrong])
        assert result.exit_code == 1
        assert said in result.output
    with pytest.raises(ConfigError, match="the scale of a crop must be above 0 and at most 1, not 2"):
        AlignRequest(scales=(2.0,))


def test_a_cache_without_a_teacher_has_nothing_to_compare(cache: Cache, tmp_path: Path) -> None:
    for name in list(cache.teachers):
        drop_teacher(cache, name)
    done = CliRunner().invoke(main, ["align-error", cache.url, "--plot", str(tmp_path / "plot.png")])
    assert done.exit_code == 1
    assert done.output.startswith(f"error: {cache.url} has no teacher yet")
    assert not (tmp_path / "plot.png").exists()
