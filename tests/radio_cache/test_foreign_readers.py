"""Anyone can open our arrays: zarr-python, tensorstore and zarrs read the same bits as our reader, in every codec."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from cache_builder.copying import CopyConfig, copy_cache
from radio_cache import Cache
from radio_cache.codecs import codec_from_json
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.format.pixels import pixels_document
from radio_cache.format.zarr_json import array_difference
from radio_cache.geometry.views import ViewSampling
from radio_cache.images.stored import chunk_of
from radio_cache.testing import fake_spec, make_tiny_cache
from radio_cache.writer import ShardWriter, add_teacher

UNUSABLE = "red/1.png"
CODECS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "klt-packed": CodecRequest(packing="packed"),
    "klt-zstd": CodecRequest(packing="zstd", fidelity=0.999),
}
"""Teacher name -> its codec. The half teacher alone has a summary."""

Read = Callable[[Path], NDArray[Any]]


def with_zarr_python(folder: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(folder, mode="r")[...])


def with_zarrs(folder: Path) -> NDArray[Any]:
    pytest.importorskip("zarrs", reason="zarrs is not installed: it comes with the dev extra")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(folder, mode="r")
        # Were it unknown to zarrs, zarr-python would read the array itself, and this test would prove nothing.
        assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return np.asarray(array[...])


def with_tensorstore(folder: Path) -> NDArray[Any]:
    tensorstore: Any = pytest.importorskip(
        "tensorstore", reason="tensorstore is not installed: it comes with the dev extra"
    )
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


READERS = {"zarr-python": with_zarr_python, "zarrs": with_zarrs, "tensorstore": with_tensorstore}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """Ten images in shards of four, one of them unusable; a teacher of each codec."""
    teachers = {name: (6 if name == "half" else None, 12) for name in CODECS}
    path = tmp_path_factory.mktemp("foreign") / "cache.zarr"
    make_tiny_cache(path, photos, shard_images=4, unusable=[UNUSABLE], teachers=teachers, codecs=CODECS)
    return path


@pytest.fixture(scope="module")
def cache(root: Path) -> Cache:
    return Cache(root)


def array_folders(root: Path) -> list[Path]:
    """Every array of the cache, found by its own metadata and not by our reader."""
    documents = sorted(root.rglob("zarr.json"))
    return [file.parent for file in documents if json.loads(file.read_text())["node_type"] == "array"]


@every_reader
@pytest.mark.parametrize("name", CODECS)
def test_codes_are_the_same_bits(root: Path, cache: Cache, name: str, read: Read) -> None:
    teacher = cache.teachers[name]
    rows = cache.usable_rows([name])
    assert len(rows) == 9
    found = read(root / "teachers" / name / "spatial")
    assert found.shape == (1, 10, *teacher.row_shape)
    assert found.dtype == teacher.codec.dtype
    assert found[0, rows].tobytes() == teacher.codes(rows).tobytes()


@every_reader
@pytest.mark.parametrize("name", CODECS)
def test_features_decoded_from_foreign_codes_and_transform_are_ours(
    root: Path, cache: Cache, name: str, read: Read
) -> None:
    """Whoever has only the Zarr arrays and the JSON gets the same features: nothing else is needed to decode."""
    group = root / "teachers" / name
    recorded = json.loads((group / "zarr.json").read_text())["attributes"]["radio_cache"]["codec"]
    arrays = {folder.name: read(folder) for folder in array_folders(group / "transform")}
    assert arrays.keys() == cache.teachers[name].codec.arrays().keys()
    for key, array in arrays.items():
        assert array.tobytes() == cache.teachers[name].codec.arrays()[key].tobytes()
    codec = codec_from_json(recorded, arrays)
    rows = cache.usable_rows([name])
    features = codec.decode(read(group / "spatial")[0, rows])
    np.testing.assert_array_equal(features, cache.teachers[name].maps(rows))


@every_reader
def test_a_hole_reads_as_the_fill_value_that_no_codec_emits(root: Path, cache: Cache, read: Read) -> None:
    hole = cache.index.keys.index(UNUSABLE)
    for name in CODECS:
        found = read(root / "teachers" / name / "spatial")[0, hole]
        fill = cache.teachers[name].codec.fill_value
        assert np.isnan(found).all() if np.isnan(fill) else (found == fill).all()


@every_reader
def test_summaries_and_image_columns_are_the_same_values(root: Path, cache: Cache, read: Read) -> None:
    rows = cache.usable_rows(["half"])
    summary = read(root / "teachers/half/summary")
    np.testing.assert_array_equal(summary[0, rows].astype(np.float32), cache.teachers["half"].summaries(rows))
    np.testing.assert_array_equal(read(root / "images/size_hw"), cache.sizes_hw)
    np.testing.assert_array_equal(read(root / "images/digest"), cache.digests)
    status = read(root / "images/status")
    assert np.flatnonzero(status != status[rows[0]]).tolist() == [cache.index.keys.index(UNUSABLE)]


@every_reader
def test_the_image_index_is_the_same_index(root: Path, cache: Cache, read: Read) -> None:
    (index,) = {folder.parent for folder in array_folders(root) if folder.name == "key_bytes"}
    text, ends = read(index / "key_bytes").tobytes(), read(index / "key_ends").tolist()
    keys = [text[first:last].decode() for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    assert keys == list(cache.index.keys)
    for name, ours in (
        ("label", cache.index.labels),
        ("container", cache.index.container),
        ("offset", cache.index.offset),
        ("length", cache.index.length),
    ):
        np.testing.assert_array_equal(read(index / name), ours)


@every_reader
def test_statistics_are_the_sums_that_our_means_come_from(root: Path, cache: Cache, read: Read) -> None:
    for name in CODECS:
        sums = read(root / "teachers" / name / "stats/spatial")
        assert sums.shape == (3, 2, 12)
        tokens = sum(receipt.num_tokens for receipt in cache.receipts(name) if receipt)
        mean, _ = cache.teachers[name].spatial_mean_std()
        np.testing.assert_allclose(sums[:, 0].sum(axis=0) / tokens, mean, rtol=1e-12)


@pytest.mark.parametrize("read", [with_zarrs, with_tensorstore], ids=["zarrs", "tensorstore"])
def test_every_array_there_is_reads_alike(root: Path, read: Read) -> None:
    """Whatever the format gains later, this test finds it."""
    folders = array_folders(root)
    assert len(folders) > 20
    for folder in folders:
        expected, found = with_zarr_python(folder), read(folder)
        assert found.dtype == expected.dtype, folder
        assert found.tobytes() == expected.tobytes(), folder


# ---------------------------------------------------------------- what other libraries ask of documents


REGISTERED = {"bool", "int8", "int32", "int64", "uint8", "uint32", "uint64", "float16", "float32", "float64", "bytes"}
"""Core types of Zarr v3 and, of registered extensions, byte strings of any length."""


@pytest.fixture(scope="module")
def with_everything(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A cache with kept images, one of them unusable; a teacher with a summary and extra views beside those of all codecs."""
    path = tmp_path_factory.mktemp("everything") / "cache.zarr"
    teachers: dict[str, tuple[int | None, int]] = dict.fromkeys(CODECS, (6, 12))
    cache = make_tiny_cache(path, photos, shard_images=4, unusable=[UNUSABLE], teachers=teachers, codecs=CODECS)
    document = pixels_document(cache.num_images, 4)
    (path / "images/pixels").mkdir()
    (path / "images/pixels/zarr.json").write_text(json.dumps(document))
    for shard in range(cache.meta.num_shards):
        rows = [
            None if cache.index.key(row) == UNUSABLE else chunk_of(b"image %d" % row)
            for row in cache.meta.shard_rows(shard)
        ]
        ShardWriter(path, "images", shard).write_sharded("pixels", rows, grid=(shard,), chunks_per_shard=4)
    spec = fake_spec("views", summary_dim=6, spatial_dim=12)
    sampling = ViewSampling(seed=0, area=(0.2, 1.0), ratio=(0.75, 1.25), flip_share=0.5)
    add_teacher(path, cache.meta, replace(spec, views=3, view_sampling=sampling))
    return path


