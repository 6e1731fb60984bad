"""What a plan promises: nothing is written, the bytes are those of the build, and caching pays from the run it says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cache_builder.planning.plan
from cache_builder.build import BuildConfig, build_cache
from cache_builder.commands.build_options import view_sampling
from cache_builder.planning.measure import CodecCost, TeacherProbe
from cache_builder.planning.plan import Plan, PlanConfig, free_bytes, plan_build, teacher_plan
from cache_builder.teachers import TeacherOptions
from radio_cache import Cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import ConfigError, SourceError, TeacherWeightsError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.pixels import PixelStore
from radio_cache.testing import write_images

HALF = CodecRequest(name="half")
PIXELS = PixelStore(side_px=24, format="jpeg", quality=90)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, per_class=40, size=40)
    return folder


@pytest.fixture
def config(fake_teachers: tuple[str, ...], photos: Path, tmp_path: Path) -> BuildConfig:
    return BuildConfig(
        images=(str(photos),),
        teachers=dict.fromkeys(fake_teachers, TeacherOptions()),
        out=tmp_path / "out.zarr",
        shard_images=16,
        batch_size=8,
        threads=1,
    )


def quick(config: BuildConfig, **changes: Any) -> Plan:
    return plan_build(PlanConfig(**{"build": config, "probe_s": 0.2, **changes}))


def made_up(**changes: Any) -> TeacherProbe:
    fields = {
        "name": "fake-a",
        "input_hw": (32, 32),
        "grid_hw": (4, 4),
        "spatial_dim": 5,
        "summary_dim": 4,
        "images": 8,
        "decode_s": 0.01,
        "forward_s": 0.1,
        "encode_s": 0.02,
        "pack_s": 0.0,
        "requested": HALF,
        "codecs": (CodecCost(request=HALF, bytes_per_image=100.0),),
    }
    return TeacherProbe(**(fields | changes))


@pytest.mark.parametrize("name", ["half", "int8", "klt"])
def test_the_bytes_of_a_plan_are_those_of_the_build(config: BuildConfig, name: Any) -> None:
    request = CodecRequest(name=name)
    config = replace(config, teachers={"fake-a": TeacherOptions(codec=CodecRecord.of_request(request))})
    (teacher,) = quick(config).teachers
    built = build_cache(config).cache.teachers["fake-a"].stored_bytes()
    # Statistics, a few hundred bytes a shard, are not counted: beside these tiny maps they show.
    shards_stats = 5 * 2 * (5 + 4) * 8
    assert 80 * teacher.bytes_per_image == pytest.approx(built - shards_stats, rel=0.1 if name == "klt" else 0.02)
    assert not teacher.is_upper_bound


def test_a_plan_writes_nothing_and_leaves_nothing(config: BuildConfig, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    plan = quick(config, devices=3)
    assert (plan.num_images, plan.num_shards) == (80, 5)
    assert [teacher.probe.name for teacher in plan.teachers] == ["fake-a", "fake-maps"]
    assert all(teacher.probe.images == 64 and teacher.images_left == 80 for teacher in plan.teachers)
    assert plan.fits
    assert list(tmp_path.rglob("*")) == [tmp_path / "tmp"]


def test_what_is_built_already_is_not_planned_again(config: BuildConfig) -> None:
    build_cache(replace(config, limit=32, teachers={"fake-a": TeacherOptions()}))
    plan = quick(replace(config, rescan=True))
    assert [teacher.images_left for teacher in plan.teachers] == [48, 80]
    assert plan.teachers[0].calibration_s == 0 < plan.teachers[1].calibration_s
    assert Cache(config.out).num_images == 32


def test_on_a_cpu_the_stages_add_up_and_beside_a_gpu_they_overlap(config: BuildConfig) -> None:
    def seconds(device: str, **changes: Any) -> float:
        return teacher_plan(made_up(**changes), 100, 10, None, replace(config, device=device), False).seconds

    assert seconds("cpu") == pytest.approx(100 * 0.13)
    assert seconds("cuda") == pytest.approx(100 * 0.12)
    assert seconds("cuda", decode_s=0.5) == pytest.approx(100 * 0.5)
    klt = CodecRequest()
    assert seconds("cpu", requested=klt) == pytest.approx(100 * 0.13 + 10 * 0.11)


def test_a_cache_pays_when_its_build_costs_less_than_the_teachers_of_the_runs(config: BuildConfig) -> None:
    teacher = teacher_plan(made_up(), 100, 0, None, config, False)
    settings = PlanConfig(build=config, student_steps=10, student_batch=5, devices=4, dollars_per_hour=3.6)
    plan = Plan(
        config=settings,
        num_images=100,
        num_shards=7,
        index_bytes=1000,
        free_bytes=None,
        scan_s=2.0,
        num_unscanned=100,
        pixel_bytes=10,
        teachers=(teacher,),
        notes=(),
    )
    assert plan.device_s == pytest.approx(15)
    assert plan.online_s == pytest.approx(5)  # 50 images at 0.1 s
    assert plan.runs_to_break_even == pytest.approx(3)
    assert plan.wall_s(4) == pytest.approx(15 / 4)
    assert plan.wall_s(100) == pytest.approx(15 / 7)  # no more devices than shards have something to do
    assert plan.dollars == pytest.approx(15 / 3600 * 3.6)
    assert plan.fits is None
    assert plan.stored_bytes == plan.bytes_to_write == 1000 + 100 * (10 + 100 + 2 * 4)


def test_too_few_images_to_calibrate_on_give_an_upper_bound_and_the_reason(config: BuildConfig) -> None:
    plan = quick(config, probe_images=1)
    teacher = plan.teachers[0]
    assert teacher.is_upper_bound
    assert teacher.stored.request == HALF
    assert "1 image is too few to calibrate klt for 5 channels" in teacher.probe.cost_of(CodecRequest()).why


def test_a_plan_takes_the_codec_that_the_build_will_take(config: BuildConfig) -> None:
    few = replace(config, limit=60, teachers={"fake-a": TeacherOptions()})
    (teacher,) = quick(few).teachers
    assert teacher.stored.request == HALF
    assert not teacher.is_upper_bound
    build_cache(few)
    assert [plan.stored.request for plan in quick(replace(config, rescan=True)).teachers] == [HALF, CodecRequest()]


def test_extra_views_and_kept_images_are_counted(config: BuildConfig) -> None:
    sampling = view_sampling(flipped=False)
    plain = replace(config, limit=32, teachers={"fake-a": TeacherOptions()})
    viewed = replace(plain, teachers={"fake-a": TeacherOptions(views=3, view_sampling=sampling)}, pixels=PIXELS)
    one, three = quick(plain), quick(viewed)
    assert three.teachers[0].bytes_per_image == 3 * one.teachers[0].bytes_per_image
    assert one.pixel_bytes == 0
    build_cache(viewed)
    kept = sum(size for _, size in Cache(config.out).storage.list_files("images/pixels/c"))
    assert three.pixel_bytes * 32 == pytest.approx(kept, rel=0.2)


def test_a_slow_teacher_is_stopped_when_its_time_is_up(config: BuildConfig, fake_module: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(fake_module, "CALL_SECONDS", 0.1)
    (teacher,) = quick(replace(config, teachers={"fake-a": TeacherOptions()}), probe_s=0.3).teachers
    assert teacher.probe.images < 64
    assert teacher.probe.forward_s > 0.01


def test_random_weights_stand_in_for_a_missing_file_only_when_asked(
    config: BuildConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    weights = tmp_path / "somewhere-else.bin"
    weights.write_bytes(b"anything")

    @contextmanager
    def made(_: object) -> Iterator[Path]:
        yield weights

    monkeypatch.setattr(cache_builder.planning.plan, "random_weights", made)
    config = replace(config, teachers={"fake-a": TeacherOptions(weights=tmp_path / "missing.bin")})
    with pytest.raises(TeacherWeightsError, match="--no-weights"):
        quick(config)
    plan = quick(config, no_weights=True)
    (teacher,) = plan.teachers
    assert teacher.random_weights
    assert teacher.is_upper_bound  # what klt takes depends on the values
    assert any("measured with random weights" in note for note in plan.notes)


def test_images_that_cannot_be_used_are_an_error_that_names_one(config: BuildConfig, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/one.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"none of 1 images of the probe can be used: one\.png: the file is empty"):
        quick(replace(config, images=(str(tmp_path / "bad"),)))


@pytest.mark.parametrize(("name", "value"), [("devices", 0), ("probe_s", 0.0), ("dollars_per_hour", -1.0)])
def test_impossible_settings_are_refused(config: BuildConfig, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name.split("_")[0]):
        PlanConfig(**{"build": config, name: value})


def test_free_space_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    found = free_bytes(tmp_path / "not/there/yet.zarr")
    assert found is not None
    assert found > 0
    assert free_bytes("s3://bucket/cache.zarr") is None


def test_levels_of_a_teacher_are_planned_like_teachers(config: BuildConfig) -> None:
    levels = {
        "fake-a": TeacherOptions(),
        "fake-a@64": TeacherOptions(size_px=64, level_of="fake-a"),
    }
    small, large = quick(replace(config, teachers=levels)).teachers
    assert (small.probe.grid_hw, large.probe.grid_hw) == ((4, 4), (8, 8))
    assert large.bytes_per_image > small.bytes_per_image


def test_a_student_run_is_counted_as_radio_train_would_make_it(config: BuildConfig) -> None:
    def run(num_images: int, **settings: Any) -> tuple[int, int]:
        plan = Plan(
            config=PlanConfig(build=config, **settings),
            num_images=num_images,
            num_shards=1,
            index_bytes=0,
            free_bytes=None,
            scan_s=0,
            num_unscanned=0,
            pixel_bytes=0,
            teachers=(),
            notes=(),
        )
        return plan.student_run.steps, plan.student_run.batch_images

    assert run(60) == (427, 60)  # 25,600 crops
    assert run(10_000) == (4688, 64)  # thirty epochs
    assert run(60, student_steps=10, student_batch=5) == (10, 5)
    assert run(60, student_batch=256) == (100, 256)
