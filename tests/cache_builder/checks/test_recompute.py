"""Teachers are run again, and what is stored is held against what they say now."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cache_builder.checks.recompute import ImageCosine, RecomputeConfig, Recomputed, recompute
from cache_builder.cli import main
from cache_builder.teachers import FAMILIES
from radio_cache import Cache
from radio_cache.errors import (
    ConfigError,
    MissingRowsError,
    SourceError,
    StaleCacheError,
    StoreError,
    TeacherWeightsError,
)
from radio_cache.writer import ShardWriter

BOTH = ("fake-a", "fake-maps")


@pytest.fixture
def photos(ten_images: Path, tmp_path: Path) -> Path:
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(ten_images, tmp_path / "photos"))


@pytest.fixture
def cache(fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path) -> Cache:
    """Ten images in shards of four, by both fake teachers, with weights in a file of their own."""
    (tmp_path / "w.pth").write_bytes(b"weights")
    done = command(
        "build",
        "--images",
        photos,
        "--out",
        tmp_path / "c.zarr",
        "--teacher",
        "fake-a",
        "--teacher",
        "fake-maps",
        "--shard-images",
        4,
        "--device",
        "cpu",
        "--weights",
        f"fake-a={tmp_path}/w.pth",
        "--codec",
        "fake-a=int8",
    )
    assert done.exit_code == 0, done.output
    return Cache(tmp_path / "c.zarr")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def confuse_shards(cache: Cache, name: str, shard: int, other: int) -> None:
    """A shard with the maps of another one's images, and a receipt for it: what a wrong build would have written."""
    teacher = cache.teachers[name]
    codes = teacher.codes(cache.meta.shard_rows(other))
    writer = ShardWriter(cache.storage, name, shard)
    receipt = cache.receipts(name)[shard]
    assert receipt is not None
    writer.write_sharded(
        "spatial",
        list(codes),
        grid=(0, shard, *(0 for _ in teacher.row_shape)),
        chunks_per_shard=cache.meta.shard_images,
    )
    for file in receipt.files[1:]:
        writer.write_stored(file.path, cache.storage.read(f"teachers/{name}/{file.path}"))
    writer.commit(
        {name: getattr(receipt, name) for name in ("first_row", "num_rows", "num_tokens", "failures", "fidelity")}
    )


def test_a_cache_that_is_right_agrees_with_its_teachers(cache: Cache) -> None:
    report = recompute(cache, RecomputeConfig(count=6, teachers=BOTH))
    assert report.ok
    a, maps = report.teachers
    assert (a.name, a.images, maps.name) == ("fake-a", 6, "fake-maps")
    assert a.cosine == pytest.approx(a.recorded, abs=1e-4)
    assert a.summary == pytest.approx(1, abs=1e-5)
    assert maps.summary is None
    assert maps.worst.cosine > 0.99999


def test_the_sample_follows_from_the_seed_and_takes_no_more_than_there_is(cache: Cache) -> None:
    def keys(count: int, seed: int) -> list[str]:
        config = RecomputeConfig(count=count, teachers=("fake-maps",), seed=seed)
        return [image.key for image in recompute(cache, config).teachers[0].by_image]

    assert keys(3, 0) == keys(3, 0)
    assert keys(3, 0) != keys(3, 1)
    assert keys(50, 0) == list(cache.index.keys)


def test_maps_of_other_images_are_found_though_every_checksum_fits(cache: Cache) -> None:
    confuse_shards(cache, "fake-a", 1, 0)
    told = command("verify", cache.path, "--recompute", 10, "--device", "cpu")
    assert told.exit_code == 1
    assert "all that is there is right" in told.stdout
    for row in cache.meta.shard_rows(1):
        assert f"fake-a: {cache.index.key(row)} has" in told.stdout
    assert f"fake-a: {cache.index.key(0)}" not in told.stdout
    assert "fake-maps: " not in told.stdout


