"""open_clip with a student for its image tower: its own tokenizer, text tower, transform and zero-shot classifier."""

from dataclasses import replace

import open_clip
import pytest
import skimage.data
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import nn

from radio_cache.errors import ConfigError
from trainer.dropins import clip_with_student

TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")
CLASSES = ["cat", "rocket", "cup of coffee"]


def small_clip() -> open_clip.CLIP:
    """CLIP's architecture with random weights."""
    torch.manual_seed(2)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=16, image_size=64, output_tokens=True)
    clip = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=CLIPTextCfg(width=32, heads=2, layers=1)).eval()
    preprocess = {
        "size": 64,
        "mode": "RGB",
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    open_clip.model.set_model_preprocess_cfg(clip, preprocess)
    return clip


def photos(clip: nn.Module) -> torch.Tensor:
    """Real photographs through open_clip's own transform of a model."""
    config = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(clip))
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    return torch.stack(
        [transform(Image.fromarray(one())) for one in (skimage.data.chelsea, skimage.data.rocket, skimage.data.coffee)]
    )


def zero_shot(clip: nn.Module, images: torch.Tensor) -> torch.Tensor:
    classifier = open_clip.build_zero_shot_classifier(clip, open_clip.SimpleTokenizer(), CLASSES, TEMPLATES)
    with torch.no_grad():
        return 100 * clip.encode_image(images, normalize=True) @ classifier


def test_with_clips_own_tower_as_the_student_zero_shot_logits_are_the_same(as_student) -> None:
    clip = small_clip()

    def call(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, tokens = net(x)
        return pooled, tokens.transpose(1, 2).unflatten(2, (4, 4))

    made = (clip.visual, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, call)
    model = as_student("clip", made, image_hw=(64, 64))
    plain = small_clip()  # one that gives the pooled embedding alone, as encode_image wants
    plain.visual.output_tokens = False
    ours = clip_with_student(plain, model, "clip")
    torch.testing.assert_close(zero_shot(ours, photos(ours)), zero_shot(plain, photos(plain)), rtol=1e-4, atol=1e-3)
    text = open_clip.SimpleTokenizer()(["a cat"])
    torch.testing.assert_close(ours(photos(ours), text), plain(photos(plain), text), rtol=1e-4, atol=1e-4)
    assert ours.visual is not plain.visual


def test_a_students_head_is_compared_with_text_at_the_size_it_was_trained_at(small_student) -> None:
    clip = small_clip()
    ours = clip_with_student(clip, small_student, "clip")
    logits = zero_shot(ours, photos(ours))
    assert logits.shape == (3, 3)
    with torch.no_grad():
        pixels = photos(clip) * torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1) + torch.tensor(
            open_clip.OPENAI_DATASET_MEAN
        ).view(3, 1, 1)
        expected = small_student(pixels)["clip"].summary
        torch.testing.assert_close(ours.encode_image(photos(ours)), expected, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_fit_the_text_tower_are_refused(small_student) -> None:
    with pytest.raises(
        ConfigError, match="the head for 'dino' gives summaries of 32 values, this CLIP's text embeddings have 24"
    ):
        clip_with_student(small_clip(), small_student, "dino")
    with pytest.raises(ConfigError, match="the head for 'sam' gives no summary"):
        clip_with_student(small_clip(), small_student, "sam")


def test_open_clips_transform_of_the_new_tower_gives_the_students_own_pixels(small_student) -> None:
    small_student.config = replace(small_student.config, fit="crop", centre_share=1.0, image_hw=(32, 32))
    ours = clip_with_student(small_clip(), small_student, "clip")
    prepared = photos(ours)
    assert prepared.shape[-2:] == (32, 32)
    mean, std = (
        torch.tensor(one).view(3, 1, 1) for one in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pictures = [Image.fromarray(one()) for one in (skimage.data.chelsea, skimage.data.rocket, skimage.data.coffee)]
    torch.testing.assert_close(prepared * std + mean, small_student.preprocess(*pictures), rtol=0, atol=1e-5)
    assert photos(small_clip()).shape[-2:] == (64, 64)
