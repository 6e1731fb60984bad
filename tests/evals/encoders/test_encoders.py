"""Encoders: what comes from the cache, what is computed, and from which pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.pipeline.preprocess import view_pixels
from cache_builder.teachers import TeacherOptions, load_teacher
from evals.encoders import (
    OWN,
    CachedTeacherEncoder,
    ModelName,
    StudentEncoder,
    live_teacher,
    load_model,
    load_runs,
    parse_models,
    recorded_teacher,
)
from evals.encoders import base as encoder_base
from evals.errors import EvalError
from evals.shared.image_set import CacheImages, ImageSet, image_set, open_source
from evals.shared.pixels import pixel_batches
from radio_cache.errors import ConfigError, TeacherWeightsError, UnknownTeacherError
from trainer.data.crops import student_pixels
from trainer.model.files import load_student
from trainer.model.student import backbone_and_heads

CPU = torch.device("cpu")


def rows_of(cache, rows: list[int]) -> ImageSet:
    source = CacheImages(cache)
    return ImageSet(source, np.array(rows), source.labels[rows], source.class_names)


def test_cached_teacher_gives_the_stored_summaries_in_the_order_asked(make_cache) -> None:
    cache = make_cache("bank")
    rows = [7, 2, 19]
    block = CachedTeacherEncoder(cache.teachers["alpha"]).summaries(rows_of(cache, rows))
    np.testing.assert_array_equal(block.summaries[OWN], cache.teachers["alpha"].summaries(rows))
    assert block.summaries[OWN].dtype == np.float32
    assert block.positions.tolist() == [0, 1, 2]


def test_cached_teacher_comes_in_blocks(make_cache, monkeypatch) -> None:
    cache = make_cache("bank")
    monkeypatch.setattr("evals.encoders.cached_teacher._BLOCK_ROWS", 8)
    counts: list[int] = []
    blocks = list(
        CachedTeacherEncoder(cache.teachers["alpha"]).blocks(image_set(CacheImages(cache)), on_images=counts.append)
    )
    assert counts == [8, 8, 4]
    assert np.concatenate([block.positions for block in blocks]).tolist() == list(range(20))
    np.testing.assert_array_equal(
        np.concatenate([block.summaries[OWN] for block in blocks]), cache.teachers["alpha"].summaries(range(20))
    )


def test_cached_teacher_without_summary_is_refused(make_cache, make_spec) -> None:
    cache = make_cache("bank", specs=[make_spec("maps", summary_dim=None)])
    with pytest.raises(EvalError, match="'maps' has no summary"):
        CachedTeacherEncoder(cache.teachers["maps"])


def test_cached_teacher_in_a_cache_without_it_names_those_there(make_cache, make_spec) -> None:
    bank, other = make_cache("bank"), make_cache("other", specs=[make_spec("beta")])
    with pytest.raises(EvalError, match="no teacher 'alpha': it has beta"):
        CachedTeacherEncoder(bank.teachers["alpha"]).summaries(rows_of(other, [0]))
    with pytest.raises(EvalError, match="is no cache"):
        CachedTeacherEncoder(bank.teachers["alpha"]).summaries(image_set(open_source(bank.path.with_suffix(".images"))))


def test_student_features_are_those_of_its_own_forward_pass(make_cache, make_run, monkeypatch) -> None:
    cache = make_cache("bank")
    run = make_run("run", cache.path)
    monkeypatch.setattr(encoder_base, "BATCH_IMAGES", 2)  # three rows: a full batch and a short one
    counts: list[int] = []
    images = rows_of(cache, [3, 11, 4])
    block = StudentEncoder.of_run(run, name="s", trained=True, device=CPU).summaries(images, on_images=counts.append)
    pixels = np.stack([student_pixels(images.decoded(position), (32, 32)) for position in range(3)])
    with torch.inference_mode():
        own, heads = backbone_and_heads(
            load_student(run, adaptors="all")(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        )
    np.testing.assert_allclose(block.summaries[OWN], own.summary.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(block.summaries["alpha"], heads["alpha"].summary.numpy(), rtol=1e-4, atol=1e-5)
    assert list(block.summaries) == [OWN, "alpha"]
    assert counts == [2, 1]


def test_student_maps_are_row_major_on_its_own_grid(make_cache, make_run) -> None:
    cache = make_cache("bank")
    run = make_run("run", cache.path)
    images = rows_of(cache, [5])
    student = StudentEncoder.of_run(run, name="s", trained=True, device=CPU)
    (maps,) = student.maps(images)
    pixels = student_pixels(images.decoded(0), (32, 32))
    with torch.inference_mode():
        own, heads = backbone_and_heads(
            load_student(run, adaptors="all")(torch.from_numpy(pixels[None].copy()).permute(0, 3, 1, 2).float() / 255)
        )
    assert maps["alpha"].shape == (1, 2, 2, 6)
    assert student.geometry.grid_hw == (2, 2)
    np.testing.assert_allclose(maps["alpha"].reshape(4, 6), heads["alpha"].spatial.numpy()[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps[OWN].reshape(4, -1), own.spatial.numpy()[0], rtol=1e-4, atol=1e-5)


def test_untrained_student_has_other_features_every_time_the_same(make_cache, make_run) -> None:
    cache = make_cache("bank")
    run = make_run("run", cache.path)
    images = rows_of(cache, [0, 1])
    trained, untrained = load_runs([run], device=CPU)
    again = StudentEncoder.of_run(run, name="u", trained=False, device=CPU)
    features = untrained.summaries(images).summaries[OWN]
    assert not np.allclose(features, trained.summaries(images).summaries[OWN])
    np.testing.assert_array_equal(features, again.summaries(images).summaries[OWN])
    assert (trained.kind, untrained.kind) == ("student", "untrained")
    assert (trained.name, untrained.name) == ("student", "student, untrained")
    assert "12 steps, 48 images seen" in trained.description
    assert "never trained" in untrained.description


def test_a_run_whose_start_is_gone_is_shown_without_its_untrained_row(
    make_cache, make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache("bank")
    start, run = make_run("start", cache.path), make_run("run", cache.path)
    file = run / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init": str(start)}))
    assert [one.name for one in load_runs([run], device=CPU)] == ["student", "student, untrained"]
    start.rename(tmp_path / "moved")
    assert [one.name for one in load_runs([run], device=CPU)] == ["student"]
    printed = capsys.readouterr().err
    assert "'student, untrained' is left out" in printed
    assert str(start) in printed


def test_student_at_another_size_has_another_grid_and_illegal_sizes_name_the_nearest(make_cache, make_run) -> None:
    cache = make_cache("bank")
    student = StudentEncoder.of_run(make_run("run", cache.path), name="s", trained=True, device=CPU)
    larger = student.at_size(64)
    (maps,) = larger.maps(rows_of(cache, [5]))
    assert maps[OWN].shape[1:3] == larger.geometry.grid_hw == (4, 4)
    assert "64 px" in larger.description
    with pytest.raises(ConfigError, match="does not take 50 px, the nearest it takes is 64 px"):
        student.at_size(50)


def test_pixel_batches_keep_the_order_and_the_rest(make_cache) -> None:
    images = rows_of(make_cache("bank"), [9, 1, 17, 4, 0])
    batches = list(pixel_batches(images, lambda image: student_pixels(image, (8, 8)), batch_images=2))
    assert [len(batch.pixels) for batch in batches] == [2, 2, 1]
    assert np.concatenate([batch.positions for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert batches[0].images_hw == [(20, 28), (20, 28)]
    expected = np.stack([student_pixels(images.decoded(position), (8, 8)) for position in range(5)])
    np.testing.assert_array_equal(np.concatenate([batch.pixels for batch in batches]), expected)


def test_image_that_is_gone_is_named(make_cache) -> None:
    cache = make_cache("bank")
    (cache.path.with_suffix(".images") / "003.png").unlink()
    with pytest.raises(EvalError, match=r"image 003\.png of .*bank\.zarr: cannot be read"):
        list(pixel_batches(rows_of(cache, [2, 3]), lambda image: student_pixels(image, (8, 8)), batch_images=4))


def test_files_that_cannot_be_decoded_are_left_out_of_the_batches(make_cache, make_run) -> None:
    cache = make_cache("bank")
    folder = cache.path.with_suffix(".images")
    for name in ("001.png", "019.png"):
        (folder / name).write_bytes(b"nothing")
    counts: list[int] = []
    student = StudentEncoder.of_run(make_run("run", cache.path), name="s", trained=True, device=CPU)
    block = student.summaries(image_set(open_source(folder)), on_images=counts.append)
    assert block.positions.tolist() == [0, *range(2, 19)]
    assert len(block.summaries[OWN]) == 18
    assert sum(counts) == 20


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> ImageSet:
    """One real photograph, with a class."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    (folder / "cat").mkdir()
    Image.fromarray(data.chelsea()).save(folder / "cat/chelsea.png")
    return image_set(open_source(folder))


