"""A folder tree: what counts as an image, what its class is, and links that lead in circles."""

from pathlib import Path

from cache_builder.sources.folder import FolderImage, list_folder


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_the_first_folder_below_is_the_class_and_files_above_have_none(tmp_path: Path) -> None:
    touch(tmp_path, "dog/b.jpg", "dog/more/a.png", "cat/x.jpeg", "loose.png")
    images, others = list_folder(tmp_path)
    assert images == [
        FolderImage("cat/x.jpeg", "cat"), FolderImage("dog/b.jpg", "dog"), FolderImage("dog/more/a.png", "dog"),
        FolderImage("loose.png", None),
    ]  # fmt: skip
    assert others == 0


def test_endings_count_in_any_case_and_other_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.JPG", "b.Png", "c.webp", "d.tiff", "notes.txt", "noending", "deep/labels.csv", "jpg")
    images, others = list_folder(tmp_path)
    assert [image.member for image in images] == ["a.JPG", "b.Png", "c.webp", "d.tiff"]
    assert others == 4


def test_hidden_files_and_folders_are_passed_over_without_counting(tmp_path: Path) -> None:
    touch(tmp_path, ".DS_Store", "._a.jpg", ".thumbs/a.jpg", "a.jpg", "cat/.b.jpg")
    images, others = list_folder(tmp_path)
    assert [image.member for image in images] == ["a.jpg"]
    assert others == 0


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"{name}.jpg" for name in ("b", "a-1", "a/1", "a", "ä", "B", "10", "9")]
    touch(tmp_path, *names)
    assert [image.member for image in list_folder(tmp_path)[0]] == sorted(names)


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/one.jpg", "b/two.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b/self").symlink_to(tmp_path / "b", target_is_directory=True)
    assert [image.member for image in list_folder(tmp_path)[0]] == ["a/one.jpg", "b/two.jpg"]


def test_linked_folders_are_followed_and_linked_files_listed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "root/c.jpg").symlink_to(tmp_path / "elsewhere/a.jpg")
    images, _ = list_folder(tmp_path / "root")
    assert [(image.member, image.class_name) for image in images] == [
        ("c.jpg", None), ("cat/a.jpg", "cat"), ("cat/b.jpg", "cat"),
    ]  # fmt: skip


def test_a_dangling_link_is_listed_so_that_the_build_can_name_it(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert [image.member for image in list_folder(tmp_path)[0]] == ["gone.jpg"]
