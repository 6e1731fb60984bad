"""Zero-shot accuracy of teachers, students and models, each with the text tower of its own CLIP, as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.commands.build_options import per_teacher
from cache_builder.teachers import find_teacher, find_weights, recorded_name
from evals.encoders import OWN, CachedTeacherEncoder, Encoder, LiveEncoder, ModelName, StudentEncoder, parse_models
from evals.encoders.counted import CountedImages
from evals.encoders.gathered import learned_from, live_encoders, refuse_namesakes
from evals.encoders.library import Weights
from evals.encoders.trained_on import held_out_of
from evals.errors import EvalError
from evals.knn.vote import Accuracy, accuracy
from evals.shared.devices import Device
from evals.shared.image_set import CacheImages, ImageSet, ImageSource, image_set, is_cache, open_source
from evals.shared.notes import counted, left_out_notes, sampling_note
from evals.shared.progress import Progress
from evals.shared.published import ROWS, PaperRow, is_imagenet_validation
from evals.zero_shot.classifier import default_classifiers, text_classifier
from evals.zero_shot.prompts import PAPER_TEMPLATES, class_phrases, templates_from
from evals.zero_shot.text_tower import TextTower, open_clip_text_tower, teacher_text_tower
from radio_cache.errors import ConfigError, ShapeError, TeacherError, UnknownTeacherError
from radio_cache.format.schema import TeacherSpec
from radio_cache.reader import Cache
from radio_cache.torch import pick_device

CLIP_FAMILY = "clip"
_NUM_RANKS = 5


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Settings of a zero-shot evaluation.

    Attributes:
        images: labelled, a cache, folder or tars; None takes the cache of the first run.
        runs, models, weights: as for k-NN.
        text_weights: `[TEACHER=]FILE` with the text tower of a teacher, if the teacher's own file is not available.
        classes, templates: files, see `evals.zero_shot.prompts`.
        classifiers: folder of stored classifiers.
        limit: images at most, drawn by `seed`.
        device: where models run.
    """

    images: str | Path | None = None
    runs: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    text_weights: tuple[str, ...] = ()
    classes: Path | None = None
    templates: Path | None = None
    classifiers: Path | None = None
    limit: int | None = None
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.images is None and not self.runs:
            raise ConfigError("nothing to evaluate: give --images PATH_OR_URL, or --run FOLDER, or both")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit needs at least 1 image, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class ZeroShotRow:
    """One feature space of one encoder.

    Attributes:
        about: a short description of the encoder.
        text: the text tower that encoded the sentences.
        top1, top5: in [0, 1].
    """

    name: str
    kind: str
    about: str
    text: str
    top1: float
    top5: float


