"""Draws the pictures of three drop-ins for docs/export.md: `python docs/pictures/dropins.py WORK`, some minutes on a CPU.

WORK is a folder for a cache and a run, of crops of six photographs of scikit-image: front.py's, at a size at which its teacher
still knows what things are.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from front import photos_in, run
from make import CROSSES, PHOTOS, Picture, crossed, square
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evals.encoders import recorded_teacher
from evals.encoders.base import LiveEncoder
from evals.vlm.wiring import IMAGE_ID, QUESTION, random_language_model, word_tokenizer
from radio_cache.reader import Cache
from radio_cache.view import PcaColours
from radio_cache.view.picture_grid import Pane, picture_grid
from trainer import DistilledStudent, load_student
from trainer.dropins import DinoV2Backbone, clip_with_student
from trainer.dropins.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from trainer.dropins.llava import llava_processor, llava_with_student

HERE = Path(__file__).parent
TEACHER = "efficientnet-lite0"
TEACHER_PX, STUDENT_PX = 320, 224
CELL_PX, WORDS_PX, LETTER_PX = 150, 320, 13

ASKED = (
    "tabby cat",
    "golden retriever",
    "espresso",
    "pizza",
    "missile",
    "lighthouse",
    "military uniform",
    "sports car",
)
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}.")
CONTEXT, TEXT_WIDTH, TEXT_STEPS, TEXT_BATCH = 16, 64, 300, 128


def text_tower_for(directions: Tensor, names: Sequence[str]) -> Any:
    """A CLIP of open_clip with a text tower that is taught, in a minute, where a teacher's classifier looks for each name.

    directions: (classes, c), that classifier's rows. No image is seen: what a sentence about a class should be near to is
    known already. The image tower is there because a CLIP has one; it is never called.
    """
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=32, patch_size=32, image_size=STUDENT_PX)
    text = CLIPTextCfg(context_length=CONTEXT, width=TEXT_WIDTH, heads=2, layers=2)
    clip: Any = open_clip.CLIP(directions.shape[1], vision, text)
    set_model_preprocess_cfg(
        clip,
        {
            "size": STUDENT_PX,
            "mode": "RGB",
            "mean": open_clip.OPENAI_DATASET_MEAN,
            "std": open_clip.OPENAI_DATASET_STD,
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "fill_color": 0,
        },
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    sentences = torch.stack([tokenizer([template.format(name) for name in names]) for template in TEMPLATES])
    rows = F.normalize(directions, dim=1)
    learned = [weight for name, weight in clip.named_parameters() if not name.startswith("visual")]
    optimiser = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=TEXT_STEPS)
    for _ in range(TEXT_STEPS):
        classes = torch.randperm(len(names))[:TEXT_BATCH]
        said = clip.encode_text(sentences[torch.randint(len(TEMPLATES), classes.shape), classes], normalize=True)
        loss = F.cross_entropy(20 * said @ rows.T, classes) + (1 - (said * rows[classes]).sum(1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return clip.eval()


def draw_zero_shot(model: DistilledStudent, teacher: LiveEncoder) -> None:
    net: Any = teacher.measurable().module
    clip = text_tower_for(net.classifier.weight.detach(), open_clip.IMAGENET_CLASSNAMES)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    classifier = open_clip.build_zero_shot_classifier(clip, tokenizer, ASKED, [one.format for one in TEMPLATES])
    student = clip_with_student(clip, model, TEACHER, image_hw=(STUDENT_PX, STUDENT_PX))
    config = open_clip.transform.PreprocessCfg(**{**open_clip.get_model_preprocess_cfg(student), "size": STUDENT_PX})
    prepare: Any = open_clip.transform.image_transform_v2(config, is_train=False)
    rows: list[list[Pane]] = []
    for make in PHOTOS:
        photo = square(make(), 448)
        with torch.inference_mode():
            ours = student.encode_image(prepare(Image.fromarray(photo))[None], normalize=True)
            seen = torch.tensor(teacher.pixels_of(Image.fromarray(photo)))[None]
            theirs = F.normalize(next(iter(teacher.outputs(seen).summaries.values())), dim=1)
        panes = [("the student", ours), ("its teacher", theirs)]
        rows.append(
            [
                ("", square(photo, CELL_PX)),
                *((title, bars((100 * one @ classifier)[0].softmax(0))) for title, one in panes),
            ]
        )
    picture_grid(rows).save(HERE / "clip-drop-in.jpg", quality=88)


def bars(shares: Tensor) -> Picture:
    """How much of the probability each sentence has, as bars."""
    canvas = Image.new("RGB", (WORDS_PX, CELL_PX), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTER_PX)
    height = CELL_PX / len(ASKED)
    for number, (name, share) in enumerate(zip(ASKED, shares.tolist(), strict=True)):
        y, best = number * height, share == float(shares.max())
        draw.text((0, y), name, fill="#333333", font=font)
        draw.rectangle((124, y + 3, 124 + share * 150, y + height - 3), fill="#3c9650" if best else "#9aa5b1")
        draw.text((128 + share * 150, y), f"{share:.0%}", fill="#333333", font=font)
    return np.asarray(canvas)


def imagenet_colours(pictures: Sequence[Picture]) -> Tensor:
    """(b, 3, h, w) as code for DINOv2 prepares images."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def draw_nearest(model: DistilledStudent, crops: Path) -> None:
    """Whole photos, mirrored, which training did not see so; and the crops it saw."""
    dino = DinoV2Backbone(model, TEACHER)
    bank = [square(np.asarray(Image.open(file)), STUDENT_PX) for file in sorted(crops.glob("*.png"))]
    asked = [square(make()[:, ::-1], STUDENT_PX) for make in PHOTOS]
    with torch.inference_mode():
        known, new = (dino.forward_features(imagenet_colours(some)) for some in (bank, asked))
    rows: list[list[Pane]] = []
    for number, (down, right) in enumerate(CROSSES):
        at = (down, 1 - right)
        alike = unit(known["x_norm_clstoken"]) @ unit(new["x_norm_clstoken"])[number]
        first, *others = alike.topk(4).indices.tolist()
        patches, there = unit(new["x_norm_patchtokens"][number]), unit(known["x_norm_patchtokens"][first])
        side = round(len(patches) ** 0.5)
        patch = patches[int(at[0] * side) * side + int(at[1] * side)]
        row: list[Pane] = [
            ("a photo, mirrored", crossed(square(asked[number], 180), at)),
            ("its patches", grey(patches @ patch)),
            (f"nearest crop, {alike[first]:.2f}", bank[first]),
            ("patches of that crop", grey(there @ patch)),
            *((f"next, {alike[one]:.2f}", bank[one]) for one in others),
        ]
        rows.append([(title, square(picture, CELL_PX)) for title, picture in row])
    picture_grid(rows).save(HERE / "dinov2-drop-in.jpg", quality=88)


