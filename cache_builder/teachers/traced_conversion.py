"""What a library's conversion does to the tensors of a file: which are resampled, made up or left out.

Conversions such as timm's `checkpoint_filter_fn` rename and reorder tensors, which changes nothing. They also resample a patch
embedding to another patch size, and fill in or leave out tensors, without a word. So every operation of PyTorch is watched.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_RESAMPLES = re.compile(r"upsample|interpolate|grid_sampl|pinv|linalg|mm$|matmul|pool|lerp|gather|index")
_MAKES = re.compile(r"new_|zeros|ones|full|empty|rand|arange|linspace|eye")
_POSITIONS = re.compile(r"pos_emb|rel_pos|relative_position|attention_bias|position|pos_table|(?:^|_)pos(?:_|$)")


@dataclass(frozen=True, kw_only=True)
class TracedConversion:
    """A converted state dict.

    tensors: by the network's names. resampled: those among them whose values were interpolated. filled: those that hold
    nothing of the file. unused: the names in the file of tensors that nothing was taken from.
    """

    tensors: dict[str, Tensor]
    resampled: list[str]
    filled: list[str]
    unused: list[str]


def traced_conversion(
    convert: Callable[[dict[str, Tensor]], Mapping[str, Any]], state: dict[str, Tensor], *, taken: Iterable[str]
) -> TracedConversion:
    """Run a conversion and report what it did beside renaming and reordering.

    Args:
        taken: names of the tensors that the network takes; the others of the result do not matter.
    """
    watch = _Watch()
    watch.begin(state)
    with watch:
        converted = dict(convert(dict(state)))
    names = [name for name in taken if isinstance(converted.get(name), Tensor)]
    origins = {name: watch.origin(converted[name]) for name in names}
    sources = {source for origin in origins.values() for source in origin.sources}
    return TracedConversion(
        tensors=converted,
        resampled=[name for name, origin in origins.items() if any(_RESAMPLES.search(op) for op in origin.operations)],
        filled=[name for name, origin in origins.items() if not origin.sources],
        unused=[name for name in state if name not in sources],
    )


def is_position_table(name: str) -> bool:
    """Return whether a tensor's name is that of a table of positions, which libraries resize for another input size."""
    return bool(_POSITIONS.search(name))


def resized_positions(net: torch.nn.Module, resize: Callable[[], None]) -> dict[str, str]:
    """Have timm give a network another input size; return, for its spec, which of its tables were resized by that."""
    before = {key: value.shape for key, value in net.state_dict().items()}
    resize()
    after = {key: value.shape for key, value in net.state_dict().items()}
    names = [key for key in after if key in before and before[key] != after[key]]
    if not names:
        return {}
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return {"positions": f"{names[0]} {tuple(before[names[0]])} -> {tuple(after[names[0]])}{more}, as timm"}


@dataclass
class _Origin:
    """Names in the file whose values went into a tensor, and the operations that they went through."""

    sources: set[str] = field(default_factory=set[str])
    operations: set[str] = field(default_factory=set[str])


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._origins: dict[int, _Origin] = {}
        self._alive: list[Tensor] = []  # a storage's address must not be used again

    def begin(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            # Tied tensors share a storage: both names are its source.
            self._origins.setdefault(_storage(tensor), _Origin()).sources.add(name)

    def origin(self, tensor: Tensor) -> _Origin:
        return self._origins.get(_storage(tensor), _Origin())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        out = func(*args, **(kwargs or {}))
        tensors_in = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [self._origins[key] for tensor in tensors_in if (key := _storage(tensor)) in self._origins]
        operation = str(func.overloadpacket.__name__)
        if _MAKES.match(operation):  # new_zeros(x) takes the type of x, and none of its values
            known = []
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                origin = self._origins.setdefault(_storage(leaf), _Origin())
                for other in known:
                    origin.sources |= other.sources
                    origin.operations |= other.operations
                if known:
                    origin.operations.add(operation)
                self._alive.append(leaf)
        return out


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage]  # the data's address is 0 on meta


__all__ = ["TracedConversion", "is_position_table", "resized_positions", "traced_conversion"]
