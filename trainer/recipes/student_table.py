"""Sizes of the students with names, as `radio-train --student help` prints them.

Stored, since building every network to count its weights takes seconds. A slow test compares them with the networks.
"""

from typing import Final, NamedTuple


class StudentSize(NamedTuple):
    """Size of one student: number of parameters; pixels of a token, of a step between sides, and (height, width); widths."""

    parameters: int
    patch_px: int
    step_px: int
    preferred_hw: tuple[int, int]
    summary_dim: int
    spatial_dim: int


E_RADIO_SIZES: Final[dict[str, StudentSize]] = {
    "e-radio-tiny": StudentSize(2_635_728, 16, 32, (96, 96), 256, 256),
    "e-radio-t": StudentSize(42_599_232, 16, 32, (224, 224), 640, 640),
    "e-radio-s": StudentSize(66_108_352, 16, 32, (224, 224), 768, 768),
    "e-radio-b": StudentSize(117_399_360, 16, 32, (224, 224), 1024, 1024),
    "e-radio-b-no-upsample": StudentSize(112_679_744, 32, 32, (224, 224), 1024, 1024),
    "e-radio-l": StudentSize(263_917_120, 16, 32, (224, 224), 1536, 1536),
    "e-radio-l-512": StudentSize(389_598_784, 16, 32, (512, 512), 1536, 1536),
}

VIT_SIZES: Final[dict[str, StudentSize]] = {
    "vit-tiny-16": StudentSize(3_014_784, 16, 16, (96, 96), 192, 192),
    "vit-s-16": StudentSize(27_883_008, 16, 16, (432, 432), 384, 384),
    "vit-b-16": StudentSize(98_233_344, 16, 16, (432, 432), 768, 768),
    "vit-l-16": StudentSize(319_881_216, 16, 16, (432, 432), 1024, 1024),
    "vit-h-16": StudentSize(651_642_880, 16, 16, (432, 432), 1280, 1280),
    "vit-so400m-16": StudentSize(431_234_928, 16, 16, (432, 432), 1152, 1152),
    "vit-g-16": StudentSize(1_159_700_480, 16, 16, (432, 432), 1536, 1536),
    "vit-s-14": StudentSize(29_707_776, 14, 14, (378, 378), 384, 384),
    "vit-b-14": StudentSize(101_882_880, 14, 14, (378, 378), 768, 768),
    "vit-l-14": StudentSize(324_747_264, 14, 14, (378, 378), 1024, 1024),
    "vit-h-14": StudentSize(657_725_440, 14, 14, (378, 378), 1280, 1280),
    "vit-so400m-14": StudentSize(436_709_232, 14, 14, (378, 378), 1152, 1152),
    "vit-g-14": StudentSize(1_166_999_552, 14, 14, (378, 378), 1536, 1536),
}

TIMM_SIZES: Final[dict[str, StudentSize]] = {
    "efficientnetv2-s": StudentSize(19_847_248, 16, 16, (224, 224), 160, 160),
    "efficientnetv2-s-whole": StudentSize(19_847_248, 32, 32, (224, 224), 256, 256),
    "resnetv2-101": StudentSize(27_529_792, 16, 16, (224, 224), 1024, 1024),
    "resnetv2-101-whole": StudentSize(42_488_384, 32, 32, (224, 224), 2048, 2048),
    "regnety-064": StudentSize(19_840_536, 16, 16, (224, 224), 576, 576),
    "regnety-064-whole": StudentSize(29_286_252, 32, 32, (224, 224), 1296, 1296),
    "efficientvit-l1": StudentSize(5_771_040, 16, 16, (224, 224), 256, 256),
    "efficientvit-l1-whole": StudentSize(38_037_280, 32, 32, (224, 224), 512, 512),
    "convnext-b": StudentSize(60_121_216, 16, 16, (224, 224), 512, 512),
    "convnext-b-whole": StudentSize(87_564_416, 32, 32, (224, 224), 1024, 1024),
    "nfnet-f3": StudentSize(166_787_508, 16, 16, (224, 224), 1536, 1536),
    "nfnet-f3-whole": StudentSize(251_851_200, 32, 32, (224, 224), 3072, 3072),
    "swinv2-s": StudentSize(33_574_794, 16, 16, (224, 224), 384, 384),
    "swinv2-s-whole": StudentSize(48_957_882, 32, 32, (224, 224), 768, 768),
    "maxvit-b": StudentSize(78_736_116, 16, 16, (224, 224), 384, 384),
    "maxvit-b-whole": StudentSize(118_106_580, 32, 32, (224, 224), 768, 768),
    "poolformerv2-m36": StudentSize(24_321_276, 16, 16, (224, 224), 384, 384),
    "poolformerv2-m36-whole": StudentSize(55_306_632, 32, 32, (224, 224), 768, 768),
    "mvitv2-b": StudentSize(30_008_736, 16, 16, (224, 224), 384, 384),
    "mvitv2-b-whole": StudentSize(50_702_208, 32, 32, (224, 224), 768, 768),
}
