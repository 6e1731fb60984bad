"""The k-NN accuracy of teachers, students and models side by side, on the same images, by the same protocol."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.encoders import OWN, CachedTeacherEncoder, Encoder, Kind, LiveEncoder, StudentEncoder, recorded_teacher
from evals.encoders.gathered import learned_from, live_encoders, refuse_namesakes
from evals.encoders.trained_on import count_trained_on, divided, memory_note, split_of
from evals.errors import EvalError
from evals.knn.classify import classify_images
from evals.knn.vote import NO_CLASS, Accuracy, accuracy, lone_classes
from evals.shared.devices import Device
from evals.shared.image_set import CacheImages, ImageSet, ImageSource, image_set, in_classes_of, open_source
from evals.shared.notes import counted, left_out_notes, sampling_note
from evals.shared.progress import Progress
from evals.shared.published import ROWS, PaperRow, is_imagenet_validation
from radio_cache.errors import ConfigError, TeacherError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.reader import Cache, is_cache
from radio_cache.statistics.knn_protocol import PAPER_K, PAPER_TEMPERATURE
from radio_cache.torch import pick_device

_INDISTINCT_COSINE = 1 - 2.0**-12
"""Where all neighbours of all queries are closer than this, float32's rounding decides between them."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Settings of a k-NN evaluation: the teachers of the caches in `bank` and `queries`, the students of `runs`, and `models`.

    Attributes:
        bank: a cache, folder or tars; None takes the cache the first run was trained on.
        queries: likewise; None classifies every image of the bank by the others (leave-one-out).
        models, weights: as `evals.encoders.parse_models` takes them.
        k: neighbours that vote.
        sweep: other numbers of neighbours, reported beside k.
        limit: images of bank and of queries at most, drawn by `seed`.
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
            raise ConfigError("nothing to evaluate: give --bank PATH_OR_URL, or --run FOLDER, or both")
        if self.limit is not None and self.limit < 2:
            raise ConfigError(f"--limit needs at least 2 images to compare, got {self.limit}")
        if too_small := [k for k in (self.k, *self.sweep) if k < 1]:
            raise ConfigError(f"k-NN needs at least one neighbour, got k = {too_small[0]}")


