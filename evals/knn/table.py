"""The k-NN accuracy of teachers, students and models side by side, on the same images, by the same protocol."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.encoders import OWN, CachedTeacherEncoder, Encoder, Kind, LiveEncoder, StudentEncoder, recorded_teacher
from evals.encoders.counted import CountedImages
from evals.encoders.gathered import learned_from, live_encoders, refuse_namesakes
from evals.encoders.trained_on import count_trained_on, divided, memory_note, split_of
from evals.errors import EvalError
from evals.knn.search import NeighbourSearch
from evals.knn.vote import NOBODY, Accuracy, accuracy, lone_classes, vote, voters
from evals.shared.devices import Device
from evals.shared.image_set import CacheImages, ImageSet, ImageSource, image_set, in_classes_of, open_source
from evals.shared.notes import counted, left_out_notes, sampling_note
from evals.shared.progress import Progress
from evals.shared.published import ROWS, PaperRow, is_imagenet_validation
from radio_cache.errors import ConfigError, TeacherError
from radio_cache.reader import Cache, is_cache
from radio_cache.statistics.knn_protocol import PAPER_K, PAPER_TEMPERATURE
from radio_cache.torch import pick_device

_ALIKE = 1 - 2.0**-12
"""Where all k nearest of all queries are closer than this, what decides between them is close to float32's rounding."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """What to compare: the teachers of the caches among `bank` and `queries`, the students of `runs`, and `models`.

    bank: a cache, folder or tars; None takes the cache the first run was trained on. queries: the same; None leaves one
    image of the bank out at a time. models, weights: as `evals.encoders.parse_models` takes them.
    k: the neighbours that vote; sweep: other numbers of them, shown beside. limit: images of each place at most, drawn by seed.
    """

    bank: str | Path | None = None
    queries: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    k: int = PAPER_K
    sweep: tuple[int, ...] = ()
    temperature: float = PAPER_TEMPERATURE
    limit: int | None = None
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.bank is None and not self.runs:
            raise ConfigError("nothing to evaluate: give --bank PLACE, or --run RUN, or both")
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"--limit needs at least 2 images to compare, got {self.limit}")
        if bad := [k for k in (self.k, *self.sweep) if k < 1]:
            raise ConfigError(f"k-NN needs at least one neighbour, got k = {bad[0]}")


@dataclass(frozen=True, kw_only=True)
class KnnRow:
    """One feature space of one encoder. top1, top5 and share_of_best_teacher (of its top-1) lie in [0, 1].

    share_of_best_teacher is None where no teacher was compared. by_k: the same accuracies for every k asked for.
    """

    name: str
    kind: Kind
    about: str
    width: int
    top1: float
    top5: float
    share_of_best_teacher: float | None
    by_k: dict[int, Accuracy]


@dataclass(frozen=True, kw_only=True)
class KnnTable:
    """What was measured and how. k: the neighbours that voted; leave_one_out: the bank was its own query set.

    bank, queries: identity of the images. notes: what a reader must know to believe the numbers, one sentence each.
    paper: published figures on the same images by the same protocol; empty for other images.
    trained_on: student -> number of the classified images that it was trained on; without those that have seen none.
    """

    k: int
    temperature: float
    leave_one_out: bool
    classes: int
    bank: dict[str, str | int]
    queries: dict[str, str | int]
    rows: tuple[KnnRow, ...]
    notes: tuple[str, ...]
    paper: tuple[PaperRow, ...] = ()
    trained_on: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def protocol(self) -> str:
        """One line for people."""
        against = (
            f"each of {self.bank['images']:,} images against all others (leave-one-out)"
            if self.leave_one_out
            else f"{self.queries['images']:,} queries against a bank of {self.bank['images']:,} images"
        )
        votes = f"k-NN, k = {self.k}, cosine, votes exp(similarity / {self.temperature:g})"
        seen = "".join(f"; {name} was trained on {count:,} of them" for name, count in self.trained_on.items())
        return f"{votes}; {against}; {self.classes:,} classes{seen}"

    def to_json(self) -> dict[str, Any]:
        return {"protocol": self.protocol, **asdict(self)}


def run_knn(config: KnnConfig, *, progress: Progress | None = None) -> KnnTable:
    """Open places, runs and models and compare everything in them. Raises RadioCacheError with what is wrong."""
    device = torch.device(pick_device(config.device))
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    bank_source = open_source(config.bank) if config.bank else _bank_of(live)
    query_source = open_source(config.queries) if config.queries else None
    teachers, notes = _teachers(bank_source, query_source, device=device)
    names = [teacher.name for teacher in teachers]
    refuse_namesakes([*names, *(one.name for one in live)])
    bank = image_set(bank_source, teachers=names, labelled=True)
    queries = image_set(query_source, teachers=names, labelled=True) if query_source else None
    parts = divided(bank, split_of(live)) if queries is None else None
    if parts is not None:
        bank, queries = parts
        notes.append(f"The queries are the {len(queries):,} images of {queries.place} that were held out of training.")
    bank = bank.sampled(config.limit, config.seed)
    queries = None if queries is None else queries.sampled(config.limit, config.seed)
    table = knn_table(
        [*teachers, *live],
        bank,
        queries,
        k=config.k,
        sweep=config.sweep,
        temperature=config.temperature,
        device=config.device,
        progress=progress,
    )
    trained_on = _trained_on(live, bank if queries is None else queries)
    memory = [memory_note(name, count, len(bank if queries is None else queries)) for name, count in trained_on.items()]
    return replace(table, trained_on=trained_on, notes=(*memory, *table.notes, *notes, *_strangers(live, bank_source)))


def _trained_on(live: Sequence[LiveEncoder], classified: ImageSet) -> dict[str, int]:
    """Name of a student -> number of the classified images that it was trained on, where there are any."""
    students = [encoder for encoder in live if isinstance(encoder, StudentEncoder) and encoder.kind == "student"]
    counts = {student.name: count_trained_on(student.config, classified) for student in students}
    return {name: count for name, count in counts.items() if count}


def _bank_of(live: Sequence[LiveEncoder]) -> CacheImages:
    """The cache that the first student learned from."""
    place = learned_from(live)
    if place is None or not is_cache(place):
        raise EvalError(
            f"the student was trained from the cache {place}, which is not there now: name the bank by --bank"
        )
    return CacheImages(Cache(place))


def _teachers(
    bank: ImageSource, queries: ImageSource | None, *, device: torch.device
) -> tuple[list[CachedTeacherEncoder], list[str]]:
    """The teachers with summaries that both places have, or can have, and notes about the others.

    Where one place is no cache, a teacher of the other is run on it. Raises EvalError if one name means two teachers.
    """
    caches = [source.cache for source in (bank, queries) if isinstance(source, CacheImages)]
    places = 1 if queries is None else 2
    if not caches:
        return [], []
    first, notes = caches[0], list[str]()
    for cache in caches:
        cache.teachers.refuse_unreadable()
    if silent := [name for name, teacher in first.teachers.items() if teacher.spec.summary_dim is None]:
        notes.append(f"{', '.join(silent)}: maps only, no summary to compare.")
    names = [name for name, teacher in first.teachers.items() if teacher.spec.summary_dim is not None]
    if len(caches) == 2:
        if alone := sorted(first.teachers.keys() ^ caches[1].teachers.keys()):
            notes.append(f"Only one of the two caches holds {', '.join(alone)}: not compared.")
        names = [name for name in names if name in caches[1].teachers]
        _same_teachers(names, first, caches[1])
    encoders: list[CachedTeacherEncoder] = []
    for name in names:
        live: LiveEncoder | None = None
        if len(caches) < places:
            try:
                live = recorded_teacher(first.teachers[name].spec, device=device)
            except TeacherError as exc:
                notes.append(f"{name} cannot be run on the images that are in no cache, and is left out: {exc}")
                continue
        encoders.append(CachedTeacherEncoder(first.teachers[name], live=live))
    return encoders, notes


def _same_teachers(names: Sequence[str], bank: Cache, queries: Cache) -> None:
    for name in names:
        # How maps are stored and how many crops are kept does not touch the summary of the whole image.
        here, there = (replace(c.teachers[name].spec, codec={}, views=1) for c in (bank, queries))
        if differences := here.differences(there):
            raise EvalError(
                f"teacher '{name}' is not the same in {bank.url} and {queries.url}: "
                f"{differences[0].replace('this run asks for', 'there it is')}; build one of the two again"
            )


def _strangers(live: Sequence[LiveEncoder], bank: ImageSource) -> list[str]:
    """Notes about teachers that students learned from and that are not compared."""
    held = bank.cache.teachers.keys() if isinstance(bank, CacheImages) else set[str]()
    notes: list[str] = []
    for student in live:
        if not isinstance(student, StudentEncoder):
            continue
        absent = sorted({teacher.name for teacher in student.config.teachers} - held)
        if absent and student.kind == "student":
            notes.append(f"{student.name} learned from {', '.join(absent)}, which {bank.place} does not hold.")
    return notes


def knn_table(
    encoders: Sequence[Encoder],
    bank: ImageSet,
    queries: ImageSet | None,
    *,
    k: int,
    temperature: float,
    sweep: Sequence[int] = (),
    device: Device = "auto",
    progress: Progress | None = None,
) -> KnnTable:
    """Classify the queries by the bank in every feature space of every encoder; without queries, leave one out.

    The bank streams past the queries; only the queries' features are kept. An untrained student is shown by its own
    summary only: what its untrained heads make of it says nothing.
    Raises EvalError if there is nothing to compare or the two image sets do not share their classes.
    """
    if not encoders:
        raise EvalError("there is nothing to compare: no cache with a teacher that has a summary, no --run, no --model")
    matched = bank if queries is None else in_classes_of(bank, queries)
    _refuse_hopeless(bank, None if queries is None else matched)
    ks = sorted({k, *sweep})
    used_k = voters(len(bank), len(matched), k, leave_one_out=queries is None)
    rows: list[KnnRow] = []
    alike: list[str] = []
    unfilled = 0
    for encoder in encoders:
        counted = CountedImages(encoder, len(bank) + (0 if queries is None else len(matched)), progress)
        asked = encoder.summaries(matched, on_images=counted)
        labels = matched.labels[asked.positions]
        spaces = encoder.spaces if encoder.kind != "untrained" else (OWN,)
        own = asked.positions if queries is None else None
        searches = {
            space: NeighbourSearch(asked.summaries[space], min(ks[-1], len(bank)), own_rows=own, device=device)
            for space in spaces
        }
        for block in [asked] if queries is None else encoder.blocks(bank, on_images=counted):
            for space, search in searches.items():
                search.add(block.positions, block.summaries[space])
        for space, search in searches.items():
            used_k = voters(search.num_rows, len(labels), k, leave_one_out=queries is None)
            found = search.result()
            farthest = float(found.similarity[:, :used_k].min())
            if farthest > _ALIKE:
                alike.append(
                    f"{encoder.name} hardly tells images apart: all neighbours that vote have a cosine above {_ALIKE:.5f}, "
                    "so its accuracy hangs on rounding, and may differ from machine to machine."
                )
            ranked = {n: vote(found.first(n), bank.labels, temperature=temperature) for n in ks}
            by_k = {n: accuracy(classes_by_vote, labels) for n, classes_by_vote in ranked.items()}
            unfilled = max(unfilled, int((ranked[k] == NOBODY).any(axis=1).sum()))
            rows.append(
                KnnRow(
                    name=encoder.name if space == OWN else f"{encoder.name} → {space}",
                    kind=encoder.kind,
                    about=encoder.about if space == OWN else f"what it makes of {space}",
                    width=asked.summaries[space].shape[1],
                    top1=by_k[k].top1,
                    top5=by_k[k].top5,
                    share_of_best_teacher=None,
                    by_k=by_k,
                )
            )
    seen_bank = bank.usable()
    seen = seen_bank if queries is None else matched.usable()
    classes = len(np.unique(np.concatenate([seen_bank.labels, seen.labels])))
    notes = _notes(seen_bank, None if queries is None else seen, asked_k=k, used_k=used_k)
    if unfilled:
        notes.append(
            f"For up to {unfilled:,} of {len(seen):,} images the neighbours are of fewer than five classes. A class without a "
            "vote never counts as right here; scripts that fill the places with such classes (DINOv2's) report a higher top-5."
        )
    left_out = [note for images in ([bank] if queries is None else [bank, matched]) for note in left_out_notes(images)]
    return KnnTable(
        k=used_k,
        temperature=temperature,
        leave_one_out=queries is None,
        classes=classes,
        bank=seen_bank.identity(),
        queries=seen.identity(),
        rows=_with_shares(rows),
        notes=(*left_out, *alike, *notes),
        paper=tuple(row for row in ROWS if row.knn is not None)
        if is_imagenet_validation(classes=classes, images=len(seen))
        else (),
    )


def _refuse_hopeless(bank: ImageSet, queries: ImageSet | None) -> None:
    """Raises EvalError where no answer can be right, so that every accuracy would be 0."""
    if queries is None and len(lone_classes(bank.labels)) == len(bank):
        raise EvalError(
            f"k-NN in {bank.place}: each of its {len(bank):,} images is the only one of its class, so that no neighbour can be "
            "right and every accuracy would be 0; give labelled --queries of the same classes, or more images of a class "
            "(or a higher --limit)"
        )
    if queries is not None and not np.isin(queries.labels, bank.labels).any():
        if queries.source is bank.source:
            raise EvalError(
                f"k-NN: the {len(queries):,} images of {queries.place} that were held out of training have none of the classes "
                "of the others, so that every accuracy would be 0: give labelled --queries, or train with a larger --holdout"
            )
        raise EvalError(
            f"k-NN: the images drawn of {bank.place} have none of the classes of those drawn of {queries.place}, so that every "
            "accuracy would be 0: give a higher --limit, or another --seed"
        )


def _with_shares(rows: Sequence[KnnRow]) -> tuple[KnnRow, ...]:
    best = max((row.top1 for row in rows if row.kind == "teacher"), default=0.0)
    if best == 0.0:
        return tuple(rows)
    return tuple(replace(row, share_of_best_teacher=row.top1 / best) for row in rows)


def _notes(bank: ImageSet, queries: ImageSet | None, *, asked_k: int, used_k: int) -> list[str]:
    notes = sampling_note(len(bank if queries is None else queries))
    if used_k < asked_k:
        notes.append(f"k was lowered from {asked_k} to {used_k}: the bank has only {used_k} images that can vote.")
    if queries is None:
        lone = lone_classes(bank.labels)
        if len(lone):
            names = ", ".join(bank.name_of(int(label)) for label in lone[:3]) + (", ..." if len(lone) > 3 else "")
            have = counted(len(lone), "class has", "classes have")
            notes.append(f"{have} only one image, which cannot be right: {names}.")
        if bank.copies():
            notes.append(
                f"{counted(bank.copies(), 'image is a copy', 'images are copies')} of another in the bank (same file), "
                "which makes k-NN look better than it is."
            )
    else:
        missing = np.setdiff1d(queries.labels, bank.labels)
        if len(missing):
            hit = int(np.isin(queries.labels, missing).sum())
            notes.append(
                f"{counted(hit, 'query cannot', 'queries cannot')} be right: the bank has no image of "
                f"{counted(len(missing), 'class', 'classes')} ({queries.name_of(int(missing[0]))}"
                f"{', ...' if len(missing) > 1 else ''})."
            )
        if shared := queries.shared_with(bank):
            notes.append(
                f"{counted(shared, 'query is', 'queries are')} in the bank too (same file), "
                "which makes k-NN look better than it is."
            )
    return notes
