"""The calibrated codecs of format version 1, in caches kept in the repository: read bit for bit, for ever.

Decoded once more here, by what docs/format.md says and nothing else of ours; all numbers are such that float32 rounds nowhere.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner

from cache_builder.cli import main
from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.errors import UnsupportedFormatError
from radio_cache.format.schema import CacheMeta, TeacherSpec
from radio_cache.reader import CachedTeacher
from radio_cache.torch.decode import decode_codes

GOLDEN = Path(__file__).parents[1] / "golden"
PATH, GAINS_PATH, ANS_PATH = GOLDEN / "v1-codecs.zarr", GOLDEN / "v1-gains.zarr", GOLDEN / "v1-ans.zarr"
ROWS, GRID_HW = (0, 2), (2, 3)
NAMES = ("golden-int8", "golden-packed", "golden-zstd")
PLACES = dict.fromkeys(NAMES, PATH) | dict.fromkeys(("golden-bytes", "golden-nibbles"), GAINS_PATH)
every_teacher = pytest.mark.parametrize("name", PLACES)
PLACES = PLACES | {"golden-ans": ANS_PATH}
with_ans = pytest.mark.parametrize("name", PLACES)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The script that made it: the formulas of the codes."""
    spec = importlib.util.spec_from_file_location("make_v1_codecs", GOLDEN / "make_v1_codecs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache() -> Cache:
    return Cache(PATH)


def teacher_of(name: str) -> CachedTeacher:
    return Cache(PLACES[name]).teachers[name]


def arrays(name: str) -> dict[str, np.ndarray]:
    """What decoding needs, read by zarr-python."""
    group = zarr.open_group(PLACES[name], mode="r")[f"teachers/{name}/transform"]
    return {key: np.asarray(array[...]) for key, array in group.arrays()}


def by_the_book(name: str, codes: np.ndarray) -> np.ndarray:
    """Features (h, w, c) in float64, from stored codes of one image, as docs/format.md says."""
    a = arrays(name)
    if name == "golden-int8":
        return codes[..., :-1].astype(np.float64) * a["scale"] * 2.0 ** codes[..., -1:]
    if name == "golden-zstd":
        y = teacher_of(name).spec.codec.parameters["step"] * (
            codes[0].astype(np.float64) + 256 * codes[1].astype(np.float64)
        ).transpose(1, 2, 0)
    elif name in ("golden-bytes", "golden-nibbles"):
        y = teacher_of(name).spec.codec.parameters["step"] * with_gains(
            codes.astype(int).tolist(), name, *GRID_HW, channels=16
        )
    else:
        y = np.array([[unpacked(token, a) for token in line] for line in codes])
    phi = np.sqrt(a["eigenvalues"].astype(np.float64).mean())
    return a["mean"] + phi * y @ a["basis"].astype(np.float64).T


def with_gains(lines: list[list[int]], name: str, h: int, w: int, *, channels: int) -> np.ndarray:
    """2^(g / 4) q of every token and channel (h, w, c), one by one."""
    found = np.zeros((h, w, channels))
    for i, j, c in np.ndindex(found.shape):
        if name == "golden-bytes":
            q = lines[h + c * h + i][j] + 256 * lines[h + channels * h + c * h + i][j]
        else:
            half, line = -(-channels * h // 2), c * h + i
            byte = lines[h + line // 2][j] % 256
            low = byte // 16 if line % 2 else byte % 16
            q = (low - 16 if low > 7 else low) + 16 * lines[h + half + line][j]
        found[i, j, c] = 2 ** (lines[i][j] / 4) * q
    return found


def unpacked(token: np.ndarray, a: dict[str, np.ndarray]) -> list[float]:
    """Coordinates of one packed token, bit by bit."""
    whole = int.from_bytes(token.tobytes(), "little")

    def take(bits: int) -> int:
        nonlocal whole
        value, whole = whole % 2**bits, whole >> bits
        return value

    channels = len(a["widths"])
    gains = [take(7) for _ in range(4)]
    found: list[float] = []
    for channel, width in enumerate(a["widths"].tolist()):
        group = max(k for k in range(4) if k * channels // 4 <= channel)
        value = a["levels"][2**width - 2 + take(width)] * a["scales"][channel] if width else 0.0
        found.append(float(value) * 2 ** ((gains[group] - 63) / 2))
    return found


@with_ans
def test_golden_codes_are_read_bit_for_bit(recipe: ModuleType, name: str) -> None:
    for row, found in zip(ROWS, teacher_of(name).codes(ROWS), strict=True):
        np.testing.assert_array_equal(found, recipe.codes(name, row))


@every_teacher
def test_golden_maps_are_decoded_without_a_rounding(name: str) -> None:
    teacher = teacher_of(name)
    for row, found in zip(ROWS, teacher.maps(ROWS), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, by_the_book(name, teacher.codes([row])[0]))
    decoded = decode_codes(teacher.codec, torch.from_numpy(teacher.codes(ROWS)))
    np.testing.assert_array_equal(decoded.numpy(), teacher.maps(ROWS))


def test_golden_ans_maps_are_decoded_to_the_rounding_of_cosines() -> None:
    teacher = teacher_of("golden-ans")
    maps = teacher.maps(ROWS)
    assert maps[1, 1, 0, :3].tolist() == pytest.approx([-26.097271, -6993.62695, 31.598896], rel=1e-5)
    decoded = decode_codes(teacher.codec, torch.from_numpy(teacher.codes(ROWS))).numpy()
    np.testing.assert_allclose(decoded, maps, rtol=1e-5, atol=1e-5 * float(np.abs(maps).max()))


def test_some_golden_values_as_numbers(cache: Cache) -> None:
    """So that this file and the recipe cannot change their minds together."""
    assert cache.teachers["golden-int8"].maps([2])[0, 1, 0].tolist()[:4] == [-4.0, 33.5, -58.5, -11.5]
    assert cache.teachers["golden-packed"].maps([2])[0, 1, 0].tolist()[:2] == [-2.29150390625, 1.68115234375]
    assert teacher_of("golden-nibbles").maps([2])[0, 1, 0].tolist()[:3] == [6.5, -10.625, 3.0]
    assert cache.teachers["golden-zstd"].maps([0])[0, 1, 2].tolist()[5:8] == [6120.46875, -0.53125, 6114.90625]


@pytest.mark.parametrize("name", ["golden-int8", "golden-zstd"])
def test_this_release_still_encodes_to_the_golden_codes(cache: Cache, name: str) -> None:
    teacher = cache.teachers[name]
    np.testing.assert_array_equal(teacher.codec.encode(teacher.maps(ROWS)), teacher.codes(ROWS))


@with_ans
def test_zarr_python_reads_the_golden_codes(recipe: ModuleType, name: str) -> None:
    array: Any = zarr.open_group(PLACES[name], mode="r")[f"teachers/{name}/spatial"]
    for row in ROWS:
        np.testing.assert_array_equal(array[0, row], recipe.codes(name, row))
    assert (np.asarray(array[0, 1]) == array.fill_value).all()


def test_golden_receipts_and_specs_say_what_was_measured(cache: Cache) -> None:
    packed, zstd = cache.teachers["golden-packed"], cache.teachers["golden-zstd"]
    assert packed.spec.codec.request == {"name": "klt", "packing": "packed", "fidelity": 0.99}
    kept = packed.fidelity()
    assert kept is not None
    assert (kept.num_tokens, kept.cosine_worst, kept.squared_error) == (12, 0.98, 0.25)
    assert kept.cosine == pytest.approx(0.99)
    assert zstd.conversion is not None
    assert zstd.conversion.source == "klt/packed"
    left = zstd.fidelity()
    assert left is not None
    assert left.cosine == pytest.approx(0.99 * 0.9925)


@pytest.mark.parametrize("path", [PATH, GAINS_PATH, ANS_PATH])
def test_the_golden_caches_of_codecs_pass_verification(path: Path) -> None:
    report = verify_cache(Cache(path), deep=True)
    assert report.damages == ()
    assert set(report.missing.values()) == {0}


@pytest.mark.parametrize("path", [PATH, GAINS_PATH, ANS_PATH])
def test_this_release_still_writes_the_bytes_of_the_golden_codecs(
    tmp_path: Path, recipe: ModuleType, path: Path
) -> None:
    """But for zstd frames, which another version of that library may write in another way, and receipts of them; and names of
    dimensions, which documents did not have."""
    recipe.make(tmp_path / path.name)
    under_zstd = [name for name in recipe.CACHES[path.name] if name not in ("golden-int8", "golden-packed")]

    def stored(folder: Path) -> dict[str, bytes]:
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        frames = {name for name in files for teacher in under_zstd if name.startswith(f"teachers/{teacher}/spatial/c/")}
        vouched = {name for name in files for teacher in under_zstd if name.startswith(f"receipts/{teacher}/")}
        return {name: content(file) for name, file in files.items() if name not in frames | vouched}

    def content(file: Path) -> Any:
        if file.name != "zarr.json":
            return file.read_bytes()
        return {key: value for key, value in json.loads(file.read_text()).items() if key != "dimension_names"}

    assert stored(tmp_path / path.name) == stored(path)


# ---------------------------------------------------------------- newer than this release


def edited(tmp_path: Path, document: str, **changes: Any) -> Path:
    """A copy whose document says something else, under a checksum that fits."""
    path = Path(shutil.copytree(PATH, tmp_path / "newer.zarr"))
    data = json.loads((path / document).read_text())
    ours = data["attributes"]["radio_cache"]
    kind = CacheMeta if document == "zarr.json" else TeacherSpec
    data["attributes"]["radio_cache"] = kind.from_json(ours).to_json() | changes  # type: ignore[attr-defined]
    data["attributes"]["radio_cache"].pop("crc32c")
    (path / document).write_text(json.dumps(data))
    return path


def test_a_newer_format_is_refused_by_every_command_with_the_cure(tmp_path: Path) -> None:
    path = edited(tmp_path, "zarr.json", format_version=2, something="new")
    for command in (["info"], ["verify"], ["repair"], ["drop-teacher", "--yes"], ["copy"]):
        more = {"drop-teacher": ["golden-int8"], "copy": [str(tmp_path / "copy.zarr")]}.get(command[0], [])
        told = CliRunner().invoke(main, [*command, str(path), *more])
        assert told.exit_code == 1
        assert (
            "format version 2, this radio-cache reads version 1: install the radio-cache that wrote it" in told.stderr
        )
    assert not (tmp_path / "copy.zarr").exists()


def test_a_codec_of_the_future_costs_its_own_teacher_only(tmp_path: Path, recipe: ModuleType) -> None:
    path = edited(
        tmp_path, "teachers/golden-zstd/zarr.json", codec={"name": "klt", "packing": "arithmetic", "step": 0.1}
    )
    cache = Cache(path)
    assert list(cache.teachers) == ["golden-int8", "golden-packed"]
    with pytest.raises(UnsupportedFormatError, match=r"codec 'klt/arithmetic' is unknown .* install the radio-cache"):
        cache.teachers["golden-zstd"]
    np.testing.assert_array_equal(cache.teachers["golden-packed"].codes([2])[0], recipe.codes("golden-packed", 2))
