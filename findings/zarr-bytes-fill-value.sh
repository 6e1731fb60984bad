#!/usr/bin/env bash
# zarr-python 3.1.6: an array of the registered data type `bytes` opens with the fill value "" (base64), and raises TypeError
# with [] (a list of byte values).
#
# Source: zarr 3.1.6 from the Python package index, CPython 3.11. Valid input: a Zarr v3 document of one array without
# chunks, codec `vlen-bytes`. zarr-python's issue 3517 quotes the list from the registry's text of the type.
# Guess before the run: both open, since the array has no chunk and the fill value is empty either way.
# Seen: "" gives b'', [] raises TypeError. Fails if that changes.
# Here: caches write "" for the images that they keep, so that zarr-python and zarrs open them (docs/format.md).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check zarr==3.1.6 2>/dev/null
cd "$place"
"$place/venv/bin/python" -W ignore - <<'PY'
import json
from pathlib import Path

import zarr

document = {
    "zarr_format": 3, "node_type": "array", "shape": [2], "data_type": "bytes",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "codecs": [{"name": "vlen-bytes"}], "attributes": {},
}
seen = {}
for name, fill in (("text", ""), ("list", [])):
    folder = Path(name)
    folder.mkdir()
    (folder / "zarr.json").write_text(json.dumps({**document, "fill_value": fill}))
    try:
        seen[name] = repr(zarr.open_array(name, mode="r")[0])
    except Exception as exc:
        seen[name] = type(exc).__name__
    print(f"fill value {fill!r}: {seen[name]}")
assert seen["list"] == "TypeError" and seen["text"] != "TypeError", "zarr-python has changed"
PY
