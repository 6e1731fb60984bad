"""Tables that `radio-train --student help` and `--recipe help` print."""

from collections.abc import Iterator, Mapping

from rich.table import Table

from radio_cache.terminal.output import table
from trainer.recipes.presets import RECIPES
from trainer.recipes.student_table import E_RADIO_SIZES, TIMM_SIZES, VIT_SIZES, StudentSize


def student_tables() -> Iterator[Table | str]:
    """Yield one table for each family of students, then the names that are not in them."""
    for family, sizes in {"E-RADIO": E_RADIO_SIZES, "ViT": VIT_SIZES, "Backbones of timm": TIMM_SIZES}.items():
        yield _family_table(family, sizes)
        yield ""
    yield (
        "Patch: side of a token in the image. Multiple: image sides are multiples of it. Input: preferred\n"
        "image size in pixels. Summary, map: numbers of channels."
    )
    yield (
        "timm:MODEL is any backbone of timm, torch-module:PACKAGE.MODULE:CLASS your own network.\n"
        "Speed of each: docs/students.md"
    )


def _family_table(family: str, sizes: Mapping[str, StudentSize]) -> Table:
    rows = table(family, "student", "parameters", "patch", "multiple", "input", "summary", "map")
    for name, size in sizes.items():
        height, width = size.preferred_hw
        rows.add_row(
            name,
            f"{size.parameters / 1e6:.1f} M",
            f"{size.patch_px} px",
            f"{size.step_px} px",
            f"{height} x {width}",
            str(size.summary_dim),
            str(size.spatial_dim),
        )
    return rows


def recipe_tables() -> Iterator[Table | str]:
    """Yield the table of recipes, with the first line of each one's docstring, then how to change settings."""
    rows = table("Recipes", "recipe", "stages", "student", "purpose", left=4)
    for name, make_recipe in RECIPES.items():
        recipe = make_recipe()
        # One line a stage: those of a long recipe would not fit side by side.
        stages = "\n".join(
            f"{stage.steps:,} steps, {' + '.join(f'{group.image_px} px' for group in stage.groups)}"
            for stage in recipe.stages
        )
        rows.add_row(name, stages, recipe.student, (make_recipe.__doc__ or "").partition("\n")[0])
    yield rows
    yield ""
    yield "A run prints its recipe before it starts. --set KEY=VALUE changes any field (docs/training.md)."
