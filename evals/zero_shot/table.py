"""Zero-shot accuracy of teachers, students and models side by side, each by the text tower of its own CLIP."""

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
_PLACES = 5


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """What to compare on which images. images: labelled, a cache, folder or tars; None takes the first run's cache.

    runs, models, weights: as for k-NN. text_weights: `[TEACHER=]FILE` where a teacher's text tower is, for those whose file
    is not found. classes, templates: files, see `evals.zero_shot.prompts`. classifiers: the folder where they are kept.
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
            raise ConfigError("nothing to evaluate: give --images PLACE, or --run RUN, or both")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit needs at least 1 image, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class ZeroShotRow:
    """One feature space of one encoder. top1, top5: in [0, 1]. text: the tower whose sentences it was compared with."""

    name: str
    kind: str
    about: str
    text: str
    top1: float
    top5: float


@dataclass(frozen=True, kw_only=True)
class ZeroShotTable:
    """What was measured and how. phrases: what every class was called. images: identity of the images."""

    protocol: str
    phrases: tuple[str, ...]
    templates: tuple[str, ...]
    images: dict[str, str | int]
    rows: tuple[ZeroShotRow, ...]
    notes: tuple[str, ...]
    paper: tuple[PaperRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Space:
    """A feature space that has sentences in it."""

    encoder: Encoder
    name: str
    tower: TextTower


def run_zero_shot(config: ZeroShotConfig, *, progress: Progress | None = None) -> ZeroShotTable:
    """Open everything, make or read the classifiers, compare. Raises RadioCacheError with what is wrong."""
    device = torch.device(pick_device(config.device))
    notes = list[str]()
    live = live_encoders(config.runs, config.models, config.weights, device=device)
    source = open_source(config.images or learned_from(live) or "")
    cached = _cached_clips(source.cache if isinstance(source, CacheImages) else None)
    refuse_namesakes(one.name for one in [*cached, *live])
    named = [one.name for one in cached]
    images, held_out = held_out_of(image_set(source, teachers=named, labelled=True), live)
    images = images.sampled(config.limit, config.seed)
    parsed = parse_models(config.models, config.weights)
    models = list(zip(parsed, live, strict=False))  # those named come first, then those of runs
    students = [one for one in live[len(models) :] if isinstance(one, StudentEncoder)]
    asked = [*named, *(m.path_or_name for m, _ in parsed if m.family == "teacher")]
    asked += [space for one in live if isinstance(one, StudentEncoder) for space in one.spaces[1:]]
    files = per_teacher(
        "--text-weights", config.text_weights, sorted(set(asked)), lambda text: Path(text).expanduser(), shared=False
    )
    towers = _Towers(_recorded(source, live), files, notes)
    spaces = [_Space(encoder, OWN, tower) for encoder in cached if (tower := towers.of(encoder.name, required=False))]
    for (model, given), encoder in models:
        spaces += _model_spaces(model, given, encoder, towers, notes)
    for student in students:
        spaces += _head_spaces(student, towers)
    if not spaces:
        raise EvalError(
            "no encoder has a text tower: zero-shot needs a student of a CLIP-family teacher, such a teacher, or an "
            "open_clip model" + "".join(f"; {note}" for note in dict.fromkeys(notes))
        )
    return _compared(spaces, images, config, [*held_out, *notes], device, progress)


def _compared(
    spaces: Sequence[_Space],
    images: ImageSet,
    config: ZeroShotConfig,
    notes: list[str],
    device: torch.device,
    progress: Progress | None,
) -> ZeroShotTable:
    phrases, templates = class_phrases(images, config.classes), templates_from(config.templates)
    folder = config.classifiers or default_classifiers()
    classifiers = {
        tower.content: text_classifier(tower, phrases, templates, folder, device=device, progress=progress)
        for tower in {space.tower.content: space.tower for space in spaces}.values()
    }
    rows = _rows(spaces, images, classifiers, progress)
    seen = images.usable()
    classes = len(np.unique(seen.labels))
    if alike := len(phrases) - len(set(phrases)):
        notes.append(
            f"{counted(alike, 'class shares', 'classes share')} its name with another: no sentence tells them apart."
        )
    return ZeroShotTable(
        protocol=_protocol(templates, phrases, len(seen)),
        phrases=phrases,
        templates=templates,
        images=seen.identity(),
        rows=tuple(rows),
        notes=(*left_out_notes(images), *sampling_note(len(seen)), *dict.fromkeys(notes)),
        paper=tuple(row for row in ROWS if row.zero_shot is not None)
        if is_imagenet_validation(classes=classes, images=len(seen))
        else (),
    )


def _protocol(templates: Sequence[str], phrases: Sequence[str], tested: int) -> str:
    whose = "the 80 of CLIP's paper" if tuple(templates) == PAPER_TEMPLATES else f"{len(templates)} of your own"
    return (
        f"zero-shot: {len(phrases):,} classes as sentences ({whose}), the mean of their unit vectors, cosine; {tested:,} images, "
        "nothing trained on their labels"
    )


def _recorded(source: ImageSource, live: Sequence[LiveEncoder]) -> dict[str, TeacherSpec]:
    """Group name -> what the build recorded of the teacher: in the cache of the images, and in those students learned from."""
    places = [one.config.cache for one in live if isinstance(one, StudentEncoder)]
    caches = [Cache(place) for place in dict.fromkeys(places) if is_cache(place)]
    caches += [source.cache] if isinstance(source, CacheImages) else []
    return {name: teacher.spec for cache in caches for name, teacher in cache.teachers.items()}


def _cached_clips(cache: Cache | None) -> list[CachedTeacherEncoder]:
    if cache is None:
        return []
    cache.teachers.refuse_unreadable()
    return [CachedTeacherEncoder(one) for one in cache.teachers.values() if one.spec.family == CLIP_FAMILY]


class _Towers:
    """Text towers by teacher. recorded: of caches, by group. notes: what to tell about those that are not to be had."""

    def __init__(self, recorded: dict[str, TeacherSpec], files: dict[str, Path], notes: list[str]) -> None:
        self._recorded, self._files, self._notes = recorded, files, notes
        self._towers: dict[str, TextTower | None] = {}

    def of(self, name: str, *, required: bool) -> TextTower | None:
        """The tower of a CLIP-family teacher; None for another family, and, with a note, where its weights are not here.

        required: raise instead.
        """
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
        spec = self._recorded.get(name)
        try:
            preset = find_teacher(name.partition("@")[0] if spec is None else recorded_name(spec))
        except UnknownTeacherError:
            return None
        if preset.family != CLIP_FAMILY:
            return None
        given = self._files.get(name)
        if given is None and spec is not None and Path(spec.weights).is_absolute() and Path(spec.weights).exists():
            given = Path(spec.weights)
        return teacher_text_tower(name, preset.model, find_weights(preset, given), tag=preset.tag)


def _model_spaces(
    model: ModelName, weights: Weights, encoder: Encoder, towers: _Towers, notes: list[str]
) -> list[_Space]:
    if model.family == "open_clip":
        return [_Space(encoder, OWN, open_clip_text_tower(model.path_or_name, weights))]
    if model.family == "teacher":
        tower = towers.of(model.path_or_name, required=True)
        made = [_Space(encoder, OWN, tower)] if tower else []
    else:
        made = _head_spaces(encoder, towers)
    if not made:
        notes.append(f"{encoder.name} has no text tower: its features are in no space with sentences.")
    return made


def _head_spaces(encoder: Encoder, towers: _Towers) -> list[_Space]:
    """A student's heads for teachers with a text tower."""
    found = [(space, towers.of(space, required=False)) for space in encoder.spaces[1:]]
    return [_Space(encoder, space, tower) for space, tower in found if tower is not None]


