"""Whoever opens a student or a recipe that somebody sent runs none of the sender's code, unless they allow it by name."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner

from evals.cli import main as eval_main
from radio_cache.allowed_modules import allowing_modules
from radio_cache.errors import ConfigError, RadioCacheError
from radio_cache.reader import Cache
from trainer import load_student
from trainer.cli import main as train_main
from trainer.export_cli import main as export_main
from trainer.exports import Card, export_student
from trainer.model.adaptors import TeacherWidths
from trainer.model.files import save_student
from trainer.model.student import StudentConfig, build_distilled
from trainer.recipes.presets import find_recipe
from trainer.recipes.recipe import Recipe
from trainer.students import create_student

SENT = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()

class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Conv2d(3, width, 16, 16))

def called(**settings):
    Path(__file__).with_name("called").touch()
    return Net()
"""


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the sender's module; files there tell whether it was imported or called."""
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / "sent_by_somebody.py").write_text(SENT)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("sent_by_somebody", None)


OTHERS = StudentConfig(
    student="e-radio-tiny",
    overrides={},
    image_hw=(32, 32),
    fit="squash",
    adaptor_width=4,
    seed=0,
    steps=1,
    images_seen=1,
    teachers=(TeacherWidths(name="t", summary_dim=4, spatial_dim=4),),
    cache="",
    run="",
    recipe="",
)


@pytest.fixture
def student(traces: Path, tmp_path: Path) -> Path:
    """A saved student of the sender's own class; the module is forgotten again."""
    config = StudentConfig(
        student="torch-module:sent_by_somebody:Net",
        overrides={"preferred_resolution": [32, 32]},
        image_hw=(32, 32),
        fit="squash",
        teachers=(TeacherWidths(name="t", summary_dim=4, spatial_dim=4),),
        adaptor_width=4,
        seed=0,
        steps=1,
        images_seen=1,
        cache=str(tmp_path / "gone.zarr"),
        run="run",
        recipe="tiny",
    )
    save_student(build_distilled(config).eval(), tmp_path / "student")
    forget(traces)
    return tmp_path / "student"


def forget(traces: Path) -> None:
    sys.modules.pop("sent_by_somebody", None)
    for name in ("imported", "called"):
        (traces / name).unlink(missing_ok=True)


def renamed(folder: Path, **changes: Any) -> Path:
    file = folder / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_a_student_of_somebodys_own_code_is_loaded_only_where_its_module_is_allowed(
    student: Path, traces: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"student.json: student 'torch-module:sent.*--allow-module sent_by_somebody"
    ) as error:
        load_student(student)
    assert str(student) in str(error.value)
    with pytest.raises(ConfigError, match="--allow-module"):
        load_student(student, untrained=True, allow_modules=["sent", "torch"])
    assert not (traces / "imported").exists()
    images = torch.rand(1, 3, 32, 32)
    mine = load_student(student, allow_modules=["sent_by_somebody"])(images)
    with allowing_modules(["sent_by_somebody:Net"]):
        assert torch.equal(load_student(student)(images).spatial, mine.spatial)


@pytest.mark.parametrize(
    "name", ["torch-module:sent_by_somebody:called", "torch-module:os.path:join", "torch-module:builtins:dict"]
)
def test_no_function_and_no_other_class_is_called_even_in_a_module_that_is_allowed(
    student: Path, traces: Path, name: str
) -> None:
    renamed(student, student=name, overrides={})
    with pytest.raises(ConfigError, match=r"nn\.Module"):
        load_student(student, allow_modules=["sent_by_somebody", "os.path", "builtins"])
    assert not (traces / "called").exists()


