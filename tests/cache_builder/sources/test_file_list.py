"""Lists of files: lines, labels, relative paths, and what is wrong with a list said with its line."""

from pathlib import Path

import pytest

from cache_builder.sources import list_images
from cache_builder.sources.file_list import list_file_list
from cache_builder.sources.found import Found
from radio_cache.errors import SourceError
from radio_cache.image_files import read_image


def write_list(folder: Path, content: str | bytes, *, names: tuple[str, ...] = ("a.jpg", "b.jpg", "sub/c.jpg")) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    path = folder / "list.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def listed(path: Path) -> Found:
    return list_file_list(str(path), path.read_bytes())


def test_images_come_in_the_order_of_the_list_with_their_paths_as_keys(tmp_path: Path) -> None:
    path = write_list(tmp_path, f"sub/c.jpg\nb.jpg\n{tmp_path}/a.jpg\n")
    listing = list_images([str(path)])
    assert list(listing.index.keys) == ["sub/c.jpg", "b.jpg", f"{tmp_path}/a.jpg"]
    (container,) = listing.containers
    assert (container.kind, container.path, container.prefix) == ("list", str(path), "")
    read = [read_image(container, key, -1, -1) for key in listing.index.keys]
    assert read == [b"sub/c.jpg", b"b.jpg", b"a.jpg"]
    assert listing.notes == ()


def test_empty_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    assert listed(write_list(tmp_path, b"\xef\xbb\xbfa.jpg\r\n\r\n  \nb.jpg")).members == ["a.jpg", "b.jpg"]


def test_names_in_any_encoding_are_names(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.jpg").write_bytes(b"")
    found = listed(write_list(tmp_path, b"caf\xe9.jpg\n"))
    assert (found.members, found.notes) == (["caf\udce9.jpg"], ())


def test_whole_numbers_behind_the_tab_are_class_numbers_and_other_words_are_names(tmp_path: Path) -> None:
    numbers = listed(write_list(tmp_path, "a.jpg\t7\nb.jpg\nsub/c.jpg\t 0 \n"))
    assert (numbers.labels.tolist(), numbers.class_names) == ([7, -1, 0], None)
    names = listed(write_list(tmp_path, "a.jpg\tred fox\nb.jpg\t7\nsub/c.jpg\n"))
    assert (names.labels.tolist(), names.class_names) == ([1, 0, -1], ("7", "red fox"))
    without = list_images([str(write_list(tmp_path, "a.jpg\nb.jpg\t\n"))])
    assert (without.index.labels.tolist(), without.class_names) == ([-1, -1], ())


def test_a_file_missing_in_the_middle_is_told_with_its_line_and_left_to_the_build(tmp_path: Path) -> None:
    found = listed(write_list(tmp_path, "a.jpg\nsub/gone.jpg\nb.jpg\n"))
    assert found.members == ["a.jpg", "sub/gone.jpg", "b.jpg"]
    assert found.notes == ("1 of 3 files does not exist (line 2: sub/gone.jpg) and will be left out",)


def test_a_list_of_which_no_file_exists_is_refused_with_where_they_were_looked_for(tmp_path: Path) -> None:
    path = write_list(tmp_path, "x/a.jpg\nx/b.jpg\n")
    with pytest.raises(
        SourceError,
        match=rf"list\.txt: none of its 2 files exists \(line 1: x/a\.jpg, looked for at {tmp_path}/x/a\.jpg\): "
        "relative paths start from the list's own folder",
    ):
        listed(path)


@pytest.mark.parametrize("content", ["a.jpg\tcat\tdog\n", "a.jpg\n\tcat\n"])
def test_a_line_that_is_no_path_and_class_is_named(tmp_path: Path, content: str) -> None:
    number = content.split("\n").index(next(line for line in content.split("\n") if "cat" in line)) + 1
    with pytest.raises(SourceError, match=rf"list\.txt, line {number}: a line is a path, and after one tab its class"):
        listed(write_list(tmp_path, content))


def test_a_url_is_not_looked_for_on_the_disk(tmp_path: Path) -> None:
    found = listed(write_list(tmp_path, "no.jpg\ns3://bucket/b.jpg\tcat\n"))
    assert found.members == ["no.jpg", "s3://bucket/b.jpg"]
    assert found.notes == ("1 of 2 files does not exist (line 1: no.jpg) and will be left out",)


def test_an_image_that_comes_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"list\.txt, line 4: a\.jpg is in line 1 already: list every image once"):
        listed(write_list(tmp_path, "a.jpg\n\nb.jpg\na.jpg\n"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_list_holds_no_image(tmp_path: Path, content: str) -> None:
    with pytest.raises(SourceError, match=r"list\.txt holds no image$"):
        list_images([str(write_list(tmp_path, content))])


def test_lists_and_folders_together_keep_their_names_apart(tmp_path: Path) -> None:
    write_list(tmp_path / "one", "a.jpg\tcat\nb.jpg\tant\n")
    write_list(tmp_path / "two", "", names=("bee/a.jpg", "cat/b.jpg"))
    listing = list_images([f"{tmp_path}/one/list.txt", f"{tmp_path}/two"])
    assert list(listing.index.keys) == ["one/list.txt/a.jpg", "one/list.txt/b.jpg", "two/bee/a.jpg", "two/cat/b.jpg"]
    assert listing.class_names == ("ant", "bee", "cat")
    assert listing.index.labels.tolist() == [2, 0, 1, 2]
    assert read_image(listing.containers[0], "one/list.txt/b.jpg", -1, -1) == b"b.jpg"
