"""Teachers beside their libraries, on photos: are the pixels the same, how far are the features, and what does precision cost?

    python benchmarks/parity.py --images FOLDER [--num 6] [--no-float16] [TEACHER ...]

For each family one teacher of real size, with random weights in the family's own file format where the published ones do
not come with a package. `pixels`: whether all inputs equal the library's own bit for bit. `float32`: largest relative
difference of features from the library's own forward pass of its own pixels (timm's; of a
DINOv2 without registers we follow Meta, see its test). `bfloat16`, `float16`: mean over tokens of one minus the cosine with
float32, under autocast as in a build. A CPU without float16 of its own takes minutes for one image of SAM's.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from cache_builder.pipeline.preprocess import teacher_input, view_pixels
from cache_builder.teachers import TeacherOptions, TeacherPreset, find_teacher, find_weights, load_teacher
from cache_builder.teachers.random_weights import random_weights
from cache_builder.teachers.state_dict import read_state_dict
from radio_cache.geometry.crops import valid_hw

NAMES = (
    "openai-clip-vit-l-14-336",
    "open_clip:ViT-B-16-SigLIP2-256/webli",
    "dinov2-vit-b-14-reg",
    "dinov3-vit-b-16",
    "dinov3-convnext-t",
    "c-radio-v3-b",
    "sam-vit-b",
    "efficientnet-lite0",
)

Own = Callable[[Image.Image], tuple[Tensor, Tensor]]
"""A photo -> the library's own input (1, 3, h, w) and its own map (1, h * w, c)."""


def library(preset: TeacherPreset, path: Path) -> Own:
    state = read_state_dict(path, teacher=preset.name)
    match preset.family:
        case "clip":
            model: Any = open_clip.create_model(preset.model, pretrained=None)
            net: Any = model.visual.eval()
            net.load_state_dict(
                {key.removeprefix("visual."): value for key, value in state.items() if "visual." in key}
            )
            published = open_clip.get_pretrained_cfg(preset.model, preset.tag)
            config = {
                key: published[key] for key in ("mean", "std", "interpolation", "resize_mode") if published.get(key)
            }
            transform: Any = image_transform_v2(PreprocessCfg(size=preset.input_px, **config), is_train=False)
            net.output_tokens = True
            tokens = (lambda x: net.trunk.forward_features(x)) if hasattr(net, "trunk") else (lambda x: net(x)[1])
            return lambda photo: (x := transform(photo)[None], tokens(x))
        case "sam":
            sam = sam_model_registry[preset.model]().eval()
            sam.image_encoder.load_state_dict({key.removeprefix("image_encoder."): v for key, v in state.items()})
            predictor = SamPredictor(sam)

            def own(photo: Image.Image) -> tuple[Tensor, Tensor]:
                predictor.set_image(np.asarray(photo))
                resized = predictor.transform.apply_image(np.asarray(photo))
                pixels = sam.preprocess(torch.as_tensor(resized).permute(2, 0, 1)[None])
                return pixels, predictor.features.flatten(2).transpose(1, 2)

            return own
        case _:
            net = timm.create_model(preset.model, pretrained=False).eval()
            if preset.family == "efficientnet-lite":
                state = dict(zip(net.state_dict(), state.values(), strict=True))
            own_names = net.state_dict().keys()
            net.load_state_dict({key: value for key, value in state.items() if key in own_names})
            own_config: Any = timm.get_pretrained_cfg(preset.model)
            size = {"input_size": (3, preset.input_px, preset.input_px)}
            transform = cast(Any, create_transform)(**resolve_data_config(size, pretrained_cfg=own_config.to_dict()))
            if hasattr(net, "set_input_size"):
                net.set_input_size((preset.input_px, preset.input_px))
            return lambda photo: (x := transform(photo)[None], timm_tokens(net, x, preset))


def timm_tokens(net: Any, x: Tensor, preset: TeacherPreset) -> Tensor:
    if preset.family == "efficientnet-lite":
        return net.forward_intermediates(x, indices=1, intermediates_only=True)[0].flatten(2).transpose(1, 2)
    out = net.forward_features(x)
    if preset.timm.norm_map:
        return net.head.norm(out).flatten(2).transpose(1, 2)
    return out[:, net.num_prefix_tokens :]


def compare(name: str, photos: list[Image.Image], *, float16: bool) -> str:
    preset = find_teacher(name)
    if preset.weights.package:
        return line(name, preset, find_weights(preset, None), photos, float16=float16)
    with random_weights(preset) as path:
        return line(name, preset, path, photos, float16=float16)


def line(name: str, preset: TeacherPreset, path: Path, photos: list[Image.Image], *, float16: bool) -> str:
    teacher = load_teacher(name, TeacherOptions(weights=path))
    own, geometry = library(preset, path), teacher.spec.geometry
    same, largest = True, 0.0
    lost: dict[torch.dtype, list[float]] = {torch.bfloat16: []} | ({torch.float16: []} if float16 else {})
    for photo in photos:
        pixels = torch.from_numpy(view_pixels(photo, geometry).copy())[None]
        x = teacher_input(pixels, [valid_hw((photo.height, photo.width), geometry)], teacher.spec.normalisation)
        with torch.inference_mode():
            theirs_x, theirs = own(photo)
            ours = teacher(x).spatial.flatten(1, 2)
        same &= torch.equal(x, theirs_x)
        largest = max(largest, float((ours - theirs).norm() / theirs.norm()))
        for dtype, losses in lost.items():
            with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
                low = teacher(x).spatial.flatten(1, 2).float()
            losses.append(float(1 - torch.cosine_similarity(low, ours, dim=-1).mean()))
    cells = " | ".join(f"{np.mean(losses):.1e}" for losses in lost.values()) + ("" if float16 else " | -")
    return f"| `{name}` | {'bitwise' if same else 'DIFFER'} | {largest:.1e} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--num", type=int, default=6)
    parser.add_argument("--no-float16", action="store_true", help="leave float16 out")
    parser.add_argument("names", nargs="*", default=NAMES)
    args = parser.parse_args()
    torch.manual_seed(0)
    files = sorted(file for file in args.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = [Image.open(file).convert("RGB") for file in files[:: max(1, len(files) // args.num)][: args.num]]
    print("sizes:", ", ".join(f"{photo.width} x {photo.height}" for photo in photos))
    print("| teacher | pixels | float32, relative | bfloat16 | float16 |\n|---|---|---|---|---|")
    for name in args.names:
        print(compare(name, photos, float16=not args.no_float16), flush=True)


if __name__ == "__main__":
    main()
