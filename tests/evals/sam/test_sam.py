"""Masks by a small random SAM and by a student in its encoder's place; COCO files as they come, broken outlines too."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pycocotools.coco import COCO
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from evals.cli import main
from evals.errors import EvalError
from evals.sam import SamConfig, run_sam, table
from evals.sam.instances import Instances, inner_points, next_point
from evals.sam.protocol import PROTOCOLS
from evals.sam.table import iou
from evals.shared.published import is_coco_validation
from radio_cache.errors import ConfigError

WIDTH = 8


def small_sam() -> Sam:
    """Inputs of 64 px, 4 x 4 tokens of 8 channels, which is what the tests' students have heads for."""
    torch.manual_seed(6)  # by which masks are neither empty nor full
    encoder = ImageEncoderViT(img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2, out_chans=WIDTH)
    prompts = PromptEncoder(WIDTH, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4)
    two_way = TwoWayTransformer(depth=1, embedding_dim=WIDTH, mlp_dim=8, num_heads=1, attention_downsample_rate=1)
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=two_way, iou_head_depth=2, iou_head_hidden_dim=8)
    return Sam(encoder, prompts, decoder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sam.pth; images 1.png and 2.png; coco.json: two sound instances, a crowd region, broken outlines, an empty one.

    The second sound instance is written without its area, as some tools do.
    """
    monkeypatch.setitem(sam_model_registry, "vit_b", small_sam)
    torch.save(small_sam().state_dict(), tmp_path / "sam.pth")
    rng = np.random.default_rng(0)
    for name in ("1", "2"):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    square = [[10, 10, 40, 10, 40, 30, 10, 30]]
    runs = {"size": [40, 60], "counts": [0, 40 * 30, 40 * 30]}
    common = {"category_id": 1, "bbox": [10, 10, 30, 20], "iscrowd": 0, "area": 600}
    annotations = [
        {**common, "id": 1, "image_id": 1, "segmentation": square},
        {**common, "id": 2, "image_id": 2, "segmentation": runs, "bbox": [0, 0, 30, 40]},
        {**common, "id": 3, "image_id": 1, "segmentation": runs, "iscrowd": 1},
        {**common, "id": 4, "image_id": 1, "segmentation": [[1, 2]]},
        {**common, "id": 5, "image_id": 1, "segmentation": square, "bbox": [10, 10, 0, 20]},
        {**common, "id": 6, "image_id": 2, "segmentation": {"size": [40, 60], "counts": "nonsense"}, "iscrowd": 1},
        {**common, "id": 7, "image_id": 2, "segmentation": {"size": [7, 7], "counts": [0, 4, 45]}},
    ]
    del annotations[1]["area"]
    images = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 60} for n in (1, 2)]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}], "info": {}}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    return tmp_path


def config(place: Path, **settings: object) -> SamConfig:
    defaults = {"annotations": place / "coco.json", "images": place, "sam": "sam-vit-b", "weights": place / "sam.pth"}
    defaults["protocol"] = "single-mask"
    return SamConfig(**{**defaults, **settings})


def test_crowds_broken_and_empty_outlines_are_left_out_and_counted(place: Path) -> None:
    instances = Instances.opened(place / "coco.json")
    sound = [one for image in instances.image_ids(None, 0) for one in instances.of(image, (40, 60))]
    assert [one.annotation for one in sound] == [1, 2]
    assert [int(one.mask.sum()) for one in sound] == [600, 1200]
    sizes = [PROTOCOLS["single-mask"].sizes(one.mask.sum()) for one in sound]
    assert sizes == [("small",), ("medium",)]
    assert instances.left_out == {
        "crowd regions": 1,
        "instances whose outline or box is broken": 3,
        "instances of no pixel": 1,
    }
    with pytest.raises(EvalError, match="listed as 60 x 40, and the file has 60 x 41"):
        list(instances.of(1, (41, 60)))
    nameless = json.loads((place / "coco.json").read_text())
    del nameless["images"][0]["height"]
    (place / "other.json").write_text(json.dumps(nameless))
    with pytest.raises(EvalError, match="image 1 has no height; every image states it"):
        Instances.opened(place / "other.json")
    (place / "other.json").write_text("[]")
    with pytest.raises(EvalError, match="no file of COCO instances"):
        Instances.opened(place / "other.json")


@pytest.mark.parametrize("prompt", ["box", "1-point", "3-points"])
def test_sam_and_the_student_answer_the_same_prompts(place: Path, make_run: Callable[..., Path], prompt: str) -> None:
    run = make_run("run", place / "none.zarr", teachers=("sam-vit-b",), spatial_dim=WIDTH)
    result = run_sam(config(place, runs=(run,), prompt=prompt, pictures=1))
    assert [(row.name, row.instances) for row in result.rows] == [("sam-vit-b", 2), ("student", 2)]
    assert all(row.miou is not None and 0 <= row.miou <= 1 and row.large is None for row in result.rows)
    assert result.rows[0] != result.rows[1]
    assert [title for title, _ in result.pictures[0]] == ["image", "annotated", "sam-vit-b", "student"]


@pytest.mark.parametrize("prompt", ["box", "3-points"])
def test_with_sams_own_encoder_as_the_student_masks_and_figures_are_the_same(
    place: Path, as_student: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    sam = small_sam().eval()
    mean, std = (numbers.flatten() / 255 for numbers in (sam.pixel_mean, sam.pixel_std))
    student = as_student("sam-vit-b", (sam.image_encoder, mean, std, lambda net, x: net(x)), image_hw=(64, 64))
    monkeypatch.setattr(table, "load_student", lambda run, **_: student)
    answered: list[np.ndarray] = []
    monkeypatch.setattr(table, "iou", lambda mask, truth: answered.append(mask) or iou(mask, truth))
    result = run_sam(config(place, runs=(place / "run",), prompt=prompt, pictures=2))
    own, ours = result.rows
    assert replace(ours, name=own.name) == own
    assert own.miou is not None
    assert 0 < own.miou < 1
    assert len(answered) == 4
    for theirs, our in zip(answered[0::2], answered[1::2], strict=True):  # an image has one instance each
        np.testing.assert_array_equal(our, theirs)
        assert 0 < theirs.mean() < 1
    for _, _, (_, theirs), (_, our) in result.pictures:
        np.testing.assert_array_equal(our, theirs)


def test_the_papers_rows_stand_beside_true_boxes_on_all_of_coco_only(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_coco_validation(categories=80, images=5000)
    assert run_sam(config(place)).paper == ()
    monkeypatch.setattr("evals.shared.published.COCO_CATEGORIES", 1)
    monkeypatch.setattr("evals.shared.published.COCO_VALIDATION", 2)
    comparable = config(place, protocol="efficientvit-sam")
    assert [row.sam_coco for row in run_sam(comparable).paper if row.name.startswith("SAM-H")] == [77.18]
    assert run_sam(replace(comparable, prompt="1-point")).paper == ()
    assert run_sam(replace(comparable, limit=1)).paper == ()
    single = run_sam(config(place))
    assert single.paper == ()
    assert any("--protocol efficientvit-sam gives figures that are comparable" in note for note in single.notes)


def test_a_detectors_boxes_are_judged_by_ap(place: Path) -> None:
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 20], "score": 0.9}]
    (place / "boxes.json").write_text(json.dumps(boxes))
    (row,) = run_sam(config(place, prompt="detections", detections=place / "boxes.json")).rows
    assert (row.instances, row.miou) == (1, None)
    (place / "boxes.json").write_text('[{"image_id": 1}]')
    with pytest.raises(EvalError, match="not a list of image_id, category_id, bbox"):
        run_sam(config(place, prompt="detections", detections=place / "boxes.json"))
    with pytest.raises(ConfigError, match="go together"):
        config(place, prompt="detections")


def test_points_lie_within_the_mask_and_apart() -> None:
    mask = np.zeros((30, 60), np.bool_)
    mask[5:25, 5:55] = True
    points = inner_points(mask, 3)
    assert all(mask[int(y), int(x)] for x, y in points)
    assert min(np.linalg.norm(points[a] - points[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 5
    assert iou(mask, mask) == 1.0
    assert iou(mask, ~mask) == 0.0


def test_the_command_prints_records_and_draws(place: Path) -> None:
    arguments = ["sam", "--annotations", place / "coco.json", "--images", place, "--sam", "sam-vit-b"]
    arguments += ["--protocol", "single-mask"]
    arguments += ["--weights", place / "sam.pth", "--json", place / "out.json", "--pictures", place / "m.png"]
    result = CliRunner().invoke(main, [str(word) for word in arguments])
    assert result.exit_code == 0, result.output
    assert "note: Left out: crowd regions (1)." in result.stdout
    assert json.loads((place / "out.json").read_text())["rows"][0]["instances"] == 2
    with Image.open(place / "m.png") as picture:
        assert picture.width > 100


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pycocotools, beside a new NumPy
@pytest.mark.parametrize("prompt", ["box", "1-point", "3-points"])
def test_the_public_scripts_protocol_equals_a_plain_loop_over_the_file(place: Path, prompt: str) -> None:
    """Best of three by predicted IoU, every annotation of at least a pixel, crowds too, sizes by the file's area."""
    contents = json.loads((place / "coco.json").read_text())
    contents["annotations"] = [known for known in contents["annotations"] if known["id"] in (1, 2, 3)]
    for known, area in zip(contents["annotations"], (32**2, 9999, 0.5), strict=True):
        known["area"] = area
    contents["annotations"].append({**contents["annotations"][2], "id": 8, "image_id": 2, "area": 600})
    (place / "coco.json").write_text(json.dumps(contents))
    index = COCO()
    index.dataset = contents
    index.createIndex()
    predictor = SamPredictor(small_sam().eval())
    expected: list[tuple[float, float]] = []
    for known in contents["annotations"]:
        if known["area"] < 1:
            continue
        truth = index.annToMask(known).astype(bool)
        predictor.set_image(np.asarray(Image.open(place / f"{known['image_id']}.png").convert("RGB")))
        x, y, w, h = known["bbox"]
        points, labels, mask = [], [], np.zeros_like(truth)
        for _ in range(3 if prompt == "3-points" else 1):
            point, positive = next_point(truth, mask, points)
            points.append(point)
            labels.append(int(positive))
            box = {"box": np.array([x, y, x + w, y + h])}
            clicks = {"point_coords": np.array(points), "point_labels": np.array(labels)}
            masks, scores, _ = predictor.predict(**(box if prompt == "box" else clicks), multimask_output=True)
            mask = masks[scores.argmax()]
        expected.append((known["area"], (mask & truth).sum() / ((mask | truth).sum() + 1e-7)))
    (row,) = run_sam(config(place, prompt=prompt, protocol="efficientvit-sam")).rows

    def mean(low: float, high: float) -> float:
        return float(np.mean([value for area, value in expected if low <= area <= high]))

    assert row.instances == len(expected) == 3
    figures = [mean(0, 1e9), mean(0, 1024), mean(1024, 9216), mean(9216, 1e9)]
    np.testing.assert_allclose([row.miou, row.small, row.medium, row.large], figures, atol=1e-6)
