"""A classifier made of sentences: one vector per class, kept on disk under the hash of what it was made from."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from evals.shared.progress import Progress
from evals.zero_shot.prompts import sentences
from evals.zero_shot.text_tower import TextTower, embedded
from radio_cache.storage.local import write_atomically

_VECTORS = "vectors"


def default_classifiers() -> Path:
    """Where classifiers are kept unless --classifiers says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radio-cache" / "text-classifiers"


def text_classifier(
    tower: TextTower,
    phrases: Sequence[str],
    templates: Sequence[str],
    folder: Path,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """(classes, c) vectors of length 1: of every class, the mean of its sentences' vectors of length 1.

    Source: CLIP, arXiv 2103.00020, section 3.1.4. Read from `folder` if the same tower, phrases and templates were there before;
    a file that cannot be read is made again.
    """
    content = json.dumps([tower.content, list(phrases), list(templates)], ensure_ascii=False)
    file = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"
    if file.exists():
        try:
            return load_file(file)[_VECTORS]
        except (SafetensorError, KeyError):
            file.unlink()
    embed = tower.load(device)
    vectors: list[NDArray[np.float32]] = []
    for number, phrase in enumerate(phrases, start=1):
        mean = embedded(embed, sentences(phrase, templates)).mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
        if progress is not None:
            progress(tower.description, number, len(phrases), unit="classes")
    made = np.stack(vectors).astype(np.float32)
    write_atomically(
        file, save({_VECTORS: made}, metadata={"about": f"{tower.description}, {len(templates)} templates"})
    )
    return made
