"""Draws front.jpg, photo, teacher, cache, student: `python docs/pictures/front.py WORK`, a few minutes on a CPU.

WORK is a folder for a cache and a run; photographs are those of scikit-image.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage.data
import torch
from make import PHOTOS, square, table
from PIL import Image

from evals.encoders import recorded_teacher
from radio_cache.reader import Cache
from radio_cache.view import PcaColours
from trainer import load_student

HERE = Path(__file__).parent
MORE_PHOTOS = (skimage.data.immunohistochemistry, skimage.data.retina)
SIDE_PX, STUDENT_PX = 640, 224
TEACHER = "efficientnet-lite0"


def photos_in(folder: Path) -> Path:
    """Each photo as a square, and thirteen crops of it, which the codec is calibrated on and the student trained."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for make in (*PHOTOS, *MORE_PHOTOS):
        photo = make()
        Image.fromarray(square(photo, SIDE_PX)).save(folder / f"{make.__name__}-0.png")
        for number in range(1, 14):
            side = int(min(photo.shape[:2]) * rng.uniform(0.4, 1))
            y, x = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
            Image.fromarray(square(photo[y : y + side, x : x + side], SIDE_PX)).save(
                folder / f"{make.__name__}-{number}.png"
            )
    return folder


def run(*command: object) -> None:
    subprocess.run([Path(sys.executable).parent / str(command[0]), *map(str, command[1:])], check=True)


def main() -> None:
    work = Path(sys.argv[1])
    cache = work / "photos.zarr"
    run(
        "radio-cache",
        "build",
        "--images",
        photos_in(work / "photos"),
        "--teacher",
        TEACHER,
        "--size",
        SIDE_PX,
        "--fit",
        "squash",
        "--codec",
        "klt",
        "--out",
        cache,
    )
    run(
        "radio-train",
        "--cache",
        cache,
        "--student",
        "e-radio-tiny",
        "--image-size",
        STUDENT_PX,
        "--batch-size",
        8,
        "--steps",
        300,
        "--set",
        "crop_area=0.6,1",
        "--out",
        work / "run",
    )
    cached = Cache(cache)
    teacher = recorded_teacher(cached.teachers[TEACHER].spec, device=torch.device("cpu"))
    rows = [cached.index.keys.index(f"{make.__name__}-0.png") for make in PHOTOS]
    pixels = torch.from_numpy(np.stack([square(make(), SIDE_PX) for make in PHOTOS]))
    with torch.inference_mode():
        live = next(iter(teacher.outputs(pixels).maps.values())).numpy()
    stored = cached.teachers[TEACHER].maps(rows)
    small = (
        torch.from_numpy(np.stack([square(make(), STUDENT_PX) for make in PHOTOS])).permute(0, 3, 1, 2).float() / 255
    )
    model = load_student(work / "run", adaptors=[TEACHER])
    with torch.inference_mode():
        student = model(small, feature_fmt="NCHW")[TEACHER].spatial.permute(0, 2, 3, 1).numpy()
    colours = PcaColours.fit(live)
    cells = [[square(make(), 180) for make in PHOTOS]]
    cells += [[colours.colours(one) for one in maps] for maps in (live, stored, student)]
    table([[column[number] for column in cells] for number in range(len(PHOTOS))]).save(HERE / "front.jpg", quality=88)


if __name__ == "__main__":
    main()
