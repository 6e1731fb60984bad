import pytest

from radio_cache.errors import ConfigError
from trainer.recipes.overrides import apply_overrides
from trainer.recipes.presets import am_radio, quick


def test_settings_are_typed_by_their_field() -> None:
    changed = apply_overrides(
        quick(),
        {
            "lr": "1e-4",
            "steps": "7",
            "crop_area": "0.5,1",
            "normalise": "none",
            "adaptor_width": "none",
            "channels_last": "false",
            "student_overrides.depths": "[1, 1, 1, 1]",
            "teacher_weights.sam": "0.5",
        },
    )
    [stage] = changed.stages
    assert (stage.lr, stage.steps, changed.crop_area, changed.normalise) == (1e-4, 7, (0.5, 1.0), "none")
    assert changed.adaptor_width is None
    assert changed.channels_last is False
    assert changed.student_overrides == {"depths": [1, 1, 1, 1]}
    assert changed.teacher_weights == {"sam": 0.5}


def test_a_path_reaches_one_group_of_one_stage() -> None:
    settings = {"stages.1.groups.1.teachers": "a,b*", "stages.1.groups.1.image_px": "64", "stages.0.lr": "0.1"}
    changed = apply_overrides(am_radio(), settings)
    assert changed.stages[1].groups[1].teachers == ("a", "b*")
    assert [group.image_px for group in changed.stages[1].groups] == [432, 64]
    assert [stage.lr for stage in changed.stages] == [0.1, 1e-3]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("crop_are", "0.5,1", "no recipe setting is called 'crop_are'. Did you mean 'crop_area'"),
        ("batch_image", "3", "no recipe setting is called 'batch_image'. Did you mean 'batch_images'"),
        ("stages.0.step", "3", "no recipe setting of stages.0 is called 'step'. Did you mean 'steps'"),
        ("stages.3.steps", "3", "stages has 1, counted from 0; there is no 3"),
        ("steps", "many", "--set steps=many: steps is 'many', not a whole number"),
        ("steps", "1.5", "--set steps=1.5"),
        ("steps", "true", "--set steps=true"),
        ("steps", "0", "steps must be at least 1"),
        ("lr", "-1", "lr must be above 0"),
        ("crop_area", "0.9,0.1", "crop_area must be two rising numbers"),
        ("crop_area", "0.5", "--set crop_area=0.5"),
        ("normalise", "phi", "--set normalise=phi: normalise is 'phi', not one of none, global"),
        ("seed.x", "1", "'seed' is one value"),
        ("name", "x", "no recipe setting is called 'name'"),
    ],
)
def test_a_bad_setting_is_named(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(quick(), {key: value})
    assert message in str(error.value)
