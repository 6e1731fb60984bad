"""The k-NN accuracy of teachers and students side by side, on the same images, by the same protocol."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.encoders import SUMMARY, CachedTeacherEncoder, Encoder, Kind, StudentEncoder
from evals.errors import EvalError
from evals.knn import PAPER_K, PAPER_TEMPERATURE, Device, accuracy, classify, lone_classes
from evals.labelled import LabelledImages, in_classes_of, labelled_images
from radio_cache.errors import ConfigError
from radio_cache.reader import Cache, is_cache
from radio_cache.torch import pick_device

Progress = Callable[[str, int, int], None]
"""Told (what is going on, images done, images in all)."""

_ENOUGH_IMAGES = 2500
"""From here on sampling error is below two points, and the table goes without the reminder."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """What to compare: the teachers of `cache` (and of `queries`, if given) and the students of `runs`.

    cache: the bank; None takes the cache the first run was trained on. queries: None leaves one image of the bank out
    at a time. limit: images of each cache at most, drawn at random.
    """

    cache: str | Path | None = None
    queries: str | Path | None = None
    runs: tuple[Path, ...] = ()
    k: int = PAPER_K
    temperature: float = PAPER_TEMPERATURE
    limit: int | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.cache is None and not self.runs:
            raise ConfigError("nothing to evaluate: give --cache BANK.zarr, or --run RUN, or both")
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"--limit needs at least 2 images to compare, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class KnnRow:
    """One feature space of one encoder. top1, top5 and share_of_best_teacher (of its top-1) lie in [0, 1].

    share_of_best_teacher is None where no teacher was compared.
    """

    name: str
    kind: Kind
    about: str
    width: int
    top1: float
    top5: float
    share_of_best_teacher: float | None


@dataclass(frozen=True, kw_only=True)
class KnnTable:
    """What was measured and how. k: the neighbours that voted; leave_one_out: the bank was its own query set.

    bank, queries: identity of the images. notes: what a reader must know to believe the numbers, one sentence each.
    """

    k: int
    temperature: float
    leave_one_out: bool
    classes: int
    bank: dict[str, str | int]
    queries: dict[str, str | int]
    rows: tuple[KnnRow, ...]
    notes: tuple[str, ...]

    @property
    def protocol(self) -> str:
        """One line for people."""
        against = (
            f"each of {self.bank['images']:,} images against all others (leave-one-out)"
            if self.leave_one_out
            else f"{self.queries['images']:,} queries against a bank of {self.bank['images']:,} images"
        )
        votes = f"k-NN, k = {self.k}, cosine, votes exp(similarity / {self.temperature:g})"
        return f"{votes}; {against}; {self.classes:,} classes"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_knn(config: KnnConfig, *, progress: Progress | None = None) -> KnnTable:
    """Open the caches and runs and compare everything in them. Raises RadioCacheError with what is wrong."""
    device = torch.device(pick_device(config.device))
    students = [
        StudentEncoder.of_run(run, name=name, trained=trained, device=device)
        for run, plain in zip(config.runs, _run_names(config.runs), strict=True)
        for name, trained in ((plain, True), (f"{plain}, untrained", False))
    ]
    bank_cache = Cache(config.cache) if config.cache else _cache_of(students[0], config.runs[0])
    query_cache = Cache(config.queries) if config.queries else None
    teachers = _teachers(bank_cache, query_cache)
    bank = labelled_images(bank_cache, teachers=teachers, limit=config.limit)
    queries = labelled_images(query_cache, teachers=teachers, limit=config.limit) if query_cache else None
    encoders = [*(CachedTeacherEncoder(bank_cache.teachers[name]) for name in teachers), *students]
    table = knn_table(
        encoders, bank, queries, k=config.k, temperature=config.temperature, device=config.device, progress=progress
    )
    return replace(table, notes=(*table.notes, *_strangers(students, teachers, bank_cache, query_cache)))


def _run_names(runs: Sequence[Path]) -> list[str]:
    if len(runs) == 1:
        return ["student"]
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _cache_of(student: StudentEncoder, run: Path) -> Cache:
    place = student.config.cache
    if not is_cache(place):
        raise EvalError(f"{run} was trained from the cache {place}, which is not there now: name the bank by --cache")
    return Cache(place)


def _teachers(bank: Cache, queries: Cache | None) -> list[str]:
    """Names of the teachers with summaries that both caches hold. Raises EvalError if one name means two teachers."""
    names = [name for name, teacher in bank.teachers.items() if teacher.spec.summary_dim is not None]
    if queries is None:
        return names
    shared = [name for name in names if name in queries.teachers]
    for name in shared:
        # How maps are stored and how many crops are kept does not touch the summary of the whole image.
        here, there = (replace(c.teachers[name].spec, codec={}, views=1) for c in (bank, queries))
        if differences := here.differences(there):
            raise EvalError(
                f"teacher '{name}' is not the same in {bank.url} and {queries.url}: "
                f"{differences[0].replace('this run asks for', 'there it is')}; build one of the two again"
            )
    return shared


def _strangers(
    students: Sequence[StudentEncoder], teachers: Sequence[str], bank: Cache, queries: Cache | None
) -> list[str]:
    """Notes about teachers that some took part with and others could not."""
    notes: list[str] = []
    if queries is not None and (alone := sorted(bank.teachers.keys() ^ queries.teachers.keys())):
        notes.append(f"Only one of the two caches holds {', '.join(alone)}: not compared.")
    if silent := [name for name, teacher in bank.teachers.items() if teacher.spec.summary_dim is None]:
        notes.append(f"{', '.join(silent)}: maps only, no summary to compare.")
    for student in students:
        absent = sorted({teacher.name for teacher in student.config.teachers} - bank.teachers.keys())
        if absent and student.kind == "student":
            notes.append(f"{student.name} learned from {', '.join(absent)}, which {bank.url} does not hold.")
    return notes


def knn_table(
    encoders: Sequence[Encoder], bank: LabelledImages, queries: LabelledImages | None,
    *, k: int, temperature: float, device: Device = "auto", progress: Progress | None = None,
) -> KnnTable:  # fmt: skip
    """Classify the queries by the bank in every feature space of every encoder; without queries, leave one out.

    An untrained student is shown by its own summary only: what its untrained heads make of it says nothing.
    Raises EvalError if there is nothing to compare or the two image sets do not share their classes.
    """
    if not encoders:
        raise EvalError("there is nothing to compare: the cache has no teacher with a summary, and no --run was given")
    matched = bank if queries is None else in_classes_of(bank, queries)
    used_k = k
    rows: list[KnnRow] = []
    for encoder in encoders:
        total = len(bank) + (0 if queries is None else len(matched))
        done = 0

        def on_images(count: int, encoder: Encoder = encoder, total: int = total) -> None:
            nonlocal done
            done += count
            if progress is not None and encoder.kind != "teacher":
                progress(encoder.name, done, total)

        in_bank = encoder.encode(bank.cache, bank.rows, on_images=on_images)
        in_queries = in_bank if queries is None else encoder.encode(matched.cache, matched.rows, on_images=on_images)
        for space in encoder.spaces if encoder.kind != "untrained" else (SUMMARY,):
            found = classify(
                in_bank[space], bank.labels, in_queries[space],
                k=k, temperature=temperature, leave_one_out=queries is None, device=device,
            )  # fmt: skip
            used_k = found.k
            result = accuracy(found.ranked, matched.labels)
            rows.append(
                KnnRow(
                    name=encoder.name if space == SUMMARY else f"{encoder.name} → {space}",
                    kind=encoder.kind,
                    about=encoder.about if space == SUMMARY else f"what it makes of {space}",
                    width=in_bank[space].shape[1],
                    top1=result.top1,
                    top5=result.top5,
                    share_of_best_teacher=None,
                )
            )
    return KnnTable(
        k=used_k,
        temperature=temperature,
        leave_one_out=queries is None,
        classes=len(np.unique(np.concatenate([bank.labels, matched.labels]))),
        bank=bank.identity(),
        queries=matched.identity(),
        rows=_with_shares(rows),
        notes=tuple(_notes(bank, None if queries is None else matched, asked_k=k, used_k=used_k)),
    )


def _with_shares(rows: Sequence[KnnRow]) -> tuple[KnnRow, ...]:
    best = max((row.top1 for row in rows if row.kind == "teacher"), default=0.0)
    if best == 0.0:
        return tuple(rows)
    return tuple(replace(row, share_of_best_teacher=row.top1 / best) for row in rows)


def _notes(bank: LabelledImages, queries: LabelledImages | None, *, asked_k: int, used_k: int) -> list[str]:
    notes: list[str] = []
    tested = len(bank if queries is None else queries)
    if tested < _ENOUGH_IMAGES:
        # Two standard errors of a share of one half, the widest there is.
        notes.append(f"{tested:,} images tested: an accuracy is known to about ±{100 / np.sqrt(tested):.0f} points.")
    if used_k < asked_k:
        notes.append(f"k was lowered from {asked_k} to {used_k}: the bank has only {used_k} images that can vote.")
    if queries is None:
        lone = lone_classes(bank.labels)
        if len(lone):
            names = ", ".join(bank.name_of(int(label)) for label in lone[:3]) + (", ..." if len(lone) > 3 else "")
            have = _count(len(lone), "class has", "classes have")
            notes.append(f"{have} only one image, which cannot be right: {names}.")
        if bank.copies():
            notes.append(
                f"{_count(bank.copies(), 'image is a copy', 'images are copies')} of another in the bank (same file), "
                "which makes k-NN look better than it is."
            )
    else:
        missing = np.setdiff1d(queries.labels, bank.labels)
        if len(missing):
            hit = int(np.isin(queries.labels, missing).sum())
            notes.append(
                f"{_count(hit, 'query cannot', 'queries cannot')} be right: the bank has no image of "
                f"{_count(len(missing), 'class', 'classes')} ({queries.name_of(int(missing[0]))}"
                f"{', ...' if len(missing) > 1 else ''})."
            )
        if shared := queries.shared_with(bank):
            notes.append(
                f"{_count(shared, 'query is', 'queries are')} in the bank too (same file), "
                "which makes k-NN look better than it is."
            )
    return notes


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
