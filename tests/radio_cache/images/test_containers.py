"""Where images lie, and what is refused before it can block, climb out, or fill the memory."""

import os
from pathlib import Path

import pytest

from radio_cache.errors import ImageError, UnsupportedFormatError
from radio_cache.format.schema import Container
from radio_cache.images import files as file_bytes
from radio_cache.images.containers import read_image
from radio_cache.images.files import read_local, resolve_list_entry


def read(kind: str, path: Path | str, key: str, offset: int = -1, length: int = -1) -> bytes:
    return read_image(Container(kind=kind, path=str(path), prefix="p/"), f"p/{key}", offset, length)


def test_a_folders_file_a_tars_range_and_a_lists_entry_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"0123456789")
    assert read("folder", tmp_path, "a/x.png") == b"0123456789"
    assert read("tar", tmp_path / "a/x.png", "whatever", 2, 5) == b"23456"
    assert read("list", tmp_path / "a/list.txt", "x.png") == b"0123456789"
    assert read("list", tmp_path / "a/list.txt", "../a/x.png") == b"0123456789"
    assert read("list", "/nowhere/list.txt", f"{tmp_path}/a/x.png") == b"0123456789"


def test_a_range_that_ends_early_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    for offset, length in ((8, 5), (10, 1), (3, -1)):
        with pytest.raises(ImageError, match=r"cannot be read: .*a\.tar ends inside it"):
            read_local(tmp_path / "a.tar", offset, length)


@pytest.mark.parametrize("member", ["../x.png", "/etc/passwd", "a/../../x.png"])
def test_a_key_that_climbs_out_of_its_folder_is_refused(tmp_path: Path, member: str) -> None:
    with pytest.raises(ImageError, match=f"'{member}' is no path below a folder"):
        read("folder", tmp_path, member)


def test_a_named_pipe_is_refused_at_once_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match=r"x\.jpg is a named pipe, not a file"):
        read("folder", tmp_path, "x.jpg")
    with pytest.raises(ImageError, match="is a device, not a file"):
        read("list", tmp_path / "l.txt", "/dev/null")
    with pytest.raises(ImageError, match="is a folder, not a file"):
        read("folder", tmp_path, ".")


def test_a_file_larger_than_any_image_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate((1 << 30) + 1)  # a hole: it takes no room
    with pytest.raises(ImageError, match="cannot be read: 1073741825 bytes are more than an image file has"):
        read("folder", tmp_path, "x.jpg")
    monkeypatch.setattr(file_bytes, "MAX_IMAGE_FILE_BYTES", 4)
    with pytest.raises(ImageError, match="5 bytes are more"):
        read("tar", tmp_path / "x.jpg", "a", 10, 5)


def test_names_that_no_system_takes_are_image_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read: embedded null"):
        read("folder", tmp_path, "a\0b")
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read("folder", tmp_path, "a" * 5000)


def test_a_kind_of_container_of_a_newer_version_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedFormatError, match=r"p/a\.png lies in a container of kind 'zip' .*install a newer one"
    ):
        read("zip", tmp_path / "a.zip", "a.png")


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ("a.jpg", "/data/a.jpg"),
        ("../a.jpg", "/data/../a.jpg"),
        ("/x/a.jpg", "/x/a.jpg"),
        ("s3://b/a.jpg", "s3://b/a.jpg"),
        ("https://h/a?b=c", "https://h/a?b=c"),
    ],
)
def test_entries_of_a_list_start_from_its_own_folder(entry: str, place: str) -> None:
    assert resolve_list_entry("/data/list.txt", entry) == place


def test_entries_of_a_list_in_a_bucket_start_there() -> None:
    assert resolve_list_entry("s3://bucket/data/list.txt", "x/a.jpg") == "s3://bucket/data/x/a.jpg"


@pytest.mark.parametrize("scheme", ["file://", "file://localhost", "file:", "FILE://"])
def test_file_urls_in_a_list_are_paths(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "a b%20.jpg").write_bytes(b"as it is")
    (tmp_path / "ü c.jpg").write_bytes(b"escaped")
    assert read("list", "/nowhere/list.txt", f"{scheme}{tmp_path}/a b%20.jpg") == b"as it is"
    assert read("list", "/nowhere/list.txt", f"{scheme}{tmp_path}/%C3%BC%20c.jpg") == b"escaped"
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        read("list", "/nowhere/list.txt", f"{scheme}{tmp_path}/none.jpg")


@pytest.mark.parametrize(
    "url", ["ipfs://x/a.jpg", "zip://a.jpg::/b.zip", "file://server/share/a.jpg", "chrome://x", "hf://a::b"]
)
def test_a_url_in_a_list_that_nothing_reads_is_one_unusable_image(url: str) -> None:
    with pytest.raises(ImageError, match=f"cannot be read: nothing here reads URLs such as '{url}'"):
        read("list", "/nowhere/list.txt", url)


@pytest.mark.parametrize(
    ("list_file", "entry", "place"),
    [
        ("s3://bucket/a/list.txt", "b//c.jpg", "s3://bucket/a/b//c.jpg"),
        ("s3://bucket/a/list.txt", "./b/../../c.jpg", "s3://bucket/c.jpg"),
        ("s3://bucket/list.txt", "b.jpg", "s3://bucket/b.jpg"),
        ("https://h/a/list.txt?key=x/y#z", "../b.jpg?key=2", "https://h/b.jpg?key=2"),
        ("https://h", "b.jpg", "https://h/b.jpg"),
        ("/data/list.txt", "../b.jpg", "/data/../b.jpg"),
    ],
)
def test_relative_paths_start_from_the_lists_folder_also_at_a_url(list_file: str, entry: str, place: str) -> None:
    assert resolve_list_entry(list_file, entry) == place


def test_a_relative_path_out_of_a_bucket_is_one_unusable_image() -> None:
    with pytest.raises(ImageError, match=r"'../../b\.jpg' leads out of s3://bucket"):
        read("list", "s3://bucket/a/list.txt", "../../b.jpg")
