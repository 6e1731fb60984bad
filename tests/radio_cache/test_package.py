"""What `import radio_cache` brings, and what it must not."""

import subprocess
import sys

import radio_cache

HEAVY = ("torch", "torchvision", "dask", "faiss", "timm", "open_clip", "segment_anything")


def test_importing_the_store_loads_no_torch_dask_or_faiss() -> None:
    program = (
        "import sys, radio_cache, radio_cache.view.info, radio_cache.images.decode, radio_cache.testing, radio_cache.view\n"
        f"print(sorted(set(sys.modules) & set({HEAVY})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there_and_nothing_else_is_public() -> None:
    modules = {name for name in vars(radio_cache) if hasattr(vars(radio_cache)[name], "__spec__")}
    public = {name for name in vars(radio_cache) if not name.startswith("_")} - modules
    assert public == set(radio_cache.__all__)
