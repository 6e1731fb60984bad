"""SAM: small random models of segment-anything's own classes give the same maps as its encoder and its predictor."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide

from cache_builder.teachers import TeacherOptions, TeacherPreset, load_recorded, load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.presets import SAMS
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.geometry.crops import valid_hw

See = Callable[[Teacher, Image.Image], torch.Tensor]


def encoder(
    *,
    img_size: int = 256,
    width: int = 64,
    depth: int = 4,
    heads: int = 2,
    window: int = 5,
    global_blocks: tuple[int, ...] = (1, 3),
    channels: int = 16,
) -> ImageEncoderViT:
    return ImageEncoderViT(
        img_size=img_size,
        patch_size=16,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4.0,
        out_chans=channels,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        qkv_bias=True,
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_blocks,
    )


def small_sam(image_encoder: ImageEncoderViT, *, channels: int = 16, seed: int = 0) -> Sam:
    """A whole SAM around an encoder; every tensor random, so that none could be forgotten unnoticed."""
    size = image_encoder.img_size
    prompts = PromptEncoder(
        embed_dim=channels,
        image_embedding_size=(size // 16, size // 16),
        input_image_size=(size, size),
        mask_in_chans=4,
    )
    decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer_dim=channels,
        iou_head_depth=2,
        iou_head_hidden_dim=16,
        transformer=TwoWayTransformer(depth=1, embedding_dim=channels, mlp_dim=32, num_heads=2),
    )
    torch.manual_seed(seed)
    sam = Sam(image_encoder, prompts, decoder).eval()
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return sam


def load(path: Path, size_px: int | None = None, name: str = "sam-vit-b") -> Teacher:
    return load_teacher(name, TeacherOptions(weights=path, size_px=size_px))


def saved(sam: Sam, path: Path, name: str = "sam-vit-b") -> Teacher:
    torch.save(sam.state_dict(), path)
    return load(path, name=name)


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"window": 4},
        {"window": 16, "global_blocks": ()},
        {"window": 7, "global_blocks": (0,), "depth": 2},
        {"global_blocks": (0, 1, 2, 3)},
        {"heads": 4, "width": 32, "channels": 8},
        {"img_size": 224},
    ],
    ids=["windows of 5", "windows of 4", "window of all", "two blocks", "no window", "narrow", "224 px"],
)
def test_maps_are_those_of_segment_anythings_own_encoder(tmp_path: Path, architecture: dict[str, int]) -> None:
    sam = small_sam(encoder(**architecture), channels=architecture.get("channels", 16))
    teacher = saved(sam, tmp_path / "sam.pth")
    size = sam.image_encoder.img_size
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected, out = sam.image_encoder(images), teacher(images)
    assert out.summary is None
    assert out.spatial.shape == (1, *teacher.spec.geometry.grid_hw, teacher.spec.spatial_dim)
    torch.testing.assert_close(out.spatial.permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-5)


def test_maps_of_a_trunk_are_what_segment_anythings_own_neck_reads(
    tmp_path: Path, seen_by: See, chelsea: Image.Image
) -> None:
    sam = small_sam(encoder())
    teacher = saved(sam, tmp_path / "sam.pth", "sam-vit-b-trunk")
    read: list[torch.Tensor] = []
    sam.image_encoder.neck.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.inference_mode():
        images = seen_by(teacher, chelsea)
        out = teacher(images)
        after = sam.image_encoder.neck(out.spatial.permute(0, 3, 1, 2))
        expected = sam.image_encoder(images)
    assert out.summary is None
    assert out.spatial.shape == (1, 16, 16, 64) == (1, *teacher.spec.geometry.grid_hw, teacher.spec.spatial_dim)
    torch.testing.assert_close(out.spatial.permute(0, 3, 1, 2), read[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert (teacher.spec.name, teacher.spec.spatial_note) == (
        "sam-vit-b-trunk",
        "after the last block, before the neck",
    )


def test_a_recorded_trunk_is_loaded_as_a_trunk(tmp_path: Path) -> None:
    spec = saved(small_sam(encoder()), tmp_path / "sam.pth", "sam-trunk").spec
    assert load_recorded(spec).spec == spec


def assert_same_as_predictor(teacher: Teacher, sam: Sam, image: Image.Image, see: See) -> None:
    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(image))
    with torch.inference_mode():
        ours = teacher(see(teacher, image)).spatial.permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, predictor.features, atol=1e-5, rtol=1e-5)


def test_maps_of_a_photo_are_those_of_the_predictor(tmp_path: Path, seen_by: See, chelsea: Image.Image) -> None:
    """The whole way of an image: its file's pixels, the resize, the padding, the encoder. Only the input size is ours."""
    sam = small_sam(encoder())
    assert_same_as_predictor(saved(sam, tmp_path / "sam.pth"), sam, chelsea, seen_by)


