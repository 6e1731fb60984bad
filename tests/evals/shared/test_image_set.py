"""Which images are compared, where they may lie, and whether two places speak of the same classes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.teachers import TeacherOptions
from evals.errors import EvalError
from evals.shared.image_set import CacheImages, ImageSet, ListedImages, image_set, in_classes_of, open_source
from evals.shared.notes import left_out_notes
from radio_cache.errors import NotACacheError, SourceError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.pixels import PixelStore
from radio_cache.reader import Cache, digest
from radio_cache.testing import write_images


def labelled_images(cache: Cache, *, teachers: list[str], limit: int | None = None) -> ImageSet:
    return image_set(CacheImages(cache), teachers=teachers, labelled=True, limit=limit)


def write_png(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), colour).save(path)
    return path


def test_rows_without_label_or_with_an_unusable_image_are_left_out(make_cache) -> None:
    cache = make_cache("bank", [0, -1, 1, 2, 0], unusable=[3])
    images = labelled_images(cache, teachers=["alpha"])
    assert images.rows.tolist() == [0, 2, 4]
    assert images.labels.tolist() == [0, 1, 0]


def test_limit_draws_the_same_images_every_time_and_keeps_order(make_cache) -> None:
    cache = make_cache("bank", [0] * 10 + [1] * 10)
    first, again = (labelled_images(cache, teachers=[], limit=8) for _ in range(2))
    assert first.rows.tolist() == again.rows.tolist() == sorted(set(first.rows.tolist()))
    assert set(first.labels.tolist()) == {0, 1}
    assert len(labelled_images(cache, teachers=[], limit=50)) == 20


def test_cache_without_labels_or_without_images_is_refused(make_cache) -> None:
    with pytest.raises(EvalError, match=r"has no labels.*one subfolder per class"):
        labelled_images(make_cache("bare", [-1, -1], class_names=()), teachers=[])
    with pytest.raises(EvalError, match=r"no finished images for alpha \(2 are listed\)"):
        labelled_images(make_cache("broken", [0, 1], unusable=[0, 1]), teachers=["alpha"])


def test_classes_are_matched_by_name(make_cache) -> None:
    bank = labelled_images(make_cache("bank", [0, 1, 2], class_names=("ant", "bee", "cat")), teachers=[])
    queries = labelled_images(make_cache("queries", [0, 1, 1], class_names=("cat", "ant", "dog")), teachers=[])
    assert in_classes_of(bank, queries).labels.tolist() == [2, 0, 0]
    assert in_classes_of(bank, queries).name_of(2) == "cat"


def test_classes_the_bank_does_not_know_are_named(make_cache) -> None:
    bank = labelled_images(make_cache("bank", [0, 1]), teachers=[])
    queries = labelled_images(make_cache("queries", [0, 1], class_names=("ant", "dog")), teachers=[])
    with pytest.raises(EvalError, match=r"1 of the 2 classes of .*queries.* \(dog\)"):
        in_classes_of(bank, queries)


def test_names_on_one_side_only_are_refused_and_numbers_on_both_are_kept(make_cache) -> None:
    named = labelled_images(make_cache("named", [0, 1]), teachers=[])
    numbered = labelled_images(make_cache("numbered", [1, 7], class_names=()), teachers=[])
    with pytest.raises(EvalError, match=r"named\.zarr names its classes and .*numbered"):
        in_classes_of(named, numbered)
    with pytest.raises(EvalError, match=r"named\.zarr names its classes and .*numbered"):
        in_classes_of(numbered, named)
    assert in_classes_of(numbered, numbered).labels.tolist() == [1, 7]
    assert numbered.name_of(7) == "class 7"


def test_identity_changes_with_the_images(make_cache) -> None:
    one = labelled_images(make_cache("one", seed=1), teachers=[]).identity()
    two = labelled_images(make_cache("two", seed=2), teachers=[]).identity()
    same = labelled_images(make_cache("same", seed=1), teachers=[]).identity()
    assert one["sha256_of_image_digests"] != two["sha256_of_image_digests"]
    assert one["sha256_of_image_digests"] == same["sha256_of_image_digests"]
    assert (one["images"], one["images_in_place"]) == (20, 20)


def test_images_in_both_caches_and_copies_are_counted(make_cache) -> None:
    one = labelled_images(make_cache("one", seed=1), teachers=[])
    same = labelled_images(make_cache("same", seed=1), teachers=[], limit=5)
    other = labelled_images(make_cache("other", seed=2), teachers=[])
    assert same.shared_with(one) == 5
    assert other.shared_with(one) == 0
    assert one.copies() == 0
    assert np.all(one.rows == np.arange(20))


def test_a_folder_is_read_with_its_classes_and_hashes(tmp_path: Path) -> None:
    write_png(tmp_path / "bee/1.png", (1, 2, 3))
    file = write_png(tmp_path / "ant/0.png", (200, 0, 0))
    images = image_set(open_source(tmp_path), labelled=True)
    assert (images.class_names, images.labels.tolist()) == (("ant", "bee"), [0, 1])
    assert [images.key(position) for position in range(2)] == ["ant/0.png", "bee/1.png"]
    assert images.decoded(0).getpixel((0, 0)) == (200, 0, 0)
    assert images.source.digests(images.rows)[0].tobytes() == digest(file.read_bytes())
    assert images.cache is None
    assert images.identity()["images"] == 2


def test_a_tar_gives_the_same_as_the_folder_it_was_packed_from(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number in range(3):
            file = write_png(tmp_path / f"loose/{number}.png", (number, 0, 0))
            for name, data in ((f"{number}.png", file.read_bytes()), (f"{number}.cls", str(number % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    packed = image_set(open_source(str(tmp_path / "train-{0..0}.tar")), labelled=True)
    loose = image_set(open_source(tmp_path / "loose"))
    assert packed.labels.tolist() == [0, 1, 0]
    assert loose.labels.tolist() == [-1, -1, -1]
    assert packed.identity()["sha256_of_image_digests"] == loose.identity()["sha256_of_image_digests"]
    assert packed.decoded(2).getpixel((0, 0)) == (2, 0, 0)


def test_files_that_are_no_images_are_left_out_when_they_are_met(tmp_path: Path) -> None:
    for number in range(3):
        write_png(tmp_path / f"ant/{number}.png", (number, 0, 0))
    (tmp_path / "ant/1.png").write_bytes(b"not a picture")
    images = image_set(ListedImages(str(tmp_path)))
    assert len(images.usable()) == 3  # nobody has looked yet
    assert [images.decoded(position) is None for position in range(3)] == [False, True, False]
    assert images.source.failures == {1: "not an image in a format PIL knows"}
    assert images.usable().rows.tolist() == [0, 2]


def test_places_without_images_or_labels_are_refused_in_words(tmp_path: Path) -> None:
    write_png(tmp_path / "flat/1.png", (1, 2, 3))
    with pytest.raises(EvalError, match=r"flat has no labels.*a folder with one subfolder per class"):
        image_set(open_source(tmp_path / "flat"), labelled=True)
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(NotACacheError, match=r"nowhere\.zarr does not exist"):
        open_source(tmp_path / "nowhere.zarr")


def test_only_some_positions(make_cache) -> None:
    images = labelled_images(make_cache("bank", [0, -1, 1, 2]), teachers=[])
    some = images.at(np.array([0, 2]))
    assert (some.rows.tolist(), some.labels.tolist()) == ([0, 3], [0, 2])


def test_images_that_are_gone_are_taken_from_the_pixels_the_cache_keeps(make_cache, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", per_class=2, size=24)
    store = PixelStore(side_px=16, format="webp-lossless", quality=0)
    teachers = {"efficientnet-lite0": TeacherOptions(codec=CodecRecord(parameters={"name": "half"}))}
    config = BuildConfig(
        images=(str(tmp_path / "photos"),), out=tmp_path / "kept.zarr", teachers=teachers, pixels=store
    )
    build_cache(config)
    source = CacheImages(Cache(config.out))
    assert [source.decoded(row).size for row in range(4)] == [(24, 24)] * 4
    assert source.notes == []
    (tmp_path / "photos" / "red").rename(tmp_path / "elsewhere")
    assert [source.decoded(row).size for row in range(4)] == [(24, 24)] * 2 + [(16, 16)] * 2
    assert left_out_notes(image_set(source)) == source.notes
    assert "2 image files of" in source.notes[0]
    assert "(16 as webp-lossless) were used for them" in source.notes[0]
    bare = make_cache("bare", [0, 1])
    Path(bare.meta.containers[0].path).rename(tmp_path / "away")
    with pytest.raises(EvalError, match=r"bring the files back to where they were, or name other images"):
        CacheImages(bare).decoded(0)
