"""What classes are called in sentences: names people would use, and templates they stand in."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import open_clip
from timm.data.imagenet_info import ImageNetInfo

from evals.shared.image_set import ImageSet
from evals.text_files import text_lines
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
            f"{images.location} numbers its classes up to {int(images.labels.max())} and does not name them: there would be a "
            f"sentence for every number below that, and at most {_MAX_NUMBERED} are compared: number them from 0 without gaps"
        )
    names = images.class_names or tuple(str(number) for number in range(int(images.labels.max()) + 1))
    if file is not None:
        return _from_file(file, names)
    if not images.class_names:
        raise ConfigError(
            f"{images.location} numbers its {len(names)} classes and does not name them: give --classes FILE with a name a line"
        )
    return tuple(_phrase(name) for name in names)


def templates_from(file: Path | None) -> tuple[str, ...]:
    """The user's sentences, one a line with {} for the class; the paper's 80 without a file. Raises ConfigError."""
    if file is None:
        return PAPER_TEMPLATES
    lines = [line.strip() for line in text_lines(file, "--templates") if line.strip()]
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
    lines = text_lines(file, "--classes")
    while lines and not lines[-1].strip():
        lines.pop()
    tabbed = ["\t" in line for line in lines if line.strip()]
    if any(tabbed):
        if not all(tabbed):
            raise ConfigError(
                f"--classes {file}: some lines have a tab and some have none: class<TAB>phrase on each, or on none"
            )
        return _by_class(file, [line for line in lines if line.strip()], names)
    if blank := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
        raise ConfigError(
            f"--classes {file}: line {blank[0]} is empty; line n is the n-th class, so that none may be left out"
        )
    if len(lines) != len(names):
        raise ConfigError(
            f"--classes {file} has {len(lines)} lines, the images have {len(names)} classes: one line for each, in their "
            "order, or lines of class<TAB>phrase"
        )
    phrases = tuple(line.strip() for line in lines)
    _refuse_misplaced(file, phrases, names)
    return phrases


def _by_class(file: Path, lines: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    phrase_of: dict[str, str] = {}
    for line in lines:
        name, phrase = (part.strip() for part in line.split("\t", 1))
        if not phrase:
            raise ConfigError(f"--classes {file}: class '{name}' has no phrase behind the tab")
        if phrase_of.setdefault(name, phrase) != phrase:
            raise ConfigError(f"--classes {file} calls class '{name}' both '{phrase_of[name]}' and '{phrase}'")
    if missing := [name for name in names if name not in phrase_of]:
        raise ConfigError(
            f"--classes {file} has no line for {len(missing)} of the {len(names)} classes, such as {missing[0]}"
        )
    return tuple(phrase_of[name] for name in names)


def _refuse_misplaced(file: Path, phrases: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError where lines without tabs are plainly in another order than the classes, or begin with the class."""
    if all(re.match(re.escape(name) + r"[\s,;:]+\S", phrase) for name, phrase in zip(names, phrases, strict=True)):
        raise ConfigError(
            f"--classes {file}: every line begins with its class, such as '{phrases[0]}', and the class would be part of the "
            "sentence: put a tab behind it"
        )
    number_of = {
        form: number for number, name in enumerate(names) for form in (name.casefold(), _phrase(name).casefold())
    }
    for number, phrase in enumerate(phrases):
        other = number_of.get(phrase.casefold(), number)
        if other != number and not names[other].isdecimal():
            raise ConfigError(
                f"--classes {file}: line {number + 1} is '{phrase}', which names class {other + 1} ({names[other]}), and class "
                f"{number + 1} is {names[number]}: order the lines as the classes, or write class<TAB>phrase"
            )
