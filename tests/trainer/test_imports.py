"""What answers at once: recipes, and the help of the commands, load neither torch nor timm."""

import subprocess
import sys

import pytest

IMPORT_ALL_RECIPES = """
import importlib, pkgutil, trainer.recipes
for module in pkgutil.iter_modules(trainer.recipes.__path__, "trainer.recipes."):
    importlib.import_module(module.name)
trainer.recipes.presets.am_radio()
"""

PROGRAMS = {
    "recipes": IMPORT_ALL_RECIPES,
    "metrics": "import trainer.monitoring.metrics",
    "radio-train --help": "from trainer.cli import main; main(['--help'], standalone_mode=False)",
    "radio-train --student help": "from trainer.cli import main; main(['--student', 'help'], standalone_mode=False)",
    "radio-train --recipe help": "from trainer.cli import main; main(['--recipe', 'help'], standalone_mode=False)",
    "radio-export --help": "from trainer.export_cli import main; main(['--help'], standalone_mode=False)",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_recipes_and_help_load_neither_torch_nor_timm(program: str) -> None:
    code = f"import sys\n{PROGRAMS[program]}\nassert not {{'torch', 'timm'}} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_public_names_of_the_package_are_there() -> None:
    import trainer

    for name in trainer.__all__:
        assert getattr(trainer, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'nothing'"):
        _ = trainer.nothing
