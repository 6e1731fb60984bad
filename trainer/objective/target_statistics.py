"""What a run normalises its targets by: fitted when it begins, by one process for all, and kept in its folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from radio_cache.errors import ConfigError
from radio_cache.format.checksums import crc32c
from radio_cache.reader import Cache
from radio_cache.storage.local import write_atomically
from trainer.distributed.processes import Processes
from trainer.objective.losses import angular_dispersion
from trainer.objective.normalisation import (
    Normaliser,
    PerChannel,
    Rotated,
    sampled_summaries,
    spatial_normaliser,
    summary_normaliser,
)
from trainer.recipes.recipe import Normalise, Recipe

STATISTICS_FILE = "statistics.safetensors"
"""In a run's folder: tensors called TEACHER/spatial/matrix, TEACHER/summary/mean, TEACHER/dispersion ..."""

_CHECKSUM = "crc32c"


@dataclass(frozen=True)
class TargetStatistics:
    """Of one teacher. dispersion: of its normalised summaries (`angular_dispersion`); None where no loss divides by it."""

    spatial: Normaliser | None
    summary: Normaliser | None
    dispersion: float | None

    @classmethod
    def fit(
        cls, cache: Cache, teacher: str, recipe: Recipe, rows: NDArray[np.int64], device: torch.device
    ) -> "TargetStatistics":
        """From what the cache recorded, and a sample of these rows where that is not enough."""
        spatial = spatial_normaliser(cache, teacher, recipe.normalise, rows, recipe.seed, device)
        summary, dispersion = None, None
        if cache.teachers[teacher].spec.summary_dim is not None:
            summary = summary_normaliser(cache, teacher, recipe.normalise_summary, rows, recipe.seed, device)
            if recipe.summary_loss == "angle":
                sample = sampled_summaries(cache, teacher, rows, recipe.seed).to(device)
                dispersion = angular_dispersion(summary(sample) if summary else sample)
        return cls(spatial, summary, dispersion)

    def tensors(self, teacher: str) -> dict[str, Tensor]:
        """Everything by name."""
        named: dict[str, Tensor] = {}
        for kind, normaliser in (("spatial", self.spatial), ("summary", self.summary)):
            fields = {} if normaliser is None else vars(normaliser)
            named |= {f"{teacher}/{kind}/{field}": tensor.contiguous() for field, tensor in fields.items()}
        if self.dispersion is not None:
            named[f"{teacher}/dispersion"] = torch.tensor(self.dispersion, dtype=torch.float64)
        return named

    @classmethod
    def of(cls, teacher: str, tensors: dict[str, Tensor], device: torch.device) -> "TargetStatistics":
        """The value with these `tensors`."""

        def normaliser(kind: str) -> Normaliser | None:
            head = f"{teacher}/{kind}/"
            own = {
                name.removeprefix(head): tensor.to(device) for name, tensor in tensors.items() if name.startswith(head)
            }
            if not own:
                return None
            return PerChannel(**own) if "std" in own else Rotated(**own)

        dispersion = tensors.get(f"{teacher}/dispersion")
        return cls(normaliser("spatial"), normaliser("summary"), None if dispersion is None else float(dispersion))


@dataclass(frozen=True)
class RunStatistics:
    """Of all teachers of a run, at the first of their levels, which normalises all.

    kept: whether they come from the run's folder, and not from the cache just now.
    """

    by_teacher: dict[str, TargetStatistics]
    kept: bool

    @classmethod
    def of_run(
        cls,
        out: Path,
        cache: Cache,
        teachers: Sequence[str],
        recipe: Recipe,
        rows: NDArray[np.int64],
        device: torch.device,
        processes: Processes,
    ) -> "RunStatistics":
        """Those that the run in `out` began with; fitted by the first process where there are none, and sent to the others.

        Raises ConfigError for a damaged file, MomentsError and HadamardError for teachers that cannot be normalised so.
        """
        shapes = {name: shape for teacher in teachers for name, shape in _shapes(cache, teacher, recipe).items()}
        tensors, kept = dict[str, Tensor](), False
        if processes.is_first:
            tensors = _read(out / STATISTICS_FILE) or {}
            kept = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
            if not kept:  # none yet, or those of other settings, which the run's folder is about to refuse
                fitted = {
                    name: TargetStatistics.fit(cache, cache.teachers.levels(name)[0].name, recipe, rows, device)
                    for name in teachers
                }
                tensors = {key: tensor for name, one in fitted.items() for key, tensor in one.tensors(name).items()}
        if processes.world > 1:
            tensors = {name: _sent(tensors.get(name), shapes[name], device, processes) for name in sorted(shapes)}
        return cls({name: TargetStatistics.of(name, tensors, device) for name in teachers}, kept)

    def save(self, out: Path) -> None:
        """Keep them in a run's folder."""
        tensors = {
            key: tensor.cpu() for name, one in self.by_teacher.items() for key, tensor in one.tensors(name).items()
        }
        write_atomically(out / STATISTICS_FILE, safetensors.torch.save(tensors, {_CHECKSUM: str(_checksum(tensors))}))


def _shapes(cache: Cache, teacher: str, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Of the tensors that a teacher has under this recipe."""
    spec = cache.teachers.levels(teacher)[0].spec

    def of(kind: str, how: Normalise, width: int) -> dict[str, tuple[int, ...]]:
        if how == "none":
            return {}
        if how == "standardise":
            return {f"{teacher}/{kind}/{field}": (width,) for field in ("mean", "std")}
        square = {f"{teacher}/{kind}/{field}": (width, width) for field in ("matrix", "inverse")}
        return {f"{teacher}/{kind}/shift": (width,), **square}

    shapes = of("spatial", recipe.normalise, spec.spatial_dim)
    if spec.summary_dim is not None:
        shapes |= of("summary", recipe.normalise_summary, spec.summary_dim)
        if recipe.summary_loss == "angle":
            shapes[f"{teacher}/dispersion"] = ()
    return shapes


def _sent(tensor: Tensor | None, shape: tuple[int, ...], device: torch.device, processes: Processes) -> Tensor:
    """The first process's tensor, on all of them."""
    dtype = torch.float32 if shape else torch.float64  # of a number alone
    mine = torch.zeros(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device, dtype)
    return processes.sum(mine)


def _read(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    cure = "restore it from a copy, or remove it: the cache then gives the same again, but for last bits"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            recorded = (file.metadata() or {}).get(_CHECKSUM)
    except SafetensorError as exc:
        raise ConfigError(f"{path} is damaged ({exc}): {cure}") from exc
    if recorded != str(_checksum(tensors)):
        raise ConfigError(f"{path} is damaged (it does not match its checksum): {cure}")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        values = tensors[name].contiguous().numpy().reshape(-1) if math.prod(tensors[name].shape) else np.zeros(0)
        crc = crc32c(values.tobytes(), crc32c(name.encode(), crc))
    return crc


__all__ = ["STATISTICS_FILE", "RunStatistics", "TargetStatistics"]
