"""The statistics that normalise a run's targets: fitted at its start, by one process for all, and stored in its folder."""

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
"""File in a run's folder, with tensors named TEACHER/spatial/matrix, TEACHER/summary/mean, TEACHER/dispersion ..."""

_CHECKSUM = "crc32c"


@dataclass(frozen=True)
class TargetStatistics:
    """The normalisers of one teacher's targets.

    Attributes:
        spatial: of the maps; None if the recipe leaves them as they are.
        summary: of the summaries; None if there are none, or the recipe leaves them as they are.
        dispersion: `angular_dispersion` of the normalised summaries; None if no loss divides by it.
    """

    spatial: Normaliser | None
    summary: Normaliser | None
    dispersion: float | None

    @classmethod
    def fit(
        cls, cache: Cache, teacher: str, recipe: Recipe, rows: NDArray[np.int64], device: torch.device
    ) -> "TargetStatistics":
        """Fit the statistics to the cache's records, and to a sample of these rows if the records do not suffice."""
        spatial = spatial_normaliser(cache, teacher, recipe.normalise, rows, recipe.seed, device)
        summary, dispersion = None, None
        if cache.teachers[teacher].spec.summary_dim is not None:
            summary = summary_normaliser(cache, teacher, recipe.normalise_summary, rows, recipe.seed, device)
            if recipe.summary_loss == "angle":
                sample = sampled_summaries(cache, teacher, rows, recipe.seed).to(device)
                # Of the normalised summaries, because the loss compares those. (n, c) -> scalar
                dispersion = angular_dispersion(summary(sample) if summary else sample)
        return cls(spatial, summary, dispersion)

    def tensors(self, teacher: str) -> dict[str, Tensor]:
        """Return all tensors by the names that `STATISTICS_FILE` uses."""
        named: dict[str, Tensor] = {}
        for kind, normaliser in (("spatial", self.spatial), ("summary", self.summary)):
            # Names of the dataclass fields are part of the file's format.
            fields = {} if normaliser is None else vars(normaliser)
            named |= {f"{teacher}/{kind}/{field}": tensor.contiguous() for field, tensor in fields.items()}
        if self.dispersion is not None:
            named[f"{teacher}/dispersion"] = torch.tensor(self.dispersion, dtype=torch.float64)
        return named

    @classmethod
    def of(cls, teacher: str, tensors: dict[str, Tensor], device: torch.device) -> "TargetStatistics":
        """Build the statistics from the tensors that `tensors` returned."""

        def normaliser(kind: str) -> Normaliser | None:
            head = f"{teacher}/{kind}/"
            fields = {
                name.removeprefix(head): tensor.to(device) for name, tensor in tensors.items() if name.startswith(head)
            }
            if not fields:
                return None
            # The field names tell the two kinds apart, so that the file needs no record of the kind.
            return PerChannel(**fields) if "std" in fields else Rotated(**fields)

        dispersion = tensors.get(f"{teacher}/dispersion")
        return cls(normaliser("spatial"), normaliser("summary"), None if dispersion is None else float(dispersion))


@dataclass(frozen=True)
class RunStatistics:
    """The statistics of all teachers of a run. The first level of a teacher normalises all its levels.

    Attributes:
        by_teacher: name -> statistics.
        from_folder: whether they were read from the run's folder, and not fitted to the cache now.
    """

    by_teacher: dict[str, TargetStatistics]
    from_folder: bool

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
        """Read the statistics that the run in `out` started with, or fit them if there are none.

        The first process reads or fits them and sends them to the others.

        Raises:
            ConfigError: for a damaged file.
            MomentsError: for a teacher whose features do not vary.
            HadamardError: for a width without a Hadamard matrix.
        """
        shapes = {name: shape for teacher in teachers for name, shape in _shapes(cache, teacher, recipe).items()}
        # One process fits for all: eigenvectors may differ in their last bits between machines.
        tensors, from_folder = dict[str, Tensor](), False
        if processes.is_first:
            tensors = _read(out / STATISTICS_FILE) or {}
            from_folder = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
            if not from_folder:  # none yet, or those of other settings, which the run's folder will refuse
                fitted = {
                    name: TargetStatistics.fit(cache, cache.teachers.levels(name)[0].name, recipe, rows, device)
                    for name in teachers
                }
                tensors = {
                    key: tensor
                    for name, statistics in fitted.items()
                    for key, tensor in statistics.tensors(name).items()
                }
        if processes.world > 1:
            # Sorted: all processes must take part in the collectives in one order.
            tensors = {name: _sent(tensors.get(name), shapes[name], device, processes) for name in sorted(shapes)}
        return cls({name: TargetStatistics.of(name, tensors, device) for name in teachers}, from_folder)

    def save(self, out: Path) -> None:
        """Write the statistics to a run's folder."""
        tensors = {
            key: tensor.cpu()
            for name, statistics in self.by_teacher.items()
            for key, tensor in statistics.tensors(name).items()
        }
        write_atomically(out / STATISTICS_FILE, safetensors.torch.save(tensors, {_CHECKSUM: str(_checksum(tensors))}))


def _shapes(cache: Cache, teacher: str, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that a teacher has under this recipe."""
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
    """Send the first process's tensor to all processes."""
    # The dispersion is the only scalar, and is stored in float64.
    dtype = torch.float32 if shape else torch.float64
    # The others contribute zeros to the sum.
    mine = torch.zeros(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device, dtype)
    return processes.sum(mine)


def _read(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    cure = "restore it from a copy, or remove it: the run then fits it to the cache again, equal up to the last bits"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            recorded = (file.metadata() or {}).get(_CHECKSUM)
    except SafetensorError as exc:
        raise ConfigError(f"{path} is damaged ({exc}): {cure}") from exc
    if recorded != str(_checksum(tensors)):
        raise ConfigError(f"{path} is damaged (it does not match its checksum): {cure}")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> int:
    # Names are summed as well, so that swapped tensors do not pass.
    crc = 0
    for name in sorted(tensors):
        values = tensors[name].contiguous().numpy().reshape(-1) if math.prod(tensors[name].shape) else np.zeros(0)
        crc = crc32c(values.tobytes(), crc32c(name.encode(), crc))
    return crc


__all__ = ["STATISTICS_FILE", "RunStatistics", "TargetStatistics"]
