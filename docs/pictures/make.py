"""Draws the pictures of docs/students.md and docs/export.md: `python docs/pictures/make.py DEMO`, where DEMO is what
`radio-cache demo --out DEMO` made. Photographs are those of scikit-image."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from evals.encoders import recorded_teacher
from radio_cache.reader import Cache
from radio_cache.view import PcaColours
from trainer import DistilledStudent, StudentConfig, load_student
from trainer.dropins import sam_with_student
from trainer.model.adaptors import TeacherWidths
from trainer.model.student import backbone_and_heads, build_distilled
from trainer.students.base import CLIP_MEAN, CLIP_STD

HERE = Path(__file__).parent
PHOTOS = (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee, skimage.data.rocket)
CROSSES = ((0.25, 0.42), (0.45, 0.3), (0.55, 0.55), (0.5, 0.45))
"""Where in each photo, (down, right) as shares, patches are compared with."""

STUDENT_PX, CELL_PX = 192, 180
SAM_PX, SAM_WIDTH = 256, 32

Picture = NDArray[np.uint8]


def square(photo: Picture, side: int) -> Picture:
    """The middle square, resized."""
    h, w = photo.shape[:2]
    least = min(h, w)
    top, left = (h - least) // 2, (w - least) // 2
    cut = Image.fromarray(photo[top : top + least, left : left + least])
    return np.asarray(cut.resize((side, side), Image.Resampling.BICUBIC))


def table(rows: Sequence[Sequence[Picture]]) -> Image.Image:
    """Pictures side by side, all of one size, without smoothing what is coarse."""
    gap = 6
    sheet = Image.new("RGB", (len(rows[0]) * (CELL_PX + gap) - gap, len(rows) * (CELL_PX + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            how = Image.Resampling.NEAREST if cell.shape[0] < 64 else Image.Resampling.LANCZOS
            sheet.paste(
                Image.fromarray(cell).resize((CELL_PX, CELL_PX), how), (x * (CELL_PX + gap), y * (CELL_PX + gap))
            )
    return sheet


def student_maps(model: DistilledStudent, photos: Sequence[Picture]) -> dict[str, NDArray[np.float32]]:
    """(n, h, w, c) by feature space, at twice the size the student was trained at."""
    pixels = np.stack([square(photo, STUDENT_PX) for photo in photos])
    with torch.inference_mode():
        out = model(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, feature_fmt="NCHW")
    own, heads = backbone_and_heads(out)
    spaces = {"backbone": own.spatial} | {name: guess.spatial for name, guess in heads.items()}
    return {name: maps.permute(0, 2, 3, 1).numpy() for name, maps in spaces.items()}


def draw_features(model: DistilledStudent, photos: Sequence[Picture]) -> None:
    columns = [[square(photo, CELL_PX) for photo in photos]]
    for maps in student_maps(model, photos).values():
        colours = PcaColours.fit(maps)
        columns.append([colours.colours(one) for one in maps])
    sheet = table([[column[number] for column in columns] for number in range(len(photos))])
    sheet.save(HERE / "features.jpg", quality=88)


def draw_similarity(model: DistilledStudent, cache: Cache, photos: Sequence[Picture]) -> None:
    teacher = recorded_teacher(cache.teachers["efficientnet-lite0"].spec, device=torch.device("cpu"))
    pixels = torch.from_numpy(np.stack([square(photo, teacher.geometry.input_hw[0]) for photo in photos]))
    with torch.inference_mode():
        live = next(iter(teacher.outputs(pixels).maps.values())).numpy()
    ours = student_maps(model, photos)
    rows = [[crossed(square(photo, CELL_PX), at) for photo, at in zip(photos, CROSSES, strict=True)]]
    rows += [
        [similarity(one, at) for one, at in zip(maps, CROSSES, strict=True)]
        for maps in (ours["backbone"], ours["efficientnet-lite0"], live)
    ]
    table(rows).save(HERE / "similarity.jpg", quality=88)


def crossed(photo: Picture, at: tuple[float, float]) -> Picture:
    image = Image.fromarray(photo)
    y, x = (share * CELL_PX for share in at)
    draw = ImageDraw.Draw(image)
    for colour, width in (("white", 5), ("red", 2)):
        draw.line([(x - 9, y), (x + 9, y)], fill=colour, width=width)
        draw.line([(x, y - 9), (x, y + 9)], fill=colour, width=width)
    return np.asarray(image)


def similarity(features: NDArray[np.float32], at: tuple[float, float]) -> Picture:
    """Cosine of every patch with one of them, from -1 (black) to 1 (white); what all patches share is taken off first."""
    centred = features - features.mean((0, 1))
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    h, w = features.shape[:2]
    cosine = unit @ unit[int(at[0] * h), int(at[1] * w)]
    return np.stack([np.uint8(np.clip((cosine + 1) / 2, 0, 1) * 255)] * 3, axis=-1)


class SamAsStudent(nn.Module):
    """SAM's encoder as a student's network: it puts SAM's colours in the place of the student's."""

    def __init__(self) -> None:
        super().__init__()
        sam = random_sam()
        self.net, self.mean, self.std = sam.image_encoder, sam.pixel_mean / 255, sam.pixel_std / 255

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
        return self.net((pixels - self.mean) / self.std)


def random_sam() -> Sam:
    """SAM's architecture, small, with random weights: always the same."""
    torch.manual_seed(5)
    encoder = ImageEncoderViT(
        img_size=SAM_PX,
        embed_dim=SAM_WIDTH,
        depth=2,
        num_heads=2,
        out_chans=SAM_WIDTH,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    grid, size = SAM_PX // 16, (SAM_PX, SAM_PX)
    prompts = PromptEncoder(
        embed_dim=SAM_WIDTH, image_embedding_size=(grid, grid), input_image_size=size, mask_in_chans=4
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=SAM_WIDTH, mlp_dim=64, num_heads=2)
    return Sam(encoder, prompts, MaskDecoder(transformer_dim=SAM_WIDTH, transformer=transformer)).eval()


def draw_masks(photos: Sequence[Picture]) -> None:
    sam = random_sam()
    student = build_distilled(
        StudentConfig(
            student="torch-module:make:SamAsStudent",
            image_hw=(SAM_PX, SAM_PX),
            fit="squash",
            adaptor_width=4,
            seed=0,
            overrides={"preferred_resolution": (SAM_PX, SAM_PX), "fixed_resolution": True},
            steps=0,
            images_seen=0,
            cache="",
            run="",
            recipe="",
            teachers=(TeacherWidths(name="sam", summary_dim=None, spatial_dim=SAM_WIDTH),),
        )
    )
    student.adaptors.spatial_heads[0] = nn.Identity()
    rows: list[list[Picture]] = []
    for photo in photos:
        shown = square(photo, CELL_PX)
        box = np.array([CELL_PX // 5, CELL_PX // 5, CELL_PX * 4 // 5, CELL_PX * 4 // 5])
        boxed = Image.fromarray(shown)
        ImageDraw.Draw(boxed).rectangle([int(side) for side in box], outline="yellow", width=3)
        theirs, ours = (mask_of(model, shown, box) for model in (sam, sam_with_student(sam, student, "sam")))
        if not np.array_equal(theirs, ours):
            sys.exit("the masks differ: the drop-in is broken")
        rows.append([np.asarray(boxed), over(shown, theirs), over(shown, ours)])
    table(rows).save(HERE / "sam-drop-in.jpg", quality=88)


def mask_of(sam: Sam, photo: Picture, box: NDArray[np.int64]) -> NDArray[np.bool_]:
    predictor = SamPredictor(sam)
    predictor.set_image(photo)
    masks, scores, _ = predictor.predict(box=box)
    return masks[int(np.argmax(scores))]


def over(photo: Picture, mask: NDArray[np.bool_]) -> Picture:
    blue = photo * 0.4 + np.array([30, 144, 255]) * 0.6
    return np.where(mask[..., None], blue, photo).astype(np.uint8)


def main() -> None:
    demo = Path(sys.argv[1])
    sys.path.insert(0, str(HERE))  # where the student that is SAM's encoder is found
    photos = [make() for make in PHOTOS]
    model = load_student(demo / "run", adaptors="all")
    draw_features(model, photos)
    draw_similarity(model, Cache(demo / "train.zarr"), photos)
    draw_masks(photos[:2])


if __name__ == "__main__":
    main()
