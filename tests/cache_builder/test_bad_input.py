"""What a user may get wrong about images and weights, through the whole `radio-cache build`: one sentence that helps, and
nothing made; or what can be used is built, and the rest named."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result

from cache_builder.cli import main
from cache_builder.teachers import find_teacher, find_weights, load_teacher
from radio_cache import Cache

Run = Callable[..., Result]


@pytest.fixture
def run(fake_teachers: tuple[str, ...], tmp_path: Path) -> Run:
    """run("--images", ...) -> result of a build into out.zarr, by fake-a unless others are named."""

    def build(*options: str | Path, teacher: str = "fake-a") -> Result:
        out = [] if "--out" in options else ["--out", str(tmp_path / "out.zarr")]
        return CliRunner().invoke(main, ["build", "--teacher", teacher, *out, *map(str, options)])

    return build


def error(result: Result, out: Path) -> str:
    """The one sentence of a build that was refused, and left nothing."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert not out.exists()
    return line


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def images(ten_images: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(ten_images.rglob("*.png"))]


# ---------------------------------------------------------------- images


def test_a_broken_member_of_a_tar_is_left_out_and_named(run: Run, tmp_path: Path, images: list[bytes]) -> None:
    place = tar(tmp_path / "a.tar", {"0.png": images[0], "1.png": images[1][:60], "2.png": images[2]})
    result = run("--images", place)
    assert result.exit_code == 0, result.output
    assert "1 of 3 images cannot be used and are left out:" in result.stderr
    assert "a.tar/1.png: cannot be decoded: " in result.stderr
    assert Cache(tmp_path / "out.zarr").usable_rows(["fake-a"]).tolist() == [0, 2]


def test_a_member_that_climbs_out_of_a_tar_is_passed_over_and_named(
    run: Run, tmp_path: Path, images: list[bytes]
) -> None:
    place = tar(tmp_path / "a.tar", {"0.png": images[0], "../../etc/1.png": images[1]})
    result = run("--images", place)
    assert result.exit_code == 0, result.output
    assert "1 file skipped, whose path leads out of the tar (../../etc/1.png)" in result.stderr
    assert Cache(tmp_path / "out.zarr").num_images == 1


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"pixels": [[1]], "label": [1]}, "", "has no column with the bytes of images; its columns are pixels (list<"),
        (
            {"jpg": [b"x"], "label": [1]},
            "#image",
            "column image does not exist; the columns are jpg (binary), label (int64)",
        ),
        ({"jpg": [b"x"], "label": [1]}, "#jpg,kind", "column kind does not exist; the columns are jpg, label"),
    ],
)
def test_a_parquet_file_without_the_column_names_those_it_has(
    run: Run, tmp_path: Path, columns: dict[str, list[object]], asked: str, message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert message in error(run("--images", f"{tmp_path}/a.parquet{asked}"), tmp_path / "out.zarr")


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_a_path_missing_in_the_middle_of_a_list_is_left_out_and_named(
    run: Run, tmp_path: Path, ten_images: Path, name: str
) -> None:
    lines = [f"{ten_images}/ant/0.png", f"{ten_images}/ant/gone.png", f"{ten_images}/ant/2.png"]
    (tmp_path / name).write_text("\n".join((["path"] if name.endswith(".csv") else []) + lines))
    result = run("--images", tmp_path / name)
    assert result.exit_code == 0, result.output
    assert (
        f"1 of 3 files does not exist (line {2 + name.endswith('.csv')}: {lines[1]}) and will be left out"
        in result.stderr
    )
    assert Cache(tmp_path / "out.zarr").usable_rows(["fake-a"]).tolist() == [0, 2]


def test_an_image_larger_than_the_limit_is_left_out_with_both_numbers(
    run: Run, tmp_path: Path, ten_images: Path
) -> None:
    result = run("--images", ten_images, "--max-pixels", "2000")
    assert result.exit_code == 0, result.output
    assert (
        "bee/photo0.png: 90 x 33 pixels is more than the limit of 2000; raise --max-pixels if you trust it"
        in result.stderr
    )


def test_a_bucket_that_cannot_be_reached_is_named(
    run: Run, tmp_path: Path, ten_images: Path, monkeypatch: pytest.MonkeyPatch, bucket: Callable[[str], str]
) -> None:
    source, target = bucket("photos"), bucket("cache.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in error(run("--images", source), tmp_path / "out.zarr")
    assert "http://127.0.0.1:9 cannot be reached" in error(
        run("--images", ten_images, "--out", target), tmp_path / "none"
    )


def test_the_member_of_samples_is_named_for_tars_alone(run: Run, tmp_path: Path, ten_images: Path) -> None:
    assert "--member 'jpg' names members of samples in tars, and no --images is a tar: leave it out" in error(
        run("--images", ten_images, "--member", "jpg"), tmp_path / "out.zarr"
    )
    photo = next(ten_images.rglob("*.png"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            tar.add(photo, f"{number}.png")
            tar.add(photo, f"{number}.seg.png")
    result = run("--images", tmp_path / "a.tar")
    assert (
        "3 images beside another one of the same sample, such as 0.seg.png: cached as photos of their own"
        in result.stderr
    )
    assert Cache(tmp_path / "out.zarr").num_images == 6
    refused = run("--images", tmp_path / "a.tar", "--member", "png")
    assert "--member was not given when the cache was made, and is png now" in refused.stderr
    for _ in range(2):
        result = run("--images", tmp_path / "a.tar", "--member", "png", "--out", tmp_path / "photos.zarr")
        assert (result.exit_code, Cache(tmp_path / "photos.zarr").num_images) == (0, 3), result.output


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def lite1() -> Path:
    return find_weights(find_teacher("efficientnet-lite1"), None)


def test_the_checkpoint_of_another_model_is_refused_with_tensors_and_a_guess(
    run: Run, tmp_path: Path, ten_images: Path, lite1: Path
) -> None:
    said = error(run("--images", ten_images, "--weights", lite1, teacher="efficientnet-lite0"), tmp_path / "out.zarr")
    assert "teacher 'efficientnet-lite0': " in said
    assert f"{lite1.name} does not fit the network: " in said
    assert "tensors missing (such as " in said
    assert said.endswith("Its sizes are those of efficientnet-lite1: use --teacher efficientnet-lite1")


def test_an_architecture_that_differs_names_the_first_differing_tensors(
    run: Run, tmp_path: Path, ten_images: Path
) -> None:
    state = load_teacher("efficientnet-lite0")._net.state_dict()
    state["blocks.0.0.conv_dw.weight"] = torch.zeros(32, 1, 5, 5)
    torch.save(state, tmp_path / "other.pth")
    said = error(
        run("--images", ten_images, "--weights", tmp_path / "other.pth", teacher="efficientnet-lite0"),
        tmp_path / "out.zarr",
    )
    assert "blocks.0.0.conv_dw.weight" in said
    assert "(32, 1, 5, 5)" in said
    assert "(32, 1, 3, 3)" in said


def test_a_half_downloaded_checkpoint_is_named_with_its_size(
    run: Run, tmp_path: Path, ten_images: Path, lite1: Path
) -> None:
    half = tmp_path / "half.pth"
    half.write_bytes(lite1.read_bytes()[: lite1.stat().st_size // 2])
    said = error(run("--images", ten_images, "--weights", half, teacher="efficientnet-lite1"), tmp_path / "out.zarr")
    assert f"Its {half.stat().st_size} bytes are not the whole file, or not such a file: fetch it again" in said
