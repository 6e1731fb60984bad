"""Samples of a WebDataset tar: the photos among their members, and the class of each photo.

As in the webdataset library, a sample is a run of consecutive members that share a key: the name up to the first dot of its
last part. Names with more dots (dates, versions, decimals) give runs of several photos. Within a run a class belongs to the
photos whose names have most in common with its own. A stem is a name without its extension.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cache_builder.sources.tar_members import TarMember
from radio_cache.errors import SourceError


class ClassFile(NamedTuple):
    """A member that holds the class of images."""

    name: str
    stem: str

    label: int | str | None
    """Class number, class name, or None for no class."""


@dataclass
class SampleNotes:
    """Members that are reported to the user after the tar is listed."""

    companions: int = 0
    """Number of images that share a sample with a photo (`x.seg.png` beside `x.jpg`)."""

    companion: str = ""
    """Name of one companion."""

    left_out: list[str] = field(default_factory=list[str])
    """Images that are not the requested member of their sample."""

    orphans: list[ClassFile] = field(default_factory=list[ClassFile])
    """Class files that belong to no image of their run."""


def sample_key(name: str) -> str:
    """Return the key of the sample that a member belongs to, "" for a name without a dot in its last part."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    # A dot at the beginning of the last part is that of a hidden file, and ends no key.
    return name[:dot] if dot > slash else ""


def stem_of(name: str) -> str:
    """Return a name without its extension."""
    return name[: name.rfind(".")]


@dataclass
class _Part:
    """The members of a run between two occurrences of the same name."""

    images: list[TarMember] = field(default_factory=list[TarMember])
    classes: list[ClassFile] = field(default_factory=list[ClassFile])


class Samples:
    """A collector of the images and class files of a tar, sample by sample.

    `images` and `labels` hold the samples that are complete. They are final after `close`.
    """

    def __init__(self, path_or_url: str, member: str = "") -> None:
        """Start with no samples.

        Args:
            path_or_url: location of the tar, for messages.
            member: extensions of the photo, best first (`jpg;png`); "" for all images.
        """
        self.images: list[TarMember] = []
        self.labels: list[int | str | None] = []
        self.notes = SampleNotes()
        self._path_or_url = path_or_url
        self._extensions = member_extensions(member)
        self._key = ""
        self._names = set[str]()
        self._parts = [_Part()]
        self._suffixes = Counter[str]()
        self._suffix_example: dict[str, str] = {}

    def add_image(self, member: TarMember) -> None:
        """Add the next member of the tar, an image."""
        self._part_for(member.name).images.append(member)

    def add_class(self, name: str, label: int | str | None) -> None:
        """Add the next member of the tar, a class file."""
        self._part_for(name).classes.append(ClassFile(name, stem_of(name), label))

    def end_run(self, name: str) -> None:
        """Pass the next member of the tar that is neither image nor class: it ends the run if it has another key."""
        key = sample_key(name)
        # A name without a key (a file without a dot) belongs to no sample and ends none.
        if key and key != self._key:
            self._flush(key)

    def close(self) -> None:
        """End the last sample.

        Raises:
            SourceError: an image has two classes. Every method that ends a sample raises it.
        """
        self._flush("")
        # No photo lies directly above another one, but suffixes repeat from sample to sample: x.image.jpg, x.mask.png.
        repeated = {suffix: count for suffix, count in self._suffixes.items() if count > 1}
        if repeated and not self.notes.companions:
            example_suffix = max(repeated)
            self.notes.companions, self.notes.companion = sum(repeated.values()), self._suffix_example[example_suffix]

    def _part_for(self, name: str) -> _Part:
        """Return the part of the run for the next member. A repeated name begins a sample of its own."""
        key = sample_key(name) or stem_of(name)
        if key != self._key:
            self._flush(key)
        elif name in self._names:
            # Appended tars repeat names: each copy is a sample of its own.
            self._names.clear()
            self._parts.append(_Part())
        self._names.add(name)
        return self._parts[-1]

    def _flush(self, key: str) -> None:
        """End the run, and begin one with this key."""
        parts, self._parts = self._parts, [_Part()]
        for part in _with_images(parts) if len(parts) > 1 else parts:
            if part.images or part.classes:
                self._add_part(part)
        self._key = key
        self._names.clear()

    def _add_part(self, part: _Part) -> None:
        """Append the images of a complete part with their labels."""
        images = part.images
        if self._extensions:
            images = chosen_images(images, self._extensions)
            # By identity: two members may have the same name.
            chosen = set(map(id, images))
            self.notes.left_out += [image.name for image in part.images if id(image) not in chosen]
        elif len(images) > 1:
            self._count_companions(images)
        self.images += images
        if not part.classes:
            self.labels += [None] * len(images)
            return
        # The common case, one photo and its class, without the general matching.
        if len(images) == len(part.classes) == 1 and stem_of(images[0].name) == part.classes[0].stem:
            self.labels.append(part.classes[0].label)
            return
        classes, orphans = classes_of([image.name for image in images], part.classes, self._path_or_url)
        self.labels += [None if class_file is None else class_file.label for class_file in classes]
        self.notes.orphans += orphans

    def _count_companions(self, images: Sequence[TarMember]) -> None:
        """Count the images of one part that accompany a photo."""
        stems = {stem_of(image.name) for image in images}
        names = list(dict.fromkeys(image.name for image in images))
        counted_stems = set[str]()
        for name in names:
            stem = stem_of(name)
            if stem in counted_stems or any(prefix in stems for prefix in _shorter_stems(stem)):
                self.notes.companions += 1
                self.notes.companion = self.notes.companion or name
            counted_stems.add(stem)
        for name in names if len(stems) > 1 else ():
            # x.image.jpg and x.mask.png: a suffix that occurs in several samples is a member, not a part of a name.
            suffix = name[len(sample_key(name)) :]
            self._suffixes[suffix] += 1
            self._suffix_example[suffix] = name


