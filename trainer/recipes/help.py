"""What `radio-train --student help` and `--recipe help` print: names, and what tells one from the other."""

from collections.abc import Iterator, Mapping

import torch
from rich.table import Table

from radio_cache.terminal.output import table
from trainer.recipes.presets import RECIPES
from trainer.students import E_RADIOS, TIMM_BACKBONES, VITS, create_student


def students() -> Iterator[Table | str]:
    """A table a family, as each is ready: networks are made to be counted, without memory for their weights."""
    for family, names in {"E-RADIO": E_RADIOS, "ViT": VITS, "Backbones of timm": TIMM_BACKBONES}.items():
        yield _family(family, names)
        yield ""
    yield "Patch: pixels a token. Step: sides of images are multiples of it. Made for: in pixels.\nSummary, map: widths."
    yield "timm:MODEL is any backbone of timm, torch-module:PACKAGE.MODULE:CLASS your own network.\nSpeed: docs/students.md"


def _family(title: str, names: Mapping[str, object]) -> Table:
    rows = table(title, "student", "parameters", "patch", "step", "made for", "summary", "map")
    for name in names:
        with torch.device("meta"):
            student = create_student(name)
        height, width = student.preferred_resolution
        rows.add_row(
            name,
            f"{sum(one.numel() for one in student.parameters()) / 1e6:.1f} M",
            f"{student.patch_size} px",
            f"{student.min_resolution_step} px",
            f"{height} x {width}",
            str(student.summary_dim),
            str(student.embed_dim),
        )
    return rows


def recipes() -> Iterator[Table | str]:
    """A line a recipe: what its docstring says first, and what it trains."""
    rows = table("Recipes", "recipe", "stages", "student", "what for", left=4)
    for name, make in RECIPES.items():
        recipe = make()
        stages = "\n".join(
            f"{stage.steps:,} steps, {' + '.join(f'{group.image_px} px' for group in stage.groups)}"
            for stage in recipe.stages
        )
        rows.add_row(name, stages, recipe.student, (make.__doc__ or "").partition("\n")[0])
    yield rows
    yield ""
    yield "A run prints its recipe before it starts. --set KEY=VALUE changes any setting:\ndocs/training.md"
