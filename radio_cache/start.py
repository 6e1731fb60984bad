"""The programs' entry points: they check that the packages beside this one are radio-cache's own, then run the program.

`trainer` and `evals` are import names of other distributions on the public index, too. Installing one of those beside
radio-cache replaces files of ours without a word (docs/design/010-import-names.md).
"""

import pkgutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

PACKAGES = ("radio_cache", "cache_builder", "trainer", "evals")
OWN = b'__distribution__ = "radio-cache"'
"""A line in the `__init__.py` of each package."""


def radio_cache() -> NoReturn:
    """Run `radio-cache`."""
    run("cache_builder.cli:main")


def radio_train() -> NoReturn:
    """Run `radio-train`."""
    run("trainer.cli:main")


def radio_eval() -> NoReturn:
    """Run `radio-eval`."""
    run("evals.cli:main")


def radio_export() -> NoReturn:
    """Run `radio-export`."""
    run("trainer.export_cli:main")


def run(program: str) -> NoReturn:
    """Check the packages, then run a program by its import path ("package.module:function").

    One import for all programs, by name, since a replaced package must not be imported before it was looked at.
    """
    complaint = complaint_about_packages()
    if complaint:
        sys.stderr.write(f"error: {complaint}\n")
        sys.exit(1)
    sys.exit(pkgutil.resolve_name(program)())


def complaint_about_packages() -> str:
    """Return a sentence about a package of ours that another distribution replaced or hides; "" if there is none."""
    for name in PACKAGES:
        # Finds the file and does not run it, since a package of the same name may do anything when it is imported.
        spec = find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is not None and OWN in Path(origin).read_bytes():
            continue
        # Only after a mismatch: reading the metadata of all distributions slows every start.
        owners = [owner for owner in metadata.packages_distributions().get(name, ()) if owner != "radio-cache"]
        if origin is None and not owners:
            return f"the package '{name}' of radio-cache is gone: pip install --force-reinstall radio-cache"
        whose = f"of the distribution '{owners[0]}'" if owners else "not radio-cache's own"
        place = "" if origin is None else f" ({origin})"
        cure = f"pip uninstall {owners[0]}, then " if owners else "rename or remove it, or "
        return (
            f"the package '{name}'{place} is {whose}, which has the same import name: {cure}"
            "pip install --force-reinstall radio-cache; or give each an environment of its own"
        )
    return ""
