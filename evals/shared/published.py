"""Figures that papers report, printed beside our own where the protocol is the same."""

from dataclasses import dataclass

# Data sets are recognised by their counts: their files carry no name.
IMAGENET_CLASSES, IMAGENET_VALIDATION = 1000, 50_000
COCO_CATEGORIES, COCO_VALIDATION = 80, 5000


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A published model and its figures in per cent, None where the paper has none.

    Attributes:
        px: side of its input.
        zero_shot, knn: top-1 on ImageNet-1k.
        ade20k, voc: mIoU of a linear probe.
        sam_coco: mIoU over the instances of COCO as SAM's image encoder.
    """

    name: str
    px: int
    zero_shot: float | None = None
    knn: float | None = None
    ade20k: float | None = None
    voc: float | None = None
    sam_coco: float | None = None


SOURCE = "AM-RADIO, arXiv 2312.06709"

ROWS = (
    PaperRow(name="OpenCLIP-H/14", px=224, zero_shot=77.19, knn=81.10, ade20k=40.04, voc=68.03),
    PaperRow(name="MetaCLIP-H/14", px=224, zero_shot=80.51, knn=82.12, ade20k=35.39, voc=62.62),
    PaperRow(name="DFN CLIP-H/14", px=378, zero_shot=83.90, knn=85.27, ade20k=39.00, voc=70.29),
    PaperRow(name="OpenAI CLIP-L/14", px=336, zero_shot=75.54, knn=79.80, ade20k=36.51, voc=67.04),
    PaperRow(name="DINOv2-g/14-reg", px=224, knn=83.41, ade20k=48.68, voc=82.78),
    PaperRow(name="SAM-H/16", px=1024, knn=22.12, ade20k=28.08, voc=34.34),
    PaperRow(name="E-RADIO-L", px=512, zero_shot=80.73, knn=83.89, ade20k=48.22, voc=81.64),
    PaperRow(name="RADIO-ViT-H/16", px=432, zero_shot=82.93, knn=86.06, ade20k=51.34, voc=84.71),
)
"""The paper's table of full models: its teachers, two more, and its students."""

SAM_ROWS = (
    PaperRow(name="SAM-B/16", px=1024, sam_coco=75.78),
    PaperRow(name="SAM-L/16", px=1024, sam_coco=77.02),
    PaperRow(name="SAM-H/16", px=1024, sam_coco=77.18),
    PaperRow(name="E-RADIO-L", px=1024, sam_coco=76.31),
    PaperRow(name="RADIO-ViTDet-H/16-W8", px=1024, sam_coco=76.09),
    PaperRow(name="RADIO-ViTDet-H/16-W16", px=1024, sam_coco=76.23),
)
"""The paper's table of image encoders for SAM's decoder, on COCO 2017's validation set, prompted by true boxes."""


def is_imagenet_validation(*, classes: int, images: int) -> bool:
    """Return whether these counts are those of the ImageNet-1k validation set, which the paper's figures are on."""
    return classes == IMAGENET_CLASSES and images == IMAGENET_VALIDATION


def is_coco_validation(*, categories: int, images: int) -> bool:
    """Return whether these counts are those of COCO's validation set, which the paper's SAM figures are on."""
    return categories == COCO_CATEGORIES and images == COCO_VALIDATION
