"""WebDataset tars: consecutive files that share a name up to the first dot of its last part are one sample (img.jpg, img.cls).

The tar is read once, headers only; images are then read by offset, in any order. At a URL a header is a request for a range.
The bytes between two headers are not read, unless they are shorter than the smallest request.
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
from cache_builder.sources.tar_members import SkippedMembers, TarMember, read_member, tar_members
from radio_cache.errors import ImageError, SourceError
from radio_cache.images.remote import OnListed

# Limits on the members that are read while listing: a longer one is no class, and a hostile one would fill the memory.
_MAX_CLS_BYTES = 64
_MAX_JSON_BYTES = 1 << 24


def list_tar(
    path_or_url: str, on_listed: OnListed = lambda _: None, *, member: str = "", class_field: str = ""
) -> SourceImages:
    """List the images of a tar at a path or a URL, in tar order, with the classes of their `.cls` files.

    A repeated name is stored as `name#2`: unpacking would silently lose the earlier file. Hidden members are skipped, as in a
    folder, and so are members whose path leads out of the tar, which only an attacker writes.

    Args:
        path_or_url: location of the tar.
        on_listed: called for each image, because at a URL every header may be a request.
        member: extensions of the photos, in webdataset's syntax (`jpg;png`); all images if empty.
        class_field: field of the `.json` members that holds the class; "a.b" is field b within field a. Empty: `.cls` members.

    Raises:
        SourceError: the tar is compressed, damaged, ends before its end-of-archive mark, or continues behind it; a label is no
            class; an image has two classes; no `.json` member has the field.
    """
    samples = Samples(path_or_url, member)
    skipped, others = SkippedMembers(), SkippedFiles()
    class_extension = ".json" if class_field else ".cls"
    json_fields: set[str] = set()  # names of all fields, for the error if none is `class_field`
    has_class_file = has_field = False
    with open_source(path_or_url) as file:
        for tar_member in tar_members(path_or_url, file, skipped):
            name = tar_member.name
            if has_image_name(name):
                samples.add_image(tar_member)
                on_listed(1)
            elif name[-len(class_extension) :].lower() == class_extension:
                has_class_file = True
                # The class is read at once, while the header's neighbourhood is in the buffer of a remote file.
                if class_field:
                    label, member_has_field = _json_label(file, tar_member, path_or_url, class_field, json_fields)
                    has_field |= member_has_field
                else:
                    label = _cls_label(file, tar_member, path_or_url)
                samples.add_class(name, label)
            else:
                samples.end_run(name)
                others.add(name)
        samples.close()
    # Some members without the field are images without a class; all members without it are a mistake in its name.
    if class_field and samples.images and not has_field:
        known_fields = f"; their fields are {', '.join(sorted(json_fields)[:20])}" if json_fields else ""
        problem = (
            f"no .json member has a field {class_field}{known_fields}" if has_class_file else "there is no .json member"
        )
        raise SourceError(f"{path_or_url}: {problem}: name the one that holds the class, as in '{path_or_url}#,FIELD'")
    images, labels = samples.images, samples.labels
    orphan_notes = _assign_orphans(samples)  # fills in `labels`
    notes = _notes(samples, skipped, others, member)
    if not (images or notes or orphan_notes):
        notes = ["there is no file in the tar: fetch it again, or leave it out"]
    numbers, names = parse_labels(labels)
    members, repeated = unique_names([image.name for image in images])
    return SourceImages(
        members=members,
        labels=numbers,
        class_names=names,
        offset=np.array([image.offset for image in images], np.int64),
        length=np.array([image.length for image in images], np.int64),
        notes=(*notes, *orphan_notes, *_folder_note(images, numbers), *repeated),
    )


def _assign_orphans(samples: Samples) -> list[str]:
    """Give class files that are not beside their image to the image with the same stem, and return notes on them.

    `tar` of a folder does not sort its files. Both names must occur only once in the tar.
    """
    orphans = samples.notes.orphans
    classes: dict[str, list[int | str | None]] = {}
    for class_file in orphans:
        classes.setdefault(class_file.stem, []).append(class_file.label)
    # stem -> images, only for stems of orphans: most tars have none, and need no pass over their images.
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(samples.images if orphans else ()):
        if (stem := stem_of(image.name)) in classes:
            rows.setdefault(stem, []).append(row)
    # An image that has a class already keeps it.
    matched = {
        stem: rows[stem][0]
        for stem, labels in classes.items()
        if len(labels) == len(rows.get(stem, ())) == 1 and samples.labels[rows[stem][0]] is None
    }
    for stem, row in matched.items():
        samples.labels[row] = classes[stem][0]
    unmatched = [class_file.name for class_file in orphans if class_file.stem not in matched]
    notes: list[str] = []
    if matched:
        image = samples.images[next(iter(matched.values()))].name
        notes.append(
            f"{counted(len(matched), 'class file')} not beside the image in the tar, such as that of {image}, found by name "
            "(webdataset does not: tar --sort=name)"
        )
    if unmatched:
        notes.append(f"{counted(len(unmatched), 'class file')} skipped, with no image to belong to ({unmatched[0]})")
    return notes


def _notes(samples: Samples, skipped: SkippedMembers, others: SkippedFiles, member: str) -> list[str]:
    """Return messages about the members of the tar that are not used, or that may be used by mistake."""
    notes = samples.notes
    messages = (
        [f"{counted(len(notes.left_out), 'image')} left out, not the member {member} of a sample ({notes.left_out[0]})"]
        if notes.left_out
        else []
    )
    if notes.companions:
        messages.append(
            f"{counted(notes.companions, 'image')} beside another one of the same sample, such as {notes.companion}: cached as "
            "photos of their own; select the photos with --member, as in --member 'jpg;png'"
        )
    if others.count:
        messages.append(others.note)
    for names, kind, reason in (
        (skipped.outside, "file", ", whose path leads out of the tar"),
        (skipped.symbolic_links, "symbolic link", ""),
        (skipped.broken_links, "hard link", ", whose file is not before it in the tar"),
        (skipped.special, "image name", ", not a file"),
    ):
        if names:
            messages.append(f"{counted(len(names), kind)} skipped{reason} ({names[0]})")
    return messages


def _folder_note(images: Sequence[TarMember], labels: NDArray[np.int32]) -> list[str]:
    """Return a note that folders within a tar are no classes, which users may expect. webdataset ignores them, too."""
    if (labels >= 0).any():
        return []
    # "./" is how `tar` of the current folder writes names.
    folders = sorted({image.name.removeprefix("./").rpartition("/")[0] for image in images})
    if len(folders) < 2:
        return []
    return [
        f"no classes: the {len(folders)} folders within the tar ({folders[-1]} ...) are none; unpack it and name the folder, or "
        "give each image a .cls file"
    ]


def _cls_label(file: BinaryIO, member: TarMember, path_or_url: str) -> int | None:
    """Return the class number that a .cls member holds, None for no class.

    Raises:
        SourceError: the member holds anything else.
    """
    text = _content(file, member, path_or_url, _MAX_CLS_BYTES).decode(errors="replace").strip()
    # Also a number beyond the limit is reported as it is written.
    try:
        label = parse_label(text)
    except ValueError:
        label = text
    if isinstance(label, str):
        raise SourceError(
            f"{path_or_url}: {member.name} holds '{text:.40}', and a .cls file holds one whole number, the class; nothing, nan "
            "or a negative number for none"
        )
    return label


def _json_label(
    file: BinaryIO, member: TarMember, path_or_url: str, field: str, known_fields: set[str]
) -> tuple[int | str | None, bool]:
    """Read the class of a .json member.

    Args:
        file: the open tar.
        member: the .json member.
        path_or_url: location of the tar, for messages.
        field: field with the class.
        known_fields: receives the names of the member's fields.

    Returns:
        The class, and whether the member has the field.

    Raises:
        SourceError: the member is no JSON object, or the field holds no class.
    """
    try:
        document: Any = json.loads(_content(file, member, path_or_url, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{path_or_url}: {member.name} is no JSON ({exc!s:.100}): the class is read from it") from exc
    if not isinstance(document, dict):
        raise SourceError(f"{path_or_url}: {member.name} holds no fields, and the class is read from its field {field}")
    known_fields.update(cast(dict[str, Any], document))
    value: Any = document
    # A field that is really called "a.b" has precedence over field b within field a.
    for name in [field] if field in document else field.split("."):
        if not isinstance(value, dict) or name not in value:
            return None, False
        value = cast(dict[str, Any], value)[name]
    try:
        return parse_label(value), True
    except ValueError as exc:
        raise SourceError(
            f"{path_or_url}: field {field} of {member.name} holds {exc}: a class is a whole number or a name"
        ) from exc


def _content(file: BinaryIO, member: TarMember, path_or_url: str, max_bytes: int) -> bytes:
    """Return the content of a class file.

    Raises:
        SourceError: it has more than `max_bytes`, or is damaged.
    """
    if member.length > max_bytes:
        raise SourceError(
            f"{path_or_url}: {member.name} has {member.length} bytes, and a file with a class has at most {max_bytes}"
        )
    try:
        return read_member(file, member)
    except ImageError as exc:
        raise SourceError(f"{path_or_url}: {member.name} {exc}") from exc
