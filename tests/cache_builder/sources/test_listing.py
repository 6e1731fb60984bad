"""From `--images` to keys, labels and places; what is wrong with a source is said with its name and the cure."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cache_builder.sources import Listing, Selection, list_images
from cache_builder.sources.listing import same_images
from radio_cache.errors import SourceError
from radio_cache.images.containers import read_image
from radio_cache.writer import ImageIndex


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder: Path, count: int) -> Path:
    for number in range(count):
        members = [(f"{number}{i}.jpg", b"x" * (i + 1)) for i in range(2)]
        write_tar(folder / f"train-{number:03d}.tar", *members, (f"{number}0.cls", b"5"))
    return folder


def contents(listing: Listing) -> list[bytes]:
    """The bytes of every image, from where the listing says they are."""
    index = listing.index
    return [
        read_image(
            listing.containers[index.container[row]], index.keys[row], int(index.offset[row]), int(index.length[row])
        )
        for row in range(len(index))
    ]


# ---------------------------------------------------------------- what is listed


def test_a_folder_gives_keys_and_labels_by_class_name(tmp_path: Path) -> None:
    listing = list_images([str(touch(tmp_path, "dog/1.jpg", "cat/2.jpg", "cat/1.jpg", "loose.jpg"))])
    assert listing.index.keys == ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "loose.jpg"]
    assert listing.class_names == ("cat", "dog")
    assert listing.index.labels.tolist() == [0, 0, 1, -1]
    assert listing.index.offset.tolist() == listing.index.length.tolist() == [-1] * 4
    (container,) = listing.containers
    assert (container.kind, container.path, container.prefix) == ("folder", str(tmp_path), "")
    assert listing.notes == ("1 of 4 images have no class (such as loose.jpg)",)


def test_every_listed_image_is_read_back_from_its_place(tmp_path: Path) -> None:
    touch(tmp_path / "photos", "a/1.jpg")
    write_tar(tmp_path / "shards/t.tar", ("x/1.jpg", b"one"), ("x/1.jpg", b"two"))
    listing = list_images([str(tmp_path / "photos"), str(tmp_path / "shards/t.tar")])
    assert listing.index.keys == ["photos/a/1.jpg", "shards/t.tar/x/1.jpg", "shards/t.tar/x/1.jpg#2"]
    assert contents(listing) == [b"a/1.jpg", b"one", b"two"]


@pytest.mark.parametrize("how", ["folder of tars", "braces", "glob", "one by one"])
def test_tars_may_be_named_in_four_ways(tmp_path: Path, how: str) -> None:
    folder = str(write_tars(tmp_path / "shards", 3))
    sources = {
        "folder of tars": [folder],
        "braces": [f"{folder}/train-{{000..002}}.tar"],
        "glob": [f"{folder}/train-*.tar"],
        "one by one": [f"{folder}/train-{number:03d}.tar" for number in range(3)],
    }[how]
    listing = list_images(sources)
    assert listing.index.keys == [f"train-{n:03d}.tar/{n}{i}.jpg" for n in range(3) for i in range(2)]
    assert listing.index.labels.tolist() == [5, -1] * 3
    assert listing.class_names == ()
    assert [Path(container.path).name for container in listing.containers] == [f"train-{n:03d}.tar" for n in range(3)]


def test_a_pattern_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "shards", 2)
    monkeypatch.chdir(tmp_path)
    assert len(list_images(["shards/*.tar"]).containers) == 2
    assert list_images(["shards/train-{000..001}.tar"]).containers == list_images(["shards"]).containers


def test_two_brace_ranges_are_both_counted(tmp_path: Path) -> None:
    for a in (8, 9, 10):
        for b in (0, 1):
            write_tar(tmp_path / f"{a:02d}/x{b}.tar", (f"{a}{b}.jpg", b"x"))
    listing = list_images([f"{tmp_path}/{{08..10}}/x{{0..1}}.tar"])
    assert [key.rpartition("/")[2] for key in listing.index.keys] == [f"{a}{b}.jpg" for a in (8, 9, 10) for b in (0, 1)]


def test_a_folder_of_tars_and_image_folders_is_a_folder_of_images(tmp_path: Path) -> None:
    write_tars(touch(tmp_path, "cat/1.jpg"), 1)
    listing = list_images([str(tmp_path)])
    assert listing.index.keys == ["cat/1.jpg"]
    assert listing.notes == (f"{tmp_path}: 1 file skipped (no image by name): 1 .tar, such as train-000.tar",)


def test_several_folders_keep_equal_names_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a/photos/cat/1.jpg", "b/photos/cat/1.jpg", "b/photos/dog/1.jpg")
    listing = list_images([f"{tmp_path}/a/photos", f"{tmp_path}/b/photos"])
    assert listing.index.keys == ["a/photos/cat/1.jpg", "b/photos/cat/1.jpg", "b/photos/dog/1.jpg"]
    assert listing.class_names == ("cat", "dog")
    assert listing.index.labels.tolist() == [0, 0, 1]


def test_a_limit_keeps_the_first_images_and_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    listing = list_images([str(tmp_path)], selection=Selection(limit=2))
    assert listing.index.keys == ["cat/1.jpg", "cat/2.jpg"]
    assert listing.class_names == ("cat",)
    assert listing.notes == ("the first 2 of 3 images are used (--limit)",)
    assert list_images([str(tmp_path)], selection=Selection(limit=3)).notes == ()


def test_files_passed_over_and_repeated_names_are_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", ("a.jpg", b"1"), ("a.jpg", b"2"), ("a.json", b"{}"), ("b.txt", b""))
    assert list_images([str(tmp_path / "t.tar")]).notes == (
        f"{tmp_path}/t.tar: 2 files skipped (no image by name): 1 .json, 1 .txt, such as a.json",
        f"{tmp_path}/t.tar: 1 duplicate image name; later ones are stored as name#2",
    )


# ---------------------------------------------------------------- what is wrong with a source


def test_a_missing_path_is_named_with_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere does not exist: --images takes a folder of images, WebDataset"):
        list_images([f"{tmp_path}/nowhere"])


def test_a_tar_missing_from_a_range_is_named(tmp_path: Path) -> None:
    write_tars(tmp_path, 2)
    with pytest.raises(SourceError, match=r"train-002\.tar does not exist"):
        list_images([f"{tmp_path}/train-{{000..002}}.tar"])


@pytest.mark.parametrize("name", ["photo.jpg", "images.zip", "table.json"])
def test_a_file_that_is_no_tar_is_named_with_what_is_wanted(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(
        SourceError, match=rf"{name} is a file, and not a tar, a Parquet file or a list: --images takes a folder"
    ):
        list_images([f"{tmp_path}/{name}"])


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "train.tar.zst"])
def test_a_compressed_tar_is_refused_with_the_cure(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(SourceError, match=rf"{name} is .*decompress it first"):
        list_images([f"{tmp_path}/{name}"])


def test_a_compressed_tar_among_tars_is_refused_and_the_others_can_be_named(tmp_path: Path) -> None:
    write_tars(tmp_path, 1)
    touch(tmp_path, "train-001.tar.gz")
    with pytest.raises(SourceError, match=r"train-001\.tar\.gz is a compressed tar.*, or name .*/\*\.tar'"):
        list_images([str(tmp_path)])
    assert len(list_images([f"{tmp_path}/*.tar"]).index.keys) == 2


def test_a_compressed_tar_beside_photos_is_passed_over_with_a_note(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "backup.tgz")
    listing = list_images([str(tmp_path)])
    assert (list(listing.index.keys), "backup.tgz" in listing.notes[0]) == (["a.jpg"], True)


def test_an_empty_folder_holds_no_image(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=rf"{tmp_path} holds no image\. Images are files whose names end in .* \.jpg "
    ):
        list_images([str(tmp_path)])


def test_a_folder_of_other_files_says_how_many(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.csv")
    with pytest.raises(SourceError, match=r"holds no image: 2 files skipped"):
        list_images([str(tmp_path)])


def test_a_tar_without_images_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", ("a.txt", b"x"))
    with pytest.raises(SourceError, match=r"t\.tar holds no image: 1 file skipped"):
        list_images([f"{tmp_path}/t.tar"])


@pytest.mark.parametrize("second", ["photos", "photos/", "./photos", "link"])
def test_the_same_source_twice_is_refused(tmp_path: Path, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "photos/a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="photos is given twice as a source of images"):
        list_images(["photos", second])


@pytest.mark.parametrize("order", [1, -1])
def test_a_folder_inside_another_source_is_refused_because_its_images_would_count_twice(
    tmp_path: Path, order: int
) -> None:
    touch(tmp_path, "photos/cat/a.jpg")
    with pytest.raises(SourceError, match=r"photos/cat is part of .*photos, .*twice"):
        list_images([f"{tmp_path}/photos", f"{tmp_path}/photos/cat"][::order])


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file matches '.*/train-\*\.tar'"):
        list_images([f"{tmp_path}/train-*.tar"])


def test_a_range_that_counts_down_is_named(tmp_path: Path) -> None:
    write_tars(tmp_path, 3)
    with pytest.raises(SourceError, match=r"train-\{002\.\.000\}\.tar: the range \{002\.\.000\} counts down"):
        list_images([f"{tmp_path}/train-{{002..000}}.tar"])


def test_images_beside_tars_are_not_lost_in_silence(tmp_path: Path) -> None:
    write_tars(touch(tmp_path, "preview.jpg"), 2)
    with pytest.raises(SourceError, match=rf"holds both tars and images: name the tars as '{tmp_path}/\*\.tar'"):
        list_images([f"{tmp_path}/"])
    assert len(list_images([f"{tmp_path}/*.tar"]).containers) == 2


def test_class_folders_and_class_numbers_do_not_mix(tmp_path: Path) -> None:
    touch(tmp_path, "photos/cat/1.jpg")
    write_tar(tmp_path / "t.tar", ("a.jpg", b"1"), ("a.cls", b"3"))
    with pytest.raises(
        SourceError, match=r"class folders\) and others have class numbers .*: build two caches instead"
    ):
        list_images([f"{tmp_path}/photos", f"{tmp_path}/t.tar"])


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_file_name_that_is_not_utf8_is_a_key_like_any_other(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (key,) = list_images([str(tmp_path)]).index.keys
    assert (tmp_path / key).read_bytes() == b"x"


# ---------------------------------------------------------------- what changed since


def index(keys: list[str], labels: list[int] | None = None, offset: int = -1) -> ImageIndex:
    count = len(keys)
    return ImageIndex(
        keys,
        np.array(labels or [0] * count, np.int32),
        np.zeros(count, np.int32),
        np.full(count, offset, np.int64),
        np.full(count, -1, np.int64),
    )


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (index(["a", "b"]), None),
        (index(["a", "b", "c"]), "1 new image (such as c)"),
        (index(["a", "c", "d", "b"]), "2 new images (such as c)"),
        (index(["b"]), "1 missing (such as a)"),
        (index(["b", "c"]), "1 new image (such as c) and 1 missing (such as a)"),
        (index(["b", "a"]), "the same images in another order"),
        (index(["a", "b"], labels=[0, 1]), "the same images with other labels or at other offsets in their tars"),
        (index(["a", "b"], offset=512), "the same images with other labels or at other offsets in their tars"),
    ],
)
def test_what_changed_is_said_in_words(now: ImageIndex, difference: str | None) -> None:
    assert same_images(index(["a", "b"]), now) == difference
