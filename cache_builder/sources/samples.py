"""Samples of a WebDataset tar: which of their members are photos, and which class belongs to which of them.

As the webdataset library has it, a sample is a run of consecutive members that share a key: the name up to the first dot of
its last part. Names with more dots (dates, versions, decimals) make runs of several photos; within one, what two names have in
common decides. A stem is a name without its ending.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cache_builder.sources.tar_members import TarMember
from radio_cache.errors import SourceError


class ClassFile(NamedTuple):
    """A member that says the class of images. label: a number, a name, or None for no class."""

    name: str
    stem: str
    label: int | str | None


@dataclass
class SampleNotes:
    """Counts of what a user should hear about.

    companions: photos that share a sample with a photo (`x.seg.png` beside `x.jpg`), and one of them.
    left_out: images that are not the member asked for. orphans: class files that belong to no image of their run.
    """

    companions: int = 0
    companion: str = ""
    left_out: list[str] = field(default_factory=list[str])
    orphans: list[ClassFile] = field(default_factory=list[ClassFile])


def sample_key(name: str) -> str:
    """Return the key of the sample that a member belongs to, "" for a name without a dot in its last part."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return name[:dot] if dot > slash else ""


def stem_of(name: str) -> str:
    return name[: name.rfind(".")]


@dataclass
class _Part:
    """What lies between two members of one name in a run."""

    images: list[TarMember] = field(default_factory=list[TarMember])
    classes: list[ClassFile] = field(default_factory=list[ClassFile])


class Samples:
    """Collects the images and class files of a tar in tar order, sample by sample.

    images, labels: what was collected of the samples that are over; all of them after `close`.
    """

    def __init__(self, place: str, member: str = "") -> None:
        """place: of the tar, for messages. member: endings of the photo, best first (`jpg;png`); "" for all images."""
        self.images: list[TarMember] = []
        self.labels: list[int | str | None] = []
        self.notes = SampleNotes()
        self._place = place
        self._endings = member_endings(member)
        self._key = ""
        self._names = set[str]()
        self._parts = [_Part()]
        self._suffixes = Counter[str]()
        self._suffix_example: dict[str, str] = {}

    def add_image(self, member: TarMember) -> None:
        self._part_for(member.name).images.append(member)

    def add_class(self, name: str, label: int | str | None) -> None:
        self._part_for(name).classes.append(ClassFile(name, stem_of(name), label))

    def end_run(self, name: str) -> None:
        """Note a member that is neither: it ends a run if it has another key."""
        key = sample_key(name)
        if key and key != self._key:
            self._flush(key)

    def close(self) -> None:
        """End the last sample. Raises SourceError, as all methods here do, for an image with two classes."""
        self._flush("")
        repeated = {suffix: count for suffix, count in self._suffixes.items() if count > 1}
        if repeated and not self.notes.companions:
            last = max(repeated)
            self.notes.companions, self.notes.companion = sum(repeated.values()), self._suffix_example[last]

    def _part_for(self, name: str) -> _Part:
        """The part of a run that takes the next member. A name that comes again begins a sample of its own."""
        key = sample_key(name) or stem_of(name)
        if key != self._key:
            self._flush(key)
        elif name in self._names:
            self._names.clear()
            self._parts.append(_Part())
        self._names.add(name)
        return self._parts[-1]

    def _flush(self, key: str) -> None:
        parts, self._parts = self._parts, [_Part()]
        for part in _with_images(parts) if len(parts) > 1 else parts:
            if part.images or part.classes:
                self._take(part)
        self._key = key
        self._names.clear()

    def _take(self, part: _Part) -> None:
        images = part.images
        if self._endings:
            images = chosen_images(images, self._endings)
            chosen = set(map(id, images))
            self.notes.left_out += [image.name for image in part.images if id(image) not in chosen]
        elif len(images) > 1:
            self._count_companions(images)
        self.images += images
        if not part.classes:
            self.labels += [None] * len(images)
            return
        if len(images) == len(part.classes) == 1 and stem_of(images[0].name) == part.classes[0].stem:  # nearly always
            self.labels.append(part.classes[0].label)
            return
        classes, orphans = classes_of([image.name for image in images], part.classes, self._place)
        self.labels += [None if one is None else one.label for one in classes]
        self.notes.orphans += orphans

    def _count_companions(self, images: Sequence[TarMember]) -> None:
        stems = {stem_of(image.name) for image in images}
        names = list(dict.fromkeys(image.name for image in images))
        seen = set[str]()
        for name in names:
            stem = stem_of(name)
            if stem in seen or any(prefix in stems for prefix in _above(stem)):
                self.notes.companions += 1
                self.notes.companion = self.notes.companion or name
            seen.add(stem)
        for name in names if len(stems) > 1 else ():
            # x.image.jpg and x.mask.png: the same endings again in other samples are members, not the dots of names.
            suffix = name[len(sample_key(name)) :]
            self._suffixes[suffix] += 1
            self._suffix_example[suffix] = name