def test_live_teacher_gives_what_the_teacher_gives(photo) -> None:
    encoder = live_teacher("efficientnet-lite0", TeacherOptions(), device=CPU)
    block = encoder.summaries(photo)
    (maps,) = encoder.maps(photo)
    teacher = load_teacher("efficientnet-lite0")
    pixels = torch.from_numpy(view_pixels(photo.decoded(0), teacher.spec.geometry).copy())[None]
    with torch.inference_mode():
        expected = teacher((pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
    np.testing.assert_allclose(block.summaries[OWN], expected.summary.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps[OWN], expected.spatial.numpy(), rtol=1e-4, atol=1e-4)
    assert (encoder.kind, encoder.description) == ("teacher", "teacher, run here, 224 px")
    assert encoder.at_size(320).geometry.grid_hw == (10, 10)


def test_timm_model_with_a_local_file_gives_what_the_teacher_gives(photo, tmp_path) -> None:
    """The same network, weights and preprocessing, reached through timm's configuration instead of ours."""
    teacher = load_teacher("efficientnet-lite0")
    torch.save(teacher._net.state_dict(), tmp_path / "lite0.pth")
    ((name, weights),) = parse_models(["timm:tf_efficientnet_lite0"], [str(tmp_path / "lite0.pth")])
    model = load_model(name, weights, device=CPU)
    live = live_teacher("efficientnet-lite0", TeacherOptions(), device=CPU)
    np.testing.assert_array_equal(model.pixels_of(photo.decoded(0)), live.pixels_of(photo.decoded(0)))
    np.testing.assert_allclose(
        model.summaries(photo).summaries[OWN], live.summaries(photo).summaries[OWN], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(next(model.maps(photo))[OWN], next(live.maps(photo))[OWN], rtol=1e-4, atol=1e-4)
    assert model.description == "timm tf_efficientnet_lite0, 224 px"


def test_timm_transformer_takes_another_size_and_gives_the_same_random_weights_every_time(photo) -> None:
    ((name, weights),) = parse_models(["small=timm:vit_tiny_patch16_224@96"], ["random"])
    model, again = (load_model(name, weights, device=CPU) for _ in range(2))
    assert (model.name, model.description) == ("small", "timm vit_tiny_patch16_224, random weights, 96 px")
    assert next(model.maps(photo))[OWN].shape == (1, 6, 6, 192)
    np.testing.assert_array_equal(*(one.summaries(photo).summaries[OWN] for one in (model, again)))
    assert model.at_size(64).geometry.grid_hw == (4, 4)


def test_open_clip_model_gives_what_the_library_gives(photo, tmp_path) -> None:
    import open_clip

    torch.manual_seed(3)
    net, _, preprocess = open_clip.create_model_and_transforms("RN50", pretrained=None)
    net.eval()
    torch.save(net.state_dict(), tmp_path / "clip.pt")
    ((name, weights),) = parse_models(["open_clip:RN50"], [str(tmp_path / "clip.pt")])
    model = load_model(name, weights, device=CPU)
    with torch.inference_mode():
        expected = net.encode_image(preprocess(photo.decoded(0))[None])
    np.testing.assert_allclose(model.summaries(photo).summaries[OWN], expected.numpy(), rtol=1e-3, atol=1e-5)
    assert next(model.maps(photo))[OWN].shape[:3] == (1, 7, 7)


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("nowhere", [], r"--model nowhere is none of these: a run or export folder, teacher:NAME"),
        ("gone.onnx", [], r"there is no file gone\.onnx"),
        ("teacher:dinov2", ["random"], "a teacher is its weights"),
        ("timm:resnet18", ["other=random"], "'other' is not among the teachers|other=random"),
    ],
)
def test_models_nobody_knows_are_refused_in_words(model: str, weights: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_models([model], weights)
    with pytest.raises(UnknownTeacherError, match="no teacher is called 'dinov9'"):
        parse_models(["teacher:dinov9"], [])


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two models are called timm:resnet18: name one"):
        parse_models(["timm:resnet18", "timm:resnet18"], [])
    assert [name.name for name, _ in parse_models(["timm:resnet18", "other=timm:resnet18"], [])] == [
        "timm:resnet18",
        "other",
    ]
    with pytest.raises(ConfigError, match="there is no --model"):
        parse_models([], ["random"])


def test_names_and_sizes_are_told_apart() -> None:
    assert ModelName.parsed("teacher:sam@1024") == ModelName("sam@1024", "teacher", "sam", 1024)
    assert ModelName.parsed("a b=open_clip:ViT-B-32/laion2b_s34b_b79k").path_or_name == "ViT-B-32/laion2b_s34b_b79k"


def test_models_libraries_do_not_have_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet1'\. Nearest: .*resnet18"):
        load_model(ModelName("x", "timm", "resnet1", None), "random", device=CPU)
    with pytest.raises(ConfigError, match=r"no open_clip model is called 'ViT-B-33'.*Did you mean .*'ViT-B-32'"):
        load_model(ModelName("x", "open_clip", "ViT-B-33/a", None), None, device=CPU)
    with pytest.raises(ConfigError, match="needs the name of its weights, as in open_clip:ViT-B-32/"):
        load_model(ModelName("x", "open_clip", "ViT-B-32", None), None, device=CPU)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"something": torch.zeros(2)}, tmp_path / "w.pt")
    for family, what in (("timm", "resnet18"), ("open_clip", "RN50")):
        with pytest.raises(TeacherWeightsError, match="fit"):
            load_model(ModelName("x", family, what, None), tmp_path / "w.pt", device=CPU)


def test_recorded_teacher_is_the_one_the_cache_was_built_with(photo) -> None:
    spec = load_teacher("efficientnet-lite0").spec
    encoder = recorded_teacher(spec, device=CPU)
    live = live_teacher("efficientnet-lite0", TeacherOptions(), device=CPU)
    np.testing.assert_array_equal(*(one.summaries(photo).summaries[OWN] for one in (encoder, live)))