@dataclass(frozen=True, kw_only=True)
class ZeroShotTable:
    """The accuracies, and how they were measured.

    Attributes:
        phrases: of the classes, by number.
        templates: of the sentences.
        images: identity of the images.
        notes: limits of the figures, one sentence each.
        paper: published rows on the same images; empty for other images.
    """

    protocol: str
    phrases: tuple[str, ...]
    templates: tuple[str, ...]
    images: dict[str, str | int]
    rows: tuple[ZeroShotRow, ...]
    notes: tuple[str, ...]
    paper: tuple[PaperRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record of this table."""
        return asdict(self)


@dataclass(frozen=True)
class _Space:
    """A feature space with a text tower."""

    encoder: Encoder
    name: str
    tower: TextTower


def run_zero_shot(config: ZeroShotConfig, *, progress: Progress | None = None) -> ZeroShotTable:
    """Open images, encoders and text towers, and classify the images by sentences about their classes.

    Raises:
        RadioCacheError: if something cannot be opened, or no encoder has a text tower.
    """
    device = torch.device(pick_device(config.device))
    notes = list[str]()
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    # Empty without images and runs, which the config refuses.
    source = open_source(config.images or learned_from(live) or "")
    cached = _cached_clips(source.cache if isinstance(source, CacheImages) else None)
    refuse_namesakes(encoder.name for encoder in [*cached, *live])
    cached_names = [encoder.name for encoder in cached]
    # The student has seen its training images with their CLIP features.
    images, held_out = held_out_of(image_set(source, teachers=cached_names, labelled=True), live)
    images = images.sampled(config.limit, config.seed)
    parsed = parse_models(config.models, config.weights)
    models = list(zip(parsed, live, strict=False))  # `live_encoders` puts --model before --run
    students = [encoder for encoder in live[len(models) :] if isinstance(encoder, StudentEncoder)]
    teacher_names = [*cached_names, *(m.path_or_name for m, _ in parsed if m.family == "teacher")]
    teacher_names += [space for encoder in live if isinstance(encoder, StudentEncoder) for space in encoder.spaces[1:]]
    # Names that no encoder has are refused there, so that a typing error shows.
    files = per_teacher(
        "--text-weights",
        config.text_weights,
        sorted(set(teacher_names)),
        lambda text: Path(text).expanduser(),
        shared=False,
    )
    # One tower per teacher, shared by the cached teacher, live models and heads.
    towers = _Towers(_recorded(source, live), files, notes)
    spaces = [_Space(encoder, OWN, tower) for encoder in cached if (tower := towers.of(encoder.name, required=False))]
    for (model, model_weights), encoder in models:
        spaces += _model_spaces(model, model_weights, encoder, towers, notes)
    # A student reaches text only through the head that predicts a CLIP's summary.
    for student in students:
        spaces += _head_spaces(student, towers)
    if not spaces:
        raise EvalError(
            "no encoder has a text tower: zero-shot needs a student of a CLIP-family teacher, such a teacher, or an "
            "open_clip model" + "".join(f"; {note}" for note in dict.fromkeys(notes))
        )
    return _compare(spaces, images, config, [*held_out, *notes], device, progress)


def _compare(
    spaces: Sequence[_Space],
    images: ImageSet,
    config: ZeroShotConfig,
    notes: list[str],
    device: torch.device,
    progress: Progress | None,
) -> ZeroShotTable:
    """Classify the images in every space and return the table."""
    phrases, templates = class_phrases(images, config.classes), templates_from(config.templates)
    folder = config.classifiers or default_classifiers()
    # Spaces of one text tower share a classifier.
    classifiers = {
        tower.content: text_classifier(tower, phrases, templates, folder, device=device, progress=progress)
        for tower in {space.tower.content: space.tower for space in spaces}.values()
    }
    rows = _rows(spaces, images, classifiers, progress)
    # After encoding: only then it is known which files could not be decoded.
    usable = images.usable()
    classes = len(np.unique(usable.labels))
    if num_shared := len(phrases) - len(set(phrases)):
        notes.append(
            f"{counted(num_shared, 'class shares', 'classes share')} its name with another: their sentences are the same."
        )
    return ZeroShotTable(
        protocol=_protocol(templates, phrases, len(usable)),
        phrases=phrases,
        templates=templates,
        images=usable.identity(),
        rows=tuple(rows),
        notes=(*left_out_notes(images), *sampling_note(len(usable)), *dict.fromkeys(notes)),
        paper=tuple(row for row in ROWS if row.zero_shot is not None)
        if is_imagenet_validation(classes=classes, images=len(usable))
        else (),
    )


def _protocol(templates: Sequence[str], phrases: Sequence[str], num_images: int) -> str:
    """Return the protocol as one line of text."""
    template_phrase = (
        "the 80 of CLIP's paper" if tuple(templates) == PAPER_TEMPLATES else f"{len(templates)} of your own"
    )
    return (
        f"zero-shot: {len(phrases):,} classes as sentences ({template_phrase}), the mean of their unit vectors, cosine; "
        f"{num_images:,} images, "
        "nothing trained on their labels"
    )


def _recorded(source: ImageSource, live: Sequence[LiveEncoder]) -> dict[str, TeacherSpec]:
    """Return teacher name -> its spec, from the cache of the images and the caches that students learned from."""
    cache_urls = [encoder.config.cache for encoder in live if isinstance(encoder, StudentEncoder)]
    caches = [Cache(url) for url in dict.fromkeys(cache_urls) if is_cache(url)]
    # Last, so that the cache of the images wins if two record the same name.
    caches += [source.cache] if isinstance(source, CacheImages) else []
    return {name: teacher.spec for cache in caches for name, teacher in cache.teachers.items()}


def _cached_clips(cache: Cache | None) -> list[CachedTeacherEncoder]:
    """Return the CLIP-family teachers of the cache of the images."""
    if cache is None:
        return []
    cache.teachers.refuse_unreadable()
    return [CachedTeacherEncoder(teacher) for teacher in cache.teachers.values() if teacher.spec.family == CLIP_FAMILY]


class _Towers:
    """Text towers by teacher, loaded when they are first used.

    Args:
        recorded: name -> spec of the teachers of caches.
        files: name -> file with the text tower, from --text-weights.
        notes: receives a note for every tower that cannot be loaded.
    """

    def __init__(self, recorded: dict[str, TeacherSpec], files: dict[str, Path], notes: list[str]) -> None:
        self._recorded, self._files, self._notes = recorded, files, notes
        self._towers: dict[str, TextTower | None] = {}

    def of(self, name: str, *, required: bool) -> TextTower | None:
        """Return the tower of a CLIP-family teacher; None for another family.

        Args:
            name: of the teacher.
            required: raise TeacherError if the weights are not available; otherwise return None and add a note.
        """
        # A failure is stored as well, so that its note appears once.
        if name not in self._towers:
            try:
                self._towers[name] = self._load(name)
            except TeacherError as exc:
                if required:
                    raise
                self._notes.append(f"{name} is left out: {exc}")
                self._towers[name] = None
        return self._towers[name]

    def _load(self, name: str) -> TextTower | None:
        """Find the tower's file: --text-weights, then the file that the cache was built with, then the published one."""
        spec = self._recorded.get(name)
        try:
            preset = find_teacher(name.partition("@")[0] if spec is None else recorded_name(spec))
        # A cache may hold teachers of the user's own, which are no CLIPs as far as is known.
        except UnknownTeacherError:
            return None
        if preset.family != CLIP_FAMILY:
            return None
        path = self._files.get(name)
        if path is None and spec is not None and Path(spec.weights).is_absolute() and Path(spec.weights).exists():
            path = Path(spec.weights)
        return teacher_text_tower(name, preset.model, find_weights(preset, path), tag=preset.tag)


def _model_spaces(
    model: ModelName, weights: Weights, encoder: Encoder, towers: _Towers, notes: list[str]
) -> list[_Space]:
    """Return the spaces of one --model that have a text tower; a note if there is none."""
    if model.family == "open_clip":
        return [_Space(encoder, OWN, open_clip_text_tower(model.path_or_name, weights))]
    if model.family == "teacher":
        tower = towers.of(model.path_or_name, required=True)
        spaces = [_Space(encoder, OWN, tower)] if tower else []
    else:
        spaces = _head_spaces(encoder, towers)
    if not spaces:
        notes.append(f"{encoder.name} has no text tower: its features are in no space with sentences.")
    return spaces


def _head_spaces(encoder: Encoder, towers: _Towers) -> list[_Space]:
    """Return the spaces of a student's heads whose teachers have a text tower."""
    space_towers = [(space, towers.of(space, required=False)) for space in encoder.spaces[1:]]
    return [_Space(encoder, space, tower) for space, tower in space_towers if tower is not None]


def _rows(
    spaces: Sequence[_Space], images: ImageSet, classifiers: dict[str, NDArray[np.float32]], progress: Progress | None
) -> list[ZeroShotRow]:
    """Return one row per space; every encoder runs once over the images."""
    rows: list[ZeroShotRow] = []
    # dict.fromkeys keeps the order of the table, which a set would not.
    for encoder in dict.fromkeys(space.encoder for space in spaces):
        encoder_spaces = [space for space in spaces if space.encoder is encoder]
        ranked: dict[str, list[NDArray[np.int64]]] = {space.name: [] for space in encoder_spaces}
        positions: list[NDArray[np.int64]] = []
        for block in encoder.blocks(images, on_images=CountedImages(encoder, len(images), progress)):
            positions.append(block.positions)
            for space in encoder_spaces:
                ranked[space.name].append(
                    rank_classes(block.summaries[space.name], classifiers[space.tower.content], name=encoder.name)
                )
        if not positions:
            raise EvalError(f"{images.location}: none of its {len(images)} images could be read")
        # Only of the images that could be read.
        labels = images.labels[np.concatenate(positions)]
        for space in encoder_spaces:
            result: Accuracy = accuracy(np.concatenate(ranked[space.name]), labels)
            is_own = space.name == OWN
            rows.append(
                ZeroShotRow(
                    name=encoder.name if is_own else f"{encoder.name} → {space.name}",
                    kind=encoder.kind,
                    about=encoder.description,
                    text=space.tower.description,
                    top1=result.top1,
                    top5=result.top5,
                )
            )
    return rows


def rank_classes(summaries: NDArray[np.float32], classifier: NDArray[np.float32], *, name: str) -> NDArray[np.int64]:
    """Rank the classes of every image by cosine.

    Args:
        summaries: (n, c) of images.
        classifier: (classes, c), of length 1.
        name: of the encoder, for messages.

    Returns:
        (n, 5) classes by falling cosine; -1 fills the ranks beyond the number of classes.

    Raises:
        ShapeError: if the two differ in width.
        EvalError: for summaries that are not finite.
    """
    if summaries.shape[1] != classifier.shape[1]:
        raise ShapeError(
            f"{name} gives summaries of {summaries.shape[1]} values, its text tower sentences of {classifier.shape[1]}: the "
            "weights of the text tower are not those of this teacher"
        )
    if not np.isfinite(summaries).all():
        broken = int((~np.isfinite(summaries).all(axis=1)).sum())
        raise EvalError(f"{name} gives summaries that are not finite for {broken:,} of {len(summaries):,} images")
    # The length of a summary does not change the order of its cosines, so it is not normalised.
    order = np.argsort(-(summaries @ classifier.T), axis=1, kind="stable")[:, :_NUM_RANKS]
    padded = np.full((len(order), _NUM_RANKS), -1, np.int64)
    padded[:, : order.shape[1]] = order
    return padded