@dataclass(frozen=True, kw_only=True)
class KnnRow:
    """One feature space of one encoder.

    Attributes:
        about: a short description of the encoder.
        width: values of a summary.
        top1, top5: in [0, 1].
        share_of_best_teacher: top-1 over that of the best teacher; None where no teacher was compared.
        by_k: the accuracies for k and every number of `sweep`.
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
    """The accuracies, and how they were measured.

    Attributes:
        k: neighbours that voted.
        leave_one_out: the bank was its own query set.
        bank, queries: identity of the images, see `ImageSet.identity`.
        notes: limits of the figures, one sentence each.
        paper: published figures on the same images by the same protocol; empty for other images.
        trained_on: student -> number of the classified images that it was trained on, where there are any.
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
        """The protocol as one line of text."""
        image_sets = (
            f"each of {self.bank['images']:,} images against all others (leave-one-out)"
            if self.leave_one_out
            else f"{self.queries['images']:,} queries against a bank of {self.bank['images']:,} images"
        )
        votes = f"k-NN, k = {self.k}, cosine, votes exp(similarity / {self.temperature:g})"
        memorised = "".join(f"; {name} was trained on {count:,} of them" for name, count in self.trained_on.items())
        return f"{votes}; {image_sets}; {self.classes:,} classes{memorised}"

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table."""
        return {"protocol": self.protocol, **asdict(self)}


def run_knn(config: KnnConfig, *, progress: Progress | None = None) -> KnnTable:
    """Open images, runs and models, and classify by every encoder.

    Raises:
        RadioCacheError: if something cannot be opened, or there is nothing to compare.
    """
    # Models run on one device; the neighbour search may use all GPUs, see NeighbourSearch.
    device = torch.device(pick_device(config.device))
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    bank_source = open_source(config.bank) if config.bank else _bank_of(live)
    # Sources are opened before anything is encoded, so that a typing error costs no time.
    query_source = open_source(config.queries) if config.queries else None
    teachers, notes = _teachers(bank_source, query_source, device=device)
    names = [teacher.name for teacher in teachers]
    refuse_namesakes([*names, *(encoder.name for encoder in live)])
    bank = image_set(bank_source, teachers=names, labelled=True)
    queries = image_set(query_source, teachers=names, labelled=True) if query_source else None
    # A cache that the student was trained on with --holdout is its own test set: held-out images against the others.
    bank_and_held_out = divided(bank, split_of(live)) if queries is None else None
    if bank_and_held_out is not None:
        bank, queries = bank_and_held_out
        notes.append(
            f"The queries are the {len(queries):,} images of {queries.location} that were held out of training."
        )
    # Sampled after the split, so that the limit applies to each side.
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
    # Counted from file hashes, whether the images come from the run's cache or from elsewhere.
    trained_on = _trained_on(live, bank if queries is None else queries)
    num_classified = len(bank if queries is None else queries)
    memory_notes = [memory_note(name, count, num_classified) for name, count in trained_on.items()]
    missing_notes = _missing_teacher_notes(live, bank_source)
    return replace(table, trained_on=trained_on, notes=(*memory_notes, *table.notes, *notes, *missing_notes))


def _trained_on(live: Sequence[LiveEncoder], classified: ImageSet) -> dict[str, int]:
    """Return name of a student -> number of the classified images that it was trained on, where there are any."""
    # An untrained student has seen no image, although its config names the cache.
    students = [encoder for encoder in live if isinstance(encoder, StudentEncoder) and encoder.kind == "student"]
    counts = {student.name: count_trained_on(student.config, classified) for student in students}
    return {name: count for name, count in counts.items() if count}


def _bank_of(live: Sequence[LiveEncoder]) -> CacheImages:
    """Return the images of the cache that the first student learned from."""
    path_or_url = learned_from(live)
    if path_or_url is None or not is_cache(path_or_url):
        raise EvalError(
            f"the student was trained from the cache {path_or_url}, which is not there now: name the bank by --bank"
        )
    return CacheImages(Cache(path_or_url))


def _teachers(
    bank: ImageSource, queries: ImageSource | None, *, device: torch.device
) -> tuple[list[CachedTeacherEncoder], list[str]]:
    """Return the teachers whose summaries of bank and queries can be compared, and notes about the others.

    If one of the two is no cache, the teachers of the other are run on its images.

    Raises:
        EvalError: if one name means two teachers.
    """
    caches = [source.cache for source in (bank, queries) if isinstance(source, CacheImages)]
    num_sources = 1 if queries is None else 2
    if not caches:
        return [], []
    first, notes = caches[0], list[str]()
    for cache in caches:
        # A damaged teacher is an error here, not a missing row.
        cache.teachers.refuse_unreadable()
    if maps_only := [name for name, teacher in first.teachers.items() if teacher.spec.summary_dim is None]:
        notes.append(f"{', '.join(maps_only)}: maps only, no summary to compare.")
    names = [name for name, teacher in first.teachers.items() if teacher.spec.summary_dim is not None]
    if len(caches) == 2:
        if unmatched := sorted(first.teachers.keys() ^ caches[1].teachers.keys()):
            notes.append(f"Only one of the two caches holds {', '.join(unmatched)}: not compared.")
        # Summaries of bank and queries have to come from the same teacher.
        names = [name for name in names if name in caches[1].teachers]
        _refuse_different_teachers(names, first, caches[1])
    encoders: list[CachedTeacherEncoder] = []
    for name in names:
        live: LiveEncoder | None = None
        if len(caches) < num_sources:
            # The images of a folder or tar have no cached summaries: the teacher itself has to run.
            try:
                live = recorded_teacher(first.teachers[name].spec, device=device)
            # Weights that are not on this machine cost a row, not the whole table.
            except TeacherError as exc:
                notes.append(f"{name} cannot be run on the images that are in no cache, and is left out: {exc}")
                continue
        encoders.append(CachedTeacherEncoder(first.teachers[name], live=live))
    return encoders, notes


def _refuse_different_teachers(names: Sequence[str], bank: Cache, queries: Cache) -> None:
    """Raise EvalError if a teacher was built in another way in one cache than in the other."""
    for name in names:
        # How maps are stored and how many crops are kept does not touch the summary of the whole image.
        bank_spec, query_spec = (replace(c.teachers[name].spec, codec=CodecRecord(), views=1) for c in (bank, queries))
        if differences := bank_spec.differences(query_spec):
            raise EvalError(
                f"teacher '{name}' is not the same in {bank.url} and {queries.url}: "
                f"{differences[0].replace('this run asks for', 'there it is')}; build one of the two again"
            )


def _missing_teacher_notes(live: Sequence[LiveEncoder], bank: ImageSource) -> list[str]:
    """Return notes about teachers that students learned from and the bank lacks."""
    # A folder or tar holds no teachers: all of the student's are missing.
    bank_teachers = bank.cache.teachers.keys() if isinstance(bank, CacheImages) else set[str]()
    notes: list[str] = []
    for student in live:
        if not isinstance(student, StudentEncoder):
            continue
        absent = sorted({teacher.name for teacher in student.config.teachers} - bank_teachers)
        if absent and student.kind == "student":
            notes.append(f"{student.name} learned from {', '.join(absent)}, which {bank.location} does not hold.")
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

    Args:
        encoders: each is classified by `classify_images`.
        bank: labelled images that vote.
        queries: labelled images to classify; None for leave-one-out.
        k: neighbours that vote.
        temperature: of the votes, above 0.
        sweep: other numbers of neighbours to report.
        device: where neighbours are searched.
        progress: receives the number of images encoded.

    Raises:
        EvalError: if there is nothing to compare, or the two image sets do not share their classes.
    """
    if not encoders:
        raise EvalError("there is nothing to compare: no cache with a teacher that has a summary, no --run, no --model")
    # From here on queries carry the class numbers of the bank.
    matched = None if queries is None else in_classes_of(bank, queries)
    _refuse_hopeless(bank, matched)
    # One search for the largest k serves them all: its first k neighbours are those of a smaller k.
    ks = sorted({k, *sweep})
    # Replaced by the number that could vote; the images that can be read are the same for all encoders.
    used_k = k
    rows: list[KnnRow] = []
    indistinct_notes: list[str] = []
    num_unfilled = 0
    for encoder in encoders:
        votes = classify_images(
            encoder, bank, matched, ks=ks, temperature=temperature, device=device, progress=progress
        )
        for space, result in votes.items():
            used_k = min(k, result.num_voters)
            if float(result.similarity[:, :used_k].min()) > _INDISTINCT_COSINE:
                indistinct_notes.append(
                    f"{encoder.name} hardly tells images apart: all neighbours that vote have a cosine above "
                    f"{_INDISTINCT_COSINE:.5f}, so its accuracy depends on rounding, and may differ from machine to machine."
                )
            by_k = {number: accuracy(ranked, result.labels) for number, ranked in result.ranked.items()}
            # Encoders differ in their neighbours; the note gives the worst case.
            num_unfilled = max(num_unfilled, int((result.ranked[k] == NO_CLASS).any(axis=1).sum()))
            rows.append(
                KnnRow(
                    name=encoder.name if space == OWN else f"{encoder.name} → {space}",
                    kind=encoder.kind,
                    about=encoder.description if space == OWN else f"prediction of {space}",
                    width=result.width,
                    top1=by_k[k].top1,
                    top5=by_k[k].top5,
                    share_of_best_teacher=None,
                    by_k=by_k,
                )
            )
    # Files that could not be decoded turned out to be unusable only while they were encoded.
    usable_bank = bank.usable()
    usable_queries = None if matched is None else matched.usable()
    classified = usable_bank if usable_queries is None else usable_queries
    # Classes that occur, not names: a list of class names may be longer than the images use.
    classes = len(np.unique(np.concatenate([usable_bank.labels, classified.labels])))
    notes = _notes(usable_bank, usable_queries, requested_k=k, used_k=used_k)
    if num_unfilled:
        notes.append(
            f"For up to {num_unfilled:,} of {len(classified):,} images the neighbours are of fewer than five classes. A class "
            "without a vote never counts as right here; scripts that fill the places with such classes (DINOv2's) report a "
            "higher top-5."
        )
    left_out = [note for images in (bank, matched) if images is not None for note in left_out_notes(images)]
    return KnnTable(
        k=used_k,
        temperature=temperature,
        leave_one_out=queries is None,
        classes=classes,
        bank=usable_bank.identity(),
        queries=classified.identity(),
        rows=_with_shares(rows),
        notes=(*left_out, *indistinct_notes, *notes),
        paper=tuple(row for row in ROWS if row.knn is not None)
        if is_imagenet_validation(classes=classes, images=len(classified))
        else (),
    )


