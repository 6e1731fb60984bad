"""A folder tree: what counts as an image, what its class is, what is no file at all, and links that lead in circles."""

import os
import re
import socket
from pathlib import Path

import pytest

from cache_builder.sources.folder import images_of_tree, walk_folder
from radio_cache.errors import SourceError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def classes(root: Path) -> list[tuple[str, str | None]]:
    """(path, class) of everything found."""
    found = images_of_tree(walk_folder(root))
    names = [*(found.class_names or ()), None]
    return [(member, names[label]) for member, label in zip(found.members, found.labels, strict=True)]


def test_the_first_folder_below_is_the_class_and_files_above_have_none(tmp_path: Path) -> None:
    touch(tmp_path, "dog/b.jpg", "dog/more/a.png", "cat/x.jpeg", "loose.png")
    assert classes(tmp_path) == [
        ("cat/x.jpeg", "cat"),
        ("dog/b.jpg", "dog"),
        ("dog/more/a.png", "dog"),
        ("loose.png", None),
    ]
    assert images_of_tree(walk_folder(tmp_path)).notes == ()


def test_endings_count_in_any_case_and_other_files_are_counted(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.JPG",
        "b.Png",
        "c.webp",
        "d.tiff",
        "notes.txt",
        "noending",
        "deep/labels.csv",
        "jpg",
        "e.jpg.",
        "f.",
    )
    tree = walk_folder(tmp_path)
    assert tree.images == ["a.JPG", "b.Png", "c.webp", "d.tiff"]
    assert tree.others.count == 6
    assert images_of_tree(walk_folder(tmp_path)).notes == (
        "6 files skipped (no image by name): 2 without an extension, 2 ., 1 .csv, 1 .txt, such as f.",
    )


def test_hidden_files_and_folders_are_passed_over_without_counting(tmp_path: Path) -> None:
    touch(tmp_path, ".DS_Store", "._a.jpg", ".thumbs/a.jpg", "a.jpg", "cat/.b.jpg")
    tree = walk_folder(tmp_path)
    assert (tree.images, tree.others.count) == (["a.jpg"], 0)


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"{name}.jpg" for name in ("b", "a-1", "a/1", "a", "ä", "B", "10", "9")]
    touch(tmp_path, *names)
    assert walk_folder(tmp_path).images == sorted(names)


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/one.jpg", "b/two.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b/self").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b/loop.jpg").symlink_to(tmp_path / "b/loop.jpg")
    assert walk_folder(tmp_path).images == ["a/one.jpg", "b/loop.jpg", "b/two.jpg"]


def test_of_two_links_to_one_folder_the_first_name_counts(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.jpg")
    (tmp_path / "root").mkdir()
    for name in ("z", "m", "k"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert walk_folder(tmp_path / "root").images == ["k/a.jpg"]


def test_linked_folders_are_followed_and_linked_files_listed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "root/c.jpg").symlink_to(tmp_path / "elsewhere/a.jpg")
    assert classes(tmp_path / "root") == [("c.jpg", None), ("cat/a.jpg", "cat"), ("cat/b.jpg", "cat")]


def test_a_dangling_link_is_listed_so_that_the_build_can_name_it(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert walk_folder(tmp_path).images == ["gone.jpg"]


def test_pipes_sockets_and_devices_are_no_images_and_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    assert walk_folder(tmp_path).images == ["a.jpg"]
    assert images_of_tree(walk_folder(tmp_path)).notes == (
        "1 image name, cat/pipe.jpg (a named pipe), skipped: not a file",
    )
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        # The name of a socket must be short.
        monkeypatch.chdir(tmp_path)
        server.bind("s.jpg")
    assert walk_folder(tmp_path).special == [
        "cat/pipe.jpg (a named pipe)",
        "null.png (a device)",
        "s.jpg (a socket)",
    ]
    assert (
        "3 image names such as cat/pipe.jpg (a named pipe) skipped: not files"
        in images_of_tree(walk_folder(tmp_path)).notes
    )


def test_a_folder_that_cannot_be_listed_is_an_error_instead_of_losing_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg")
    scan = os.scandir

    def refuse(place: str) -> object:
        if place.endswith("dog"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match="dog cannot be listed: Permission denied: change its permissions"):
        walk_folder(tmp_path)


def test_a_tree_knows_when_each_of_its_folders_was_changed(tmp_path: Path) -> None:
    touch(tmp_path, "cat/deep/a.jpg", "empty/x.txt", ".hidden/b.jpg")
    folders = walk_folder(tmp_path).folders
    assert folders == {below: (tmp_path / below).stat().st_mtime_ns for below in ("", "cat", "cat/deep", "empty")}


def test_a_folder_deeper_than_paths_can_be_is_passed_over_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own limit; beyond it only relative paths lead on."""
    monkeypatch.chdir(tmp_path)
    try:
        Path("a.jpg").touch()
        for depth in range(25):
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)
            Path(f"{depth}.jpg").touch()
        tree = walk_folder(tmp_path)
        found = images_of_tree(tree)
    finally:  # pytest removes no such folder
        while Path.cwd() != tmp_path:
            for entry in list(Path().iterdir()):
                (Path.rmdir if entry.is_dir() else Path.unlink)(entry)
            os.chdir("..")
    assert tree.images[0] == "a.jpg"
    assert 10 < len(tree.images) < 25
    assert max(len(f"{tmp_path}/{image}") for image in tree.images) < 4096
    # Where the limit falls, between a folder and the files in it, depends on how long tmp_path is.
    assert re.match(
        "[12] too deep to be opened, skipped with all below: the system opens paths of 4096", found.notes[0]
    )


def test_photos_that_nothing_decodes_are_told_first(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.heic", "d/e.CR2", "f.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert images_of_tree(walk_folder(tmp_path)).notes == (
        "5 files skipped (no image by name): 1 .cr2, 1 .heic, 2 .txt, 1 .json, such as c.heic",
    )
