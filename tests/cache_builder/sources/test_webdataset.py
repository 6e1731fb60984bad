"""Tars: samples, labels, bytes by offset, and every way a tar can be broken."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from cache_builder.sources import list_images
from cache_builder.sources.columns import SourceImages
from cache_builder.sources.webdataset import list_tar
from radio_cache.errors import SourceError
from radio_cache.images.files import read_local

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, *, format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(path: Path, found: SourceImages) -> list[bytes]:
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
    assert found.notes == ("2 files skipped (no image by name): 1 .json, 1 .txt, such as 0001.json",)


def test_hidden_folders_are_passed_over_as_in_a_folder_and_the_working_folder_is_not_hidden(tmp_path: Path) -> None:
    members = [("./cat/1.jpg", b"1"), ("./.thumbs/1.jpg", b"2"), ("cat/.cache/2.jpg", b"3"), ("./cat/1.cls", b"4")]
    found = list_tar(str(write_tar(tmp_path / "a.tar", members)))
    assert (found.members, found.labels.tolist(), found.notes) == (["./cat/1.jpg"], [4], ())


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg"])
def test_a_member_whose_path_leads_out_of_the_tar_is_passed_over_and_told(tmp_path: Path, name: str) -> None:
    found = list_tar(str(write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), (name, b"2")])))
    assert found.members == ["a.jpg"]
    assert found.notes == (f"1 file skipped, whose path leads out of the tar ({name})",)


def test_folders_links_and_devices_are_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("dir.jpg", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("fifo.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    found = list_tar(str(tmp_path / "a.tar"))
    assert found.members == []
    assert found.notes == (
        "1 symbolic link skipped (link.jpg -> )",
        "1 image name skipped, not a file (fifo.jpg (a named pipe))",
    )


def test_a_name_that_comes_again_is_kept_apart_with_its_own_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"old"), ("b.jpg", b"-"), ("a.jpg", b"new"), ("a.jpg", b"newest")])
    found = list_tar(str(path))
    assert found.members == ["a.jpg", "b.jpg", "a.jpg#2", "a.jpg#3"]
    assert found.notes == ("2 duplicate image names; later ones are stored as name#2",)
    assert contents(path, found) == [b"old", b"-", b"new", b"newest"]


@pytest.mark.parametrize("text", [b"cat", b"1.5", b"\xff", b"99999999999", b"2147483648"])
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


@pytest.mark.parametrize("zeros", [0, 1 << 16, 3 << 18])
@pytest.mark.parametrize("has_magic", [True, False], ids=["ustar", "v7"])
def test_a_second_tar_behind_any_number_of_zeros_is_refused(tmp_path: Path, zeros: int, *, has_magic: bool) -> None:
    one, two = (write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", b"x")]).read_bytes() for n in (1, 2))
    if not has_magic:
        header = bytearray(two[:512])
        header[257:265], header[148:156] = bytes(8), b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        two = bytes(header) + two[512:]
    (tmp_path / "padded.tar").write_bytes(one + bytes(zeros))
    assert list_tar(str(tmp_path / "padded.tar")).members == ["1.jpg"]
    (tmp_path / "both.tar").write_bytes(one + bytes(zeros) + two)
    with pytest.raises(SourceError, match=r"both\.tar holds another tar behind its end"):
        list_tar(str(tmp_path / "both.tar"))


def labels_of(path: Path, **options: str) -> dict[str, int | str]:
    """Member -> its class."""
    found = list_tar(str(path), **options)
    names = found.class_names
    return {
        member: names[label] if names and label >= 0 else label
        for member, label in zip(found.members, found.labels.tolist(), strict=True)
    }


@pytest.mark.parametrize(
    "members",
    [
        {"cam.1.jpg": 1, "cam.2.jpg": 2},
        {"2024.01.05.jpg": 1, "2024.01.06.jpg": 2, "2024.02.05.png": 3},
        {"v1.5/a.jpg": 1, "v1.5/a.b.jpg": 2, "v1.6/a.jpg": 3},
        {"x_0.25.jpg": 1, "x_0.5.jpg": 2, "y.jpg": 3},
    ],
)
@pytest.mark.parametrize("classes_first", [True, False])
def test_names_with_dots_keep_their_own_class(tmp_path: Path, members: dict[str, int], classes_first: bool) -> None:
    pairs: Members = []
    for name, label in members.items():
        pair = [(name, b"x"), (f"{name.rpartition('.')[0]}.cls", str(label).encode())]
        pairs += reversed(pair) if classes_first else pair
    assert labels_of(write_tar(tmp_path / "a.tar", pairs)) == members


def test_a_key_that_comes_again_is_a_sample_of_its_own(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.cls", b"1"), ("a.jpg", b"2"), ("a.cls", b"2"), ("b.jpg", b"3")]
    members += [("a.cls", b"4"), ("a.jpg", b"4"), ("c.jpg", b"5"), ("a.jpg", b"6")]
    assert labels_of(write_tar(tmp_path / "a.tar", members)) == {
        "a.jpg": 1,
        "a.jpg#2": 2,
        "b.jpg": -1,
        "a.jpg#3": 4,
        "c.jpg": -1,
        "a.jpg#4": -1,
    }


@pytest.mark.parametrize("members", [["a.jpg", "a.cls", "a.super.cls"], ["a.super.cls", "a.cls", "a.jpg"]])
def test_the_class_of_the_key_counts_more_than_further_ones(tmp_path: Path, members: list[str]) -> None:
    content = {"a.jpg": b"x", "a.cls": b"1", "a.super.cls": b"9"}
    assert labels_of(write_tar(tmp_path / "a.tar", [(name, content[name]) for name in members])) == {"a.jpg": 1}
    assert labels_of(write_tar(tmp_path / "b.tar", [("a.jpg", b"x"), ("a.super.cls", b"9")])) == {"a.jpg": 9}


@pytest.mark.parametrize("second", ["a.CLS", "a.cls"])
def test_two_classes_for_one_image_are_an_error_that_names_both(tmp_path: Path, second: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.cls", b"1"), (second, b"2")])
    with pytest.raises(SourceError, match=rf"a\.jpg has two classes, 1 in a\.cls and 2 in {second}: keep one of them"):
        list_tar(str(path))
    path = write_tar(tmp_path / "b.tar", [("a.jpg", b"x"), ("a.fine.cls", b"1"), ("a.coarse.cls", b"2")])
    with pytest.raises(SourceError, match=r"a\.jpg has two classes, 1 in a\.fine\.cls and 2 in a\.coarse\.cls"):
        list_tar(str(path))


@pytest.mark.parametrize(("text", "label"), [(b"3.0", 3), (b"-1", -1), (b"", -1), (b"nan\n", -1), (b"-1.0", -1)])
@pytest.mark.parametrize("ending", ["cls", "CLS"])
def test_class_files_follow_the_one_rule(tmp_path: Path, text: bytes, label: int, ending: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), (f"x.{ending}", text), ("y.jpg", b"2"), ("y.cls", b"7")])
    assert labels_of(path) == {"x.jpg": label, "y.jpg": 7}


def test_a_class_of_no_image_is_told_and_goes_to_no_other(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("cam.1.cls", b"1"), ("cam.2.jpg", b"x"), ("b.cls", b"2")])
    found = list_tar(str(path))
    assert found.labels.tolist() == [-1]
    assert found.notes == ("2 class files skipped, with no image to belong to (cam.1.cls)",)


def test_classes_far_from_their_image_are_found_by_name_and_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.cls", b"2"), ("a.cls", b"1")])
    found = list_tar(str(path))
    assert found.labels.tolist() == [1, 2]
    assert found.notes[0].startswith(
        "1 class file not beside the image in the tar, such as that of a.jpg, found by name"
    )


COMPANIONS: Members = [
    ("a.jpg", b"1"),
    ("a.seg.png", b"2"),
    ("a.cls", b"1"),
    ("b.jpg", b"3"),
    ("b.seg.png", b"4"),
    ("b.cls", b"2"),
    ("c.png", b"5"),
]


def test_images_beside_a_photo_are_told_and_the_member_can_be_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", COMPANIONS)
    found = list_tar(str(path))
    assert found.members == ["a.jpg", "a.seg.png", "b.jpg", "b.seg.png", "c.png"]
    assert found.notes == (
        "2 images beside another one of the same sample, such as a.seg.png: cached as photos of their own; select the photos "
        "with --member, as in --member 'jpg;png'",
    )
    found = list_tar(str(path), member="jpg;png")
    assert (found.members, found.labels.tolist()) == (["a.jpg", "b.jpg", "c.png"], [1, 2, -1])
    assert found.notes == ("2 images left out, not the member jpg;png of a sample (a.seg.png)",)
    assert list_tar(str(path), member=".SEG.png").members == ["a.seg.png", "b.seg.png"]


def test_members_with_names_of_their_own_are_told_apart(tmp_path: Path) -> None:
    members = [(f"{key}.{end}", b"3") for key in "ab" for end in ("image.jpg", "label.cls", "mask.png")]
    path = write_tar(tmp_path / "a.tar", members)
    assert labels_of(path) == {"a.image.jpg": 3, "a.mask.png": 3, "b.image.jpg": 3, "b.mask.png": 3}
    assert list_tar(str(path)).notes[0].startswith("4 images beside another one of the same sample, such as b.mask.png")
    assert labels_of(path, member="image.jpg") == {"a.image.jpg": 3, "b.image.jpg": 3}


@pytest.mark.parametrize("member", ["jpg", "jpg;png", "png;jpg"])
def test_the_member_of_names_with_dots(tmp_path: Path, member: str) -> None:
    members = [(name, b"x") for name in ("v.1.5.jpg", "v.1.5.seg.png", "v.1.6.jpg", "v.1.6.seg.png")]
    assert list_tar(str(write_tar(tmp_path / "a.tar", members)), member=member).members == ["v.1.5.jpg", "v.1.6.jpg"]


def test_dots_in_names_are_no_companions(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"2024.01.{day:02}.jpg", b"x") for day in range(9)])
    assert list_tar(str(path)).notes == ()


def test_a_field_of_json_members_is_the_class(tmp_path: Path) -> None:
    samples = [
        ("a", '{"label": 3, "key": "a", "score": NaN}'),
        ("b", '{"label": null}'),
        ("c", '{"label": 5.0}'),
        ("d", "{}"),
    ]
    members: Members = []
    for key, text in samples:
        members += [(f"{key}.jpg", b"x"), (f"{key}.json", text.encode()), (f"{key}.cls", b"9")]
    path = write_tar(tmp_path / "a.tar", members)
    assert labels_of(path, class_field="label") == {"a.jpg": 3, "b.jpg": -1, "c.jpg": 5, "d.jpg": -1}
    assert labels_of(path) == {"a.jpg": 9, "b.jpg": 9, "c.jpg": 9, "d.jpg": 9}
    with pytest.raises(
        SourceError, match=r"no \.json member has a field cls; their fields are key, label, score: name the one"
    ):
        list_tar(str(path), class_field="cls")
    path = write_tar(tmp_path / "b.tar", [("a.jpg", b"x"), ("a.json", b'{"class": {"name": "cat"}}')])
    assert labels_of(path, class_field="class.name") == {"a.jpg": "cat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is no JSON"),
        (b"[1]", "holds no fields"),
        (b'{"label": [1]}', "holds a list, which is neither"),
        (b'{"label": 0.5}', "holds 0.5, which is no whole number"),
        (b"[" * 100_000, "is no JSON"),
    ],
)
def test_a_json_member_that_holds_no_class_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.json", text)])
    with pytest.raises(SourceError, match=rf"a\.json.*{message}"):
        list_tar(str(path), class_field="label")


def test_folders_within_a_tar_are_no_classes_and_that_is_told(tmp_path: Path) -> None:
    found = list_tar(str(write_tar(tmp_path / "a.tar", [("t/cat/1.jpg", b"1"), ("t/dog/1.jpg", b"2")])))
    assert (found.labels.tolist(), found.class_names) == ([-1, -1], None)
    assert found.notes[0].startswith(
        "no classes: the 2 folders within the tar (t/dog ...) are none; unpack it and name"
    )


def test_hard_links_are_followed_and_other_links_are_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            tar.addfile(info, io.BytesIO(data))

        add("./a.jpg", b"first")
        add("blob/1", b"second")
        add("./seven", b"7")
        add("./b.jpg", kind=tarfile.LNKTYPE, target="./a.jpg")
        add("c.jpg", kind=tarfile.LNKTYPE, target="blob/1")
        add("d.jpg", kind=tarfile.LNKTYPE, target="c.jpg")
        add("d.cls", kind=tarfile.LNKTYPE, target="seven")
        add("e.jpg", kind=tarfile.LNKTYPE, target="gone.jpg")
        add("f.jpg", kind=tarfile.SYMTYPE, target="a.jpg")
        add("g.jpg", kind=tarfile.SYMTYPE, target="c.jpg")
    found = list_tar(str(tmp_path / "a.tar"))
    assert found.members == ["./a.jpg", "./b.jpg", "c.jpg", "d.jpg"]
    assert contents(tmp_path / "a.tar", found) == [b"first", b"first", b"second", b"second"]
    assert found.labels.tolist() == [-1, -1, -1, 7]
    assert found.notes == (
        "2 files skipped (no image by name): 2 without an extension, such as blob/1",
        "2 symbolic links skipped (f.jpg -> a.jpg)",
        "1 hard link skipped, whose file is not before it in the tar (e.jpg -> gone.jpg)",
    )


def pax_record(name: str, value: str) -> bytes:
    """One record of an extended header, with its own length before it."""
    rest = f" {name}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def with_header(path: Path, kind: bytes, content: bytes, *, size: int | None = None) -> Path:
    """A tar of one image whose extended header is this. size: what the header says of its own length."""
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(content) if size is None else size
    content += bytes(-len(content) % 512)
    image = tarfile.TarInfo("a.jpg")
    image.size = 5
    path.write_bytes(info.tobuf() + content + image.tobuf() + b"first" + bytes(507 + 10240))
    return path


@pytest.mark.parametrize("size", ["99999999999999999999999", "-1024", "9999999999999"])
def test_an_absurd_size_is_an_error_and_no_traceback(tmp_path: Path, size: str) -> None:
    path = with_header(tmp_path / "a.tar", tarfile.XHDTYPE, pax_record("size", size))
    with pytest.raises(SourceError, match=r"a\.tar (is damaged|is not a plain tar|ends without)"):
        list_tar(str(path))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGLINK])
def test_a_header_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path, kind: bytes) -> None:
    path = with_header(tmp_path / "a.tar", kind, b"a" * 100, size=1 << 30)
    with pytest.raises(SourceError, match=r"a\.tar is damaged or hostile: the header before byte 512 has 1,073,7"):
        list_tar(str(path))


def test_headers_without_end_are_an_error(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    (tmp_path / "a.tar").write_bytes((info.tobuf() + b"x" + bytes(511)) * 3000 + bytes(10240))
    with pytest.raises(SourceError, match=r"a\.tar"):
        list_tar(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"an empty file \(0 bytes\): fetch it again"),
        (b"<!DOCTYPE html><html>", "a web page: check the address"),
        (b"\n <html>", "a web page"),
        (b"PK\x03\x04" + bytes(600), "a zip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b'<?xml version="1.0"?><Error>', "an XML document"),
    ],
)
def test_what_is_called_tar_and_is_something_else_is_told(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(SourceError, match=rf"a\.tar is not a plain tar but {what}"):
        list_tar(str(tmp_path / "a.tar"))


def test_times_in_headers_of_incremental_tars_are_no_part_of_names(tmp_path: Path) -> None:
    """`tar -g` writes them in octal where POSIX has the beginning of a long name."""
    content = b""
    for number, name in enumerate(("a.jpg", "a.cls")):
        info = tarfile.TarInfo(name)
        info.size = 1
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[345:369] = f"{15303406435 + number:011}\0{15303406435 + number:011}\0".encode()
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        content += bytes(header) + b"7" + bytes(511)
    (tmp_path / "a.tar").write_bytes(content + bytes(10240))
    assert labels_of(tmp_path / "a.tar") == {"a.jpg": 7}


def test_a_tar_without_files_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [])
    with pytest.raises(
        SourceError, match=r"a\.tar holds no image: there is no file in the tar: fetch it again, or leave it out"
    ):
        list_images([str(path)])
    write_tar(tmp_path / "b.tar", SAMPLES)
    listing = list_images([str(tmp_path)])
    assert len(listing.index) == 2
    assert any("a.tar" in note for note in listing.notes)