def _refuse_hopeless(bank: ImageSet, queries: ImageSet | None) -> None:
    """Raise EvalError if no answer can be right, so that every accuracy would be 0."""
    if queries is None and len(lone_classes(bank.labels)) == len(bank):
        raise EvalError(
            f"k-NN in {bank.location}: each of its {len(bank):,} images is the only one of its class, so that no neighbour can "
            "be right and every accuracy would be 0; give labelled --queries of the same classes, or more images of a class "
            "(or a higher --limit)"
        )
    if queries is not None and not np.isin(queries.labels, bank.labels).any():
        # Both sides come from one cache: the cure is another split, not other images.
        if queries.source is bank.source:
            raise EvalError(
                f"k-NN: the {len(queries):,} images of {queries.location} that were held out of training have none of the "
                "classes of the others, so that every accuracy would be 0: give labelled --queries, or train with a larger "
                "--holdout"
            )
        raise EvalError(
            f"k-NN: the images drawn of {bank.location} have none of the classes of those drawn of {queries.location}, so that "
            "every accuracy would be 0: give a higher --limit, or another --seed"
        )


def _with_shares(rows: Sequence[KnnRow]) -> tuple[KnnRow, ...]:
    """Return the rows with their share of the best teacher's top-1, where a teacher was compared."""
    # A best teacher at 0 would divide by zero; a share of it means nothing.
    best = max((row.top1 for row in rows if row.kind == "teacher"), default=0.0)
    if best == 0.0:
        return tuple(rows)
    return tuple(replace(row, share_of_best_teacher=row.top1 / best) for row in rows)


