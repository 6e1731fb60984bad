"""segment-anything with a student for its image encoder: its own predictor and mask generator, on a photograph."""

from functools import partial

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from radio_cache.errors import ConfigError
from trainer.dropins import sam_with_student

SIDE, WIDTH = 128, 32


def small_sam() -> Sam:
    """SAM's architecture at 128 px with random weights; SAM itself takes 1024 px and is 256 wide."""
    torch.manual_seed(1)
    encoder = ImageEncoderViT(
        img_size=SIDE,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        out_chans=WIDTH,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(
        embed_dim=WIDTH, image_embedding_size=(8, 8), input_image_size=(SIDE, SIDE), mask_in_chans=4
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=64, num_heads=2)
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=WIDTH)
    return Sam(encoder, prompts, decoder).eval()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """An oblong photograph, so that SAM pads it."""
    return np.asarray(Image.fromarray(skimage.data.astronaut()[:360]).resize((100, 70)))


def test_with_sams_own_encoder_as_the_student_masks_are_identical(as_student, photo: np.ndarray) -> None:
    sam = small_sam()
    mean, std = (numbers.flatten() / 255 for numbers in (sam.pixel_mean, sam.pixel_std))
    model = as_student("sam", (sam.image_encoder, mean, std, lambda net, x: net(x)), image_hw=(SIDE, SIDE))
    predictors = [SamPredictor(sam), SamPredictor(sam_with_student(sam, model, "sam"))]
    for predictor in predictors:
        predictor.set_image(photo)
    torch.testing.assert_close(predictors[1].features, predictors[0].features, rtol=1e-3, atol=1e-4)
    for prompt in (
        {"point_coords": np.array([[50, 30]]), "point_labels": np.array([1])},
        {"box": np.array([10, 5, 80, 60])},
    ):
        (masks, scores, _), (ours, our_scores, _) = (predictor.predict(**prompt) for predictor in predictors)
        assert 0 < masks.mean() < 1
        np.testing.assert_array_equal(ours, masks)
        np.testing.assert_allclose(our_scores, scores, rtol=1e-3, atol=1e-4)


def test_the_mask_generator_gives_the_same_masks_too(as_student, photo: np.ndarray) -> None:
    sam = small_sam()
    mean, std = (numbers.flatten() / 255 for numbers in (sam.pixel_mean, sam.pixel_std))
    model = as_student("sam", (sam.image_encoder, mean, std, lambda net, x: net(x)), image_hw=(SIDE, SIDE))
    found = []
    for one in (sam, sam_with_student(sam, model, "sam")):
        # Random weights trust none of their masks: every threshold that would drop them is off.
        generator = SamAutomaticMaskGenerator(
            one, points_per_side=3, pred_iou_thresh=-10.0, stability_score_thresh=-1.0, box_nms_thresh=1.1
        )
        found.append(generator.generate(photo))
    assert len(found[0]) == len(found[1]) > 0
    for theirs, ours in zip(*found, strict=True):
        np.testing.assert_array_equal(ours["segmentation"], theirs["segmentation"])


def test_a_students_head_feeds_the_decoder_on_its_own_grid(small_student, photo: np.ndarray) -> None:
    sam = small_sam()
    ours = sam_with_student(sam, small_student, "sam")
    predictor = SamPredictor(ours)
    predictor.set_image(photo)
    assert predictor.features.shape == (1, WIDTH, 8, 8)
    masks, _, _ = predictor.predict(box=np.array([10, 5, 80, 60]))
    assert masks.shape == (3, 70, 100)
    # The given SAM keeps its encoder and shares its decoder.
    assert isinstance(sam.image_encoder, ImageEncoderViT)
    assert ours.mask_decoder is sam.mask_decoder
    smaller = SamPredictor(sam_with_student(sam, small_student, "sam", image_px=64))
    smaller.set_image(photo)
    assert smaller.features.shape == (1, WIDTH, 8, 8)
    assert not torch.allclose(smaller.features, predictor.features)


def test_heads_of_another_width_and_unknown_teachers_are_refused(small_student) -> None:
    sam = small_sam()
    sam.mask_decoder.transformer_dim = 256
    with pytest.raises(ConfigError, match="the head for 'sam' gives 32 channels, SAM's mask decoder reads 256"):
        sam_with_student(sam, small_student, "sam")
    with pytest.raises(ConfigError, match="no adaptor of this student is called 'sma'"):
        sam_with_student(small_sam(), small_student, "sma")
    with pytest.raises(ConfigError, match="does not take 70 x 70 pixels; 64 x 64 is the nearest"):
        sam_with_student(small_sam(), small_student, "sam", image_px=70)
