"""COCO files as other tools write them: identifiers of every kind, and what a perfect SAM scores on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_length

from evals.errors import EvalError
from evals.sam import SamConfig, SamTable, run_sam, table
from evals.sam.coco_file import identifier, image_path, read_coco, run_lengths
from evals.sam.instances import next_point

BOXES = [(1, 5, 5, 40, 40), (1, 60, 20, 50, 50), (2, 10, 10, 60, 60), (2, 80, 60, 40, 40)]


class FillsBoxes:
    """A SAM whose masks are the boxes that it is asked for, or, of three masks, the second one."""

    def set_image(self, image: np.ndarray) -> None:
        self.hw = image.shape[:2]

    def predict(self, box: np.ndarray, multimask_output: bool, **_: Any) -> tuple[np.ndarray, np.ndarray, None]:
        mask = np.zeros(self.hw, np.bool_)
        x0, y0, x1, y1 = (round(value) for value in box)
        mask[y0:y1, x0:x1] = True
        if not multimask_output:
            return mask[None], np.array([0.9]), None
        return np.stack([~mask, mask, ~mask]), np.array([0.2, 0.9, 0.1]), None


def annotation(number: object, image: object, x: int, y: int, w: int, h: int, **fields: object) -> dict[str, object]:
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    known = {"id": number, "image_id": image, "category_id": 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
    return {**known, "segmentation": outline, **fields}


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SamTable]:
    """What a perfect SAM scores on two images, their annotations and, optionally, fields of the file replaced or dropped."""
    monkeypatch.setattr(table, "_predictors", lambda config: {"perfect": FillsBoxes()})
    for number in (1, 2):
        Image.new("RGB", (160, 120)).save(tmp_path / f"{number}.png")

    def score(
        annotations: list[dict[str, object]], *, ids: tuple[object, object] = (1, 2), **fields: object
    ) -> SamTable:
        images = [{"id": ids[n], "file_name": f"{n + 1}.png", "height": 120, "width": 160} for n in (0, 1)]
        contents = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": annotations} | fields
        kept = {name: value for name, value in contents.items() if value is not None}
        (tmp_path / "coco.json").write_text(json.dumps(kept))
        (tmp_path / "boxes.json").write_text(json.dumps(fields.get("boxes", [])))
        detections = {"prompt": "detections", "detections": tmp_path / "boxes.json"} if "boxes" in fields else {}
        return run_sam(SamConfig(annotations=tmp_path / "coco.json", images=tmp_path, **detections))

    return score


@pytest.mark.parametrize(
    "ids", [[1, 2, 3, 4], [0, 1, 2, 3], [1, 2, 1, 2], [0, 0, 0, 0], ["a", "b", "c", "d"], [-1, -2, 7, 0]]
)
def test_true_masks_score_one_whatever_the_ids_of_annotations(
    score: Callable[..., SamTable], ids: list[object]
) -> None:
    (row,) = score([annotation(number, *box) for number, box in zip(ids, BOXES, strict=True)]).rows
    assert (row.instances, row.miou, row.ap) == (4, 1.0, 1.0)


def test_annotations_without_ids_are_numbered(score: Callable[..., SamTable]) -> None:
    nameless = [annotation(0, *box) for box in BOXES]
    for known in nameless:
        del known["id"]
    assert score(nameless).rows[0].ap == 1.0


@pytest.mark.parametrize("categories", [None, [], [{"id": 7, "name": "another"}]])
def test_classes_without_an_entry_are_scored_all_the_same(score: Callable[..., SamTable], categories: object) -> None:
    (row,) = score([annotation(n, *box) for n, box in enumerate(BOXES)], categories=categories).rows
    assert (row.miou, row.ap) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("ids", "quoted"),
    [((1, 2), ("1", "2")), (("1", "2"), (1, 2)), (("ab12", "cd"), ("ab12", "cd")), ((1.0, 2.0), (1, 2))],
)
def test_images_may_be_named_or_numbered_in_quotes(
    score: Callable[..., SamTable], ids: tuple[object, object], quoted: tuple[object, object]
) -> None:
    (row,) = score([annotation(n, quoted[image - 1], *box) for n, (image, *box) in enumerate(BOXES)], ids=ids).rows
    assert (row.instances, row.ap) == (4, 1.0)


def test_an_image_listed_twice_is_refused(score: Callable[..., SamTable]) -> None:
    with pytest.raises(EvalError, match=r"lists image id '1' twice; give every image an id of its own"):
        score([annotation(1, *BOXES[0])], ids=(1, "1"))


def test_annotations_of_other_images_are_counted_and_a_file_of_nothing_else_is_refused(
    score: Callable[..., SamTable],
) -> None:
    result = score([annotation(1, *BOXES[0]), annotation(2, 9, 1, 1, 5, 5)])
    assert result.rows[0].ap == pytest.approx(1.0)
    assert result.notes == ("Left out: instances of images that the file does not list (1).",)
    with pytest.raises(
        EvalError, match="no instance belongs to an image that the file lists; the first one names image 9"
    ):
        score([annotation(2, 9, 1, 1, 5, 5)])


def test_what_was_not_measured_is_no_zero(score: Callable[..., SamTable]) -> None:
    crowd = run_length.frPyObjects([[5.0, 5, 45, 5, 45, 45, 5, 45]], 120, 160)[0]
    counts = crowd["counts"].decode()
    (row,) = score([annotation(1, *BOXES[0], iscrowd=1, segmentation={"size": [120, 160], "counts": counts})]).rows
    assert (row.instances, row.ap) == (1, None)


def test_null_fields_and_missing_boxes_are_taken_from_the_mask(score: Callable[..., SamTable]) -> None:
    (row,) = score([annotation(1, *BOXES[0], area=None, iscrowd=None, bbox=None)]).rows
    assert (row.miou, row.ap, row.medium) == (1.0, pytest.approx(1.0), 1.0)


def test_false_detections_on_images_without_instances_lower_the_ap(score: Callable[..., SamTable]) -> None:
    true = {"image_id": "1", "category_id": 1, "bbox": [5, 5, 40, 40], "score": 0.5}
    false = {"image_id": 2, "category_id": 1, "bbox": [5, 5, 40, 40], "score": 0.9}
    known = [annotation(1, *BOXES[0])]
    assert score(known, boxes=[true]).rows[0].ap == pytest.approx(1.0)
    assert score(known, boxes=[true, false]).rows[0].ap == pytest.approx(0.5)
    stray = {**true, "category_id": 5}
    assert score(known, boxes=[true, stray]).notes == ("Left out: detected boxes of other images or categories (1).",)
    with pytest.raises(EvalError, match="none of its 1 boxes is of an image and a category"):
        score(known, boxes=[stray])
    with pytest.raises(EvalError, match="not finite"):
        score(known, boxes=[{**true, "score": float("nan")}])


def test_more_masks_than_coco_looks_at_are_said(score: Callable[..., SamTable]) -> None:
    many = [annotation(n, 1, 1 + n, 1, 5 + n % 7, 9) for n in range(101)]
    result = score(many)
    assert result.rows[0].ap < 1.0
    assert "considers the 100 surest masks" in result.notes[0]


def test_identifiers_are_compared_by_value() -> None:
    assert identifier(7) == identifier(7.0) == identifier("7")
    for odd in (True, None, 1.5, [1]):
        with pytest.raises(TypeError, match="is not an identifier"):
            identifier(odd)


@pytest.mark.parametrize(
    "contents", ["[]", "{}", "null", '{"images": 1, "annotations": 2}', '{"images": [1], "annotations": [1]}', "{"]
)
def test_other_files_are_refused_by_name(tmp_path: Path, contents: str) -> None:
    (tmp_path / "x.json").write_text(contents)
    with pytest.raises(EvalError, match=r"x\.json is no file of COCO instances"):
        read_coco(tmp_path / "x.json")


def test_the_next_point_is_in_the_larger_error_and_never_where_one_was_placed() -> None:
    truth, mask = np.zeros((20, 30), np.bool_), np.zeros((20, 30), np.bool_)
    truth[2:9, 2:9] = True
    assert next_point(truth, mask, []) == ((5.0, 5.0), True)
    mask[5:16, 12:23] = True  # the false part is larger than the missing one
    assert next_point(truth, mask, []) == ((17.0, 10.0), False)
    assert next_point(truth, mask, [(17.0, 10.0)])[0] != (17.0, 10.0)


@pytest.mark.parametrize("name", ["/dev/zero", "../other/a.jpg", "a/../../b.jpg", "", ".", "a\0b"])
def test_names_of_images_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="leads out of --images"):
        image_path(tmp_path / "images", name)


def test_names_of_images_may_have_folders_and_be_absolute(tmp_path: Path) -> None:
    for name in ("a.jpg", "val/a.jpg", "val/../a.jpg", str(tmp_path / "val" / "a.jpg")):
        assert image_path(tmp_path, name).suffix == ".jpg"


def outline_of(x: int, y: int, w: int, h: int) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def lengths_of(x: int, y: int, w: int, h: int) -> list[int]:
    mask = np.zeros((120, 160), np.int8)
    mask[y : y + h, x : x + w] = 1
    return np.diff(np.r_[0, np.flatnonzero(np.diff(mask.ravel(order="F"))) + 1, mask.size]).tolist()


def compressed(x: int, y: int, w: int, h: int) -> str:
    return run_length.frPyObjects({"size": [120, 160], "counts": lengths_of(x, y, w, h)}, 120, 160)["counts"].decode()


@pytest.mark.parametrize(
    "outline",
    [
        lambda *box: [[box[0], box[1], box[0] + 9, box[1]], outline_of(*box)],
        outline_of,
        lambda *box: [np.reshape(outline_of(*box), (-1, 2)).tolist()],
        lambda *box: {"size": [120.0, 160.0], "counts": [float(length) for length in lengths_of(*box)]},
        lambda *box: {"size": [120, 160], "counts": compressed(*box)},
    ],
    ids=["line first", "flat", "pairs", "floats", "compressed"],
)
def test_outlines_of_other_writers_are_drawn_as_meant(
    score: Callable[..., SamTable], outline: Callable[..., object]
) -> None:
    result = score([annotation(n, *box, segmentation=outline(*box[1:])) for n, box in enumerate(BOXES)])
    assert (result.rows[0].instances, result.rows[0].miou, result.rows[0].ap, result.notes) == (4, 1.0, 1.0, ())


@pytest.mark.parametrize(
    "outline",
    [
        [[5, 5, 45, 45]],
        [[*outline_of(5, 5, 40, 40), 3]],
        {"size": [120, 160], "counts": lengths_of(5, 5, 40, 40)[:-1]},
        {"size": [160, 120], "counts": lengths_of(5, 5, 40, 40)},
        {"size": [120, 160], "counts": compressed(5, 5, 40, 40)[:-1]},
        {"size": [120, 160], "counts": f"b'{compressed(5, 5, 40, 40)}'"},
    ],
    ids=["line", "odd", "short", "turned", "cut", "bytes"],
)
def test_outlines_that_mean_nothing_are_left_out_and_counted(score: Callable[..., SamTable], outline: object) -> None:
    result = score([annotation(1, *BOXES[0], segmentation=outline), annotation(2, *BOXES[1])])
    assert (result.rows[0].instances, result.rows[0].ap) == (1, pytest.approx(1.0))
    assert result.notes == ("Left out: instances whose outline or box is broken (1).",)


@pytest.mark.parametrize("lengths", [[0, 19200], [7, 3, 200, 1, 18989], [1, 1, 1, 1, 1, 19195]])
def test_compressed_lengths_are_those_of_pycocotools(lengths: list[int]) -> None:
    code = run_length.frPyObjects({"size": [120, 160], "counts": lengths}, 120, 160)["counts"].decode()
    assert run_lengths(code) == lengths


@pytest.mark.parametrize("area", ["1600", 0, -1, float("nan")])
def test_areas_as_text_or_without_meaning_do_not_change_the_score(score: Callable[..., SamTable], area: object) -> None:
    (row,) = score([annotation(1, *BOXES[0], area=area), annotation(2, *BOXES[1])]).rows
    assert (row.instances, row.miou, row.medium, row.ap) == (2, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("side", [120.0, "120"])
def test_image_sizes_may_be_floats_or_text(score: Callable[..., SamTable], side: object) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "height": side, "width": 160} for n in (1, 2)]
    assert score([annotation(n, *box) for n, box in enumerate(BOXES)], images=images).rows[0].ap == 1.0
    with pytest.raises(EvalError, match="image 1 has no height"):
        score([annotation(1, *BOXES[0])], images=[{"id": 1, "file_name": "1.png", "width": 160}])
    with pytest.raises(EvalError, match=r"the height 120\.5: no number of pixels"):
        score([annotation(1, *BOXES[0])], images=[{**images[0], "height": 120.5}])


@pytest.mark.parametrize("bbox", [[60, 20, 110, 70], [0.375, 0.17, 0.31, 0.42]], ids=["corners", "shares"])
def test_boxes_that_do_not_fit_their_outlines_are_said(score: Callable[..., SamTable], bbox: list[float]) -> None:
    result = score([annotation(1, *BOXES[0]), annotation(2, *BOXES[1], bbox=bbox)])
    assert "The box and the outline of 1 instance overlaps by less than half" in result.notes[0]


def test_outlines_in_shares_of_the_image_are_said(score: Callable[..., SamTable]) -> None:
    small = [value / 160 for value in outline_of(*BOXES[0][1:])]
    assert "by less than half" in score([annotation(1, *BOXES[0], segmentation=[small])]).notes[0]


def test_images_turned_by_their_tag_are_said(score: Callable[..., SamTable], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 3
    Image.new("RGB", (160, 120)).save(tmp_path / "turned.jpg", exif=exif)
    images = [{"id": 1, "file_name": "turned.jpg", "height": 120, "width": 160}]
    assert (
        score([annotation(1, *BOXES[0])], images=images).notes[0].startswith("1 image is turned by an orientation tag")
    )