def _notes(bank: ImageSet, queries: ImageSet | None, *, requested_k: int, used_k: int) -> list[str]:
    """Return the limits of the figures that follow from the images: few, copied, leaked, or without their class in the bank."""
    notes = sampling_note(len(bank if queries is None else queries))
    if used_k < requested_k:
        notes.append(f"k was lowered from {requested_k} to {used_k}: the bank has only {used_k} images that can vote.")
    if queries is None:
        # With its only image left out, a class gets no vote.
        lone = lone_classes(bank.labels)
        if len(lone):
            names = ", ".join(bank.name_of(int(label)) for label in lone[:3]) + (", ..." if len(lone) > 3 else "")
            count_phrase = counted(len(lone), "class has", "classes have")
            notes.append(f"{count_phrase} only one image, which cannot be right: {names}.")
        if bank.copies():
            notes.append(
                f"{counted(bank.copies(), 'image is a copy', 'images are copies')} of another in the bank (same file), "
                "which makes k-NN look better than it is."
            )
    else:
        # A class name may exist in the bank's list without an image of it.
        missing = np.setdiff1d(queries.labels, bank.labels)
        if len(missing):
            num_affected = int(np.isin(queries.labels, missing).sum())
            notes.append(
                f"{counted(num_affected, 'query cannot', 'queries cannot')} be right: the bank has no image of "
                f"{counted(len(missing), 'class', 'classes')} ({queries.name_of(int(missing[0]))}"
                f"{', ...' if len(missing) > 1 else ''})."
            )
        # Leaked test images are their own nearest neighbours, with similarity 1.
        if shared := queries.shared_with(bank):
            notes.append(
                f"{counted(shared, 'query is', 'queries are')} in the bank too (same file), "
                "which makes k-NN look better than it is."
            )
    return notes
