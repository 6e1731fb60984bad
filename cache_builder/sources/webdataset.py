"""A WebDataset tar: consecutive files that share a name up to the first dot of its last part are one sample (img.jpg, img.cls).

The tar is read once, headers only; images are then read by offset, in any order. At a URL a header is a request for a
range: what lies between them is not read, unless it is shorter than what a request brings.
"""

import json
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.columns import SkippedFiles, SourceImages, counted, unique_names
from cache_builder.sources.folder import has_image_name
from cache_builder.sources.labels import parse_label, parse_labels
from cache_builder.sources.open_file import open_source
from cache_builder.sources.samples import Samples, stem_of
from cache_builder.sources.tar_members import PassedOver, TarMember, read_member, tar_members
from radio_cache.errors import ImageError, SourceError
from radio_cache.images.remote import OnListed

_MAX_CLS_BYTES = 64
_MAX_JSON_BYTES = 1 << 24


def list_tar(place: str, tell: OnListed = lambda _: None, *, member: str = "", class_field: str = "") -> SourceImages:
    """The images of a tar at a path or a URL, in tar order, with the classes of their `.cls` files.

    A name that comes again is kept apart as `name#2`: unpacking would silently lose the earlier one. Hidden members are
    passed over as in a folder, and members whose path leads out of the tar, as only an attacker's does.

    Args:
        tell: told of each image, for at a URL every header may be a request.
        member: which member of a sample is the photo, in webdataset's syntax (`jpg;png`); all images if empty.
        class_field: of the `.json` members, holds the class; a field within another behind a point. `.cls` counts if empty.

    Raises:
        SourceError: the tar is compressed, damaged, ends before its end-of-archive mark, or goes on behind it; a class is
            none; an image has two; no `.json` member has the field.
    """
    samples = Samples(place, member)
    passed, others = PassedOver(), SkippedFiles()
    class_ending = ".json" if class_field else ".cls"
    fields: set[str] = set()
    read_any = found_any = False
    with open_source(place) as file:
        for one in tar_members(place, file, passed):
            if has_image_name(one.name):
                samples.add_image(one)
                tell(1)
            elif one.name[-len(class_ending) :].lower() == class_ending:
                read_any = True
                if class_field:
                    label, there = _json_label(file, one, place, class_field, fields)
                    found_any |= there
                else:
                    label = _cls_label(file, one, place)
                samples.add_class(one.name, label)
            else:
                samples.end_run(one.name)
                others.add(one.name)
        samples.close()
    if class_field and samples.images and not found_any:
        known = f"; their fields are {', '.join(sorted(fields)[:20])}" if fields else ""
        what = f"no .json member has a field {class_field}{known}" if read_any else "there is no .json member"
        raise SourceError(f"{place}: {what}: name the one that holds the class, as in '{place}#,FIELD'")
    images, labels = samples.images, samples.labels
    apart = _labels_from_afar(samples)
    notes = _notes(samples, passed, others, member)
    if not (images or notes or apart):
        notes = ["there is no file in the tar: fetch it again, or leave it out"]
    numbers, names = parse_labels(labels)
    members, repeated = unique_names([one.name for one in images])
    return SourceImages(
        members=members,
        labels=numbers,
        class_names=names,
        offset=np.array([one.offset for one in images], np.int64),
        length=np.array([one.length for one in images], np.int64),
        notes=(*notes, *apart, *_folder_note(images, numbers), *repeated),
    )


