"""All encoders of one evaluation: the teachers of a cache, the models of --model, the students of runs."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from evals.encoders.base import Encoder, LiveEncoder
from evals.encoders.cached_teacher import CachedTeacherEncoder
from evals.encoders.named import load_model, load_runs, parse_models
from evals.encoders.student import StudentEncoder
from evals.encoders.trained_on import held_out_of
from evals.errors import EvalError
from evals.shared.image_set import ImageSet, image_set, open_source
from radio_cache.errors import ConfigError


def live_encoders(
    runs: Sequence[Path], models: Sequence[str], weights: Sequence[str], *, device: torch.device, untrained: bool = True
) -> list[LiveEncoder]:
    """Load the models, then every run's student and the same network untrained.

    Args:
        runs: folders of training runs.
        models: as `parse_models` takes them.
        weights: likewise.
        device: where models run.
        untrained: whether untrained students are loaded as well.

    Raises:
        ConfigError: if two encoders have one name.
    """
    encoders: list[LiveEncoder] = [
        load_model(model, model_weights, device=device) for model, model_weights in parse_models(models, weights)
    ]
    # Models first: callers pair the leading encoders with the parsed --model values.
    encoders += load_runs(runs, device=device, untrained=untrained)
    refuse_namesakes(encoder.name for encoder in encoders)
    return encoders


def refuse_namesakes(names: Iterable[str]) -> None:
    """Raise ConfigError if two encoders have one name: rows of a table would look alike."""
    names_so_far = set[str]()
    for name in names:
        if name in names_so_far:
            raise ConfigError(f"two encoders are called {name}: name one, as in --model OTHER=WHAT")
        names_so_far.add(name)


def images_and_encoders(
    location: str | Path | None,
    live: Sequence[LiveEncoder],
    fallback: str | None,
    *,
    limit: int | None,
    seed: int = 0,
    labelled: bool = False,
) -> tuple[ImageSet, list[Encoder], list[str]]:
    """Open images and collect the encoders that have summaries of them: the teachers, if it is a cache, and `live`.

    Of a cache that a student was trained on, only the held-out images are selected, if there are any.

    Args:
        location: of the images; None takes `fallback`.
        live: encoders that run their model.
        fallback: the cache of the first run, if there is a run.
        limit: images at most, drawn by `seed`.
        seed: of the draw.
        labelled: only images with a class.

    Returns:
        Images, encoders and notes.

    Raises:
        ConfigError: if there are no images to evaluate.
        EvalError: if no encoder has summaries.
    """
    path_or_url = location if location is not None else fallback
    if path_or_url is None:
        raise ConfigError("nothing to evaluate: give --images PATH_OR_URL, or --run FOLDER, or both")
    source = open_source(path_or_url)
    # Which teachers there are decides which images are usable, so a single image opens the cache first.
    first = image_set(source, labelled=labelled, limit=1)
    teachers: list[Encoder] = []
    if first.cache is not None:
        first.cache.teachers.refuse_unreadable()
        # SAM and others without a summary cannot be compared as whole images.
        teachers = [
            CachedTeacherEncoder(encoder)
            for encoder in first.cache.teachers.values()
            if encoder.spec.summary_dim is not None
        ]
    # Teachers come first in tables: students are read against them.
    encoders = [*teachers, *(encoder for encoder in live if encoder.spaces)]
    refuse_namesakes(encoder.name for encoder in encoders)
    if not encoders:
        raise EvalError(
            f"no encoder gives summaries of the images of {path_or_url}: name a --run, a --model, or a cache with such teachers"
        )
    # An image must have features of every teacher, so that all rows are on the same images.
    usable = image_set(source, teachers=[encoder.name for encoder in teachers], labelled=labelled)
    images, notes = held_out_of(usable, live)
    # Sampled after the held-out selection, so that --limit counts held-out images.
    return images.sampled(limit, seed), encoders, notes


def learned_from(live: Sequence[LiveEncoder]) -> str | None:
    """Return the cache that the first student among the encoders learned from."""
    return next((encoder.config.cache for encoder in live if isinstance(encoder, StudentEncoder)), None)
