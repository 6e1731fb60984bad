"""`NAME=VALUE` options: one value for all teachers, or one for each."""

from pathlib import Path
from typing import Any

import pytest

from cache_builder.commands.build_options import codec_requests, per_teacher, pixels, teacher_options
from cache_builder.teachers import TeacherOptions
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import ConfigError
from radio_cache.format.codec_record import CodecRecord

TEACHERS = ("clip", "sam")


def sizes(*given: str) -> dict[str, int]:
    return per_teacher("--size", given, TEACHERS, pixels, shared=True)


def weights(*given: str, teachers: tuple[str, ...] = TEACHERS) -> dict[str, Path]:
    return per_teacher("--weights", given, teachers, Path, shared=False)


def test_a_bare_value_is_every_teachers_and_a_named_one_wins_in_any_order() -> None:
    assert sizes() == {}
    assert sizes("224") == {"clip": 224, "sam": 224}
    assert sizes("sam=1024") == {"sam": 1024}
    assert sizes("224", "sam=1024") == sizes("sam=1024", "224") == {"clip": 224, "sam": 1024}


def test_one_file_cannot_be_the_weights_of_two_teachers() -> None:
    with pytest.raises(ConfigError, match=r"--weights w\.pt: with several teachers, name one: --weights clip=w\.pt"):
        weights("w.pt")
    assert weights("w.pt", teachers=("sam",)) == {"sam": Path("w.pt")}
    assert weights("sam=a/b.pt", "clip=c.pt") == {"sam": Path("a/b.pt"), "clip": Path("c.pt")}


def test_a_name_that_is_not_built_is_named_with_those_that_are() -> None:
    with pytest.raises(
        ConfigError, match=r"--size dino=224: 'dino' is not among the teachers of this build \(clip, sam\)"
    ):
        sizes("dino=224")


def test_an_equals_sign_in_a_file_name_is_no_teacher(tmp_path: Path) -> None:
    file = tmp_path / "lr=0.1.pt"
    file.touch()
    assert weights(str(file), teachers=("sam",)) == {"sam": file}
    assert weights(f"sam={file}", teachers=TEACHERS) == {"sam": file}


@pytest.mark.parametrize("text", ["", "0", "-5", "224px", "2.5", "224x224"])
def test_a_size_that_is_no_number_of_pixels_is_refused(text: str) -> None:
    for given in (text, f"sam={text}"):
        with pytest.raises(ConfigError, match=r"--size .*: a size is a whole number of pixels"):
            sizes(given)


def test_a_teacher_given_two_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="--size is given 2 times for sam: one value is possible"):
        sizes("sam=1", "sam=2")
    with pytest.raises(ConfigError, match="--size is given 2 times for clip: one value is possible"):
        sizes("224", "448")


def options(*teachers: str, **given: tuple[str, ...]) -> dict[str, TeacherOptions]:
    flags: Any = dict.fromkeys(
        ("weights", "size", "fit", "features", "codec", "packing", "fidelity", "step", "views"), ()
    )
    return teacher_options(
        teachers, "cpu", **(flags | {"dtype": "auto", "flip_views": False, "compiled": False} | given)
    )


def test_the_first_size_is_the_teacher_itself_and_further_ones_are_levels_beside_it() -> None:
    requested = options("clip", "sam", size=("224", "clip=448", "clip=896"), fidelity=("0.95",))
    assert {name: (one.size_px, one.level_of) for name, one in requested.items()} == {
        "clip": (448, None),
        "clip@896": (896, "clip"),
        "sam": (224, None),
    }
    assert requested["clip@896"].codec == requested["clip"].codec != CodecRecord()
    both = options("clip", "dinov2", size=("448", "224"))
    assert list(both) == ["clip", "clip@224", "dinov2", "dinov2@224"]


def test_the_trunk_of_a_teacher_is_a_teacher_of_its_own_with_the_options_of_the_one_that_was_named() -> None:
    requested = options("clip", "sam", features=("sam=trunk",), weights=("sam=w.pth",), fidelity=("sam=0.999",))
    assert list(requested) == ["clip", "sam-trunk"]
    assert requested["sam-trunk"] == options("sam", weights=("w.pth",), fidelity=("0.999",))["sam"]
    assert list(options("sam", features=("neck",))) == ["sam"]


def test_a_trunk_that_is_not_there_or_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--features trunk: clip has no neck; teachers with one: sam, sam-vit-h"):
        options("clip", "sam", features=("trunk",))
    with pytest.raises(ConfigError, match="--teacher sam-trunk is given twice"):
        options("sam", "sam-trunk", features=("sam=trunk",))
    with pytest.raises(ConfigError, match="--features head: one of neck, trunk"):
        options("sam", features=("head",))


def test_a_size_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--size 224: clip, sam has that already"):
        options("clip", "sam", size=("224", "448", "224"))
    with pytest.raises(ConfigError, match="--size sam=64: sam has that already"):
        options("clip", "sam", size=("sam=64", "sam=64"))


def requests(**given: list[str]) -> dict[str, CodecRequest | None]:
    return codec_requests(["a", "b"], **{"codec": [], "packing": [], "fidelity": [], "step": []} | given)


def test_no_word_about_codecs_leaves_the_choice_to_the_build() -> None:
    assert requests() == {"a": None, "b": None}


def test_codecs_are_set_for_all_teachers_or_for_one() -> None:
    assert requests(codec=["int8"]) == {"a": CodecRequest(name="int8"), "b": CodecRequest(name="int8")}
    assert requests(fidelity=["a=0.999"], packing=["a=zstd"], codec=["b=half"]) == {
        "a": CodecRequest(packing="zstd", fidelity=0.999),
        "b": CodecRequest(name="half"),
    }
    assert requests(step=["b=0.5"])["b"] == CodecRequest(step=0.5)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="--packing is a setting of klt, and a is to be stored as half"):
        requests(codec=["half"], packing=["zstd"])
    with pytest.raises(ConfigError, match="a has both --fidelity and --step"):
        requests(fidelity=["0.99"], step=["0.1"])
    with pytest.raises(ConfigError, match="--fidelity high: that is not a number"):
        requests(fidelity=["high"])