def _rows(
    spaces: Sequence[_Space], images: ImageSet, classifiers: dict[str, NDArray[np.float32]], progress: Progress | None
) -> list[ZeroShotRow]:
    rows: list[ZeroShotRow] = []
    for encoder in dict.fromkeys(space.encoder for space in spaces):
        here = [space for space in spaces if space.encoder is encoder]
        ranked: dict[str, list[NDArray[np.int64]]] = {space.name: [] for space in here}
        positions: list[NDArray[np.int64]] = []
        for block in encoder.blocks(images, on_images=CountedImages(encoder, len(images), progress)):
            positions.append(block.positions)
            for space in here:
                ranked[space.name].append(
                    likeliest(block.summaries[space.name], classifiers[space.tower.content], whose=encoder.name)
                )
        if not positions:
            raise EvalError(f"{images.location}: none of its {len(images)} images could be read")
        labels = images.labels[np.concatenate(positions)]
        for space in here:
            found: Accuracy = accuracy(np.concatenate(ranked[space.name]), labels)
            own = space.name == OWN
            rows.append(
                ZeroShotRow(
                    name=encoder.name if own else f"{encoder.name} → {space.name}",
                    kind=encoder.kind,
                    about=encoder.description,
                    text=space.tower.description,
                    top1=found.top1,
                    top5=found.top5,
                )
            )
    return rows


def likeliest(summaries: NDArray[np.float32], classifier: NDArray[np.float32], *, whose: str) -> NDArray[np.int64]:
    """(n, 5) classes by falling cosine; -1 behind where there are fewer. Raises ShapeError for vectors of another width."""
    if summaries.shape[1] != classifier.shape[1]:
        raise ShapeError(
            f"{whose} gives summaries of {summaries.shape[1]} values, its text tower sentences of {classifier.shape[1]}: the "
            "weights of the text tower are not those of this teacher"
        )
    if not np.isfinite(summaries).all():
        broken = int((~np.isfinite(summaries).all(axis=1)).sum())
        raise EvalError(f"{whose} gives summaries that are not finite for {broken:,} of {len(summaries):,} images")
    order = np.argsort(-(summaries @ classifier.T), axis=1, kind="stable")[:, :_PLACES]
    padded = np.full((len(order), _PLACES), -1, np.int64)
    padded[:, : order.shape[1]] = order
    return padded
