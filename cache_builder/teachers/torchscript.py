"""Tensors of a TorchScript archive, such as OpenAI's CLIP, read without running its code.

`torch.jit.load` would run code: modules may bring their own `__setstate__`. But the archive is a zip file: its `data.pkl` lists
the tensors, and its `data/` holds their values. This reader knows the few names that such a pickle needs, and refuses all others.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

# Storage classes in the pickle -> dtypes.
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive: a zip file with constants beside its data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of the archived module and its submodules by name.

    Raises:
        UnpicklingError: the archive needs anything else than tensors. Damaged archives raise other errors of zipfile and torch.
    """
    with zipfile.ZipFile(path) as archive:
        # One file of this name lies in the folder of the archive; constants and code are not read.
        (data,) = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        with archive.open(data) as file:
            root = _TensorsOnly(file, archive, data.removesuffix("data.pkl")).load()
    tensors: dict[str, Tensor] = {}
    _collect(root, "", tensors)
    return tensors


class _Module:
    """A replacement for a module of the archive: its attributes, and none of its code."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = cast(dict[str, Any], state) if isinstance(state, dict) else {}


class _TensorsOnly(pickle.Unpickler):
    """An unpickler that builds tensors and containers only."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the replacement for a class of the pickle.

        Raises:
            UnpicklingError: the class is not one of the known ones.
        """
        # Compiled modules have generated class names.
        if module_name.startswith("__torch__"):
            return _Module
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
        }
        if (module_name, global_name) in known:
            return known[module_name, global_name]
        raise pickle.UnpicklingError(f"it requires {module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> Tensor:
        """Return the values of a storage as a flat tensor.

        Raises:
            UnpicklingError: the reference is no storage, or its file has another length.
        """
        kind, dtype, key, _, num_values = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it requires a {kind}")
        # bytearray: torch warns about read-only buffers.
        values = torch.frombuffer(bytearray(self._archive.read(f"{self._folder}data/{key}")), dtype=dtype)
        if len(values) != num_values:
            raise pickle.UnpicklingError(f"data/{key} holds {len(values)} values, not {num_values}")
        return values


def _tensor(values: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Return a tensor of a storage, in place of torch._utils._rebuild_tensor_v2."""
    # as_strided raises if the tensor would exceed the storage. The clone is independent of tensors that share it.
    return values.as_strided(tuple(size), tuple(stride), offset).clone()


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Add the tensors of a module and its submodules to `tensors` under their dotted names."""
    if not isinstance(module, _Module):
        return
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        else:
            _collect(value, f"{prefix}{name}.", tensors)
