"""Lists of files: lines, labels, relative paths, and what is wrong with a list said with its line."""

from pathlib import Path

import pytest

from cache_builder.sources import list_images
from cache_builder.sources.columns import SourceImages
from cache_builder.sources.file_list import list_file_list
from radio_cache.errors import SourceError
from radio_cache.images.containers import read_image


def write_list(folder: Path, content: str | bytes, *, names: tuple[str, ...] = ("a.jpg", "b.jpg", "sub/c.jpg")) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    path = folder / "list.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def listed(path: Path) -> SourceImages:
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


@pytest.mark.parametrize("again", ["./a.jpg", ".//a.jpg", "{folder}/a.jpg"])
def test_another_spelling_of_one_file_is_named_with_both_lines(tmp_path: Path, again: str) -> None:
    content = f"a.jpg\tcat\n{again.format(folder=tmp_path)}\tdog\n"
    with pytest.raises(SourceError, match=r"line 2: \S+a\.jpg is in line 1 already, as a\.jpg: list every image once"):
        listed(write_list(tmp_path, content))


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


# ---------------------------------------------------------------- CSV


def write_csv(folder: Path, content: str | bytes) -> Path:
    write_list(folder, "")
    path = folder / "list.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_csv_file_names_paths_and_classes_in_its_columns(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path, b'\xef\xbb\xbfsplit,Path,label\r\ntrain,"sub/c.jpg",cat\r\n\r\ntrain,a.jpg,\r\ntest,b.jpg,ant\r\n'
    )
    listing = list_images([str(path)])
    assert list(listing.index.keys) == ["sub/c.jpg", "a.jpg", "b.jpg"]
    assert (listing.class_names, listing.index.labels.tolist()) == (("ant", "cat"), [1, -1, 0])
    (container,) = listing.containers
    assert [read_image(container, key, -1, -1) for key in listing.index.keys] == [b"sub/c.jpg", b"a.jpg", b"b.jpg"]


def test_columns_of_a_csv_file_may_be_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "image,where,kind\n1,a.jpg,7\n2,b.jpg,8\n")
    listing = list_images([f"{path}#where,kind"])
    assert list(listing.index.keys) == ["a.jpg", "b.jpg"]
    assert (listing.class_names, listing.index.labels.tolist()) == ((), [7, 8])


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (
            "where,kind\na.jpg,1\n",
            "",
            r"its columns are where, kind, and none is called path, file.*list\.csv#COLUMN,CLASS",
        ),
        ("", "", r"its columns are none"),
        ("path\na.jpg\n", "#place", r"column place does not exist; the columns are path"),
        ("path,label\na.jpg,1\n", "#path,class", r"column class does not exist; the columns are path, label"),
        ("path,label\na.jpg,1\nb.jpg\n", "", r"line 3: 1 fields under 2 columns: 'b\.jpg'"),
        ("path,label\na.jpg,1\n,2\n", "", r"line 3: no path: ',2'"),
        ("path\na.jpg\nb.jpg\na.jpg\n", "", r"line 4: a\.jpg is in line 2 already"),
        ('path\na.jpg\n"b.jpg\n', "", r"list\.csv, line \d: unexpected end of data"),
        ("path\nnone.jpg\n", "", r"none of its 1 files exists \(line 2: none\.jpg, looked for at"),
        ("path\n", "", r"holds no image"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_said_with_its_line_or_its_columns(
    tmp_path: Path, content: str, columns: str, message: str
) -> None:
    path = write_csv(tmp_path, content)
    with pytest.raises(SourceError, match=message):
        list_images([f"{path}{columns}"])


def test_a_file_missing_in_the_middle_of_a_csv_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path\na.jpg\ngone.jpg\nb.jpg\n")
    assert list_images([str(path)]).notes == (
        f"{path}: 1 of 3 files does not exist (line 3: gone.jpg) and will be left out",
    )


def test_a_text_list_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"(no columns such as|does not exist)"):
        list_images([f"{write_list(tmp_path, 'a.jpg')}#path"])


def test_urls_that_nothing_reads_are_told_with_their_lines_and_left_to_the_build(tmp_path: Path) -> None:
    found = listed(write_list(tmp_path, f"file://{tmp_path}/a.jpg\nipfs://x/b.jpg\nhttp://x/c//d.jpg\n"))
    assert found.members == [f"file://{tmp_path}/a.jpg", "ipfs://x/b.jpg", "http://x/c//d.jpg"]
    assert found.notes == ("1 of 3 files does not exist (line 2: ipfs://x/b.jpg) and will be left out",)
    with pytest.raises(
        SourceError, match=r"none of its 1 files exists .line 1: ipfs://x/b\.jpg, which cannot be read: nothing"
    ):
        listed(write_list(tmp_path, "ipfs://x/b.jpg\n"))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("3", "-1", "10"), [3, -1, 10]),
        (("3.0", "", "5.0"), [3, -1, 5]),
        (("3", "nan", "5"), [3, -1, 5]),
        (("3", "NA", "5"), [3, -1, 5]),
        (("-1", "-1", "-1"), [-1, -1, -1]),
    ],
)
@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.txt"])
def test_missing_labels_are_no_class_and_leave_numbers_numbers(
    tmp_path: Path, labels: tuple[str, ...], expected: list[int], name: str
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    tab = "," if name.endswith(".csv") else "\t"
    rows = [] if name.endswith(".txt") else [f"path{tab}label"]
    rows += [f"{number}.jpg{tab}{label}" for number, label in enumerate(labels)]
    (tmp_path / name).write_text("\n".join(rows))
    listing = list_images([str(tmp_path / name)])
    assert listing.index.keys == ["0.jpg", "1.jpg", "2.jpg"]
    assert (listing.index.labels.tolist(), listing.class_names) == (expected, ())


def test_a_header_of_a_list_with_tabs_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "three.tsv").write_text("caption\timage\tlabel\na cat\ta.jpg\t7\n")
    (tmp_path / "one.tsv").write_text("path\na.jpg\n")
    (tmp_path / "none.tsv").write_text("a.jpg\t7\n")
    (tmp_path / "named.tsv").write_text("wo\twas\na.jpg\t7\n")
    for source, label in (("three.tsv", 7), ("one.tsv", -1), ("none.tsv", 7), ("named.tsv#wo,was", 7)):
        listing = list_images([f"{tmp_path}/{source}"])
        assert (listing.index.keys, listing.index.labels.tolist()) == (["a.jpg"], [label])
    (tmp_path / "path").write_bytes(b"x")  # a file that is called so
    assert list_images([f"{tmp_path}/one.tsv"]).index.keys == ["path", "a.jpg"]


def test_a_list_with_blanks_for_tabs_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "val_1.JPEG").write_bytes(b"x")
    (tmp_path / "val.txt").write_text("val_1.JPEG 65\n")
    with pytest.raises(
        SourceError, match=r"its lines end in a blank and a class \(65\): put a tab before the class instead"
    ):
        list_images([f"{tmp_path}/val.txt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('path, label\na.jpg, "cat"\n', r"line 2: a quote behind a blank"),
        ('label,path\n1, "a.jpg"\n', r"line 2: a quote behind a blank"),
        ("path,label,label\na.jpg,1,0\n", r"2 columns are called label: give each a name of its own"),
        (
            "label,path\n1, a.jpg\n0, b.jpg\n",
            r"its paths begin with a blank: leave out the blanks behind the separators",
        ),
    ],
)
def test_tables_that_say_two_things_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = write_list(tmp_path, content).rename(tmp_path / "list.csv")
    with pytest.raises(SourceError, match=message):
        listed(path)