def test_every_dimension_has_a_name_that_means_one_size_in_its_group(with_everything: Path) -> None:
    """As xarray needs it to open a group as a data set."""
    folders = array_folders(with_everything)
    assert len(folders) > 30
    for group in {folder.parent for folder in folders}:
        sizes: dict[str, int] = {}
        for folder in (folder for folder in folders if folder.parent == group):
            document = json.loads((folder / "zarr.json").read_text())
            names = document["dimension_names"]
            assert len(set(names)) == len(document["shape"]), folder
            for name, size in zip(names, document["shape"], strict=True):
                assert sizes.setdefault(name, size) == size, (folder, name)


def test_every_type_has_its_registered_name(with_everything: Path) -> None:
    types = {json.loads((folder / "zarr.json").read_text())["data_type"] for folder in array_folders(with_everything)}
    assert types <= REGISTERED
    assert "bytes" in types


@pytest.mark.filterwarnings("ignore:The data type .VariableLengthBytes:zarr.errors.UnstableSpecificationWarning")
@pytest.mark.parametrize("read", [with_zarr_python, with_zarrs], ids=["zarr-python", "zarrs"])
@pytest.mark.parametrize("name", ["bytes", "variable_length_bytes"])
def test_kept_images_are_byte_strings_under_either_name(with_everything: Path, read: Read, name: str) -> None:
    document = with_everything / "images/pixels/zarr.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | {"data_type": name}))
    found = read(document.parent)
    hole = Cache(with_everything).index.keys.index(UNUSABLE)
    assert [bytes(one) for one in found] == [b"" if row == hole else b"image %d" % row for row in range(10)]
    assert array_difference(document.read_bytes(), json.dumps(pixels_document(10, 4)).encode()) is None


def test_a_cache_opens_with_zarr_python_wherever_it_lies(
    root: Path, cache: Cache, bucket: Callable[[str], str]
) -> None:
    place = bucket("cache.zarr")
    copy_cache(CopyConfig(source=root, target=place))
    rows = cache.usable_rows(["int8"])
    for one in (cache, Cache(place)):
        array: Any = one.zarr_group()["teachers/int8/spatial"]
        assert array.metadata.dimension_names == ("view", "image", "token_row", "token_column", "code")
        np.testing.assert_array_equal(np.asarray(array[0])[rows], cache.teachers["int8"].codes(rows))
