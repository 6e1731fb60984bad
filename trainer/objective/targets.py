"""Targets of a step: a teacher's stored codes, decoded and resampled under the student's crops, on the device."""

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from radio_cache.reader import Cache, CachedTeacher
from radio_cache.torch import MapDecoder
from trainer.data.batch import LevelCodes, Targets, TeacherCodes
from trainer.model.adaptors import Head
from trainer.model.student import DistilledStudent
from trainer.objective.normalisation import Rotated, from_coordinates
from trainer.objective.target_statistics import TargetStatistics
from trainer.recipes.recipe import Recipe


class TargetMaker:
    """Turn one teacher's part of a batch into targets on the device."""

    def __init__(
        self,
        cache: Cache,
        levels: tuple[CachedTeacher, ...],
        recipe: Recipe,
        rows: NDArray[np.int64],
        device: torch.device,
        statistics: TargetStatistics | None = None,
    ) -> None:
        """Prepare decoders and normalisers.

        Args:
            cache: of the teacher.
            levels: of the teacher. The statistics of the first one normalise all of them.
            recipe: names the normalisations.
            rows: images of the training set, sampled if a normalisation needs more than the cache recorded.
            device: of the targets.
            statistics: of the teacher, if the run has them already.
        """
        base = levels[0]
        self._channels = base.spec.spatial_dim
        statistics = statistics or TargetStatistics.fit(cache, base.name, recipe, rows, device)
        self.spatial, self.summary, self._dispersion = statistics.spatial, statistics.summary, statistics.dispersion
        self._decoders = [MapDecoder(level.codec, device) for level in levels]
        self._composed: list[tuple[Tensor, Tensor]] | None = None
        if isinstance(self.spatial, Rotated):
            self._composed = [from_coordinates(d, self.spatial, self._channels, device) for d in self._decoders]

    def __call__(self, part: TeacherCodes, shift_yx: Int[Tensor, "b 2"] | None = None) -> Targets:
        """Return the targets of one teacher.

        Args:
            part: the teacher's codes, and where the crops lie.
            shift_yx: (b, 2) tokens by which the student's crops are shifted against the teacher's; None without shifts.
        """
        summary = part.summary
        if summary is not None and self.summary:
            summary = self.summary(summary)
        h, w = part.valid.shape[1:]
        return Targets(
            self._spatial(part),
            part.valid.flatten(1),
            summary,
            part.coverage,
            (int(h), int(w)),
            shift_yx,
            self._dispersion,
        )

    def _spatial(self, part: TeacherCodes) -> Float[Tensor, "b n c"]:
        if len(part.levels) == 1:
            return self._under_crops(part.levels[0])
        b, h, w = part.valid.shape
        spatial = torch.empty(b, h * w, self._channels, device=part.valid.device)
        for level in part.levels:
            spatial[level.positions] = self._under_crops(level)
        return spatial

    def _under_crops(self, level: LevelCodes) -> Float[Tensor, "k n c"]:
        # The codec's last step is linear, so crops are resampled before it: tokens outside the crops need no rotation.
        decoder = self._decoders[level.level]
        coordinates = decoder.crops(level.codes, level.rows, level.columns)
        if self._composed:
            matrix, shift = self._composed[level.level]
            return torch.addmm(shift, coordinates.flatten(0, 1), matrix).view_as(coordinates)
        spatial = decoder.features(coordinates)
        return self.spatial(spatial) if self.spatial else spatial


def fold_targets(model: DistilledStudent, makers: Mapping[str, TargetMaker]) -> None:
    """Fold the targets' normalisation into the heads, in place, so that heads predict in the teachers' own units."""
    summary_heads = iter(model.adaptors.summary_heads)
    for widths, spatial_head in zip(model.config.teachers, model.adaptors.spatial_heads, strict=True):
        make = makers[widths.name]
        if make.spatial:
            make.spatial.fold_into(cast(Head, spatial_head))
        summary_head = next(summary_heads) if widths.summary_dim is not None else None
        if summary_head is not None and make.summary:
            make.summary.fold_into(cast(Head, summary_head))