@pytest.mark.slow
def test_maps_of_a_photo_are_those_of_the_predictor_at_sams_own_size(
    tmp_path: Path, seen_by: See, chelsea: Image.Image
) -> None:
    sam = small_sam(encoder(img_size=1024, window=14))
    assert_same_as_predictor(saved(sam, tmp_path / "sam.pth"), sam, chelsea, seen_by)


def test_pixels_are_bitwise_those_of_segment_anything_at_its_own_size(
    tmp_path: Path, seen_by: See, photo: Image.Image
) -> None:
    sam = small_sam(encoder(img_size=1024, width=16, depth=1, heads=1, window=0, global_blocks=(0,)))
    teacher = saved(sam, tmp_path / "sam.pth")
    resized = ResizeLongestSide(1024).apply_image(np.asarray(photo))
    expected = sam.preprocess(torch.as_tensor(resized).permute(2, 0, 1))
    assert torch.equal(seen_by(teacher, photo)[0], expected)
    assert valid_hw((photo.height, photo.width), teacher.spec.geometry) == resized.shape[:2]


def test_on_a_cpu_images_go_one_by_one_so_that_memory_does_not_grow_with_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = ImageEncoderViT.forward

    def counted(self: ImageEncoderViT, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(ImageEncoderViT, "forward", counted)
    teacher = saved(small_sam(encoder()), tmp_path / "sam.pth")
    images = torch.randn(3, 3, 256, 256)
    with torch.inference_mode():
        together = teacher(images).spatial
        alone = torch.cat([teacher(image[None]).spatial for image in images])
    assert seen == [1] * 6
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_the_architecture_is_read_from_the_file_and_told(tmp_path: Path) -> None:
    teacher = saved(small_sam(encoder()), tmp_path / "sam.pth")
    assert teacher.notes == ("these weights are not the published SAM vit_b: width 64, 4 blocks",)
    assert teacher.spec.geometry.input_hw == (256, 256)
    assert (teacher.spec.summary_dim, teacher.spec.spatial_dim) == (None, 16)


def test_other_sizes_and_other_fits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    saved(small_sam(encoder()), path)
    with pytest.raises(ConfigError, match="these weights take 256 px, --size 512 is not possible"):
        load(path, size_px=512)
    with pytest.raises(ConfigError, match="SAM knows images padded on the right and bottom; --fit must be pad"):
        load_teacher("sam-vit-b", TeacherOptions(weights=path, fit="squash"))


def test_an_encoder_alone_is_not_in_segment_anythings_format(tmp_path: Path) -> None:
    torch.save(encoder().state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(
        TeacherWeightsError, match=r"encoder\.pth is not in segment-anything's format: it has no image_enc"
    ):
        load(tmp_path / "encoder.pth")


@pytest.mark.parametrize("preset", SAMS, ids=lambda preset: preset.name)
def test_a_preset_has_the_parameters_of_the_published_encoder(preset: TeacherPreset) -> None:
    # width, depth, heads and global blocks as in segment_anything/build_sam.py
    width, depth, heads, global_blocks = {
        "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
        "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
        "vit_b": (768, 12, 12, (2, 5, 8, 11)),
    }[preset.model]
    with torch.device("meta"):
        net = encoder(
            img_size=1024, width=width, depth=depth, heads=heads, window=14, global_blocks=global_blocks, channels=256
        )
    assert preset.params == f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.0f} M"


def test_a_fine_tuning_that_resized_one_of_its_tables_is_refused(tmp_path: Path) -> None:
    """SAM at 80 px: windows of 5 tokens fit, and the tables of the global blocks are still those of 256 px."""
    state = small_sam(encoder(depth=6, global_blocks=(1, 4))).state_dict()
    name = "image_encoder.pos_embed"
    torch.save({**state, name: state[name][:, :5, :5]}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="those of a map of 16 tokens a side, and pos_embed is that of 5"):
        load(tmp_path / "w.pth")
    override_stages = small_sam(encoder(global_blocks=(0, 1, 2, 3))).state_dict()
    torch.save({**override_stages, name: override_stages[name][:, :8, :8]}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="those of a map of 16 tokens a side, and pos_embed is that of 8"):
        load(tmp_path / "w.pth")


def test_windows_may_be_larger_than_the_map(tmp_path: Path) -> None:
    sam = small_sam(encoder(img_size=64, window=5, depth=6, global_blocks=(1, 4)))
    teacher = saved(sam, tmp_path / "w.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(teacher(images).spatial, sam.image_encoder(images).permute(0, 2, 3, 1))


def test_adapters_beside_an_encoder_are_not_left_out_without_a_word(tmp_path: Path) -> None:
    sam = small_sam(encoder())
    torch.save({**sam.state_dict(), "w_a_000.weight": torch.zeros(4, 64)}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="1 tensors of adapters or prompts"):
        load(tmp_path / "w.pth")
    torch.save({**sam.state_dict(), "image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(9)}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=r"rel_pos_h is \(9,\)"):
        load(tmp_path / "w.pth")