def unit(vectors: Any) -> Tensor:
    """Of length 1, once what all have in common is taken off."""
    return F.normalize(vectors - vectors.mean(0), dim=-1)


def grey(cosines: Tensor) -> Picture:
    """A square of cosines, black at -1 and white at 1."""
    side = round(len(cosines) ** 0.5)
    shade = np.uint8(np.clip((cosines.numpy().reshape(side, side) + 1) / 2, 0, 1) * 255)
    return np.asarray(Image.fromarray(np.stack([shade] * 3, axis=-1)).resize((180, 180), Image.Resampling.NEAREST))


def draw_llava(model: DistilledStudent) -> None:
    words = word_tokenizer()
    llava: Any = llava_with_student(model, random_language_model(0), image_token_id=IMAGE_ID).eval()
    processor: Any = llava_processor(model, words)
    question = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    photos = [square(make(), 448) for make in PHOTOS]
    asked = [processor(images=Image.fromarray(photo), text=question, return_tensors="pt") for photo in photos]
    with torch.inference_mode():
        tokens = torch.cat([llava.model.vision_tower(one["pixel_values"]).last_hidden_state for one in asked])
        logits = [llava(**one).logits for one in asked]
        answers = [
            llava.generate(**one, max_new_tokens=3, do_sample=False)[0, one["input_ids"].shape[1] :] for one in asked
        ]
    side = round(tokens.shape[1] ** 0.5)
    maps = tokens.unflatten(1, (side, side)).numpy()
    colours = PcaColours.fit(maps)
    rows: list[list[Pane]] = []
    for photo, one, made, said in zip(photos, maps, logits, answers, strict=True):
        lines = [
            f"in: {' '.join(question.split())}",
            f"<image> becomes {tokens.shape[1]} tokens, {tokens.shape[2]} wide",
            f"logits {tuple(made.shape)}, all finite" if bool(made.isfinite().all()) else "LOGITS ARE NOT FINITE",
            f"out: {words.decode(said)}",
            "(a random language model: the words mean nothing)",
        ]
        large = np.asarray(Image.fromarray(colours.colours(one)).resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST))
        rows.append([("", square(photo, CELL_PX)), (f"{side} x {side} tokens", large), ("", written(lines))])
    picture_grid(rows).save(HERE / "llava-drop-in.jpg", quality=88)


def written(lines: Sequence[str]) -> Picture:
    canvas = Image.new("RGB", (WORDS_PX, CELL_PX), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTER_PX)
    for number, line in enumerate(lines):
        draw.text((0, 26 * number + 8), line, fill="#333333", font=font)
    return np.asarray(canvas)


def main() -> None:
    work = Path(sys.argv[1])
    cache, crops = work / "drop-ins.zarr", photos_in(work / "photos")
    run(
        "radio-cache",
        "build",
        "--images",
        crops,
        "--teacher",
        TEACHER,
        "--size",
        TEACHER_PX,
        "--fit",
        "squash",
        "--codec",
        "half",
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
        work / "drop-ins",
    )
    model = load_student(work / "drop-ins", adaptors="all")
    draw_nearest(model, crops)
    draw_llava(model)
    draw_zero_shot(model, recorded_teacher(Cache(cache).teachers[TEACHER].spec, device=torch.device("cpu")))


if __name__ == "__main__":
    main()
