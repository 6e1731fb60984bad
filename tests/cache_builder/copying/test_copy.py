"""Copies hold what their source holds: whole, in part, in the other packing, from and to a folder or a bucket."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cache_builder.cli import main
from cache_builder.copying import CopyConfig, CopyReport, copy_cache
from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.errors import (
    ConfigError,
    CorruptShardError,
    MissingRowsError,
    NotACacheError,
    StaleCacheError,
    StoreError,
    UnsupportedFormatError,
)
from radio_cache.testing import make_tiny_cache, write_images
from radio_cache.view.info import teacher_infos


@pytest.fixture
def copy(source_path: Path, tmp_path: Path) -> Callable[..., CopyReport]:
    """copy(limit=3) copies the source to copy.zarr."""

    def made(*, on_message: Callable[[str], None] = lambda _: None, **options: Any) -> CopyReport:
        return copy_cache(
            CopyConfig(**{"source": source_path, "target": tmp_path / "copy.zarr", **options}), on_message
        )

    return made


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def assert_same_rows(target: Cache, source: Cache, rows: list[int]) -> None:
    """All but the codes: the images, and the summaries of every teacher in the target."""
    index, original = target.index, source.index
    assert index.keys == [original.key(row) for row in rows]
    assert index.labels.tolist() == original.labels[rows].tolist()
    assert target.meta.class_names == source.meta.class_names
    np.testing.assert_array_equal(target.sizes_hw, source.sizes_hw[rows])
    np.testing.assert_array_equal(target.digests, source.digests[rows])
    np.testing.assert_array_equal(target.statuses, source.statuses[rows])
    bad = {failure.row: failure.reason for failure in source.failures()}
    kept = {new: bad[old] for new, old in enumerate(rows) if old in bad}
    assert {failure.row: failure.reason for failure in target.failures()} == kept
    usable = [new for new, old in enumerate(rows) if old not in bad]
    for name, teacher in target.teachers.items():
        assert target.usable_rows([name]).tolist() == usable
        if teacher.spec.summary_dim is not None:
            theirs = source.teachers[name].summaries([rows[row] for row in usable])
            np.testing.assert_array_equal(teacher.summaries(usable), theirs)


# ---------------------------------------------------------------- all of it


def test_a_whole_copy_is_the_same_files(copy: Callable[..., CopyReport], source_path: Path) -> None:
    report = copy()
    mine, theirs = files(report.target.path), files(source_path)
    del mine["zarr.json"], theirs["zarr.json"]  # which name the version that wrote them
    assert mine == theirs
    assert [(unit.name, unit.kept, unit.assembled, unit.transcoded) for unit in report.units] == [
        (name, 5, 0, 0) for name in ("images", "half", "int8", "packed", "zstd")
    ]


def test_the_same_command_again_copies_nothing(copy: Callable[..., CopyReport]) -> None:
    before = files(copy().target.path)
    report = copy()
    assert {(unit.before, unit.num_bytes) for unit in report.units} == {(5, 0)}
    assert files(report.target.path) == before


def test_a_copy_to_a_bucket_and_back_is_the_same_files(
    copy: Callable[..., CopyReport], source_path: Path, tmp_path: Path, bucket: Callable[[str], str]
) -> None:
    url = bucket("copy.zarr")
    copy(target=url)
    copy(source=url, target=tmp_path / "back.zarr")
    mine, theirs = files(tmp_path / "back.zarr"), files(source_path)
    del mine["zarr.json"], theirs["zarr.json"]
    assert mine == theirs


def test_teachers_can_be_chosen_and_others_added_later(copy: Callable[..., CopyReport], source: Cache) -> None:
    assert list(copy(teachers=("int8",)).target.teachers) == ["int8"]
    report = copy(teachers=("packed",))
    assert list(report.target.teachers) == ["int8", "packed"]
    assert [unit.name for unit in report.units] == ["images", "packed"]
    assert verify_cache(report.target, deep=True).ok


# ---------------------------------------------------------------- a part


@pytest.mark.parametrize(
    "options",
    [{"limit": 11}, {"fraction": 0.5}, {"filters": ("red/*",)}, {"filters": ("red/1.png",)}, {"limit": 8}],
    ids=str,
)
def test_a_part_holds_the_chosen_rows_bit_for_bit(
    copy: Callable[..., CopyReport], source: Cache, options: dict[str, Any]
) -> None:
    target = copy(**options).target
    rows = CopyConfig(source="", target="copy", **options).rows(source.index.keys).tolist()
    assert_same_rows(target, source, rows)
    usable = target.usable_rows()
    for name, teacher in target.teachers.items():
        np.testing.assert_array_equal(teacher.codes(usable), source.teachers[name].codes([rows[row] for row in usable]))
        np.testing.assert_array_equal(teacher.maps(usable), source.teachers[name].maps([rows[row] for row in usable]))
    report = verify_cache(target, deep=True)
    assert report.damages == ()
    assert set(report.missing.values()) == {0}


def test_whole_shards_of_a_part_are_copied_as_they_are(copy: Callable[..., CopyReport]) -> None:
    assert {(unit.kept, unit.assembled) for unit in copy(limit=11).units} == {(2, 1)}


def test_statistics_of_a_part_are_those_of_its_decoded_maps(copy: Callable[..., CopyReport], source: Cache) -> None:
    target = copy(filters=("!blue/0*",), teachers=("packed", "half")).target  # so that no shard keeps its rows
    usable = target.usable_rows()
    for teacher in target.teachers.values():
        tokens = teacher.maps(usable).reshape(-1, teacher.spec.spatial_dim).astype(np.float64)
        mean, std = teacher.spatial_mean_std()
        np.testing.assert_allclose(mean, tokens.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(std, tokens.std(axis=0), atol=1e-6)
    mean, std = target.teachers["packed"].summary_mean_std()
    np.testing.assert_allclose(mean, target.teachers["packed"].summaries(usable).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, target.teachers["packed"].summaries(usable).std(axis=0), atol=1e-6)


def test_an_unfinished_teacher_is_refused_unless_its_missing_rows_are_not_wanted(
    copy: Callable[..., CopyReport], source_path: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(source_path, tmp_path / "unfinished.zarr"))
    (broken / "receipts/packed/000003.json").unlink()
    with pytest.raises(MissingRowsError, match=r"'packed' is not complete: 1 of the 5 shards .* finish its build"):
        copy(source=broken)
    assert not (tmp_path / "copy.zarr").exists()
    assert verify_cache(copy(source=broken, limit=12).target, deep=True).ok


# ---------------------------------------------------------------- the other packing


@pytest.mark.parametrize(("packing", "name", "kept"), [("zstd", "packed", "zstd"), ("packed", "zstd", "packed")])
@pytest.mark.parametrize("part", [{}, {"fraction": 0.5}], ids=["all", "half"])
def test_the_other_packing_keeps_the_fidelity_asked_for_and_records_what_it_kept(
    copy: Callable[..., CopyReport], source: Cache, packing: str, name: str, kept: str, part: dict[str, Any]
) -> None:
    told: list[str] = []
    report = copy(packing=packing, fidelity=0.995, teachers=(name, kept), on_message=told.append, **part)
    target = report.target
    assert f"{name}: transcoding klt/{name} to klt/{packing} is lossy" in " ".join(told)
    teacher, original = target.teachers[name], source.teachers[name]
    assert teacher.spec.codec.parameters["packing"] == packing
    assert teacher.conversion is not None
    assert teacher.conversion.source == f"klt/{name}"
    assert target.teachers[kept].conversion is None
    rows = CopyConfig(source="", target="copy", **part).rows(source.index.keys)
    usable = target.usable_rows()
    true = original.maps(rows[usable]).reshape(-1, 16).astype(np.float64)
    found = teacher.maps(usable).reshape(-1, 16).astype(np.float64)
    cosines = (true * found).sum(-1) / np.linalg.norm(true, axis=-1) / np.linalg.norm(found, axis=-1)
    assert cosines.mean() > 0.99
    measured = teacher.fidelity()
    assert measured is not None
    assert measured.cosine == pytest.approx(cosines.mean(), abs=1e-5)
    assert measured.squared_error == pytest.approx(np.square(true - found).sum(-1).mean(), rel=1e-3)
    assert verify_cache(target, deep=True).ok
    assert_same_rows(target, source, rows.tolist())


def test_statistics_stay_the_teachers_own_where_only_the_packing_changes(
    copy: Callable[..., CopyReport], source: Cache
) -> None:
    target = copy(packing="zstd").target
    for name in ("packed", "zstd", "half"):
        for mine, theirs in zip(
            target.teachers[name].spatial_mean_std(), source.teachers[name].spatial_mean_std(), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)


def test_a_packing_that_concerns_no_teacher_is_refused(copy: Callable[..., CopyReport], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--packing applies only to klt, and in .* half is stored as half, int8 is stored as int8"
    ):
        copy(packing="zstd", teachers=("half", "int8"))
    assert not (tmp_path / "copy.zarr").exists()


def test_a_copy_without_a_usable_image_is_whole_but_has_nothing_to_encode_again(
    copy: Callable[..., CopyReport], tmp_path: Path
) -> None:
    empty = copy(filters=("red/1.png",)).target
    assert empty.usable_rows().tolist() == []
    assert verify_cache(empty, deep=True).ok
    for name in ("packed", "zstd"):
        with pytest.raises(
            MissingRowsError, match=f"teacher '{name}': no usable image has a token .* without --packing"
        ):
            copy(
                source=empty.url,
                target=tmp_path / f"again-{name}.zarr",
                teachers=(name,),
                packing="zstd" if name == "packed" else "packed",
            )


def test_going_on_with_another_packing_or_fidelity_is_refused(copy: Callable[..., CopyReport]) -> None:
    copy(packing="zstd", fidelity=0.995, teachers=("packed",))
    with pytest.raises(StaleCacheError, match=r"holds another teacher 'packed' .* drop-teacher"):
        copy(packing="zstd", fidelity=0.99, teachers=("packed",))
    with pytest.raises(StaleCacheError, match="its codec, klt/zstd, differs"):
        copy(teachers=("packed",))
    assert copy(packing="zstd", fidelity=0.995, teachers=("packed",)).units[1].before == 5


# ---------------------------------------------------------------- what is refused


def test_a_place_that_holds_something_else_is_refused(
    copy: Callable[..., CopyReport], source_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(NotACacheError, match="exists and is not empty: choose another place, or remove it"):
        copy(target=tmp_path / "mine")
    assert files(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_another_cache_is_refused_and_stays_as_it_is(copy: Callable[..., CopyReport], tmp_path: Path) -> None:
    copy(limit=11)
    before = files(tmp_path / "copy.zarr")
    for options, message in (
        ({"limit": 12}, "it has 11 images, the copy would have 12"),
        ({"fraction": 0.6}, "it has as many images, but different ones"),
    ):
        with pytest.raises(StaleCacheError, match=message):
            copy(**options)
    assert files(tmp_path / "copy.zarr") == before


def test_a_cache_of_the_same_images_with_other_numbers_is_no_copy(
    copy: Callable[..., CopyReport], source_path: Path, tmp_path: Path
) -> None:
    photos = source_path.parent / "photos"
    make_tiny_cache(tmp_path / "one.zarr", photos, shard_images=4, teachers={"half": (None, 5)})
    with pytest.raises(StaleCacheError, match=r"shard 3 of 'images' differs from that of .*source\.zarr"):
        copy(target=tmp_path / "one.zarr", teachers=("half",))  # where no image is unusable


@pytest.mark.parametrize("target", ["source.zarr", "source.zarr/inner", "."])
def test_a_copy_into_itself_is_refused(copy: Callable[..., CopyReport], source_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="itself, or one lies in the other: choose another target"):
        copy(target=source_path.parent / target)


def test_an_unknown_teacher_is_named_beside_the_known(copy: Callable[..., CopyReport]) -> None:
    with pytest.raises(StoreError, match=r"no cached teacher is called 'pakced'\. Did you mean 'packed'"):
        copy(teachers=("pakced",))


@pytest.mark.parametrize("file", ["teachers/packed/spatial/c/0/1/0/0/0", "teachers/packed/summary/c/0/1/0"])
@pytest.mark.parametrize("options", [{}, {"limit": 7}, {"packing": "zstd"}], ids=str)
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damage_of_the_source_is_found_while_copying(
    copy: Callable[..., CopyReport], source_path: Path, tmp_path: Path, file: str, options: dict[str, Any], damage: str
) -> None:
    broken = Path(shutil.copytree(source_path, tmp_path / "broken.zarr"))
    if damage == "gone":
        (broken / file).unlink()
    else:
        data = bytearray((broken / file).read_bytes())
        data[5] ^= 4
        (broken / file).write_bytes(data)
    with pytest.raises(CorruptShardError, match="radio-cache repair"):
        copy(source=broken, teachers=("packed",), **options)


# ---------------------------------------------------------------- killed


def test_a_copy_killed_at_any_moment_goes_on_to_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", per_class=12, size=24)
    make_tiny_cache(tmp_path / "source.zarr", tmp_path / "photos", shard_images=1)
    whole = CopyConfig(source=tmp_path / "source.zarr", target=tmp_path / "whole.zarr", fraction=0.9, threads=1)
    copy_cache(whole)
    target = tmp_path / "killed.zarr"
    kills = 0
    for receipts in (0, 5, 30, 50):
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                copy_cache(CopyConfig(source=whole.source, target=target, fraction=0.9, threads=1))
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while len(list(target.rglob("receipts/*/*.json"))) < receipts and time.monotonic() < deadline:
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if (target / "zarr.json").exists():
            assert verify_cache(Cache(target), deep=True).ok
    assert kills >= 3
    copy_cache(CopyConfig(source=whole.source, target=target, fraction=0.9))
    assert files(target) == files(tmp_path / "whole.zarr")


@pytest.mark.parametrize("name", ["v1.zarr", "v1-sealed.zarr", "v1-labelled.zarr"])
@pytest.mark.parametrize("part", [{}, {"fraction": 0.7}], ids=["all", "a part"])
def test_caches_of_earlier_days_are_copied_too(tmp_path: Path, name: str, part: dict[str, Any]) -> None:
    golden = Path(__file__).parents[2] / "golden" / name
    config = CopyConfig(source=golden, target=tmp_path / "copy.zarr", teachers=("golden-a",), **part)
    target, source = copy_cache(config).target, Cache(golden)
    rows = config.rows(source.index.keys)
    assert_same_rows(target, source, rows.tolist())
    usable = target.usable_rows()
    theirs = source.teachers["golden-a"].maps(rows[usable])
    np.testing.assert_array_equal(target.teachers["golden-a"].maps(usable), theirs)
    assert verify_cache(target, deep=True).ok
    assert copy_cache(config).units[0].before == target.meta.num_shards


# ---------------------------------------------------------------- the command


def test_the_command_tells_what_it_did_shard_by_shard(source_path: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(
        main, ["copy", str(source_path), str(tmp_path / "c.zarr"), "--limit", "11", "--packing", "zstd"]
    )
    assert told.exit_code == 0, told.output
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in told.stdout.splitlines() if line}
    assert lines["images"].startswith("2 unchanged, 1 with selected images")
    assert lines["packed"].startswith("3 encoded again klt/zstd 0.9")
    assert lines["zstd"].startswith("2 unchanged, 1 with selected images klt/zstd")
    assert f"radio-cache verify --deep {tmp_path}/c.zarr" in told.stdout
    assert "11 of 18 images: the first of them" in told.stderr
    info = CliRunner().invoke(main, ["info", str(tmp_path / "c.zarr")])
    assert "packed was transcoded from klt/packed: its cosine is an estimate" in " ".join(info.stdout.split())


def test_a_mistake_of_the_command_is_one_sentence(source_path: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--fraction", "7"], "error: --fraction 7: a fraction of the images is above 0 and at most 1, such as 0.1"),
        (["--teacher", "sam"], "no cached teacher is called 'sam'"),
    ):
        told = CliRunner().invoke(main, ["copy", str(source_path), str(tmp_path / "c.zarr"), *options])
        assert told.exit_code == 1
        assert message in told.stderr
    assert not (tmp_path / "c.zarr").exists()


def test_extra_views_are_copied_with_all_images_or_not_at_all(
    fake_teachers: tuple[str, ...], ten_images: Path, tmp_path: Path
) -> None:
    options = ["--teacher", "fake-a", "--views", "2", "--shard-images", "4", "--device", "cpu"]
    built = CliRunner().invoke(
        main, ["build", "--images", str(ten_images), "--out", str(tmp_path / "a.zarr"), *options]
    )
    assert built.exit_code == 0, built.output
    with pytest.raises(
        UnsupportedFormatError, match="'fake-a' has 3 views of every image, so it can only be copied with all images"
    ):
        copy_cache(CopyConfig(source=tmp_path / "a.zarr", target=tmp_path / "b.zarr", limit=5))
    assert not (tmp_path / "b.zarr").exists()
    target = copy_cache(CopyConfig(source=tmp_path / "a.zarr", target=tmp_path / "b.zarr")).target
    mine, theirs = files(target.path), files(tmp_path / "a.zarr")
    theirs.pop("listing.json", None)  # of sources that were changed just now there is none
    assert mine == theirs
    (info,) = teacher_infos(target)
    assert 16 <= info.bits_per_value < 30  # half precision, checksums and indexes; of all views
