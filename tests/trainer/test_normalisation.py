"""Normalisation of targets: statistics afterwards, the way back through a head, and klt's short cut."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from radio_cache.phi_s import NORMALISATIONS
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from radio_cache.torch import MapDecoder
from trainer.adaptors import Head, MlpHead, ResidualHead, spread_copies
from trainer.data import CropData
from trainer.normalisation import Normalise, Rotated, from_coordinates, spatial_normaliser, summary_normaliser
from trainer.recipe import Recipe
from trainer.targets import TargetMaker

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    write_images(tmp_path / "images")
    return make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images", teachers={"t": (4, 4)})


def heads_of_every_kind() -> list[Head]:
    return [MlpHead(3, 8, 4), ResidualHead(3, 8, 4, blocks=2), ResidualHead(3, 8, 4, blocks=1, copies=4)]


@pytest.mark.parametrize("kind", range(3), ids=["mlp", "residual", "upsampling"])
@pytest.mark.parametrize("how", ["standardise", *NORMALISATIONS])
def test_a_head_that_says_the_targets_says_the_teachers_features_once_folded(
    cache: Cache, how: Normalise, kind: int
) -> None:
    rows = cache.usable_rows(["t"])
    normaliser = spatial_normaliser(cache, "t", how, rows, 0, CPU)
    assert normaliser is not None
    torch.manual_seed(0)
    head, inputs = heads_of_every_kind()[kind], torch.randn(2, 15, 3)
    factor = 2 if kind == 2 else 1
    with torch.no_grad():
        torch.nn.init.normal_(head.last.bias)
        said = spread_copies(head(inputs), (3, 5), factor)
        normaliser.fold_into(head)
        torch.testing.assert_close(normaliser(spread_copies(head(inputs), (3, 5), factor)), said, rtol=1e-3, atol=1e-3)


def test_phi_s_targets_have_variance_one_in_every_channel_and_keep_angles(cache: Cache) -> None:
    rows = cache.usable_rows(["t"])
    normaliser = spatial_normaliser(cache, "t", "phi-s", rows, 0, CPU)
    assert isinstance(normaliser, Rotated)
    features = torch.from_numpy(cache.teachers["t"].maps(rows)).flatten(0, 2)
    targets = normaliser(features)
    torch.testing.assert_close(targets.var(0, unbiased=False), torch.ones(4), rtol=1e-3, atol=1e-3)
    gram = normaliser.matrix @ normaliser.matrix.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4), rtol=1e-4, atol=1e-4 * float(gram[0, 0]))


def test_summaries_are_normalised_by_their_own_moments(cache: Cache) -> None:
    rows = cache.usable_rows(["t"])
    normaliser = summary_normaliser(cache, "t", "global", rows, 0, CPU)
    assert normaliser is not None
    values = normaliser(torch.from_numpy(cache.teachers["t"].summaries(rows)))
    assert float(values.mean()) == pytest.approx(0, abs=1e-5)
    assert float(values.var(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert summary_normaliser(cache, "t", "none", rows, 0, CPU) is None


def test_targets_in_one_product_are_decoding_then_normalising(cache: Cache) -> None:
    teacher, rows = cache.teachers["t"], cache.usable_rows(["t"])
    normaliser = spatial_normaliser(cache, "t", "hadamard", rows, 0, CPU)
    assert isinstance(normaliser, Rotated)

    class Turned(MapDecoder):
        """As klt decodes: coordinates in another basis, with a mean."""

        def features(self, coordinates: torch.Tensor) -> torch.Tensor:
            turn = torch.tensor([[0.0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]])
            return coordinates @ turn + torch.tensor([1.0, 2, 3, 4])

    decoder = Turned(teacher.codec, CPU)
    weight, bias = from_coordinates(decoder, normaliser, 4, CPU)
    coordinates = torch.randn(7, 4)
    expected = normaliser(decoder.features(coordinates))
    torch.testing.assert_close(coordinates @ weight + bias, expected, rtol=1e-4, atol=1e-3)


def test_the_dispersion_is_that_of_the_normalised_summaries(
    cache: Cache, tiny_recipe: Recipe, make_data: Callable[..., CropData]
) -> None:
    from trainer.losses import angular_dispersion

    recipe = replace(tiny_recipe, summary_loss="angle", normalise_summary="none")
    data = make_data(cache, ("t",), recipe, (2, 2))
    targets = TargetMaker(cache, data.levels["t"].all, recipe, cache.usable_rows(), CPU)(data.batch(0, 0, 3).teachers[0])
    everything = torch.from_numpy(cache.teachers["t"].summaries(cache.usable_rows()))
    assert targets.dispersion == pytest.approx(angular_dispersion(everything))
    scaled = TargetMaker(
        cache, data.levels["t"].all, replace(recipe, normalise_summary="standardise"), cache.usable_rows(), CPU
    )
    assert scaled(data.batch(0, 0, 3).teachers[0]).dispersion != pytest.approx(targets.dispersion)
    assert np.isfinite(targets.dispersion)
