"""Preprocessing of exported students in other libraries, with the pixels of `trainer.model.eval_view`."""

import json
import math
from pathlib import Path
from typing import Any

from radio_cache.storage.local import write_atomically
from trainer.exports.carried_code import carried_source
from trainer.model.eval_view import resized_px
from trainer.model.student import DistilledStudent, StudentConfig

PREPARE_FILE = "prepare_photos.py"


def timm_pretrained_cfg(config: StudentConfig) -> dict[str, Any]:
    """Describe the view as timm does: `timm.data.create_transform(**timm.data.resolve_data_config(model=model))`."""
    crop_pct = 1.0
    if config.fit == "crop":
        short_px = resized_px(config.image_hw, config.centre_share)
        # timm divides the view's side by crop_pct to get the resized side back.
        crop_pct = min(config.image_hw) / short_px
        if math.floor(min(config.image_hw) / crop_pct) < short_px:  # timm rounds down
            crop_pct = math.nextafter(crop_pct, 0.0)
    return {
        "input_size": [3, *config.image_hw],
        "num_classes": 0,
        # The student standardises colours itself, so that timm must not.
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": "center" if config.fit == "crop" else "squash",
        "classifier": "head",
        "first_conv": None,
    }


def image_processor_settings(model: DistilledStudent) -> dict[str, Any]:
    """Describe the view in transformers' words. Its crops are those of timm but for the rounding of their place, one pixel."""
    config = model.config
    h, w = config.image_hw
    colours: dict[str, Any] = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "do_convert_rgb": True,
    }
    bicubic: dict[str, Any] = {"do_resize": True, "resample": 3}
    if config.fit == "squash":
        return {"image_processor_type": "ViTImageProcessor", **bicubic, "size": {"height": h, "width": w}, **colours}
    return {
        "image_processor_type": "CLIPImageProcessor",
        **bicubic,
        "size": {"shortest_edge": resized_px(config.image_hw, config.centre_share)},
        "do_center_crop": True,
        "crop_size": {"height": h, "width": w},
        **colours,
    }


def view_settings(config: StudentConfig) -> dict[str, Any]:
    """Return the arguments of `trainer.model.eval_view.prepare`, as JSON holds them."""
    return {"image_hw": list(config.image_hw), "fit": config.fit, "centre_share": config.centre_share}


def write_prepare_file(model: DistilledStudent, folder: Path) -> tuple[str, ...]:
    """Put `trainer.model.eval_view` into a folder, for formats that are a graph alone. Returns the lines that show its use."""
    config = model.config
    write_atomically(folder / PREPARE_FILE, carried_source("trainer.model.eval_view").encode())
    write_atomically(
        folder / "preprocessor_config.json", json.dumps(image_processor_settings(model), indent=1).encode()
    )
    arguments = f"image_hw={config.image_hw}, fit={config.fit!r}, centre_share={config.centre_share!r}"
    return (
        "from PIL import Image",
        f"from {PREPARE_FILE.removesuffix('.py')} import prepare",
        f"images = prepare(Image.open('photo.jpg'), {arguments})  # (1, 3, {config.image_hw[0]}, {config.image_hw[1]})",
    )