def _labels_from_afar(samples: Samples) -> list[str]:
    """Give class files that lie apart from their image to it where both names occur only once: `tar` of a folder does not sort.

    Returns notes.
    """
    orphans = samples.notes.orphans
    classes: dict[str, list[int | str | None]] = {}
    for one in orphans:
        classes.setdefault(one.stem, []).append(one.label)
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(samples.images if orphans else ()):
        if (stem := stem_of(image.name)) in classes:
            rows.setdefault(stem, []).append(row)
    matched = {
        stem: rows[stem][0]
        for stem, labels in classes.items()
        if len(labels) == len(rows.get(stem, ())) == 1 and samples.labels[rows[stem][0]] is None
    }
    for stem, row in matched.items():
        samples.labels[row] = classes[stem][0]
    left = [one.name for one in orphans if one.stem not in matched]
    notes: list[str] = []
    if matched:
        image = samples.images[next(iter(matched.values()))].name
        notes.append(
            f"{counted(len(matched), 'class file')} not beside the image in the tar, such as that of {image}, found by name "
            "(webdataset does not: tar --sort=name)"
        )
    if left:
        notes.append(f"{counted(len(left), 'class file')} passed over, with no image to belong to ({left[0]})")
    return notes


def _notes(samples: Samples, passed: PassedOver, others: SkippedFiles, member: str) -> list[str]:
    """What a user should hear of what the tar holds besides the images."""
    notes = samples.notes
    sentences = (
        [f"{counted(len(notes.left_out), 'image')} left out, not the member {member} of a sample ({notes.left_out[0]})"]
        if notes.left_out
        else []
    )
    if notes.companions:
        sentences.append(
            f"{counted(notes.companions, 'image')} beside another one of the same sample, such as {notes.companion}: cached as "
            "photos of their own; --member says which member is the photo, as in --member 'jpg;png'"
        )
    if others.count:
        sentences.append(others.note)
    for names, kind, why in (
        (passed.outside, "file", ", whose path leads out of the tar"),
        (passed.symbolic_links, "symbolic link", ""),
        (passed.broken_links, "hard link", ", whose file is not before it in the tar"),
        (passed.special, "image name", ", not a file"),
    ):
        if names:
            sentences.append(f"{counted(len(names), kind)} passed over{why} ({names[0]})")
    return sentences


def _folder_note(images: Sequence[TarMember], labels: NDArray[np.int32]) -> list[str]:
    """Folders in a tar are no classes, as webdataset has it; who expects them is told."""
    if (labels >= 0).any():
        return []
    folders = sorted({image.name.removeprefix("./").rpartition("/")[0] for image in images})
    if len(folders) < 2:
        return []
    return [
        f"no classes: the {len(folders)} folders within the tar ({folders[-1]} ...) are none; unpack it and name the folder, or "
        "give each image a .cls file"
    ]


def _cls_label(file: BinaryIO, member: TarMember, place: str) -> int | None:
    text = _content(file, member, place, _MAX_CLS_BYTES).decode(errors="replace").strip()
    try:
        label = parse_label(text)
    except ValueError:
        label = text
    if isinstance(label, str):
        raise SourceError(
            f"{place}: {member.name} holds '{text:.40}', and a .cls file holds one whole number, the class; nothing, nan or a "
            "negative number for none"
        )
    return label


def _json_label(
    file: BinaryIO, member: TarMember, place: str, field: str, fields: set[str]
) -> tuple[int | str | None, bool]:
    """The class that a .json member holds, and whether it has the field at all. fields: takes the names of those it has."""
    try:
        document: Any = json.loads(_content(file, member, place, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{place}: {member.name} is no JSON ({exc!s:.100}): the class is read from it") from exc
    if not isinstance(document, dict):
        raise SourceError(f"{place}: {member.name} holds no fields, and the class is read from its field {field}")
    fields.update(cast(dict[str, Any], document))
    value: Any = document
    for name in [field] if field in document else field.split("."):
        if not isinstance(value, dict) or name not in value:
            return None, False
        value = cast(dict[str, Any], value)[name]
    try:
        return parse_label(value), True
    except ValueError as exc:
        raise SourceError(
            f"{place}: field {field} of {member.name} holds {exc}: a class is a whole number or a name"
        ) from exc


def _content(file: BinaryIO, member: TarMember, place: str, most: int) -> bytes:
    if member.length > most:
        raise SourceError(f"{place}: {member.name} has {member.length} bytes, and what says a class has at most {most}")
    try:
        return read_member(file, member)
    except ImageError as exc:
        raise SourceError(f"{place}: {member.name} {exc}") from exc
