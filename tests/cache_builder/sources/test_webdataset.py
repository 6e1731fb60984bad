"""Tars: samples, labels, bytes by offset, and every way a tar can be broken."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from cache_builder.sources.found import Found
from cache_builder.sources.webdataset import list_tar
from radio_cache.errors import SourceError
from radio_cache.file_bytes import read_local

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, *, format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(path: Path, found: Found) -> list[bytes]:
    """What the images' places in the tar hold."""
    return [read_local(path, *place) for place in zip(found.offset.tolist(), found.length.tolist(), strict=True)]


LONG = "folder/" * 30 + "a.jpg"
SAMPLES: Members = [("0001.jpg", b"first"), ("0001.cls", b"7"), ("0002.png", b"x" * 700), ("0002.cls", b" 12\n")]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_images_have_their_class_number_and_the_place_of_their_bytes(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", SAMPLES, format=format)
    found = list_tar(str(path))
    assert found.members == ["0001.jpg", "0002.png"]
    assert found.labels.tolist() == [7, 12]
    assert found.length.tolist() == [5, 700]
    assert found.notes == ()
    assert contents(path, found) == [b"first", b"x" * 700]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_survive(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", [(LONG, b"1"), ("größe.jpg", b"22")], format=format)
    found = list_tar(str(path))
    assert found.members == [LONG, "größe.jpg"]
    assert contents(path, found) == [b"1", b"22"]


def test_a_sample_ends_at_the_first_dot_and_the_class_may_come_first(tmp_path: Path) -> None:
    members = [
        ("d/a.cls", b"3"),
        ("d/a.left.jpg", b"1"),
        ("d/a.right.jpg", b"2"),
        ("e/a.jpg", b"3"),
        ("v1.0/b.jpg", b"4"),
    ]
    found = list_tar(str(write_tar(tmp_path / "a.tar", [*members, ("v1.0/b.cls", b"5")])))
    assert found.labels.tolist() == [3, 3, -1, 5]


def test_other_members_are_counted_and_hidden_ones_are_not(tmp_path: Path) -> None:
    members = [("0001.json", b"{}"), ("0001.txt", b"cat"), ("._0001.jpg", b"mac"), ("0001.JPG", b"x")]
    found = list_tar(str(write_tar(tmp_path / "a.tar", members)))
    assert found.members == ["0001.JPG"]
    assert found.notes == ("2 files passed over (no image by name)",)


def test_hidden_folders_are_passed_over_as_in_a_folder_and_the_working_folder_is_not_hidden(tmp_path: Path) -> None:
    members = [("./cat/1.jpg", b"1"), ("./.thumbs/1.jpg", b"2"), ("cat/.cache/2.jpg", b"3"), ("./cat/1.cls", b"4")]
    found = list_tar(str(write_tar(tmp_path / "a.tar", members)))
    assert (found.members, found.labels.tolist(), found.notes) == (["./cat/1.jpg"], [4], ())


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg"])
def test_a_member_whose_path_leads_out_of_the_tar_is_passed_over_and_told(tmp_path: Path, name: str) -> None:
    found = list_tar(str(write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), (name, b"2")])))
    assert found.members == ["a.jpg"]
    assert found.notes == (f"1 file passed over, whose path leads out of the tar ({name})",)


def test_folders_links_and_devices_are_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("dir.jpg", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("fifo.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    found = list_tar(str(tmp_path / "a.tar"))
    assert (found.members, found.notes) == ([], ())


def test_a_name_that_comes_again_is_kept_apart_with_its_own_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"old"), ("b.jpg", b"-"), ("a.jpg", b"new"), ("a.jpg", b"newest")])
    found = list_tar(str(path))
    assert found.members == ["a.jpg", "b.jpg", "a.jpg#2", "a.jpg#3"]
    assert found.notes == ("2 image names came twice; the later ones are called name#2",)
    assert contents(path, found) == [b"old", b"-", b"new", b"newest"]


@pytest.mark.parametrize("text", [b"cat", b"", b"-1", b"1.5", b"\xff", b"99999999999", b"2147483648"])
def test_a_class_file_without_a_class_number_is_named(tmp_path: Path, text: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.cls", text)])
    with pytest.raises(SourceError, match=r"a\.tar: x\.cls holds '.*', and a \.cls file holds one whole number"):
        list_tar(str(path))


def test_a_compressed_tar_is_refused_with_the_cure(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "plain.tar", SAMPLES).read_bytes()
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(SourceError, match=r"zipped\.tar is not a plain tar.*no random access: decompress it first"):
        list_tar(str(tmp_path / "zipped.tar"))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.tar is not a plain tar"):
        list_tar(str(tmp_path / "a.tar"))


HEADER = DATA = 512
"""SAMPLES in blocks: header and data of 0001.jpg and of 0001.cls, then 0002.png, whose data takes two blocks."""


@pytest.mark.parametrize(
    "length",
    [
        2 * HEADER + 2 * DATA,
        2 * HEADER + 2 * DATA + 100,
        5 * 512 + 300,
        5 * 512 + 1024,
        7 * 512,
        9 * 512,
        9 * 512 + 512,
    ],
    ids=["member boundary", "in a header", "in a member", "end of data", "before a header", "no mark", "half a mark"],
)
def test_a_tar_cut_short_anywhere_is_refused_instead_of_losing_images(tmp_path: Path, length: int) -> None:
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        SourceError, match=r"a\.tar (ends without tar's end-of-archive mark|is damaged or was cut short).*: fetch it"
    ):
        list_tar(str(path))


def test_a_tar_with_a_damaged_header_in_the_middle_is_refused_instead_of_losing_images(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    data = bytearray(path.read_bytes())
    data[2 * (HEADER + DATA) + 10] ^= 0xFF  # in the name of 0002.png, so that its checksum fails
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.tar is damaged: there is no tar header at byte 2048: fetch it again"):
        list_tar(str(path))


def test_two_tars_one_after_the_other_in_a_file_are_refused_instead_of_losing_the_second(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", b"x")]).read_bytes() for n in (1, 2))
    (tmp_path / "both.tar").write_bytes(one + two)
    with pytest.raises(
        SourceError, match=r"both\.tar holds another tar behind its end, which would be lost: pack it again"
    ):
        list_tar(str(tmp_path / "both.tar"))