def member_extensions(member: str) -> list[str]:
    """Return the extensions that `--member` names, with their dot: "jpg;png" -> [".jpg", ".png"]."""
    names = (extension.strip().lstrip(".").lower() for extension in member.split(";"))
    return [f".{name}" for name in names if name]


def chosen_images(images: Sequence[TarMember], extensions: Sequence[str]) -> list[TarMember]:
    """Return the photos of a run: for each key the image with the best extension directly behind the key.

    In `x.jpg`, `x.seg.png` the extension `.png` chooses nothing: the key of the second is `x`, which `.seg.png` follows.

    Args:
        images: the images of one run.
        extensions: extensions of photos with their dot, best first.
    """
    stems = {stem_of(image.name) for image in images}
    best: dict[str, tuple[int, TarMember]] = {}
    for image in images:
        name = image.name.lower()
        for rank, extension in enumerate(extensions):
            key = image.name[: -len(extension)]
            if name.endswith(extension) and not any(prefix in stems for prefix in _shorter_stems(key)):
                if key not in best or rank < best[key][0]:
                    best[key] = (rank, image)
                break
    return [image for _, image in best.values()]


def classes_of(
    images: Sequence[str], classes: Sequence[ClassFile], path_or_url: str
) -> tuple[list[ClassFile | None], list[ClassFile]]:
    """Match the images of a run with its class files.

    A class file belongs to the images with which its stem has most in common: `KEY.cls` to `KEY.jpg` and, if there is no other,
    to `KEY.x.jpg`. `KEY.x.cls` is the class of `KEY.jpg` only where there is no `KEY.cls`. `KEY.label.cls` is also that of
    `KEY.image.jpg`, but `KEY.1.cls` is not that of `KEY.2.jpg`: digits behind a dot are part of a name.

    Args:
        images: names of the images.
        classes: class files of the run.
        path_or_url: location of the tar, for messages.

    Returns:
        The class file of each image, and the class files that belong to none.

    Raises:
        SourceError: an image has two different classes.
    """
    by_stem: dict[str, list[ClassFile]] = {}
    for class_file in classes:
        by_stem.setdefault(class_file.stem, []).append(class_file)
    candidates: list[list[ClassFile]] = []
    images_of: dict[str, list[int]] = {}  # stem -> images
    images_below: dict[str, list[int]] = {}  # stem, or a beginning of it -> images
    # First from the images: the class file with the longest stem that begins the image's stem.
    for number, name in enumerate(images):
        stem = stem_of(name)
        beginnings = (stem, *_shorter_stems(stem))
        candidates.append(next((by_stem[beginning] for beginning in beginnings if beginning in by_stem), []))
        images_of.setdefault(stem, []).append(number)
        for beginning in beginnings:
            images_below.setdefault(beginning, []).append(number)
    is_matched = [bool(class_files) for class_files in candidates]
    orphans: list[ClassFile] = []
    # Then from the class files that begin no image's stem: they go to the nearest images that have no class yet.
    for class_file in classes:
        stem = class_file.stem
        if stem in images_below:
            continue
        shared = next((beginning for beginning in _shorter_stems(stem) if beginning in images_below), "")
        nearest = images_of.get(shared, [])
        if not nearest and shared and not any(map(str.isdigit, stem[len(shared) :])):
            nearest = images_below[shared]
        for number in nearest:
            if not is_matched[number]:
                candidates[number] = [*candidates[number], class_file]
        if not nearest:
            orphans.append(class_file)
    matches = [
        _unambiguous_class(name, class_files, path_or_url) for name, class_files in zip(images, candidates, strict=True)
    ]
    return matches, orphans


def _unambiguous_class(image: str, classes: Sequence[ClassFile], path_or_url: str) -> ClassFile | None:
    """Return the class file of an image; None if it has none.

    Raises:
        SourceError: the class files of the image hold different classes.
    """
    labelled = [class_file for class_file in classes if class_file.label is not None]
    for class_file in labelled[1:]:
        if class_file.label != labelled[0].label:
            raise SourceError(
                f"{path_or_url}: {image} has two classes, {labelled[0].label} in {labelled[0].name} and {class_file.label} in "
                f"{class_file.name}: keep one of them, or name the field of a .json member that holds the class, as in "
                "'train.tar#,label'"
            )
    return labelled[0] if labelled else None


def _with_images(parts: Sequence[_Part]) -> Iterator[_Part]:
    """Yield the parts of a run that hold images. Parts of class files alone are merged into the part before or behind them."""
    waiting: list[ClassFile] = []  # class files in front of the first image
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


def _shorter_stems(stem: str) -> Iterator[str]:
    """Yield a stem without its last dotted part, without its last two, and so on down to the key."""
    name_start = stem.rfind("/") + 1
    while (dot := stem.rfind(".")) > name_start:
        stem = stem[:dot]
        yield stem
