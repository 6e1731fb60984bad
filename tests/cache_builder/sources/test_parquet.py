"""Parquet files as sources: which column holds the images, what the classes are, and what is wrong with a file."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_builder.sources import Listing, Selection, list_images, parquet
from cache_builder.sources.parquet import list_parquet
from radio_cache.errors import ImageError, SourceError
from radio_cache.images import parquet as parquet_images
from radio_cache.images.containers import read_image

IMAGES = [b"first", b"second", b"third", b"fourth"]


def hugging_face(path: Path, *, labels: list[int | None] | None = None, names: list[str | None] | None = None) -> Path:
    """As `Dataset.to_parquet` writes images with classes."""
    rows = [{"bytes": data, "path": name} for data, name in zip(IMAGES, names or [None] * len(IMAGES), strict=True)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(labels or [1, 0, 1, None], pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=["label"])
    return path


def write(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def contents(listing: Listing) -> list[bytes]:
    index = listing.index
    return [
        read_image(listing.containers[index.container[row]], key, int(index.offset[row]), int(index.length[row]))
        for row, key in enumerate(index.keys)
    ]


def test_the_layout_of_hugging_face_gives_images_classes_and_their_names(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "train.parquet")
    listing = list_images([str(path)])
    assert listing.index.keys == [f"train.parquet/{row}" for row in range(4)]
    assert listing.index.labels.tolist() == [1, 0, 1, -1]
    assert listing.class_names == ("cat", "dog")
    (container,) = listing.containers
    assert (container.kind, container.path, container.column) == ("parquet", str(path), "image.bytes")
    assert contents(listing) == IMAGES
    assert listing.notes == ("1 of 4 images have no class (such as train.parquet/3)",)


def test_names_of_images_are_keys_and_equal_ones_are_kept_apart(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", names=["x.jpg", "y/z.png", "x.jpg", "w.jpg"])
    listing = list_images([f"{tmp_path}/a.parquet"])
    assert listing.index.keys == [f"a.parquet/{name}" for name in ("x.jpg", "y/z.png", "x.jpg#2", "w.jpg")]
    assert contents(listing) == IMAGES
    assert listing.notes[0] == f"{tmp_path}/a.parquet: 1 duplicate image name; later ones are stored as name#2"


def test_names_that_are_missing_for_some_rows_name_none(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", names=["x.jpg", None, "y.jpg", "z.jpg"])
    assert list_parquet(f"{tmp_path}/a.parquet").members == ["0", "1", "2", "3"]


@pytest.mark.parametrize("how", ["folder", "glob", "braces"])
def test_several_files_are_one_source_in_order_with_one_set_of_classes(tmp_path: Path, how: str) -> None:
    for number in range(2):
        hugging_face(tmp_path / f"data/train-{number:05d}.parquet")
    typed = {"folder": "data", "glob": "data/train-*.parquet", "braces": "data/train-{00000..00001}.parquet"}[how]
    listing = list_images([f"{tmp_path}/{typed}"])
    assert listing.index.keys == [f"train-{number:05d}.parquet/{row}" for number in range(2) for row in range(4)]
    assert listing.class_names == ("cat", "dog")
    assert contents(listing) == IMAGES * 2


def test_limit_filter_and_shuffle_choose_among_rows(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", names=["x.jpg", "y.png", "z.jpg", "w.jpg"])
    shuffled = list_images([f"{tmp_path}/a.parquet"], selection=Selection(filters=("*.jpg",), shuffle_seed=3, limit=2))
    by_name = dict(zip(("x.jpg", "y.png", "z.jpg", "w.jpg"), IMAGES, strict=True))
    assert contents(shuffled) == [by_name[key.rpartition("/")[2]] for key in shuffled.index.keys]
    assert len(shuffled.index) == 2


def test_no_image_is_read_while_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise AssertionError

    monkeypatch.setattr(parquet_images, "read_path_or_url", refuse)
    path = hugging_face(tmp_path / "a.parquet")
    asked: list[list[str]] = []
    original = pq.ParquetFile.read

    def watched(self: Any, columns: list[str], **more: Any) -> Any:
        asked.append(columns)
        return original(self, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read", watched)
    list_images([str(path)])
    assert asked == [["label", "image.path"]]


# ---------------------------------------------------------------- columns


def test_plain_columns_of_bytes_and_class_names_in_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", jpg=IMAGES, cls=["dog", "cat", None, "dog"], __key__=["a", "b", "c", "d"])
    found = list_parquet(path)
    assert found.column == "jpg"
    assert (found.labels.tolist(), found.class_names) == ([1, 0, -1, 1], ("cat", "dog"))
    assert found.members == ["a", "b", "c", "d"]


def test_class_numbers_without_names_and_negative_ones(tmp_path: Path) -> None:
    found = list_parquet(write(tmp_path / "a.parquet", image=IMAGES, label=pa.array([3, -1, 0, None], pa.int8())))
    assert (found.labels.tolist(), found.class_names) == ([3, -1, 0, -1], None)


def test_class_names_in_a_dictionary_column(tmp_path: Path) -> None:
    found = list_parquet(
        write(tmp_path / "a.parquet", image=IMAGES, label=pa.array(["b", "a", "b", "b"]).dictionary_encode())
    )
    assert (found.labels.tolist(), found.class_names) == ([1, 0, 1, 1], ("a", "b"))


def test_columns_may_be_named_behind_the_place(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data/a.parquet", img=IMAGES, mask=[b"m"] * 4, fine=[1, 2, 3, 4], coarse=[0, 0, 1, 1])
    assert list_images([path]).containers[0].column == "img"
    for typed in (f"{path}#mask,coarse", f"{tmp_path}/data/#mask,coarse", f"{tmp_path}/data/*.parquet#mask,coarse"):
        listing = list_images([typed])
        assert listing.containers[0].column == "mask"
        assert listing.containers[0].path == path
        assert listing.index.labels.tolist() == [0, 0, 1, 1]
    assert list_images([f"{path}#,fine"]).index.labels.tolist() == [1, 2, 3, 4]


def test_several_columns_of_classes_are_told_and_none_is_guessed(tmp_path: Path) -> None:
    features = {"features": {name: {"_type": "ClassLabel", "names": ["a", "b"]} for name in ("fine", "coarse")}}
    table = pa.table({"img": IMAGES, "fine": [0, 1, 1, 0], "coarse": [0, 0, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
    pq.write_table(table, tmp_path / "a.parquet")
    found = list_parquet(f"{tmp_path}/a.parquet")
    assert found.labels.tolist() == [-1] * 4
    assert found.notes == ("no classes: there are several columns of them (fine, coarse); name one, as in '#,fine'",)
    assert list_parquet(f"{tmp_path}/a.parquet", label="coarse").class_names == ("a", "b")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("#photo", r"column photo does not exist; the columns are image \(binary\), label \(int64\), score \(double\)"),
        ("#label", "column label is int64, and images are bytes"),
        ("#,klass", "column klass does not exist; the columns are image, label, score"),
        ("#,score", "column score holds 0.5, which is no whole number"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, asked: str, message: str) -> None:
    path = write(tmp_path / "a.parquet", image=IMAGES, label=[1, 2, 3, 4], score=[0.5] * 4)
    with pytest.raises(SourceError, match=rf"a\.parquet: {message}"):
        list_images([path + asked])


def test_a_file_without_bytes_names_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", link=["http://x/a.jpg"], label=[1])
    with pytest.raises(
        SourceError, match=r"a\.parquet has no column with the bytes of images; its columns are link \(string\)"
    ):
        list_images([path])


def test_several_columns_of_bytes_are_named_with_the_way_to_choose(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", left=IMAGES, right=IMAGES)
    with pytest.raises(
        SourceError, match=r"several columns of bytes \(left, right\): name the one .* as in '.*a\.parquet#left'"
    ):
        list_images([path])


def test_lists_of_images_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", images=[[b"a", b"b"]])
    with pytest.raises(SourceError, match=r"no column with the bytes of images; .* images \(list<element: binary>\)"):
        list_images([path])


def test_columns_behind_what_has_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"x")
    with pytest.raises(SourceError, match="photos has no columns such as '#img': only Parquet, CSV and TSV files"):
        list_images([f"{tmp_path}/photos/#img"])


def test_a_class_beyond_the_names_is_named(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "a.parquet", labels=[0, 1, 7, 2])
    with pytest.raises(SourceError, match="column label holds class 7, and the file names 3 classes"):
        list_images([str(path)])


# ---------------------------------------------------------------- files that are damaged, or dear to read


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_file_cut_short_is_named_with_the_cure(tmp_path: Path, keep: int) -> None:
    path = hugging_face(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        SourceError, match=r"a\.parquet is damaged, was cut short, or is no Parquet file \(.*\): fetch it again"
    ):
        list_images([str(path)])


def test_an_empty_table_holds_no_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", image=pa.array([], pa.binary()))
    with pytest.raises(SourceError, match=r"a\.parquet holds no image$"):
        list_images([path])


def test_what_random_reads_of_a_compressed_file_cost_is_told(tmp_path: Path) -> None:
    data = [np.random.default_rng(row).bytes(400_000) for row in range(4)]
    path = write(tmp_path / "a.parquet", image=data)
    (note,) = list_parquet(path).notes
    assert note.startswith(
        "its images are compressed or in dictionaries: reading one in random order reads its row group (2 MB)"
    )


def test_row_groups_that_no_single_image_can_be_read_from_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    path = write(tmp_path / "a.parquet", image=IMAGES)
    with pytest.raises(
        SourceError, match=r"row groups with .* bytes of images, .*: write it again with row groups of about 100"
    ):
        list_images([path])
    pq.write_table(pa.table({"image": IMAGES}), path, compression="none", use_dictionary=False)
    assert contents(list_images([path])) == IMAGES


def test_a_folder_of_both_kinds_of_shards_is_refused(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(SourceError, match=rf"holds both tars and Parquet files: name the tars as '{tmp_path}/\*\.tar'"):
        list_images([str(tmp_path)])


def test_many_notes_are_cut_to_a_few(tmp_path: Path) -> None:
    for number in range(12):
        hugging_face(tmp_path / f"{number:02d}.parquet", names=["x.jpg"] * 4)
    notes = list_images([str(tmp_path)]).notes
    assert len(notes) == 9
    assert notes[-2:] == ("... and 5 more such notes", "12 of 48 images have no class (such as 00.parquet/x.jpg#4)")


# ---------------------------------------------------------------- paths instead of images


def with_paths(folder: Path, **columns: Any) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(name.encode())
    pq.write_table(pa.table(columns), folder / "list.parquet")
    return folder / "list.parquet"


@pytest.mark.parametrize("columns", ["", "#file_name", "#file_name,label"])
def test_a_file_without_images_may_name_them_by_path(tmp_path: Path, columns: str) -> None:
    place = with_paths(tmp_path, file_name=["b.jpg", str(tmp_path / "a.jpg")], label=["dog", "cat"], note=["x", "y"])
    listing = list_images([f"{place}{columns}"])
    (container,) = listing.containers
    assert container.kind == "list"
    assert [read_image(container, key, -1, -1) for key in listing.index.keys] == [b"b.jpg", b"a.jpg"]
    assert (listing.class_names, listing.index.labels.tolist()) == (("cat", "dog"), [1, 0])


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"path": ["a.jpg", None]}, "", r"list\.parquet, row 1: column path names no file"),
        ({"path": ["a.jpg", "a.jpg"]}, "", r"row 1: a\.jpg is in row 0 already"),
        ({"path": ["x.jpg", "y.jpg"]}, "", r"none of its 2 files exists \(row 0: x\.jpg"),
        ({"where": ["a.jpg"]}, "", r"no column with the bytes of images; its columns are where \(string\); nor is one"),
        ({"where": ["a.jpg"]}, "#place", r"column place does not exist; the columns are where"),
        ({"path": ["a.jpg"]}, "#path,kind", r"column kind does not exist; the columns are path"),
    ],
)
def test_what_is_wrong_with_a_column_of_paths_is_named(
    tmp_path: Path, columns: dict[str, Any], asked: str, message: str
) -> None:
    place = with_paths(tmp_path, **columns)
    with pytest.raises(SourceError, match=message):
        list_images([f"{place}{asked}"])


def test_a_path_missing_in_the_middle_is_told_with_its_row(tmp_path: Path) -> None:
    place = with_paths(tmp_path, path=["a.jpg", "gone.jpg", "b.jpg"])
    assert list_images([str(place)]).notes == (
        f"{place}: 1 of 3 files does not exist (row 1: gone.jpg) and will be left out",
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([3.0, float("nan"), 5.0]), [3, -1, 5]),
        (pa.array([3.0, None, 5.0], pa.float32()), [3, -1, 5]),
        (pa.array([True, False, None]), [1, 0, -1]),
        (pa.array([3, -1, None]), [3, -1, -1]),
        (pa.array(["3", "-1", ""]), [3, -1, -1]),
        (pa.array([None, None, None]), [-1, -1, -1]),
        (pa.array([3.0, -1.0, 5.0]).dictionary_encode(), [3, -1, 5]),
    ],
)
@pytest.mark.parametrize("columns", ["", "#image,label"])
def test_missing_labels_of_any_type_are_no_class(
    tmp_path: Path, labels: pa.Array, expected: list[int], columns: str
) -> None:
    pq.write_table(pa.table({"image": [b"0", b"1", b"2"], "label": labels}), tmp_path / "a.parquet")
    listing = list_images([f"{tmp_path}/a.parquet{columns}"])
    assert (listing.index.labels.tolist(), listing.class_names) == (expected, ())


def test_scores_that_nobody_named_are_no_classes_and_that_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"0", b"1"], "label": [0.5, 1.0]}), tmp_path / "a.parquet")
    listing = list_images([f"{tmp_path}/a.parquet"])
    assert listing.index.labels.tolist() == [-1, -1]
    assert listing.notes == (f"{tmp_path}/a.parquet: no classes: column label holds 0.5, which is no whole number",)


# ---------------------------------------------------------------- types, and images that lie elsewhere

TEXT = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]
BYTES = [
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.binary()),
    pa.dictionary(pa.int16(), pa.large_binary()),
]


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


@pytest.mark.parametrize("how", [{}, {"compression": "none", "use_dictionary": False}], ids=str)
@pytest.mark.parametrize("text", TEXT, ids=str)
@pytest.mark.parametrize("kind", BYTES, ids=str)
def test_bytes_names_and_classes_of_every_layout_are_columns(
    tmp_path: Path, kind: pa.DataType, text: pa.DataType, how: dict[str, Any]
) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    table = pa.table(
        {
            "jpg": array(IMAGES, kind),
            "__key__": array(names, text),
            "label": array(["x", "y", None, "x"], text),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, **how)
    listing = list_images([f"{tmp_path}/a.parquet"])
    assert listing.index.keys == [f"a.parquet/{name}" for name in names]
    assert [listing.class_names[label] if label >= 0 else None for label in listing.index.labels] == [
        "x",
        "y",
        None,
        "x",
    ]
    assert contents(listing) == IMAGES


@pytest.mark.parametrize("text", TEXT[:3], ids=str)
@pytest.mark.parametrize("kind", BYTES[:3], ids=str)
def test_bytes_and_path_of_every_layout_within_one_column(tmp_path: Path, kind: pa.DataType, text: pa.DataType) -> None:
    column = pa.StructArray.from_arrays([array(IMAGES, kind), array(["a", "b", "c", "d"], text)], ["bytes", "path"])
    listing = list_images([write(tmp_path / "a.parquet", image=column)])
    assert listing.index.keys == [f"a.parquet/{name}" for name in "abcd"]
    assert contents(listing) == IMAGES


def by_path(
    path: Path, rows: list[tuple[bytes | None, str | None]], kind: pa.DataType | None = None, **how: Any
) -> str:
    """As `datasets` 5 writes images that are files: bytes are null."""
    column = pa.StructArray.from_arrays(
        [pa.array([data for data, _ in rows], kind or pa.binary()), pa.array([name for _, name in rows], pa.string())],
        ["bytes", "path"],
    )
    pq.write_table(pa.table({"image": column}), path, row_group_size=2, **how)
    return str(path)


@pytest.mark.parametrize("how", [{}, {"compression": "none", "use_dictionary": False}], ids=str)
@pytest.mark.parametrize("kind", [pa.binary(), pa.null()], ids=str)
def test_images_by_path_are_read_from_where_they_lie(tmp_path: Path, kind: pa.DataType, how: dict[str, Any]) -> None:
    (tmp_path / "pics").mkdir()
    for number, data in enumerate(IMAGES):
        (tmp_path / f"pics/{number} ü.jpg").write_bytes(data)
    names = ["pics/0 ü.jpg", f"{tmp_path}/pics/1 ü.jpg", f"file://{tmp_path}/pics/2%20%C3%BC.jpg", "./pics/3 ü.jpg"]
    listing = list_images([by_path(tmp_path / "a.parquet", [(None, name) for name in names], kind, **how)])
    assert listing.index.keys == [f"a.parquet/{name}" for name in names]
    assert (contents(listing), listing.notes) == (IMAGES, ())


def test_images_by_path_among_others_and_rows_with_neither(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"from the file")
    rows = [(b"inside", "a.jpg"), (None, "b.jpg"), (None, None), (b"", "c.jpg"), (None, "gone.jpg")]
    listing = list_images([by_path(tmp_path / "a.parquet", rows)])
    container = listing.containers[0]
    read = [read_image(container, key, row, -1) for row, key in enumerate(listing.index.keys[:2])]
    assert read == [b"inside", b"from the file"]
    with pytest.raises(
        ImageError, match=r"row 2 of .* holds no image: its image\.bytes is null, and so is its image\.path"
    ):
        read_image(container, "", 2, -1)
    assert read_image(container, "", 3, -1) == b""
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(container, "", 4, -1)


def test_paths_that_lead_nowhere_are_told_when_listed(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"x")
    some = by_path(tmp_path / "a.parquet", [(None, "b.jpg"), (None, "gone/c.jpg")])
    assert (
        list_images([some])
        .notes[0]
        .endswith("1 of the 2 files that it names do not exist ('gone/c.jpg') and will be left out")
    )
    none = by_path(tmp_path / "b.parquet", [(None, "gone/c.jpg")])
    with pytest.raises(
        SourceError, match=r"none of the 1 files that it names exists .'gone/c\.jpg'.: relative paths start from"
    ):
        list_images([none])


def test_one_empty_shard_among_others_is_passed_over_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        write(tmp_path / f"data/train-{number}.parquet", jpg=IMAGES, label=[0, 1, 0, 1])
    write(tmp_path / "data/train-3.parquet", jpg=pa.nulls(0), label=pa.array([], pa.float64()))
    for typed in ("data", "data/*.parquet", "data/train-{0..3}.parquet"):
        listing = list_images([f"{tmp_path}/{typed}"])
        assert len(listing.index) == 12
        assert listing.notes == (f"{tmp_path}/data/train-3.parquet holds no image",)
        assert contents(listing) == IMAGES * 3
    with pytest.raises(SourceError, match=r"train-3\.parquet holds no image"):
        list_images([f"{tmp_path}/data/train-0.parquet", f"{tmp_path}/data/train-3.parquet"])


def test_one_image_in_a_dictionary_for_all_rows_is_read_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_images, "MAX_GROUP_BYTES", 1_000_000)
    image = bytes(range(256)) * 400
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([image]))
    for name, column, how in (
        ("a", rows, {}),
        ("b", pa.array([image] * 3000), {}),
        ("c", pa.array([image] * 3000), {"compression": "zstd"}),
        ("d", pa.array([image] * 300), {"use_dictionary": False, "column_encoding": {"jpg": "DELTA_BYTE_ARRAY"}}),
    ):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"jpg": column}), path, row_group_size=1 << 20, **how)
        file = parquet_images._File(str(path), "jpg")
        assert file.read(len(column) - 1) == image
        assert file._decoded(0).num_bytes < 1_000_000


@pytest.mark.parametrize("how", [{}, {"compression": "none", "use_dictionary": False}], ids=str)
@pytest.mark.parametrize("plain", [True, False])
def test_lists_of_one_image_are_images(tmp_path: Path, plain: bool, how: dict[str, Any]) -> None:
    (tmp_path / "b.jpg").write_bytes(b"from the file")
    if plain:
        rows: list[Any] = [[b"first"], [b"second"], [], None, [b"fifth"]]
        kind = pa.list_(pa.binary())
    else:
        images = [(b"first", "a"), (None, "b.jpg"), (None, None), (b"fifth", None)]
        first, second, _, last = ([{"bytes": data, "path": path}] for data, path in images)
        rows, kind = (
            [first, second, [], None, last],
            pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"images": pa.array(rows, kind), "label": [0, 1, 0, 1, 0]}), path, row_group_size=3, **how)
    listing = list_images([str(path)])
    (container,) = listing.containers
    assert (len(listing.index), list_images([f"{path}#images"]).containers) == (5, (container,))
    read = [read_image(container, "", row, -1) for row in (0, 1, 4)]
    assert read == [b"first", b"second" if plain else b"from the file", b"fifth"]
    for row in (2, 3):
        with pytest.raises(ImageError, match=f"row {row} of .* holds no image"):
            read_image(container, "", row, -1)


def test_lists_of_several_images_are_refused_when_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", images=[[b"1"], [b"2", b"3"]])
    with pytest.raises(SourceError, match=r"in the lists of column images\.list\.\w+ some rows hold several images"):
        list_images([path])
    path = write(tmp_path / "b.parquet", jpg=[b"1", b"2"], others=[[b"1"], [b"2", b"3"]])
    assert list_images([path]).containers[0].column == "jpg"


def test_numbers_written_as_text_are_names_beside_a_shard_of_names(tmp_path: Path) -> None:
    for name, labels in (("a", ["3", "10"]), ("b", ["cat", None])):
        pq.write_table(pa.table({"image": [b"0", b"1"], "label": labels}), tmp_path / f"{name}.parquet")
    listing = list_images([str(tmp_path)])
    assert listing.class_names == ("10", "3", "cat")
    assert listing.index.labels.tolist() == [1, 0, 2, -1]


def test_whole_decimals_are_class_numbers_and_fractions_are_told(tmp_path: Path) -> None:
    whole = pa.array([Decimal("1.0"), Decimal(0), None, Decimal(-1)], pa.decimal128(5, 1))
    assert list_parquet(write(tmp_path / "a.parquet", image=IMAGES, label=whole)).labels.tolist() == [1, 0, -1, -1]
    fractions = pa.array([Decimal("1.5")] * 4, pa.decimal128(5, 1))
    found = list_parquet(write(tmp_path / "b.parquet", image=IMAGES, label=fractions))
    assert found.notes == ("no classes: column label holds 1.5, which is no whole number",)


@pytest.mark.parametrize("value", [b"cat", [1, 0], {"x": 1}], ids=["bytes", "list", "struct"])
def test_a_column_called_label_that_can_be_no_class_is_told(tmp_path: Path, value: object) -> None:
    found = list_parquet(
        write(tmp_path / "a.parquet", photo=pa.array(IMAGES), label=pa.array([value] * 4)), image="photo"
    )
    assert found.labels.tolist() == [-1] * 4
    assert found.notes[0].startswith("no classes: column label is ")
    assert found.notes[0].endswith(", and a class is a number or a name")


def test_names_of_class_columns_count_in_upper_case_too(tmp_path: Path) -> None:
    assert list_parquet(write(tmp_path / "a.parquet", Image=IMAGES, Label=[3, 1, 0, 2])).labels.tolist() == [3, 1, 0, 2]


def test_further_image_columns_and_nested_classes_are_told(tmp_path: Path) -> None:
    picture = pa.array([{"bytes": data} for data in IMAGES], pa.struct([("bytes", pa.binary())]))
    meta = pa.array([{"label": 1}] * len(IMAGES), pa.struct([("label", pa.int64())]))
    path = write(tmp_path / "t.parquet", image=picture, mask=picture, meta=meta)
    notes = list_images([path]).notes
    assert any(
        "images are those of column image.bytes; other columns of bytes are not used: mask.bytes" in n for n in notes
    )
    assert any("no classes: meta.label is a field within another column" in n for n in notes)
    assert not any("are not used" in n for n in list_images([f"{path}#mask"]).notes)