def test_a_mean_below_what_was_recorded_is_told_with_both_figures() -> None:
    one = Recomputed(
        name="clip",
        images=1,
        recorded=0.99,
        floor=0.984,
        image_floor=0.9,
        cosine=0.97,
        by_image=(ImageCosine("a.jpg", 0.97),),
        summary=0.5,
    )
    first, second = one.complaints()
    assert "clip: a mean cosine of 0.9700 is below 0.9840" in first
    assert second == "clip: a summary has a cosine of 0.5000, below 0.99"


def test_not_a_number_is_no_agreement() -> None:
    one = Recomputed(
        name="clip",
        images=1,
        recorded=0.99,
        floor=0.984,
        image_floor=0.9,
        cosine=np.nan,
        by_image=(ImageCosine("a.jpg", np.nan),),
        summary=np.nan,
    )
    assert len(one.complaints()) == 3


def test_images_that_changed_are_named_and_the_others_compared(cache: Cache, photos: Path) -> None:
    key = cache.index.key(2)
    (photos / key).write_bytes((photos / cache.index.key(3)).read_bytes())
    told = command("verify", cache.path, "--recompute", 10, "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert f"{key} could not be compared: {key} has changed since the cache was built" in " ".join(told.stdout.split())
    assert "recorded loss of its codec (without 1 of the sample that could not be compared)" in told.stdout
    shutil.rmtree(photos)
    with pytest.raises(
        SourceError, match=r"none of the 4 images of the sample can be compared, the first is .*No such file"
    ):
        recompute(cache, RecomputeConfig(count=4, teachers=BOTH))


def test_weights_that_are_gone_or_others_are_errors_and_can_be_found_elsewhere(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "w.pth").rename(tmp_path / "moved.pth")
    told = command("verify", cache.path, "--recompute", 2)
    assert told.exit_code == 1
    assert f"the weights that the cache was built with are not at {tmp_path}/w.pth any more" in told.stderr
    assert command("verify", cache.path, "--recompute", 2, "--weights", f"fake-a={tmp_path}/moved.pth").exit_code == 0
    assert command("verify", cache.path, "--recompute", 2, "--teacher", "fake-maps").exit_code == 0
    (tmp_path / "other.pth").write_bytes(b"others")
    with pytest.raises(TeacherWeightsError, match=r"other\.pth are not the ones this cache was built with"):
        recompute(cache, RecomputeConfig(count=2, teachers=("fake-a",), weights={"fake-a": tmp_path / "other.pth"}))


def test_a_teacher_that_runs_in_another_way_now_is_not_compared(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["fake"]

    def other(*arguments: object) -> object:
        teacher = family(*arguments)  # type: ignore[arg-type]
        object.__setattr__(teacher.spec, "spatial_note", "something new")
        return teacher

    monkeypatch.setitem(FAMILIES, "fake", other)
    with pytest.raises(StaleCacheError, match="spatial_note is colour of the patch, this run asks for something new"):
        recompute(cache, RecomputeConfig(count=2, teachers=("fake-a",)))


def test_an_image_too_thin_for_a_single_token_is_no_disagreement(
    fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (900, 20), (9, 99, 199)).save(photos / "bee" / "thin.png")
    done = command(
        "build",
        "--images",
        photos,
        "--out",
        tmp_path / "p.zarr",
        "--teacher",
        "fake-a",
        "--fit",
        "pad",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.output
    report = recompute(Cache(tmp_path / "p.zarr"), RecomputeConfig(count=11, teachers=("fake-a",)))
    assert report.ok
    assert {one.cosine for one in report.teachers[0].by_image if one.key == "bee/thin.png"} == {1.0}


def test_what_cannot_be_recomputed_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no cached teacher is called 'fake-b'\. Did you mean 'fake-a'"):
        recompute(cache, RecomputeConfig(count=2, teachers=("fake-b",)))
    with pytest.raises(ConfigError, match="--recompute 0: at least 1 image"):
        RecomputeConfig(count=0, teachers=BOTH)
    shutil.rmtree(cache.path / "receipts/fake-a")
    with pytest.raises(MissingRowsError, match="nothing to recompute: no image has its features yet"):
        recompute(Cache(cache.path), RecomputeConfig(count=2, teachers=BOTH))
    assert "add --recompute N" in command("verify", cache.path, "--teacher", "fake-a").stderr
