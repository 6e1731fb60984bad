"""Masks as people have them: palettes, ignored pixels, other layouts, and what is wrong with some."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from evals.errors import EvalError
from evals.segmentation.masks import IGNORED, MaskFormat, ade20k, class_list, mask_folders, split, voc2012
from evals.segmentation.table import SegmentConfig, masked_images
from radio_cache.errors import ConfigError


def save_pair(
    root: Path, name: str, ids: np.ndarray, *, mode: str = "L", image_hw: tuple[int, int] | None = None
) -> None:
    for below in ("images", "masks"):
        (root / below).mkdir(parents=True, exist_ok=True)
    h, w = image_hw or ids.shape
    Image.fromarray(np.full((h, w, 3), 90, np.uint8)).save(root / "images" / f"{name}.jpg")
    mask = Image.fromarray(ids.astype(np.uint8))
    if mode == "P":
        mask = mask.convert("P")
        mask.putdata(ids.astype(np.uint8).ravel().tolist())
        mask.putpalette([17, 34, 51] * 256)
    elif mode == "I;16":
        mask = Image.fromarray(ids.astype(np.uint16))
    elif mode != "L":
        mask = mask.convert(mode)
    mask.save(root / "masks" / f"{name}.png")


def folders(root: Path, **format: object):
    return mask_folders(root / "images", root / "masks", MaskFormat(**format))


IDS = np.array([[0, 1, 2], [255, 1, 0]])


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_the_numbers_count_and_not_the_colours_of_the_palette(tmp_path: Path, mode: str) -> None:
    save_pair(tmp_path, "a", IDS, mode=mode)
    pairs = folders(tmp_path, class_names=("x", "y", "z"))
    assert pairs.classes(0, (2, 3)).tolist() == [[0, 1, 2], [IGNORED, 1, 0]]
    assert pairs.largest_class() == 2


def test_ids_may_begin_at_one_and_what_lies_below_is_nobodys(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", IDS)
    pairs = folders(tmp_path, class_names=("x", "y"), first_id=1)
    assert pairs.classes(0, (2, 3)).tolist() == [[IGNORED, 0, 1], [IGNORED, 0, IGNORED]]


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", IDS, image_hw=(4, 6))
    pairs = folders(tmp_path)
    assert pairs.size_hw(0) == (4, 6)
    with pytest.raises(EvalError, match=r"a\.png is 3 x 2 pixels, its image .*a\.jpg is 6 x 4"):
        pairs.classes(0, pairs.size_hw(0))


def test_ids_outside_the_list_are_refused_and_not_clipped(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", IDS)
    with pytest.raises(EvalError, match=r"a\.png holds the id 2 \(1 pixels\), the list of classes ends at 1"):
        folders(tmp_path, class_names=("x", "y")).classes(0, (2, 3))


def test_a_colour_picture_is_no_mask(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", IDS, mode="RGB")
    with pytest.raises(EvalError, match=r"a picture in RGB: a mask holds one number per pixel"):
        folders(tmp_path).classes(0, (2, 3))
    (tmp_path / "masks/a.png").write_bytes(b"nothing")
    with pytest.raises(EvalError, match="cannot be read as a mask"):
        folders(tmp_path).classes(0, (2, 3))


def test_pairs_have_one_name_and_images_without_a_mask_are_counted(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", IDS)
    save_pair(tmp_path, "b", IDS)
    (tmp_path / "masks/b.png").unlink()
    pairs = folders(tmp_path)
    assert (pairs.keys, pairs.left_out) == (("a",), 1)
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(EvalError, match=r"1 masks have no image in .*, such as a"):
        folders(tmp_path)
    with pytest.raises(EvalError, match="there is no folder"):
        mask_folders(tmp_path / "nowhere", tmp_path / "masks", MaskFormat())


def test_a_turned_photo_has_the_size_people_see(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", IDS)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((3, 2, 3), np.uint8)).save(tmp_path / "images/a.jpg", exif=exif)
    pairs = folders(tmp_path)
    assert pairs.size_hw(0) == (2, 3) == (pairs.image(0).height, pairs.image(0).width)


def test_ade20k_leaves_out_id_zero_and_reads_its_names(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        save_pair(tmp_path, "a", np.array([[0, 1, 150]]))
        for below, kind in (("images", "images"), ("masks", "annotations")):
            (tmp_path / kind / part).mkdir(parents=True)
            for path in (tmp_path / below).glob("a.*"):
                path.rename(tmp_path / kind / part / path.name)
    train, test = ade20k(tmp_path)
    assert train.classes(0, (1, 3)).tolist() == [[IGNORED, 0, 149]]
    assert (len(test), train.format.class_names[149]) == (1, "class 150")
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{n}\t0\t0\t0\tthing {n}, stuff" for n in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    assert ade20k(tmp_path)[0].format.class_names[0] == "thing 1"
    (tmp_path / "images/validation").rename(tmp_path / "images/other")
    with pytest.raises(EvalError, match="not laid out as ADE20K: it has no folder images/validation"):
        ade20k(tmp_path)


def test_voc_is_found_below_its_devkit_and_takes_the_augmented_masks(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("one", "two"):
        save_pair(root, name, IDS, mode="P")
    (root / "images").rename(root / "JPEGImages")
    (root / "masks").rename(root / "SegmentationClass")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("one\n")
    (lists / "val.txt").write_text("two\n")
    train, test = voc2012(tmp_path)
    assert (train.keys, test.keys, len(train.format.class_names)) == (("one",), ("two",), 21)
    (root / "SegmentationClassAug").mkdir()
    (lists / "trainaug.txt").write_text("one\ntwo\n")
    with pytest.raises(EvalError, match="names 2 files that are not there"):
        voc2012(tmp_path)


def test_class_lists_come_from_a_file_a_number_or_commas(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("sky\nroad\n\n")
    assert class_list(str(file)) == ("sky", "road") == class_list("sky, road")
    assert class_list("2") == ("class 0", "class 1")
    for text, match in (
        ("sky", "a file with one name per line"),
        ("a,a", "'a' is there twice"),
        ("a,,b", "line 2 is empty"),
    ):
        with pytest.raises(ConfigError, match=match):
            class_list(text)


def test_a_split_has_every_pair_once_and_is_the_same_again(tmp_path: Path) -> None:
    for number in range(10):
        save_pair(tmp_path, str(number), IDS)
    pairs = folders(tmp_path)
    train, test = split(pairs, test_share=0.2, seed=0)
    assert (len(train), len(test)) == (8, 2)
    assert {*train.keys, *test.keys} == set(pairs.keys)
    assert split(pairs, test_share=0.2, seed=0)[1].keys == test.keys
    assert pairs.limited(3, 0).keys == pairs.limited(3, 0).keys
    with pytest.raises(EvalError, match="one image with a mask"):
        split(train.limited(1, 0), test_share=0.2, seed=0)


def grey_png(ids: np.ndarray, bits: int) -> bytes:
    """A grey PNG with fewer than 8 bits a pixel, which PIL reads and does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    per_byte = 8 // bits
    shifts = 8 - bits * (1 + np.arange(per_byte))
    rows = (ids.reshape(ids.shape[0], -1, per_byte) << shifts).sum(-1).astype(np.uint8)
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_in_few_bits_are_not_stretched(tmp_path: Path, bits: int) -> None:
    ids = np.arange(32).reshape(4, 8) % min(2**bits, 16)
    save_pair(tmp_path, "a", ids)
    (tmp_path / "masks/a.png").write_bytes(grey_png(ids, bits))
    pairs = folders(tmp_path)
    assert pairs.classes(0, (4, 8)).tolist() == ids.tolist()
    assert pairs.largest_class() == ids.max()


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("photometric", "dtype"), [("miniswhite", "uint8"), ("minisblack", "uint8"), ("miniswhite", "uint16")]
)
def test_ids_in_a_tiff_are_those_in_the_file_whatever_colour_zero_is(
    tmp_path: Path, photometric: str, dtype: str, compression: str | None
) -> None:
    save_pair(tmp_path, "a", IDS)
    (tmp_path / "masks/a.png").unlink()
    tifffile.imwrite(tmp_path / "masks/a.tif", IDS.astype(dtype), photometric=photometric, compression=compression)
    assert folders(tmp_path).classes(0, (2, 3)).tolist() == [[0, 1, 2], [IGNORED, 1, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kinds", [("tif", "png"), ("jpg", "tif"), ("tif", "tif"), ("jpg", "png")])
def test_turned_images_and_masks_of_any_format_fit_each_other(
    tmp_path: Path, orientation: int, kinds: tuple[str, str]
) -> None:
    save_pair(tmp_path, "a", IDS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    hw = (2, 3) if orientation < 5 else (3, 2)
    for below, kind in zip(("images", "masks"), kinds, strict=True):
        for file in (tmp_path / below).iterdir():
            file.unlink()
        stored = np.zeros((*hw, 3), np.uint8) if below == "images" else np.arange(6, dtype=np.uint8).reshape(hw)
        Image.fromarray(stored).save(tmp_path / below / f"a.{kind}", exif=exif)
    pairs = folders(tmp_path)
    assert pairs.size_hw(0) == (2, 3) == (pairs.image(0).height, pairs.image(0).width)
    back = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }[orientation]
    assert pairs.classes(0, (2, 3)).tolist() == back(np.arange(6).reshape(hw)).tolist()


@pytest.mark.parametrize("names", [(), ("x", "y")])
def test_ids_beyond_any_list_are_refused_and_never_wrap_round(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_pair(tmp_path, "a", np.array([[0, 1, 65535], [40000, 1, 0]]), mode="I;16")
    with pytest.raises(EvalError, match=r"a\.png holds the id"):
        _ = folders(tmp_path, class_names=names).classes(0, (2, 3))
    with pytest.raises(EvalError, match=r"a\.png holds the id 40000; classes are at most 4,096"):
        folders(tmp_path).largest_class()


def test_pixels_without_a_class_are_counted(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", IDS)
    assert folders(tmp_path).unlabelled_share() == pytest.approx(1 / 6)
    assert folders(tmp_path, first_id=1).unlabelled_share() == pytest.approx(3 / 6)


def test_masks_of_0_and_255_are_no_single_class_that_anybody_gets_right(tmp_path: Path) -> None:
    for name in "ab":
        save_pair(tmp_path, name, np.array([[0, 255], [255, 0]]))
    config = SegmentConfig(train=(tmp_path / "images", tmp_path / "masks"), cache="unused")
    with pytest.raises(EvalError, match="every pixel that counts is of class 0, so that any answer is right"):
        masked_images(config)
    assert masked_images(replace(config, ignore=-1))[0].format.class_names[-1] == "class 255"


def test_a_list_with_a_byte_order_mark_and_windows_line_ends_is_the_same_list(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfsky\r\ngrass\r\n")
    assert class_list(str(tmp_path / "names.txt")) == ("sky", "grass")
    (tmp_path / "names.txt").write_bytes("café\nsky\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        class_list(str(tmp_path / "names.txt"))
