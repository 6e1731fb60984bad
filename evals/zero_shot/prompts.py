"""What classes are called in sentences: names people would use, and templates they stand in."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import open_clip
from timm.data.imagenet_info import ImageNetInfo

from evals.image_set import ImageSet
from radio_cache.errors import ConfigError

PAPER_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
"""The 80 sentences of CLIP's paper (arXiv 2103.00020) for ImageNet; {} is the class."""

_MAX_NUMBERED = 1 << 17
"""Above the classes of ImageNet-21k and of iNaturalist; numbers far above are identifiers of something else."""

_WORDNET = re.compile(r"(n\d{8})(?:[_ -]+(.*))?")


def class_phrases(images: ImageSet, file: Path | None) -> tuple[str, ...]:
    """What every class of the images is called in a sentence, by its number.

    file: lines of `class<TAB>phrase`, class being the folder's name or the number, or one phrase a line in the order of the
    classes. Without: an ImageNet class has the name that CLIP's authors gave it; other folders are called what they are called,
    underscores as spaces. Raises ConfigError for classes without a name.
    """
    if not images.class_names and int(images.labels.max()) >= _MAX_NUMBERED:
        raise ConfigError(
            f"{images.place} numbers its classes up to {int(images.labels.max())} and does not name them: there would be a "
            f"sentence for every number below that, and at most {_MAX_NUMBERED} are compared: number them from 0 without gaps"
        )
    names = images.class_names or tuple(str(number) for number in range(int(images.labels.max()) + 1))
    if file is not None:
        return _from_file(file, names)
    if not images.class_names:
        raise ConfigError(
            f"{images.place} numbers its {len(names)} classes and does not name them: give --classes FILE with a name a line"
        )
    return tuple(_phrase(name) for name in names)


def templates_from(file: Path | None) -> tuple[str, ...]:
    """The user's sentences, one a line with {} for the class; the paper's 80 without a file. Raises ConfigError."""
    if file is None:
        return PAPER_TEMPLATES
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"--templates {file} holds no sentence: one a line, with {{}} for the class")
    if lost := [line for line in lines if line.count("{}") != 1]:
        raise ConfigError(f"--templates {file}: '{lost[0]}' has no {{}} where the class stands, or several")
    return tuple(lines)


def sentences(phrase: str, templates: Sequence[str]) -> list[str]:
    """The templates about one class."""
    return [template.replace("{}", phrase) for template in templates]


def _phrase(name: str) -> str:
    found = _WORDNET.fullmatch(name)
    known = _imagenet_phrases().get(found[1]) if found else None
    plain = (found[2] or name) if found else name
    return known or " ".join(plain.replace("_", " ").split())


@functools.cache
def _imagenet_phrases() -> dict[str, str]:
    """WordNet id -> the name CLIP's authors gave the class; both lists are in ImageNet's order."""
    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))


def _from_file(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    lines = [line.rstrip("\r\n") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if all("\t" in line for line in lines) and lines:
        phrase_of = dict(line.split("\t", 1) for line in lines)
        if missing := [name for name in names if name not in phrase_of]:
            raise ConfigError(
                f"--classes {file} has no line for {len(missing)} of the {len(names)} classes, such as {missing[0]}"
            )
        return tuple(phrase_of[name].strip() for name in names)
    if len(lines) != len(names):
        raise ConfigError(
            f"--classes {file} has {len(lines)} lines, the images have {len(names)} classes: one line for each, in their "
            "order, or lines of class<TAB>phrase"
        )
    return tuple(line.strip() for line in lines)
