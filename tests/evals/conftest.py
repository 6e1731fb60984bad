"""Tiny caches with real image files, and a tiny student, for every test of the evaluations."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from radio_cache.codecs import Half
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import IMAGENET_PIXELS, CacheMeta, Container, Failure, TeacherSpec
from radio_cache.geometry.crops import patch_geometry
from radio_cache.reader import Cache, digest
from radio_cache.testing import Features, write_images_shard, write_teacher_shard
from radio_cache.writer import ImageIndex, add_teacher, create_cache
from trainer.model.adaptors import TeacherWidths
from trainer.model.files import save_student
from trainer.model.image_split import ImageSplit
from trainer.model.student import StudentConfig, build_distilled

CLASSES = ("ant", "bee", "cat")
GRID, WIDTH, SUMMARY_WIDTH = 4, 6, 8
SMALLEST = {"width": 8, "stem_width": 4, "depths": (1, 1, 1, 1), "heads": (2, 2), "bias_hidden": 8}


def teacher_spec(name: str = "alpha", *, summary_dim: int | None = SUMMARY_WIDTH, weights: str = "00") -> TeacherSpec:
    return TeacherSpec(
        name=name,
        family="fake",
        model="fake-4",
        licence="none",
        weights="fake.pt",
        weights_sha256=weights,
        geometry=patch_geometry(32, 32 // GRID, fit="squash", interpolation="bilinear"),
        normalisation=IMAGENET_PIXELS,
        summary_dim=summary_dim,
        spatial_dim=WIDTH,
        summary_note="",
        spatial_note="",
        compute_dtype="float32",
        codec=CodecRecord(parameters={"name": "half"}),
        views=1,
        software={},
    )


def write_cache(
    path: Path,
    labels: Sequence[int],
    *,
    seed: int = 0,
    class_names: Sequence[str] = CLASSES,
    specs: Sequence[TeacherSpec] | None = None,
    unusable: Sequence[int] = (),
) -> Cache:
    """A finished cache: coloured noise as images, and teachers whose features lie near their class's direction."""
    rng = np.random.default_rng(seed)
    folder = path.with_suffix(".images")
    folder.mkdir()
    n, shard = len(labels), 8
    hues = np.random.default_rng(99).uniform(60, 200, (16, 3))
    keys = [f"{number:03d}.png" for number in range(n)]
    for key, label in zip(keys, labels, strict=True):
        pixels = hues[label] + rng.normal(0, 25, (20, 28, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / key)
    meta = CacheMeta(
        num_images=n,
        shard_images=shard,
        creator="test",
        class_names=tuple(class_names),
        max_pixels=10**6,
        containers=(Container(kind="folder", path=str(folder), prefix=""),),
    )
    none = np.full(n, -1, np.int64)
    create_cache(path, meta, ImageIndex(keys, np.array(labels, np.int32), np.zeros(n, np.int32), none, none))
    failures = [Failure(row=row, reason="made up") for row in unusable]
    digests = {row: digest((folder / key).read_bytes()) for row, key in enumerate(keys)}
    for number in range(meta.num_shards):
        write_images_shard(path, meta, number, dict.fromkeys(range(n), (20, 28)), digests, failures)
    for spec in specs if specs is not None else [teacher_spec()]:
        _write_teacher(path, meta, spec, labels, rng)
    return Cache(path)


def _write_teacher(
    path: Path, meta: CacheMeta, spec: TeacherSpec, labels: Sequence[int], rng: np.random.Generator
) -> None:
    add_teacher(path, meta, spec)
    directions = np.random.default_rng(len(spec.name)).normal(size=(16, SUMMARY_WIDTH))
    for number in range(meta.num_shards):
        rows = meta.shard_rows(number)
        maps = rng.normal(size=(len(rows), GRID, GRID, WIDTH)).astype(np.float32)
        features: dict[int, Features] = {}
        for place, row in enumerate(rows):
            summary = None
            if spec.summary_dim is not None:
                summary = directions[labels[row]] + rng.normal(0, 0.6, spec.summary_dim)
            features[row] = (summary, maps[place])
        write_teacher_shard(path, meta, number, spec, Half(), features)


def write_run(
    path: Path,
    cache: Path,
    *,
    teachers: Sequence[str] = ("alpha",),
    steps: int = 12,
    summary_dim: int = SUMMARY_WIDTH,
    spatial_dim: int = WIDTH,
    images: ImageSplit | None = None,
) -> Path:
    """A finished run folder: a tiny student with weights unlike its first ones, and its metrics."""
    config = StudentConfig(
        student="e-radio-tiny",
        overrides=SMALLEST,
        image_hw=(32, 32),
        fit="squash",
        adaptor_width=16,
        seed=5,
        steps=steps,
        teachers=tuple(TeacherWidths(name=name, summary_dim=summary_dim, spatial_dim=spatial_dim) for name in teachers),
        images_seen=steps * 4,
        cache=str(cache),
        run=path.name,
        recipe="test",
        images=images,
    )
    model = build_distilled(config)
    for parameter in model.parameters():
        parameter.data.mul_(1.05)
    save_student(model, path)
    lines = [
        {
            "step": step,
            "loss": 2.0 / step,
            "lr": 1e-3,
            "images_per_s": 100.0,
            "data_wait": 0.1,
            "teachers": {name: {"summary": 0.9 / step, "spatial": 1.1 / step} for name in teachers},
        }
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """These networks are too small for threads, which only wait for each other when tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before)


LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0]

MakeCache = Callable[..., Cache]


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    """make_cache("bank", labels, ...) -> Cache, in this test's folder."""
    return lambda name, labels=LABELS, **settings: write_cache(tmp_path / f"{name}.zarr", labels, **settings)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("run", cache_path, ...) -> the run's folder."""
    return lambda name, cache, **settings: write_run(tmp_path / name, cache, **settings)


@pytest.fixture
def make_spec() -> Callable[..., TeacherSpec]:
    return teacher_spec
