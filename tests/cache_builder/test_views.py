"""Extra views of every image: stored beside the whole, with where they lie, and read again at the same place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from cache_builder.build import BuildReport
from cache_builder.commands.build_options import view_sampling
from cache_builder.teachers import TeacherOptions, load_recorded, load_teacher
from radio_cache import Cache
from radio_cache.checks.verify import repair_cache, verify_cache
from radio_cache.errors import CorruptShardError, MissingRowsError, ShapeError, StaleCacheError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import receipt_path
from radio_cache.geometry.crops import valid_tokens
from radio_cache.geometry.views import whole_view
from radio_cache.images.decode import cut_view

Build = Callable[..., BuildReport]

TWO_MORE = TeacherOptions(views=3, view_sampling=view_sampling(flipped=True))
OPTIONS = {"fake-a": TWO_MORE, "fake-maps": replace(TWO_MORE, fit="pad")}


@pytest.fixture
def viewed(build: Build) -> Cache:
    return build(teachers=OPTIONS).cache


def files(cache: Cache) -> dict[str, bytes]:
    return {path: cache.storage.read(path) for path, _ in cache.storage.list_files("teachers")}


def test_a_view_is_what_the_teacher_says_of_the_part_of_the_image(
    viewed: Cache, ten_images: Path, seen_by: Callable[..., torch.Tensor]
) -> None:
    for name, options in OPTIONS.items():
        teacher, cached = load_teacher(name, options), viewed.teachers[name]
        for number in range(3):
            views = cached.views_of(range(10), view=number)
            for row, view in enumerate(views):
                image = Image.open(ten_images / viewed.index.key(row)).convert("RGB")
                out = teacher(seen_by(teacher, cut_view(image, view)))
                found = torch.from_numpy(cached.maps([row], view=number))
                torch.testing.assert_close(found, out.spatial, atol=1e-3, rtol=1e-3)
                if out.summary is not None:
                    summary = torch.from_numpy(cached.summaries([row], view=number))
                    torch.testing.assert_close(summary, out.summary, atol=1e-3, rtol=1e-3)


def test_all_teachers_are_shown_the_same_views_and_the_first_is_the_whole_image(viewed: Cache) -> None:
    a, b = (teacher.views_of(range(10), view=1) for teacher in viewed.teachers.values())
    assert a == b
    assert len(set(a)) == 10
    assert any(view.flipped for view in a)
    whole = viewed.teachers["fake-a"].views_of(range(10), view=0)
    assert whole == [whole_view((int(h), int(w))) for h, w in viewed.sizes_hw]
    boxes = np.asarray(zarr.open_array(viewed.path / "teachers/fake-a/crop_xyxy", mode="r"))
    assert boxes.shape == (3, 10, 4)
    assert [tuple(box) for box in boxes[1]] == [view.box_xyxy for view in a]


def test_statistics_are_of_all_views_without_padding(viewed: Cache) -> None:
    teacher = viewed.teachers["fake-maps"]
    tokens = np.concatenate(
        [
            teacher.maps([row], view=number)[0][valid_tokens(view.image_hw, teacher.spec.geometry)]
            for number in range(3)
            for row, view in enumerate(teacher.views_of(range(10), view=number))
        ]
    ).astype(np.float64)
    mean, std = teacher.spatial_mean_std()
    np.testing.assert_allclose(mean, tokens.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(std, tokens.std(axis=0), atol=2e-3)
    with_summary = viewed.teachers["fake-a"]
    summaries = np.concatenate([with_summary.summaries(range(10), view=number) for number in range(3)])
    np.testing.assert_allclose(with_summary.summary_mean_std()[0], summaries.mean(axis=0), atol=2e-3)


def test_the_whole_images_are_as_in_a_cache_without_extra_views(build: Build, viewed: Cache, tmp_path: Path) -> None:
    plain = build(out=tmp_path / "plain.zarr", teachers={"fake-a": TeacherOptions()}).cache.teachers["fake-a"]
    np.testing.assert_array_equal(plain.codes(range(10)), viewed.teachers["fake-a"].codes(range(10)))
    assert plain.views_of([3], view=0) == viewed.teachers["fake-a"].views_of([3], view=0)
    with pytest.raises(ShapeError, match="'fake-a' has 1 views, and view 1 was asked for"):
        plain.summaries([0], view=1)


@pytest.mark.parametrize("file", ["spatial/c/2/1/0/0/0", "summary/c/1/1/0", "crop_xyxy/c/0/1/0", "flipped/c/0/1"])
def test_a_damaged_view_is_found_repaired_and_built_again(build: Build, viewed: Cache, file: str) -> None:
    before = files(viewed)
    path = viewed.path / "teachers/fake-a" / file
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    report = verify_cache(viewed)
    assert [(damage.unit, damage.shard) for damage in report.damages] == [("fake-a", 1)]
    repair_cache(viewed, report)
    assert files(build(teachers=OPTIONS).cache) == before


def test_where_a_view_lies_is_an_error_if_it_is_not_known(viewed: Cache) -> None:
    (viewed.path / receipt_path("fake-a", 2)).unlink()
    (viewed.path / "teachers/fake-a/crop_xyxy/c/0/2/0").unlink()
    with pytest.raises(MissingRowsError, match="nothing for row 6"):
        Cache(viewed.path).teachers["fake-a"].views_of([0, 6], view=1)
    (viewed.path / "teachers/fake-a/crop_xyxy/c/0/1/0").unlink()
    with pytest.raises(CorruptShardError, match="crop_xyxy/c/0/1/0"):
        Cache(viewed.path).teachers["fake-a"].views_of([3], view=1)


def test_views_grow_with_the_cache(build: Build, viewed: Cache, tmp_path: Path) -> None:
    short = build(teachers=OPTIONS, out=tmp_path / "grown.zarr", limit=7).cache
    assert len(short.teachers["fake-a"].views_of(range(7), view=2)) == 7
    grown = build(teachers=OPTIONS, out=tmp_path / "grown.zarr").cache
    assert files(grown) == files(viewed)
    assert verify_cache(grown, deep=True).ok


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (TeacherOptions(), "views is 3, this run asks for 1"),
        (replace(TWO_MORE, views=2), "views is 3, this run asks for 2"),
        (replace(TWO_MORE, view_sampling=view_sampling(flipped=False)), r"view_sampling.flip_share is 0.5"),
    ],
)
def test_other_views_than_the_caches_are_refused(build: Build, viewed: Cache, other: TeacherOptions, told: str) -> None:
    with pytest.raises(StaleCacheError, match=told):
        build(teachers={"fake-a": other})


def test_a_teacher_with_views_is_loaded_again_from_what_the_cache_recorded(viewed: Cache) -> None:
    spec = viewed.teachers["fake-maps"].spec
    again = load_recorded(spec).spec
    # What the first shards were computed with is the build's to record, not the teacher's.
    assert replace(again, codec=CodecRecord(), software={}) == replace(spec, codec=CodecRecord(), software={})
