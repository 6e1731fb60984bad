"""Classifiers made of sentences: one vector per class, stored under the hash of everything it depends on."""

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
from evals.zero_shot.text_tower import TextTower, embed_sentences
from radio_cache.storage.local import write_atomically

_VECTORS = "vectors"


def default_classifiers() -> Path:
    """Return the folder of stored classifiers if --classifiers names none."""
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
    """Return one vector per class: the normalised mean of the normalised vectors of its sentences.

    The classifier is read from `folder` if it is stored there for the same tower, phrases and templates. A file that cannot
    be read is replaced.

    Args:
        tower: encodes sentences.
        phrases: one per class.
        templates: sentences with {} for the phrase.
        folder: of stored classifiers.
        device: where the tower runs.
        progress: receives the number of classes.

    Returns:
        (classes, c) vectors of length 1.

    Source: CLIP, arXiv 2103.00020, section 3.1.4.
    """
    # Everything the vectors depend on; the name of the file is its hash.
    content = json.dumps([tower.content, list(phrases), list(templates)], ensure_ascii=False)
    file = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"
    if file.exists():
        try:
            # Stored in float32: 1,000 classes of 1,280 values are 5 MB.
            return load_file(file)[_VECTORS]
        except (SafetensorError, KeyError):
            file.unlink()
    # Loading the tower is the slow part; it happens only if no classifier is stored.
    embed = tower.load(device)
    vectors: list[NDArray[np.float32]] = []
    for number, phrase in enumerate(phrases, start=1):
        # (templates, c) -> (c,): every sentence weighs the same.
        mean = embed_sentences(embed, sentences(phrase, templates)).mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
        if progress is not None:
            progress(tower.description, number, len(phrases), unit="classes")
    classifier = np.stack(vectors).astype(np.float32)
    write_atomically(
        file, save({_VECTORS: classifier}, metadata={"about": f"{tower.description}, {len(templates)} templates"})
    )
    return classifier
