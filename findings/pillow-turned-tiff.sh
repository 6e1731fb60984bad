#!/usr/bin/env bash
# Pillow 13.0.0: one TIFF with an orientation tag has another size, and other pixels, when it is opened by its path than
# when it is opened from memory.
#
# Source: Pillow 13.0.0 from the Python package index, CPython 3.11. Valid input: an uncompressed grey TIFF, 2 x 3 pixels,
# written by Pillow itself with orientation 6.
# Guess before the run: both ways give the same image, since the bytes are the same.
# Seen: by path (2, 3), from memory (3, 2) after loading. Fails if that changes.
# Here: images are always opened from memory, so that one photo is one image (radio_cache/images/decode.py).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 2>/dev/null
cd "$place"
"$place/venv/bin/python" - <<'PY'
import io
from pathlib import Path

from PIL import Image

exif = Image.Exif()
exif[0x112] = 6
picture = Image.new("L", (2, 3))
picture.putdata(range(6))
picture.save("turned.tif", exif=exif)
by_path, from_memory = Image.open("turned.tif"), Image.open(io.BytesIO(Path("turned.tif").read_bytes()))
by_path.load()
from_memory.load()
print("by path:", by_path.size, list(by_path.tobytes()))
print("from memory:", from_memory.size, list(from_memory.tobytes()))
assert by_path.size != from_memory.size, "Pillow has changed: both ways give one size now"
PY
