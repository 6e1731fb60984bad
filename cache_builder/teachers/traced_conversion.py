"""A trace of a library's checkpoint conversion: the tensors that it resamples, fills in or leaves out.

Conversions such as timm's `checkpoint_filter_fn` rename and reorder tensors, which changes nothing. They also silently resample a
patch embedding to another patch size, and fill in or leave out tensors. So every operation of PyTorch is traced.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names of PyTorch's operations that mix values of a tensor, and that make new ones.
_RESAMPLES = re.compile(r"upsample|interpolate|grid_sampl|pinv|linalg|mm$|matmul|pool|lerp|gather|index")
_MAKES = re.compile(r"new_|zeros|ones|full|empty|rand|arange|linspace|eye")
_POSITIONS = re.compile(r"pos_emb|rel_pos|relative_position|attention_bias|position|pos_table|(?:^|_)pos(?:_|$)")


@dataclass(frozen=True, kw_only=True)
class TracedConversion:
    """A converted state dict, and the differences from the file."""

    tensors: dict[str, Tensor]
    """Tensors by the network's names."""

    resampled: list[str]
    """Names of tensors whose values were interpolated."""

    filled: list[str]
    """Names of tensors without any value of the file."""

    unused: list[str]
    """Names in the file of tensors without any value in the network."""


def traced_conversion(
    convert: Callable[[dict[str, Tensor]], Mapping[str, Any]], state: dict[str, Tensor], *, names: Iterable[str]
) -> TracedConversion:
    """Run a conversion, and report its effects besides renaming and reordering.

    Args:
        convert: the library's conversion.
        state: tensors by the file's names.
        names: names of the network's tensors. The others in the result are ignored.
    """
    tracer = _OperationTracer()
    tracer.register(state)
    with tracer:
        converted = dict(convert(dict(state)))  # a copy: conversions pop entries
    converted_names = [name for name in names if isinstance(converted.get(name), Tensor)]
    origins = {name: tracer.origin(converted[name]) for name in converted_names}
    sources = {source for origin in origins.values() for source in origin.sources}
    return TracedConversion(
        tensors=converted,
        resampled=[name for name, origin in origins.items() if any(_RESAMPLES.search(op) for op in origin.operations)],
        filled=[name for name, origin in origins.items() if not origin.sources],
        unused=[name for name in state if name not in sources],
    )


def is_position_table(name: str) -> bool:
    """Return whether a tensor's name is that of a position table, which libraries resize for another input size."""
    return bool(_POSITIONS.search(name))


def resized_positions(net: torch.nn.Module, resize: Callable[[], None]) -> dict[str, str]:
    """Give a network another input size, and report the resized tables.

    Args:
        net: the network.
        resize: changes its input size, with timm.

    Returns:
        An entry for `TeacherSpec.loaded`; {} if no table was resized.
    """
    before = {key: value.shape for key, value in net.state_dict().items()}
    resize()
    after = {key: value.shape for key, value in net.state_dict().items()}
    names = [key for key in after if key in before and before[key] != after[key]]
    if not names:
        return {}
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    # This text is recorded in caches: its wording must not change.
    return {"positions": f"{names[0]} {tuple(before[names[0]])} -> {tuple(after[names[0]])}{more}, as timm"}


@dataclass
class _Origin:
    """The origin of a tensor: names in the file whose values it holds, and the operations they went through."""

    sources: set[str] = field(default_factory=set[str])
    operations: set[str] = field(default_factory=set[str])


class _OperationTracer(TorchDispatchMode):
    """A record of the origin of every tensor that operations of PyTorch produce."""

    def __init__(self) -> None:
        super().__init__()
        self._origins: dict[int, _Origin] = {}
        # References that keep every storage alive: origins are stored by address, which must not be used again.
        self._alive: list[Tensor] = []

    def register(self, state: Mapping[str, Tensor]) -> None:
        """Register the tensors of the file as origins."""
        for name, tensor in state.items():
            # Tied tensors share a storage: both names are its source.
            self._origins.setdefault(_storage(tensor), _Origin()).sources.add(name)

    def origin(self, tensor: Tensor) -> _Origin:
        """Return the origin of a tensor; an empty one for a tensor of another source."""
        return self._origins.get(_storage(tensor), _Origin())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        out = func(*args, **(kwargs or {}))
        tensors_in = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [self._origins[key] for tensor in tensors_in if (key := _storage(tensor)) in self._origins]
        operation = str(func.overloadpacket.__name__)
        if _MAKES.match(operation):  # new_zeros(x) uses the type of x, and none of its values
            known = []
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                origin = self._origins.setdefault(_storage(leaf), _Origin())
                for input_origin in known:
                    origin.sources |= input_origin.sources
                    origin.operations |= input_origin.operations
                if known:
                    origin.operations.add(operation)
                self._alive.append(leaf)
        return out


def _storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage; views of a tensor share it."""
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage]  # the data's address is 0 on meta


__all__ = ["TracedConversion", "is_position_table", "resized_positions", "traced_conversion"]
