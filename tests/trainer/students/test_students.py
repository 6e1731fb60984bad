"""One contract for every student: shapes, formats, sizes, errors. On the meta device, where size costs nothing."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from radio_cache.errors import ConfigError, RadioCacheError
from trainer.students import (
    STUDENTS,
    Student,
    StudentInputError,
    UnsupportedResolutionError,
    create_student,
)

# The ways timm models hand out maps: a convnet, one that gives NHWC, a transformer.
TIMM = ("timm:resnet10t", "timm:swin_tiny_patch4_window7_224", "timm:vit_tiny_patch16_224")
TINY = ("e-radio-tiny", "vit-tiny-16")


@functools.cache
def on_meta(name: str) -> Student:
    with torch.device("meta"):
        return create_student(name).eval()


@pytest.mark.parametrize("name", [*STUDENTS, *TIMM])
def test_contract_of_shapes_widths_and_formats(name: str) -> None:
    student = on_meta(name)
    assert student.name == name
    h, w = student.fixed_resolution or (2 * student.min_resolution_step, 3 * student.min_resolution_step)
    rows, columns = h // student.patch_size, w // student.patch_size
    images = torch.empty(2, 3, h, w, device="meta")
    tokens, maps = student(images), student(images, feature_fmt="NCHW")
    assert tokens.summary.shape == maps.summary.shape == (2, student.summary_dim)
    assert tokens.spatial.shape == (2, rows * columns, student.embed_dim)
    assert maps.spatial.shape == (2, student.embed_dim, rows, columns)
    assert student.summary_dim % student.num_summary_tokens == 0


@pytest.mark.parametrize("name", [*STUDENTS, *TIMM])
def test_preferred_resolution_is_legal(name: str) -> None:
    student = on_meta(name)
    assert student.nearest_supported_resolution(*student.preferred_resolution) == student.preferred_resolution


@pytest.mark.parametrize("name", [*STUDENTS, *TIMM])
def test_illegal_size_names_the_nearest_legal_one(name: str) -> None:
    student = on_meta(name)
    h, w = student.preferred_resolution
    with pytest.raises(UnsupportedResolutionError, match=f"got {h} x {w + 1}: resize to {h} x {w}") as caught:
        student(torch.empty(1, 3, h, w + 1, device="meta"))
    assert isinstance(caught.value, RadioCacheError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", [*STUDENTS, *TIMM])
def test_parameters_that_must_not_decay_exist(name: str) -> None:
    student = on_meta(name)
    assert student.no_weight_decay <= dict(student.named_parameters()).keys()


@pytest.mark.parametrize("name", [*TINY, "timm:resnet10t"])
@pytest.mark.parametrize("image_hw", [(32, 32), (128, 32), (64, 96)])
def test_every_parameter_gets_a_finite_gradient_at_small_and_oblong_sizes(name: str, image_hw: tuple[int, int]) -> None:
    student = create_student(name)
    out = student(torch.rand(3, 3, *image_hw))
    (out.summary.square().mean() + out.spatial.square().mean()).backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


SMALL_SWIN = {"img_size": (64, 96), "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in (*TINY, "timm:resnet10t")), ("timm:swin_tiny_patch4_window7_224", SMALL_SWIN)],
)
def test_tokens_are_the_map_row_major_from_the_top_left(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    student = create_student(name, **options).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        tokens, maps = student(images).spatial, student(images, feature_fmt="NCHW").spatial
    columns = maps.shape[-1]
    torch.testing.assert_close(tokens[:, columns + 2], maps[:, :, 1, 2])
    # What changes in the lower right of the image changes the lower right of the map more than the upper left.
    images[..., -16:, -16:] = 1 - images[..., -16:, -16:]
    with torch.no_grad():
        change = (student(images, feature_fmt="NCHW").spatial - maps).abs().sum(1)[0]
    assert change[-1, -1] > change[0, 0]


@pytest.mark.parametrize("name", [*TINY, "timm:resnet10t"])
def test_evaluation_of_an_image_does_not_depend_on_its_batch(name: str) -> None:
    student = create_student(name).eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        together, alone = student(images), student(images[1:2])
    torch.testing.assert_close(together.spatial[1:2], alone.spatial, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.summary[1:2], alone.summary, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_state_dict_round_trip_gives_the_same_features(name: str) -> None:
    student, other = create_student(name).eval(), create_student(name).eval()
    other.load_state_dict(student.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(images), student(images), rtol=0, atol=0)


def test_conditioner_subtracts_the_mean_of_clip_and_stays_out_of_the_state_dict() -> None:
    student = create_student("vit-tiny-16")
    assert not any(name.startswith("input_") for name in student.state_dict())
    assert student.input_mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert student.input_std.flatten().tolist() == pytest.approx([0.26862954, 0.26130258, 0.27577711])


def test_half_precision_student_takes_float32_images() -> None:
    student = create_student("vit-tiny-16").bfloat16().eval()
    assert student(torch.rand(1, 3, 32, 32)).spatial.dtype == torch.bfloat16


def test_integer_images_are_refused() -> None:
    with pytest.raises(StudentInputError, match=r"takes float images in \[0, 1\], got torch.uint8"):
        create_student("vit-tiny-16")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("asked_hw", "nearest_hw"), [((1, 40), (32, 32)), ((48, 47), (64, 32)), ((240, 250), (256, 256))]
)
def test_nearest_supported_resolution_rounds_halves_up_and_gives_at_least_one_step(
    asked_hw: tuple[int, int], nearest_hw: tuple[int, int]
) -> None:
    assert create_student("e-radio-tiny").nearest_supported_resolution(*asked_hw) == nearest_hw


def test_unknown_student_error_names_the_closest_and_says_what_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'e-radio-tiny'.* `radio-train --student help` lists all"):
        create_student("e-radio-tinny")


def test_a_model_of_timm_without_its_prefix_is_recognised() -> None:
    with pytest.raises(ConfigError, match="`--student timm:resnet18`"):
        create_student("resnet18")


def test_unknown_setting_error_names_the_closest() -> None:
    with pytest.raises(
        ConfigError, match=r"no setting of student 'e-radio-tiny' is called 'widht'. Did you mean 'width'"
    ):
        create_student("e-radio-tiny", widht=3)


def test_impossible_settings_are_refused_by_name_and_value() -> None:
    with pytest.raises(ConfigError, match=r"e-radio-tiny: stage 2 .* not divisible by 7 heads"):
        create_student("e-radio-tiny", heads=(7, 8))
    with pytest.raises(ConfigError, match="vit-tiny-16: width 192 is not divisible by 5 heads"):
        create_student("vit-tiny-16", heads=5)
    with pytest.raises(ConfigError, match="position_drop is in"):
        create_student("vit-tiny-16", position_drop=1.0)


@pytest.mark.parametrize("name", [*STUDENTS, *TIMM])
def test_what_is_no_batch_of_rgb_images_is_refused_with_its_shape(name: str) -> None:
    student = on_meta(name)
    h, w = student.preferred_resolution
    for shape in ((3, h, w), (1, 4, h, w), (1, h, w, 3)):
        with pytest.raises(StudentInputError, match=r"takes RGB images \(batch, 3, height, width\), got"):
            student(torch.empty(shape, device="meta"))


@pytest.mark.parametrize("name", [*STUDENTS, *TIMM])
def test_unknown_feature_format_is_refused_and_not_taken_for_tokens(name: str) -> None:
    student = on_meta(name)
    with pytest.raises(StudentInputError, match=r"feature_fmt is 'NLC' .* got 'NHWC'"):
        student(torch.empty(1, 3, *student.preferred_resolution, device="meta"), feature_fmt="NHWC")


def small_student() -> Any:
    return create_student("vit-tiny-16", width=24, depth=2, heads=2).eval()


def range_warnings(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "RGB images in [0, 1]" in str(one.message)]


@pytest.mark.parametrize(
    ("scale", "shift", "cure"),
    [(255.0, 0.0, "divide by 255"), (4.4, -2.1, "leave out the normalisation"), (2.0, -1.0, "leave out")],
)
def test_pixels_of_another_range_are_warned_of_once(scale: float, shift: float, cure: str) -> None:
    student, images = small_student(), torch.rand(2, 3, 32, 32) * scale + shift
    (message,) = range_warnings(lambda: student(images))
    assert cure in message
    assert range_warnings(lambda: student(images)) == []
    assert range_warnings(lambda: small_student()(images.half())) != []


def test_pixels_as_they_should_be_and_what_resizing_overshoots_are_not_warned_of() -> None:
    for images in (torch.rand(2, 3, 32, 32), torch.zeros(1, 3, 32, 32), torch.rand(2, 3, 32, 32) * 1.3 - 0.15):
        assert range_warnings(lambda images=images: small_student()(images)) == []


def test_the_look_at_pixels_is_no_obstacle_for_compilers_and_exporters() -> None:
    images = torch.rand(2, 3, 32, 32) * 255
    with torch.no_grad():
        plain = small_student()
        compiled = torch.compile(plain, fullgraph=True, backend="eager")
        found = compiled(images).spatial
        assert range_warnings(lambda: torch.testing.assert_close(found, plain(images).spatial))
        torch.export.export(small_student(), (images,))
        student = small_student()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "There is a performance drop because we have not yet implemented the batching rule"
            )
            torch.vmap(lambda image: student(image[None]).summary)(images)
        with torch.device("meta"):
            small_student()(torch.rand(2, 3, 32, 32))
