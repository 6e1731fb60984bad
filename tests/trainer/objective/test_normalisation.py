"""Normalisation of targets: statistics afterwards, the way back through a head, and klt's short cut."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.errors import HadamardError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import CacheMeta, Container
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.statistics.moments import Moments
from radio_cache.statistics.phi_s import NORMALISATIONS
from radio_cache.testing import fake_spec, make_tiny_cache, write_images, write_images_shard, write_teacher_shard
from radio_cache.torch import MapDecoder
from radio_cache.writer import ImageIndex, add_teacher, create_cache
from trainer.data.crops import CropData
from trainer.model.adaptors import Head, MlpHead, ResidualHead, spread_copies
from trainer.objective import normalisation
from trainer.objective.normalisation import Normalise, Rotated, from_coordinates, spatial_normaliser, summary_normaliser
from trainer.objective.targets import TargetMaker
from trainer.recipes.recipe import Recipe

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


HELD_OUT, TRAINED, CHANNELS = 1000, 600, 64


def made_of_noise(path: Path, name: str) -> Cache:
    """A cache of images that need no files, and features of 64 channels of very different variance along their axes."""
    count = HELD_OUT + TRAINED
    meta = CacheMeta(
        num_images=count,
        shard_images=256,
        creator="radio-cache tests",
        class_names=(),
        max_pixels=10**6,
        containers=(Container(kind="folder", path="/nowhere", prefix=""),),
    )
    nowhere = np.full(count, -1, np.int64)
    keys = [f"{row:05d}.png" for row in range(count)]
    index = ImageIndex(keys, np.full(count, -1, np.int32), np.zeros(count, np.int32), nowhere, nowhere)
    create_cache(path, meta, index)
    rng = np.random.default_rng(0)
    mix = np.linalg.qr(rng.normal(size=(CHANNELS, CHANNELS)))[0] * np.geomspace(3, 0.5, CHANNELS)
    tokens = rng.normal(size=(count, 4, 4, CHANNELS)) + 0.3 * rng.normal(size=(count, 1, 1, CHANNELS))
    maps = (tokens @ mix.T + rng.normal(size=CHANNELS)).astype(np.float32)
    summaries = (rng.normal(size=(count, CHANNELS)) @ mix.T).astype(np.float32)
    request = {
        "half": CodecRequest(name="half"),
        "zstd": CodecRequest(packing="zstd", fidelity=0.999),
        "packed": CodecRequest(fidelity=0.999),
    }[name]
    some = maps[:100].reshape(-1, CHANNELS)  # as a build would calibrate: on few images
    codec = calibrate(request, Moments.of(some), some, some).codec
    spec = replace(
        fake_spec("t", summary_dim=CHANNELS, spatial_dim=CHANNELS), codec=CodecRecord(parameters=codec.to_json())
    )
    add_teacher(path, meta, spec, codec)
    for shard in range(meta.num_shards):
        rows = meta.shard_rows(shard)
        write_images_shard(path, meta, shard, dict.fromkeys(rows, (32, 32)), {})
        write_teacher_shard(path, meta, shard, spec, codec, {row: (summaries[row], maps[row]) for row in rows})
    return Cache(path)


@pytest.fixture(scope="module", params=["half", "zstd", "packed"])
def noise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return made_of_noise(tmp_path_factory.mktemp("noise") / "c.zarr", request.param)


@pytest.mark.parametrize("how", ["phi-s", "pca", "zca", "hadamard"])
def test_targets_of_images_that_no_sample_saw_have_variance_one(noise: Cache, how: Normalise) -> None:
    rows = np.random.default_rng(1).permutation(HELD_OUT + TRAINED)
    trained, held_out = np.sort(rows[:TRAINED]), np.sort(rows[TRAINED:])
    normaliser = spatial_normaliser(noise, "t", how, trained, 0, CPU)
    assert isinstance(normaliser, Rotated)
    targets = normaliser(torch.from_numpy(noise.teachers["t"].maps(held_out)).flatten(0, 2))
    variances = targets.double().var(0, unbiased=False)
    assert float(variances.mean()) == pytest.approx(1, abs=0.01)
    assert float((variances - 1).abs().max()) < 0.08  # 1,000 images know a variance to 1.8 %, and there are 64
    assert float((variances - 1).abs().quantile(0.95)) < 0.05
    assert float(targets.mean(0).abs().max()) < 0.05


def test_means_and_deviations_are_the_recorded_ones(tmp_path: Path) -> None:
    cache = made_of_noise(tmp_path / "c.zarr", "half")
    few = np.arange(40)
    mean, std = cache.teachers["t"].spatial_mean_std()
    normaliser = spatial_normaliser(cache, "t", "phi-s", few, 0, CPU)
    assert isinstance(normaliser, Rotated)
    np.testing.assert_allclose(normaliser.shift, mean, rtol=1e-5, atol=1e-5)
    covariance = (normaliser.inverse @ normaliser.inverse.T).double()  # phi^2 I for PHI-S
    assert float(covariance.diagonal().mean()) == pytest.approx(float(np.square(std).mean()), rel=1e-4)


def test_a_sample_follows_from_the_seed_and_comes_from_all_shards(
    noise: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalisation, "_FEWEST_IMAGES", 1)
    monkeypatch.setattr(normalisation, "_FEWEST_TOKENS", 1)
    read: list[int] = []
    codes = CachedTeacher.codes

    def noted(self: CachedTeacher, rows: Any, **options: Any) -> Any:
        read.extend(rows)
        return codes(self, rows, **options)

    monkeypatch.setattr(CachedTeacher, "codes", noted)
    rows = np.arange(HELD_OUT + TRAINED)
    one, two, other = (spatial_normaliser(noise, "t", "pca", rows, seed, CPU) for seed in (0, 0, 1))
    assert isinstance(one, Rotated)
    assert isinstance(two, Rotated)
    assert isinstance(other, Rotated)
    assert torch.equal(one.matrix, two.matrix)
    assert not torch.equal(one.matrix, other.matrix)
    assert len(read) == 3 * 1024  # 128 tokens a channel, of 16 a map, and as many again for padding
    assert {row // 256 for row in read} == set(range(7))


def test_a_teacher_whose_width_has_no_hadamard_matrix_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "others")
    five = make_tiny_cache(tmp_path / "five.zarr", tmp_path / "others", teachers={"five": (None, 5)})
    with pytest.raises(
        HadamardError, match=r"five\.zarr, teacher 'five', normalise=phi-s: no Hadamard matrix of order 5"
    ):
        spatial_normaliser(five, "five", "phi-s", five.usable_rows(), 0, CPU)


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
    from trainer.objective.losses import angular_dispersion

    recipe = replace(tiny_recipe, summary_loss="angle", normalise_summary="none")
    data = make_data(cache, ("t",), recipe, (2, 2))
    targets = TargetMaker(cache, data.levels["t"].all, recipe, cache.usable_rows(), CPU)(
        data.batch(0, 0, 3).teachers[0]
    )
    everything = torch.from_numpy(cache.teachers["t"].summaries(cache.usable_rows()))
    assert targets.dispersion == pytest.approx(angular_dispersion(everything))
    scaled = TargetMaker(
        cache, data.levels["t"].all, replace(recipe, normalise_summary="standardise"), cache.usable_rows(), CPU
    )
    assert scaled(data.batch(0, 0, 3).teachers[0]).dispersion != pytest.approx(targets.dispersion)
    assert np.isfinite(targets.dispersion)
