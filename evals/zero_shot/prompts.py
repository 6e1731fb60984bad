"""Sentences about classes: phrases for class names, and templates that hold them."""

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
"""More classes than ImageNet-21k and iNaturalist have; larger numbers are identifiers of something else."""

# A WordNet id alone, or followed by a name, as some copies of ImageNet call their folders.
_WORDNET = re.compile(r"(n\d{8})(?:[_ -]+(.*))?")


def class_phrases(images: ImageSet, file: Path | None) -> tuple[str, ...]:
    """Return the phrase of every class of the images, in the order of class numbers.

    Args:
        images: with labels.
        file: lines of `class<TAB>phrase`, where class is the name of the folder or the number; or one phrase per line in the
            order of the classes. None takes the names of CLIP's authors for ImageNet classes, and folder names with spaces
            for underscores otherwise.

    Raises:
        ConfigError: for classes without a name.
    """
    if not images.class_names and int(images.labels.max()) >= _MAX_NUMBERED:
        raise ConfigError(
            f"{images.location} numbers its classes up to {int(images.labels.max())} and does not name them: there would be a "
            f"sentence for every number below that, and at most {_MAX_NUMBERED} are compared: number them from 0 without gaps"
        )
    # A list file may still name numbered classes.
    names = images.class_names or tuple(str(number) for number in range(int(images.labels.max()) + 1))
    if file is not None:
        return _from_file(file, names)
    if not images.class_names:
        raise ConfigError(
            f"{images.location} numbers its {len(names)} classes and does not name them: give --classes FILE with one name per "
            "line"
        )
    return tuple(_phrase(name) for name in names)


def templates_from(file: Path | None) -> tuple[str, ...]:
    """Read templates from a file with one per line, {} for the class; without a file, return the paper's 80.

    Raises:
        ConfigError: if the file holds no template, or one without a single {}.
    """
    if file is None:
        return PAPER_TEMPLATES
    # Empty lines separate groups of templates in some published lists.
    lines = [line.strip() for line in text_lines(file, "--templates") if line.strip()]
    if not lines:
        raise ConfigError(f"--templates {file} holds no sentence: write one per line, with {{}} for the class")
    if malformed := [line for line in lines if line.count("{}") != 1]:
        raise ConfigError(f"--templates {file}: '{malformed[0]}' has no {{}} where the class stands, or several")
    return tuple(lines)


def sentences(phrase: str, templates: Sequence[str]) -> list[str]:
    """Return the templates with the phrase of one class."""
    # replace, not format: other braces in a sentence stay as they are.
    return [template.replace("{}", phrase) for template in templates]


def _phrase(name: str) -> str:
    """Return the phrase for a folder name: CLIP's for a WordNet id of ImageNet, else the name with spaces."""
    wordnet = _WORDNET.fullmatch(name)
    imagenet_phrase = _imagenet_phrases().get(wordnet[1]) if wordnet else None
    folder_name = (wordnet[2] or name) if wordnet else name
    return imagenet_phrase or " ".join(folder_name.replace("_", " ").split())


@functools.cache
def _imagenet_phrases() -> dict[str, str]:
    """Return WordNet id -> the name of the class by CLIP's authors; both lists are in ImageNet's order."""
    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))


def _from_file(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return one phrase per class from a file of either form."""
    lines = text_lines(file, "--classes")
    while lines and not lines[-1].strip():
        lines.pop()
    # One file has one of the two forms; a mixture is a mistake in some line.
    tabbed = ["\t" in line for line in lines if line.strip()]
    if any(tabbed):
        if not all(tabbed):
            raise ConfigError(
                f"--classes {file}: some lines have a tab and some have none: class<TAB>phrase on each, or on none"
            )
        return _by_class(file, [line for line in lines if line.strip()], names)
    # Positions matter in this form: an empty line would shift all classes behind it.
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
    """Return one phrase per class from lines of class<TAB>phrase."""
    phrase_of: dict[str, str] = {}
    for line in lines:
        name, phrase = (part.strip() for part in line.split("\t", 1))
        if not phrase:
            raise ConfigError(f"--classes {file}: class '{name}' has no phrase behind the tab")
        # The same line twice is harmless.
        if phrase_of.setdefault(name, phrase) != phrase:
            raise ConfigError(f"--classes {file} calls class '{name}' both '{phrase_of[name]}' and '{phrase}'")
    if missing := [name for name in names if name not in phrase_of]:
        raise ConfigError(
            f"--classes {file} has no line for {len(missing)} of the {len(names)} classes, such as {missing[0]}"
        )
    return tuple(phrase_of[name] for name in names)


def _refuse_misplaced(file: Path, phrases: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError if lines without tabs begin with the class, or name another class than their position does."""
    if all(re.match(re.escape(name) + r"[\s,;:]+\S", phrase) for name, phrase in zip(names, phrases, strict=True)):
        raise ConfigError(
            f"--classes {file}: every line begins with its class, such as '{phrases[0]}', and the class would be part of the "
            "sentence: put a tab behind it"
        )
    # Either spelling of a class: the folder's name, or the phrase for it.
    number_of = {
        form: number for number, name in enumerate(names) for form in (name.casefold(), _phrase(name).casefold())
    }
    for number, phrase in enumerate(phrases):
        named_class = number_of.get(phrase.casefold(), number)
        # A class that is a mere number may be the right phrase by chance.
        if named_class != number and not names[named_class].isdecimal():
            raise ConfigError(
                f"--classes {file}: line {number + 1} is '{phrase}', which names class {named_class + 1} "
                f"({names[named_class]}), and class {number + 1} is {names[number]}: order the lines as the classes, or write "
                "class<TAB>phrase"
            )
