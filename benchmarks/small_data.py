"""Stand-ins for what `benchmarks/reproduce.sh` needs, small, for `RADIO_SMALL=1`: `python benchmarks/small_data.py OUT`.

Photographs (those in scikit-image and scikit-learn, or a folder of your own) in the official layouts of ImageNet, ADE20K, VOC
2012 and COCO; masks are three tones of each photo. Weights of a small CLIP and of SAM-B, random. All of it always the same.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from pycocotools import mask as rle
from segment_anything import sam_model_registry

from cache_builder.demo.images import DemoImagesConfig, bundled_photos, make_demo_images, own_photos

LONG_SIDE_PX, TONES = 256, 3
TRAINING_PARTS = 2 / 3
"""Share of the photos that are training images of ADE20K and VOC; the others are their validation images."""

COCO_IMAGES = 4
NOBODY = 255


@dataclass(frozen=True)
class Masked:
    """A photo, and the tone of each of its pixels, 0 to TONES - 1."""

    photo: Image.Image
    tones: NDArray[np.uint8]


def masked(photo: Image.Image) -> Masked:
    small = photo.convert("RGB")
    small.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX))
    grey = np.asarray(small.convert("L").resize((48, 48), Image.Resampling.BICUBIC), np.float32)
    bounds = np.quantile(grey, [number / TONES for number in range(1, TONES)])
    tones = Image.fromarray(np.digitize(grey, bounds).astype(np.uint8))
    return Masked(small, np.asarray(tones.resize(small.size, Image.Resampling.NEAREST)))


def write_imagenet(photos: dict[str, bytes], folder: Path) -> None:
    """`train` and `val`, a folder a class; a class is a photo, and no pixel is in both."""
    images = make_demo_images(photos, folder, DemoImagesConfig(train_crops=4, test_crops=2))
    if images.test.exists():  # else it was, when this was stopped
        images.test.rename(folder / "val")


def write_ade20k(pairs: list[Masked], folder: Path) -> None:
    for number, one in enumerate(pairs):
        part = "training" if number < TRAINING_PARTS * len(pairs) else "validation"
        images, masks = (made(folder / kind / part) for kind in ("images", "annotations"))
        one.photo.save(images / f"ADE_{number:08}.jpg")
        Image.fromarray(one.tones + 1).save(masks / f"ADE_{number:08}.png")  # 0 is nobody's there


def write_voc(pairs: list[Masked], folder: Path) -> None:
    images, masks, lists = (
        made(folder / name) for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    )
    names: dict[str, list[str]] = {"train": [], "val": []}
    for number, one in enumerate(pairs):
        name = f"2007_{number:06}"
        names["train" if number < TRAINING_PARTS * len(pairs) else "val"].append(name)
        one.photo.save(images / f"{name}.jpg")
        ids = one.tones.copy()
        ids[:4] = NOBODY
        mask = Image.fromarray(ids).convert("P")
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
        mask.save(masks / f"{name}.png")
    for part, some in names.items():
        (lists / f"{part}.txt").write_text("\n".join(some) + "\n")


def write_coco(pairs: list[Masked], folder: Path) -> None:
    """`val2017` and its instances: a tone is an instance; one crowd region, which no evaluation counts."""
    images, annotations = made(folder / "val2017"), made(folder / "annotations")
    listed: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for number, one in enumerate(pairs[:COCO_IMAGES]):
        one.photo.save(images / f"{number:012}.jpg")
        listed.append(
            {"id": number, "file_name": f"{number:012}.jpg", "height": one.photo.height, "width": one.photo.width}
        )
        for tone in range(TONES):
            mask = np.asfortranarray(one.tones == tone).astype(np.uint8)
            region: Any = rle.encode(mask)
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": number,
                    "category_id": tone + 1,
                    "iscrowd": int(not instances),
                    "area": float(mask.sum()),
                    "bbox": [float(side) for side in rle.toBbox(region)],
                    "segmentation": {"size": region["size"], "counts": region["counts"].decode()},
                },
            )
    categories = [{"id": tone + 1, "name": f"tone {tone}"} for tone in range(TONES)]
    record = {"images": listed, "annotations": instances, "categories": categories}
    (annotations / "instances_val2017.json").write_text(json.dumps(record))


def write_weights(folder: Path) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=14, image_size=224)
    clip = CLIP(64, vision, CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=1, layers=2))
    torch.save(clip.state_dict(), folder / "clip.pt")
    torch.save(sam_model_registry["vit_b"]().state_dict(), folder / "sam_vit_b.pth")


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="a folder of photos; without, those in scikit-image")
    args = parser.parse_args()
    photos = bundled_photos() if args.photos is None else own_photos(args.photos, DemoImagesConfig())
    out = made(args.out)
    write_imagenet(photos, out / "imagenet")
    pairs = [masked(Image.open(file)) for file in sorted((out / "imagenet" / "train").rglob("00.png"))]
    write_ade20k(pairs, out / "ADEChallengeData2016")
    write_voc(pairs, out / "VOCdevkit" / "VOC2012")
    write_coco(pairs, out / "coco")
    write_weights(out)
    (out / "done").touch()


if __name__ == "__main__":
    main()
