"""All encoders of one evaluation: the teachers of a cache, the models named, the students of runs."""

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
    """The models named, then every run's student and the same one untrained. Raises ConfigError for two of one name."""
    made: list[LiveEncoder] = [
        load_model(model, given, device=device) for model, given in parse_models(models, weights)
    ]
    made += load_runs(runs, device=device, untrained=untrained)
    refuse_namesakes(one.name for one in made)
    return made


def refuse_namesakes(names: Iterable[str]) -> None:
    """Raises ConfigError for two encoders of one name: rows of a table could not be told apart."""
    seen = set[str]()
    for name in names:
        if name in seen:
            raise ConfigError(f"two encoders are called {name}: name one, as in --model OTHER=WHAT")
        seen.add(name)


def images_and_encoders(
    place: str | Path | None,
    live: Sequence[LiveEncoder],
    fallback: str | None,
    *,
    limit: int | None,
    seed: int = 0,
    labelled: bool = False,
) -> tuple[ImageSet, list[Encoder], list[str]]:
    """The images of a place, who can give summaries of them (the teachers of the place, if it is a cache, and `live`), and notes.

    Of a cache that a student was trained on, only the images that were held out, if there are any.
    fallback: the place for None, a run's own cache. Raises EvalError where nobody has summaries.
    """
    where = place if place is not None else fallback
    if where is None:
        raise ConfigError("nothing to evaluate: give --images PLACE, or --run RUN, or both")
    source = open_source(where)
    first = image_set(source, labelled=labelled, limit=1)
    teachers: list[Encoder] = []
    if first.cache is not None:
        first.cache.teachers.refuse_unreadable()
        teachers = [
            CachedTeacherEncoder(one) for one in first.cache.teachers.values() if one.spec.summary_dim is not None
        ]
    encoders = [*teachers, *(one for one in live if one.spaces)]
    refuse_namesakes(one.name for one in encoders)
    if not encoders:
        raise EvalError(
            f"no encoder gives summaries of the images of {where}: name a --run, a --model, or a cache with such teachers"
        )
    usable = image_set(source, teachers=[one.name for one in teachers], labelled=labelled)
    images, notes = held_out_of(usable, live)
    return images.sampled(limit, seed), encoders, notes


def learned_from(live: Sequence[LiveEncoder]) -> str | None:
    """The cache that the first student among them learned from."""
    return next((one.config.cache for one in live if isinstance(one, StudentEncoder)), None)
