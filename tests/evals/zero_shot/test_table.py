"""Zero-shot by a small random CLIP in open_clip's own format gives what its library computes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.teachers import TeacherOptions
from evals.cli import main
from evals.errors import EvalError
from evals.zero_shot import ZeroShotConfig, run_zero_shot, text_tower
from evals.zero_shot.classifier import text_classifier
from evals.zero_shot.table import rank_classes
from evals.zero_shot.text_tower import TextTower
from radio_cache.errors import ConfigError, ShapeError, TeacherWeightsError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.testing import write_images

TEACHER, WIDTH = "openclip-vit-h-14", 24
TEMPLATES = ("a photo of {}.", "{} in the wild.")


@pytest.fixture(scope="module")
def model() -> CLIP:
    vision = CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=14, image_size=28)
    text = CLIPTextCfg(context_length=16, vocab_size=49408, width=64, heads=1, layers=1)
    torch.manual_seed(0)
    clip = CLIP(WIDTH, vision, text).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return clip


@pytest.fixture(scope="module")
def place(model: CLIP, tmp_path_factory) -> Path:
    """Weights in clip.pt, 9 photos of 3 classes in images/, their cache in c.zarr, templates in t.txt."""
    root = tmp_path_factory.mktemp("zero_shot")
    torch.save(model.state_dict(), root / "clip.pt")
    write_images(root / "images", classes=("ant", "honey_bee", "cat"), per_class=3, size=30)
    (root / "t.txt").write_text("\n".join(TEMPLATES))
    teachers = {TEACHER: TeacherOptions(weights=root / "clip.pt", codec=CodecRecord(parameters={"name": "half"}))}
    build_cache(BuildConfig(images=(str(root / "images"),), out=root / "c.zarr", teachers=teachers))
    return root


def reference(model: CLIP, place: Path) -> float:
    """Top-1 as open_clip itself computes it."""
    classifier = open_clip.build_zero_shot_classifier(
        model,
        open_clip.get_tokenizer("ViT-H-14", context_length=16),
        ["ant", "cat", "honey bee"],
        [lambda c, t=t: t.replace("{}", c) for t in TEMPLATES],
    )
    transform = open_clip.image_transform(28, is_train=False)
    hits = []
    for number, name in enumerate(("ant", "cat", "honey_bee")):
        for path in sorted((place / "images" / name).iterdir()):
            with torch.inference_mode(), Image.open(path) as image:
                features = model.encode_image(transform(image)[None], normalize=True)
            hits.append(int((features @ classifier).argmax()) == number)
    return float(np.mean(hits))


def config(place: Path, tmp_path: Path, **settings: object) -> ZeroShotConfig:
    defaults = {"images": place / "c.zarr", "templates": place / "t.txt", "classifiers": tmp_path / "kept"}
    return ZeroShotConfig(**{**defaults, **settings})


def test_cached_teacher_live_teacher_and_student_are_compared_with_its_own_sentences(
    model: CLIP, place: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run("run", place / "c.zarr", teachers=(TEACHER,), summary_dim=WIDTH)
    settings = {"runs": (run,), "models": (f"live=teacher:{TEACHER}",), "weights": (f"live={place / 'clip.pt'}",)}
    table = run_zero_shot(config(place, tmp_path, **settings))
    assert [(row.name, row.kind) for row in table.rows] == [
        (TEACHER, "teacher"),
        ("live", "teacher"),
        (f"student → {TEACHER}", "student"),
        (f"student, untrained → {TEACHER}", "untrained"),
    ]
    assert table.rows[0].top1 == table.rows[1].top1 == pytest.approx(reference(model, place))
    assert table.phrases == ("ant", "cat", "honey bee")
    assert "3 classes as sentences (2 of your own" in table.protocol
    assert table.images["images"] == 9


def test_a_library_model_in_a_cache_and_a_student_elsewhere_find_the_recorded_text_tower(
    model: CLIP, place: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    teachers = {
        "open_clip:ViT-H-14": TeacherOptions(weights=place / "clip.pt", codec=CodecRecord(parameters={"name": "half"}))
    }
    build_cache(BuildConfig(images=(str(place / "images"),), out=tmp_path / "c.zarr", teachers=teachers))
    group = "open_clip-vit-h-14"
    run = make_run("run", tmp_path / "c.zarr", teachers=(group,), summary_dim=WIDTH)
    (row,) = run_zero_shot(config(place, tmp_path, images=tmp_path / "c.zarr")).rows
    assert (row.name, row.text, row.top1) == (group, "text tower of ViT-H-14", pytest.approx(reference(model, place)))
    result = run_zero_shot(config(place, tmp_path, images=place / "images", runs=(run,)))
    assert [row.name for row in result.rows] == [f"student → {group}", f"student, untrained → {group}"]


def test_a_tokenizer_that_is_not_here_says_where_it_comes_from_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tower, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(text_tower, "check_network", lambda url: (_ for _ in ()).throw(ConnectionError("no way")))
    whole = r"timm/ViT-B-16-SigLIP, which could not be downloaded \(no way\).\n.*hf download timm/ViT-B-16-SigLIP .*\n"
    with pytest.raises(TeacherWeightsError, match=whole + ".*models--timm--ViT-B-16-SigLIP, into "):
        text_tower._tokenizer("ViT-B-16-SigLIP", None)


def test_the_classifier_is_made_once_and_again_for_other_words(place: Path, tmp_path: Path) -> None:
    reported: list[str] = []

    def progress(name: str, done: int, total: int, /, *, unit: str = "images") -> None:
        if unit == "classes":
            reported.append(name)

    first = run_zero_shot(config(place, tmp_path), progress=progress)
    assert len(reported) == 3
    assert run_zero_shot(config(place, tmp_path), progress=progress).rows == first.rows
    assert len(reported) == 3
    names = tmp_path / "names.txt"
    names.write_text("spider\nlion\nwasp\n")
    run_zero_shot(config(place, tmp_path, classes=names), progress=progress)
    assert len(reported) == 6
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(b"cut off")
    assert run_zero_shot(config(place, tmp_path)).rows == first.rows


def test_an_open_clip_model_speaks_with_its_own_tower(place: Path, tmp_path: Path) -> None:
    images = config(place, tmp_path, images=place / "images", models=("open_clip:ViT-S-32-alt",), weights=("random",))
    (row,) = run_zero_shot(images).rows
    assert (row.text, row.kind) == ("text tower of ViT-S-32-alt", "model")


def test_the_command_prints_and_records(place: Path, tmp_path: Path) -> None:
    arguments = ["--images", place / "c.zarr", "--classifiers", tmp_path / "k", "--json", tmp_path / "z.json"]
    arguments += ["--templates", place / "t.txt"]
    result = CliRunner().invoke(main, ["zero-shot", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "text tower of ViT-H-14" in " ".join(result.stdout.split())
    record = json.loads((tmp_path / "z.json").read_text())
    assert record["phrases"] == ["ant", "cat", "honey bee"]
    assert record["templates"] == list(TEMPLATES)
    assert "sha256_of_image_digests" in record["images"]


def test_who_has_no_text_tower_is_told_and_nobody_left_is_an_error(make_cache, place: Path, tmp_path: Path) -> None:
    timm = {"models": ("timm:vit_tiny_patch16_224@32",), "weights": ("random",)}
    table = run_zero_shot(config(place, tmp_path, **timm))
    assert any("timm:vit_tiny_patch16_224@32 has no text tower" in note for note in table.notes)
    with pytest.raises(EvalError, match="no encoder has a text tower"):
        run_zero_shot(config(place, tmp_path, images=make_cache("bank").path))
    with pytest.raises(EvalError, match="has no labels"):
        run_zero_shot(config(place, tmp_path, images=make_cache("plain", [-1] * 8).path))
    with pytest.raises(ConfigError, match="give --images PATH_OR_URL"):
        ZeroShotConfig()


def test_a_file_without_a_text_tower_asks_for_the_whole_one(model: CLIP, place: Path, tmp_path: Path) -> None:
    image_tower = {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}
    torch.save(image_tower, tmp_path / "visual.pt")
    with pytest.raises(EvalError, match=f"no text tower, only an image tower.*--text-weights {TEACHER}=FILE"):
        run_zero_shot(config(place, tmp_path, text_weights=(str(tmp_path / "visual.pt"),)))


def test_the_text_tower_of_another_clip_is_refused(place: Path, tmp_path: Path) -> None:
    text = CLIPTextCfg(16, 49408, width=64, heads=1, layers=1)
    other = CLIP(12, CLIPVisionCfg(layers=1, width=64, patch_size=14, image_size=28), text)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(ShapeError, match="gives summaries of 24 values, its text tower sentences of 12"):
        run_zero_shot(config(place, tmp_path, text_weights=(f"{TEACHER}={tmp_path / 'other.pt'}",)))


def test_a_class_is_the_mean_of_unit_vectors(tmp_path: Path) -> None:
    vectors = {"x one": (3.0, 0.0), "x two": (0.0, 0.5)}
    tower = TextTower(
        description="", content="", load=lambda device: lambda words: torch.tensor([vectors[word] for word in words])
    )
    result = text_classifier(tower, ["x"], ["{} one", "{} two"], tmp_path, device=torch.device("cpu"))
    np.testing.assert_allclose(result, [[2**-0.5, 2**-0.5]], rtol=1e-6)


def test_summaries_that_are_not_finite_are_never_ranked() -> None:
    summaries = np.array([[1.0, 0.0], [np.nan, 0.0]], np.float32)
    with pytest.raises(EvalError, match="x gives summaries that are not finite for 1 of 2 images"):
        rank_classes(summaries, np.eye(2, dtype=np.float32), name="x")
