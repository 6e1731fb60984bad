"""The ViT student: patches, cropped position embeddings, class tokens."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from radio_cache.errors import ConfigError
from trainer.students import ViT, create_student
from trainer.students.positions import CroppedPositions, crop_points
from trainer.students.vit import cut_patches


def positions(side: int = 8, width: int = 4, drop: float = 0.0) -> CroppedPositions:
    torch.manual_seed(0)
    return CroppedPositions(side, width, drop=drop)


def test_patches_are_row_major_and_flattened_channel_first() -> None:
    images = torch.arange(2 * 3 * 32 * 48).float().view(2, 3, 32, 48)
    patches = cut_patches(images, 16)
    assert patches.shape == (2, 6, 3 * 16 * 16)
    torch.testing.assert_close(patches[1, 4], images[1, :, 16:32, 16:32].flatten())


def test_crops_follow_the_published_scale_aspect_and_place() -> None:
    torch.manual_seed(0)
    ys, xs = crop_points(20_000, (6, 9), torch.device("cpu"))
    assert ys.shape == (20_000, 6)
    assert xs.shape == (20_000, 9)
    assert ys.min() >= 0
    assert xs.min() >= 0
    assert ys.max() <= 1 + 1e-6
    assert xs.max() <= 1 + 1e-6
    span_y, span_x = ys[:, -1] - ys[:, 0], xs[:, -1] - xs[:, 0]
    # Where neither side was cut to 1, their product is s squared and their ratio the squared aspect.
    uncut = (span_y < 0.999) & (span_x < 0.999)
    scale, log_aspect = (span_y * span_x)[uncut].sqrt(), (span_x / span_y)[uncut].log() / 2
    assert scale.min() >= math.sqrt(0.1) - 1e-4
    assert log_aspect.abs().max() <= math.log(4 / 3) + 1e-4
    # Scales below 3/4 are never cut, so there they stay uniform: each tenth of that range holds a tenth of them.
    low = scale[scale < 0.75]
    counts = torch.histc(low, bins=10, min=math.sqrt(0.1), max=0.75) / low.numel()
    assert counts.sub(0.1).abs().max() < 0.015
    assert len(low) / 20_000 == pytest.approx((0.75 - math.sqrt(0.1)) / (1 - math.sqrt(0.1)), abs=0.015)
    # The place is uniform in the room that is left.
    place = ys[:, 0][uncut] / (1 - span_y[uncut])
    assert place.mean().item() == pytest.approx(0.5, abs=0.02)
    assert place.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.02)


def test_points_of_a_crop_are_evenly_spaced() -> None:
    ys, _ = crop_points(4, (5, 5), torch.device("cpu"))
    steps = ys.diff(dim=1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))


def test_reading_the_table_equals_grid_sample_and_so_does_its_gradient() -> None:
    module = positions()
    ys, xs = crop_points(5, (3, 6), torch.device("cpu"))
    grid = torch.stack([xs[:, None, :].expand(-1, 3, -1), ys[:, :, None].expand(-1, -1, 6)], dim=-1) * 2 - 1
    table = module.table.T.reshape(1, -1, 8, 8).expand(5, -1, -1, -1)
    expected = F.grid_sample(table, grid, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module.read(ys, xs), expected)
    weights = torch.randn_like(expected)
    (ours,) = torch.autograd.grad((module.read(ys, xs) * weights).sum(), module.table)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), module.table)
    torch.testing.assert_close(ours, theirs)


def test_the_edges_of_the_table_can_be_read() -> None:
    module = positions()
    edges = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(module.read(edges, edges)[0], module.table[[0, 7, 56, 63]])


@pytest.mark.parametrize("side", [4, 8, 11])
def test_evaluation_on_a_square_grid_equals_a_plain_resize(side: int) -> None:
    module = positions().eval()
    table = module.table.T.reshape(1, -1, 8, 8)
    plain = F.interpolate(table, (side, side), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    added = module(torch.zeros(1, side * side, 4), (side, side))
    torch.testing.assert_close(added, plain)


def test_evaluation_on_an_oblong_grid_is_the_top_left_of_the_square_one() -> None:
    module = positions().eval()
    square = module.top_left((6, 6)).view(6, 6, 4)
    torch.testing.assert_close(module.top_left((6, 4)).view(6, 4, 4), square[:, :4])
    torch.testing.assert_close(module.top_left((3, 6)).view(3, 6, 4), square[:3])


def test_training_crops_differ_between_images_and_repeat_with_the_seed() -> None:
    module = positions().train()
    tokens = torch.zeros(2, 16, 4)
    torch.manual_seed(3)
    first = module(tokens, (4, 4))
    torch.manual_seed(3)
    again = module(tokens, (4, 4))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first[0], first[1])


def test_a_grid_as_large_as_the_table_uses_all_of_it_in_training() -> None:
    module = positions().train()
    added = module(torch.zeros(2, 64, 4), (8, 8))
    torch.testing.assert_close(added, module.table.expand(2, -1, -1))


def test_position_drop_leaves_whole_images_without_positions() -> None:
    module = positions(drop=0.25).train()
    torch.manual_seed(0)
    added = module(torch.zeros(2000, 4, 4), (2, 2))
    without = (added == 0).flatten(1).all(1)
    assert without.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert module.eval()(torch.zeros(1, 4, 4), (2, 2)).abs().sum() > 0


@pytest.mark.parametrize(("class_tokens", "registers"), [(1, 7), (3, 5), (4, 4), (8, 8)])
def test_class_tokens_and_registers_fill_a_multiple_of_eight(class_tokens: int, registers: int) -> None:
    student = create_student("vit-tiny-16", num_summary_tokens=class_tokens, depth=1)
    assert student.get_parameter("tokens").shape == (class_tokens + registers, 192)
    assert student.summary_dim == class_tokens * 192
    assert student(torch.rand(2, 3, 32, 48)).summary.shape == (2, class_tokens * 192)


def test_number_of_registers_can_be_set() -> None:
    assert create_student("vit-tiny-16", registers=0, depth=1).get_parameter("tokens").shape == (1, 192)


def test_tables_of_the_papers_have_128_by_128_positions() -> None:
    with torch.device("meta"):
        assert create_student("vit-b-16").get_parameter("positions.table").shape == (16_384, 768)
        assert create_student("vit-b-14", max_resolution=1050).get_parameter("positions.table").shape == (5_625, 768)


# timm's vit_base, _large and _huge without head, final norm, positions and class token, plus this table and 8 tokens.
@pytest.mark.parametrize(("name", "millions"), [("vit-b-16", 98.2), ("vit-l-16", 319.9), ("vit-h-16", 651.6)])
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        student = create_student(name)
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


# timm's blocks, patch embedding and tokens of the same shape; layer scale is folded into our matrices.
@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        ("vit-s-16", "vit_small_patch16_224"),
        ("vit-b-16", "vit_base_patch16_224"),
        ("vit-l-16", "vit_large_patch16_224"),
        ("vit-s-14", "vit_small_patch14_dinov2"),
        ("vit-b-14", "vit_base_patch14_dinov2"),
        ("vit-l-14", "vit_large_patch14_dinov2"),
        ("vit-h-14", "vit_huge_patch14_224"),
        ("vit-so400m-14", "vit_so400m_patch14_siglip_224"),
        ("vit-g-14", "vit_giant_patch14_dinov2"),
    ],
)
def test_parameters_are_those_of_timm_in_the_same_shape(name: str, timm_name: str) -> None:
    with torch.device("meta"):
        student = create_student(name)
        theirs = timm.create_model(timm_name)
    scales = sum(p.numel() for key, p in theirs.named_parameters() if key.endswith("gamma"))
    blocks = sum(p.numel() for p in theirs.blocks.parameters()) - scales
    assert sum(p.numel() for p in student.get_submodule("blocks").parameters()) == blocks
    assert student.get_parameter("embed.weight").numel() == theirs.patch_embed.proj.weight.numel()


def test_intermediates_end_in_what_forward_gives_and_stop_behind_the_last_asked_for() -> None:
    student = vit()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        first, last = student.intermediates(images, [1, -1])
        (maps,) = student.intermediates(images, [1], feature_fmt="NCHW")
        torch.testing.assert_close(last, student(images))
        torch.testing.assert_close(maps.spatial.flatten(2).transpose(1, 2), first.spatial)
        assert not torch.allclose(first.spatial, last.spatial)
        for parameter in student.blocks[2].parameters():
            parameter.fill_(torch.nan)
        torch.testing.assert_close(student.intermediates(images, [1])[0], first)


def test_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="has blocks 0 to 3, not 4"):
        vit().intermediates(torch.rand(1, 3, 32, 32), [4])


def vit(**overrides: object) -> ViT:
    torch.manual_seed(0)
    settings = {"width": 24, "depth": 4, "heads": 2, "registers": 2, "max_resolution": 128, **overrides}
    student = create_student("vit-tiny-16", **settings).eval()
    assert isinstance(student, ViT)
    return student


def test_a_compiled_windowed_vit_has_no_graph_break_in_evaluation() -> None:
    student = vit(window=2)
    images = torch.rand(2, 3, 64, 64)
    explanation = torch._dynamo.explain(student)(images)
    assert explanation.graph_break_count == 0
