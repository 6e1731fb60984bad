"""From a teacher's stored codes to what a student should say under its crops, on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from radio_cache.reader import Cache
from radio_cache.torch import MapDecoder, crop_maps
from trainer.data import TeacherBatch
from trainer.losses import angular_dispersion
from trainer.normalisation import (
    Rotated,
    from_coordinates,
    sampled_summaries,
    spatial_normaliser,
    summary_normaliser,
)
from trainer.recipes import Recipe


@dataclass(frozen=True)
class Targets:
    """What a student should say under its crops: spatial (b, n, c), valid (b, n), summary (b, c) or None.

    grid_hw: of the n tokens. kept (b,): the share of what the teacher saw that the crop kept; a summary speaks of all of it.
    shift_yx (b, 2): how many of its tokens the student's crop lies further down and right; None for not at all.
    dispersion: of the teacher's summaries, radians squared, where the loss asks for it.
    """

    spatial: Float[Tensor, "b n c"]
    valid: Bool[Tensor, "b n"]
    summary: Float[Tensor, "b c"] | None
    kept: Float[Tensor, " b"]
    grid_hw: tuple[int, int]
    shift_yx: Int[Tensor, "b 2"] | None = None
    dispersion: float | None = None


class TargetMaker:
    """Turns one teacher's part of a batch into targets on the device. Statistics come from the cache.

    rows: the images that training sees, to take samples of where a normalisation needs more than the cache recorded.
    """

    def __init__(
        self, cache: Cache, teacher: str, recipe: Recipe, rows: NDArray[np.int64], device: torch.device
    ) -> None:
        cached, seed = cache.teachers[teacher], recipe.seed
        self._decoder, self._device = MapDecoder(cached.codec, device), device
        self.spatial = spatial_normaliser(cache, teacher, recipe.normalise, rows, seed, device)
        self.summary = None
        self._dispersion: float | None = None
        if cached.spec.summary_dim is not None:
            self.summary = summary_normaliser(cache, teacher, recipe.normalise_summary, rows, seed, device)
            if recipe.summary_loss == "angle":
                sample = sampled_summaries(cache, teacher, rows, seed).to(device)
                self._dispersion = angular_dispersion(self.summary(sample) if self.summary else sample)
        self._composed = None
        if isinstance(self.spatial, Rotated):
            self._composed = from_coordinates(self._decoder, self.spatial, cached.spec.spatial_dim, device)

    def __call__(self, part: TeacherBatch, shift_yx: NDArray[np.int64] | None = None) -> Targets:
        rows, columns, kept = (self._here(a) for a in (part.weights.rows, part.weights.columns, part.weights.kept))
        # Crops are cut before the codec's last step, which is linear: what is cut away need not be rotated.
        coordinates = crop_maps(self._decoder.coordinates(self._here(part.codes)), rows, columns)
        if self._composed:
            spatial = torch.addmm(self._composed[1], coordinates.flatten(0, 1), self._composed[0])
            spatial = spatial.view_as(coordinates)
        else:
            spatial = self._decoder.features(coordinates)
            spatial = self.spatial(spatial) if self.spatial else spatial
        summary = None if part.summary is None else self._here(part.summary)
        if summary is not None and self.summary:
            summary = self.summary(summary)
        h, w = part.weights.valid.shape[1:]
        return Targets(
            spatial, self._here(part.weights.valid).flatten(1), summary, kept, (int(h), int(w)),
            None if shift_yx is None else self._here(shift_yx), self._dispersion,
        )  # fmt: skip

    def _here(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
