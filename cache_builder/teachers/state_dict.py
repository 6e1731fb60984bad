"""Reading a weights file without running code from it, and loading all of it into a network."""

import pickle
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cache_builder.teachers.torchscript import is_torchscript, read_torchscript
from cache_builder.teachers.weights import first_line
from cache_builder.teachers.wrong_weights import first_differences
from radio_cache.errors import TeacherWeightsError

_ASKS_FOR = re.compile(r"GLOBAL (\S+)")


def read_state_dict(path: Path, *, teacher: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or PyTorch file or a TorchScript archive; nothing in the file can run.

    Unwraps the usual `state_dict` and `model` levels and a `module.` prefix.
    Raises TeacherWeightsError for a pickle that needs code, a damaged file, or one that holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        elif is_torchscript(path):
            loaded = read_torchscript(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} is not a plain file of tensors, and files that can run code are not opened "
            f"({_what_stops_it(exc)}). Save its state dict with torch.save, or as safetensors; fetch it again if it is one"
        ) from exc
    except Exception as exc:  # torch and safetensors raise RuntimeError, EOFError, KeyError ... on damaged files
        raise TeacherWeightsError(
            f"teacher '{teacher}': {path} cannot be read as weights: {first_line(exc).rstrip('.')}. Its "
            f"{path.stat().st_size} bytes are not the whole file, or not such a file: fetch it again"
        ) from exc
    for level in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(cast(Any, loaded).get(level), dict):
            loaded = cast(Any, loaded)[level]
    if not isinstance(loaded, dict):
        raise TeacherWeightsError(f"teacher '{teacher}': {path} holds a {type(loaded).__name__}, not tensors by name")
    items = cast(dict[Any, Any], loaded).items()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise TeacherWeightsError(f"teacher '{teacher}': {path} holds no tensors")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _what_stops_it(error: pickle.UnpicklingError) -> str:
    """Why a pickle is not read. PyTorch's own words go on to tell how to run what is in it."""
    asked = _ASKS_FOR.search(str(error))
    if asked:
        return f"it asks for {asked[1]}"
    return "PyTorch finds no tensors in it" if "weights_only" in str(error) else first_line(error)


def load_exactly(net: torch.nn.Module, state: dict[str, Tensor], *, teacher: str, path: Path, whose: str = "") -> None:
    """Load all of a network's tensors.

    Raises TeacherWeightsError naming what is missing, left over or misshapen, and whose the file may be. whose: that, if
    the tensors' names here are not those in the file.
    """
    own = net.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    problems = [
        f"{len(names)} {what} (such as {example})"
        for names, what, example in (
            (missing, "tensors missing", "".join(missing[:1])),
            (extra, "tensors too many", "".join(extra[:1])),
            (wrong, "of another shape", ", ".join(first_differences(own, state))),
        )
        if names
    ]
    if problems:
        raise TeacherWeightsError(f"teacher '{teacher}': {path} does not fit the network: {'; '.join(problems)}{whose}")
    net.load_state_dict(state)