def test_every_command_takes_allow_module_and_refuses_without(
    student: Path, traces: Path, tmp_path: Path, tiny_cache: Cache
) -> None:
    arguments = ["--run", str(student), "--no-picture"]
    result = CliRunner().invoke(export_main, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "--allow-module sent_by_somebody" in result.output
    assert not (traces / "imported").exists()
    result = CliRunner().invoke(
        export_main, [*arguments, "--out", str(tmp_path / "out"), "--allow-module", "sent_by_somebody"]
    )
    assert result.exit_code == 0, result.output
    forget(traces)
    rank = ["rank", "--images", str(tiny_cache.path), "--run", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(eval_main, rank)
    assert "--allow-module sent_by_somebody" in result.output
    assert not (traces / "imported").exists()
    result = CliRunner().invoke(eval_main, [*rank, "--allow-module", "sent_by_somebody"])
    assert result.exit_code == 0, result.output


def test_a_recipe_file_names_no_code_and_the_command_line_does(
    traces: Path, tmp_path: Path, tiny_cache: Cache, tiny_recipe: Recipe
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({**asdict(tiny_recipe), "student": "torch-module:sent_by_somebody:Net"}))
    with pytest.raises(ConfigError, match=r"recipe.json: student .*--allow-module sent_by_somebody"):
        find_recipe(str(file))
    assert find_recipe(str(file), allow_modules=["sent_by_somebody"]).student.endswith(":Net")
    train = ["--cache", str(tiny_cache.path), "--device", "cpu", "--recipe", str(file), "--steps", "1"]
    result = CliRunner().invoke(train_main, [*train, "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "--allow-module sent_by_somebody" in result.output
    assert not (tmp_path / "run").exists()
    assert not (traces / "imported").exists()
    result = CliRunner().invoke(
        train_main, [*train, "--out", str(tmp_path / "run"), "--allow-module", "sent_by_somebody"]
    )
    assert result.exit_code == 0, result.output
    assert load_student(tmp_path / "run", allow_modules=["sent_by_somebody"]).config.steps == 1
    forget(traces)
    last = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "last"), "--checkpoint", "last", "--no-picture"]
    result = CliRunner().invoke(export_main, last)
    assert "--allow-module sent_by_somebody" in result.output
    assert not (traces / "imported").exists()
    result = CliRunner().invoke(export_main, [*last, "--allow-module", "sent_by_somebody"])
    assert result.exit_code == 0, result.output
    named = ["--student", "torch-module:sent_by_somebody:Net", "--set", "student_overrides.width=8"]
    quick = [
        "--cache",
        str(tiny_cache.path),
        "--device",
        "cpu",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--image-size",
        "32",
    ]
    result = CliRunner().invoke(train_main, [*quick, *named, "--out", str(tmp_path / "typed")])
    assert result.exit_code == 0, result.output


def test_the_recipe_itself_may_not_be_run_by_a_name_that_settings_smuggle_in(student: Path, traces: Path) -> None:
    """Overrides of a saved student are settings of a constructor: none of them names code, a file or an address."""
    for overrides in ({"path": "os:system"}, {"self": 1}, {"name": "x"}, {"model_name": "y"}):
        with pytest.raises(RadioCacheError):
            load_student(renamed(student, student="e-radio-tiny", overrides=overrides))
        with pytest.raises(RadioCacheError):
            load_student(renamed(student, student="timm:resnet10t", overrides=overrides))
    assert not (traces / "imported").exists()


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_settings_of_timm_that_name_files_and_addresses_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is no setting of a student"):
        create_student("timm:resnet10t", **{option: "somewhere"})
    with pytest.raises(ConfigError, match=f"{option} is no setting of a student"):
        build_distilled(replace(OTHERS, student="timm:resnet10t", overrides={option: "somewhere"}))


def test_a_file_of_first_weights_is_read_as_tensors_alone(tmp_path: Path) -> None:
    import pickle

    file = tmp_path / "weights.pt"
    file.write_bytes(pickle.dumps({"weight": Path("not a tensor")}))
    for name, overrides in (("timm:resnet10t", {}), ("vit-tiny-16", {"init_from": "vit_tiny_patch16_224"})):
        with pytest.raises(ConfigError, match="is no file of weights"):
            create_student(name, **overrides, init_file=str(file))
    torch.save(timm.create_model("resnet10t").state_dict(), file)
    student = create_student("timm:resnet10t", init_file=str(file))
    assert torch.equal(student.net.conv1[0].weight, torch.load(file)["conv1.0.weight"])


def test_a_timm_folder_that_names_code_is_refused(traces: Path, tmp_path: Path) -> None:
    import trainer.carried.timm_radio_student  # noqa: F401  # registers radio_student

    folder = tmp_path / "timm"
    folder.mkdir()
    arguments = {"student": "torch-module:sent_by_somebody:called", "overrides": {}}
    document = {"architecture": "radio_student", "num_classes": 0, "model_args": arguments, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="--allow-module sent_by_somebody"):
        timm.create_model(f"local-dir:{folder}", pretrained=False)
    assert not (traces / "imported").exists()


def test_an_hf_folder_that_names_code_is_refused(traces: Path, student: Path) -> None:
    from trainer.carried.modeling_radio_student import RadioStudentConfig, RadioStudentModel

    distilled = json.loads((student / "student.json").read_text())
    distilled.pop("weights_sha256", None)
    with pytest.raises(ConfigError, match="--allow-module sent_by_somebody"):
        RadioStudentModel(RadioStudentConfig(distilled=distilled))
    assert not (traces / "imported").exists()


def test_an_export_of_ones_own_network_says_how_to_load_it(student: Path, tmp_path: Path) -> None:
    report = export_student(student, tmp_path / "out", card=Card(pictures=()), allow_modules=["sent_by_somebody"])
    assert "allow_modules=['sent_by_somebody']" in "".join(report.exported[0].written.use)


@pytest.mark.parametrize("name", ["a'], x=1)#\nimport os", "../up", "<script>", "A B", ""])
def test_names_of_teachers_that_would_be_code_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    """They go into lines of Python, on the screen and in model cards, which people copy."""
    save_student(build_distilled(OTHERS).eval(), tmp_path / "sent")
    load_student(tmp_path / "sent")
    folder = renamed(tmp_path / "sent", teachers=[{"name": name, "summary_dim": 4, "spatial_dim": 4}])
    with pytest.raises(ConfigError, match="cannot name a group"):
        load_student(folder)
    result = CliRunner().invoke(export_main, ["--run", str(folder), "--out", str(tmp_path / "out"), "--no-picture"])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert not (tmp_path / "out").exists()