def member_endings(member: str) -> list[str]:
    """Return the endings that `--member` names, with their dot: "jpg;png" -> [".jpg", ".png"]."""
    return [f".{ending.strip().lstrip('.').lower()}" for ending in member.split(";") if ending.strip().lstrip(".")]


def chosen_images(images: Sequence[TarMember], endings: Sequence[str]) -> list[TarMember]:
    """Return the photos of a run: of each key the image whose name goes on with the first ending there is.

    In `x.jpg`, `x.seg.png` the ending `.png` chooses nothing: the key of the second is `x`, and it goes on with `seg.png`.
    """
    stems = {stem_of(image.name) for image in images}
    best: dict[str, tuple[int, TarMember]] = {}
    for image in images:
        name = image.name.lower()
        for rank, ending in enumerate(endings):
            key = image.name[: -len(ending)]
            if name.endswith(ending) and not any(prefix in stems for prefix in _above(key)):
                if key not in best or rank < best[key][0]:
                    best[key] = (rank, image)
                break
    return [image for _, image in best.values()]


def classes_of(
    images: Sequence[str], classes: Sequence[ClassFile], place: str
) -> tuple[list[ClassFile | None], list[ClassFile]]:
    """Give each image of a run its class.

    A class file belongs to the images with which its stem has most in common: `KEY.cls` to `KEY.jpg` and, if there is no other,
    to `KEY.x.jpg`. `KEY.x.cls` is the class of `KEY.jpg` only where there is no `KEY.cls`. `KEY.label.cls` is also that of
    `KEY.image.jpg`, but `KEY.1.cls` is not that of `KEY.2.jpg`: digits behind a dot are part of a name.

    Args:
        images: their names.
        place: of the tar, for messages.

    Returns:
        The class file of each image, and the class files that belong to none.

    Raises:
        SourceError: two different classes for one image.
    """
    by_stem: dict[str, list[ClassFile]] = {}
    for one in classes:
        by_stem.setdefault(one.stem, []).append(one)
    candidates: list[list[ClassFile]] = []
    images_of: dict[str, list[int]] = {}  # stem -> images
    images_below: dict[str, list[int]] = {}  # the same, and the beginnings of their stems
    for number, name in enumerate(images):
        stem = stem_of(name)
        beginnings = (stem, *_above(stem))
        candidates.append(next((by_stem[beginning] for beginning in beginnings if beginning in by_stem), []))
        images_of.setdefault(stem, []).append(number)
        for beginning in beginnings:
            images_below.setdefault(beginning, []).append(number)
    have_own = [bool(own) for own in candidates]
    orphans: list[ClassFile] = []
    for one in classes:
        if one.stem in images_below:
            continue
        shared = next((beginning for beginning in _above(one.stem) if beginning in images_below), "")
        nearest = images_of.get(shared, [])
        if not nearest and shared and not any(map(str.isdigit, one.stem[len(shared) :])):
            nearest = images_below[shared]
        for number in nearest:
            if not have_own[number]:
                candidates[number] = [*candidates[number], one]
        if not nearest:
            orphans.append(one)
    return [_only(name, few, place) for name, few in zip(images, candidates, strict=True)], orphans


def _only(image: str, classes: Sequence[ClassFile], place: str) -> ClassFile | None:
    labelled = [one for one in classes if one.label is not None]
    for one in labelled[1:]:
        if one.label != labelled[0].label:
            raise SourceError(
                f"{place}: {image} has two classes, {labelled[0].label} in {labelled[0].name} and {one.label} in {one.name}: "
                "keep one of them, or name the field of a .json member that holds the class, as in 'train.tar#,label'"
            )
    return labelled[0] if labelled else None


def _with_images(parts: Sequence[_Part]) -> Iterator[_Part]:
    """The parts of a run; those of class files alone go to the part before them, or else behind."""
    waiting: list[ClassFile] = []
    current: _Part | None = None
    for part in parts:
        if part.images:
            if current is not None:
                yield current
            current = _Part(part.images, waiting + part.classes)
            waiting = []
        elif current is not None:
            current.classes.extend(part.classes)
        else:
            waiting += part.classes
    yield current or _Part([], waiting)


def _above(stem: str) -> Iterator[str]:
    """A stem without its last dotted part, without its last two, and so on down to the key."""
    first = stem.rfind("/") + 1
    while (dot := stem.rfind(".")) > first:
        stem = stem[:dot]
        yield stem
