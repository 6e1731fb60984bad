"""Every error that radio-cache raises on purpose.

RadioCacheError
├── ImageError                an image is unusable, as its own bytes show; the build records it and continues
│   └── UnreadableImageError  an image cannot be read now (missing, refused); its bytes are unknown
├── SourceError               a source of images is wrong as a whole
├── StoreError                the cache on disk is not as expected
│   ├── NotACacheError        the path exists, but is not a radio-cache store
│   ├── StaleCacheError       the cache was made with other weights, geometry, codec or images
│   ├── UnsupportedFormatError  the cache was written by a newer radio-cache
│   ├── CorruptShardError     stored bytes do not match their checksum
│   ├── MissingRowsError      requested rows have no receipt
│   ├── LimitError            the cache declares implausible sizes: damaged, or hostile
│   └── StorageError          a disk, a bucket or a server refuses: full, read-only, unreachable, wrong credentials
├── TeacherError              a teacher is unavailable or cannot run
│   ├── UnknownTeacherError   no teacher of that name
│   └── TeacherWeightsError   the weights are missing, or do not fit the teacher
├── ClusterError              the workers of a cluster cannot work, or there are none
│   └── BlindWorkerError      one worker cannot read the images; another may
├── CodecError                values cannot be stored within the codec's error bound
│   └── UnstorableFeaturesError  of one image: NaN, infinite, or too large for the codec
├── ConfigError               a setting has an impossible value, or an unknown name
├── HadamardError             no Hadamard matrix of that order exists or is known here
├── MomentsError              a sample of tokens has no variance to normalise by, or is not finite
├── ShapeError                two arrays that must agree do not
└── TrainingError             a training run cannot continue
    └── NonFiniteLossError    a loss, or the weights behind it, became NaN or infinite

A message names the thing, the value, the place and the cure.
"""

import difflib
import re
from collections.abc import Iterable


class RadioCacheError(Exception):
    """Base of all errors above. The commands print it as one message, without a traceback."""


class ImageError(RadioCacheError):
    """One image cannot be used. `str(error)` is the reason alone; the caller knows which image it was.

    Raise it for what the bytes of the image show (no image, too large, broken), and for a path or an address that no file can
    have. A build records it as the image's own fault and does not look again.
    """


class UnreadableImageError(ImageError):
    """One image cannot be read now: the file is gone, or access is refused (404, 410, 401, 403, EACCES, EIO ...).

    Nothing is known of its bytes, so a build never condemns the image for it. What is wrong for every image at once (no
    memory, no descriptor, a server that is unreachable, 429 or 5xx after all tries) is a StorageError instead.
    """


class SourceError(RadioCacheError):
    """The image source as a whole is wrong: missing, empty, or not a folder or tar."""


class StoreError(RadioCacheError):
    """The cache on disk is not what was expected."""


class NotACacheError(StoreError):
    """Something is at that path, but it is not a radio-cache store."""


class StaleCacheError(StoreError):
    """The cache holds something else than requested."""


class UnsupportedFormatError(StoreError):
    """The cache was written in a format this version does not know."""


class CorruptShardError(StoreError):
    """Stored bytes do not match their checksum."""


class MissingRowsError(StoreError):
    """Requested rows are not in the cache, or belong to unusable images."""


class LimitError(StoreError):
    """The cache declares a size beyond what any cache has; nothing was allocated for it."""


class StorageError(StoreError):
    """The disk, bucket or server of a cache or its images refuses.

    It is full, read-only or unreachable, memory or descriptors are exhausted, or credentials are wrong.
    """


class TeacherError(RadioCacheError):
    """A teacher cannot be had or run."""


class UnknownTeacherError(TeacherError):
    """No teacher has that name."""


class TeacherWeightsError(TeacherError):
    """The weights are missing, or are not in the format the teacher's family uses."""


class ClusterError(RadioCacheError):
    """The workers of a cluster cannot do their work, or there are none."""


class BlindWorkerError(ClusterError):
    """One worker does not see the images that others see: it may not judge any. Another worker can do its task.

    Args: worker: its address at the scheduler; '' where it has none.
    """

    def __init__(self, message: str, worker: str = "") -> None:
        super().__init__(message, worker)  # both, so that it survives pickling
        self.worker = worker

    def __str__(self) -> str:
        return str(self.args[0])


class CodecError(RadioCacheError):
    """Values cannot be stored without breaking the codec's promise."""


class UnstorableFeaturesError(CodecError):
    """A teacher's features of one image are not finite, or the codec cannot keep them. row: of the image in the cache."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row

    def __reduce__(self) -> tuple[type["UnstorableFeaturesError"], tuple[int, str]]:
        return (type(self), (self.row, str(self)))


class ConfigError(RadioCacheError):
    """A setting has an impossible value, or an unknown name."""


class HadamardError(RadioCacheError):
    """No Hadamard matrix of that order exists, or none is known here."""


class MomentsError(RadioCacheError):
    """A sample of tokens has no variance to normalise by, or is not finite."""


class ShapeError(RadioCacheError, ValueError):
    """Two arrays that must agree in shape do not."""


class TrainingError(RadioCacheError):
    """A training run cannot go on."""


class NonFiniteLossError(TrainingError):
    """A loss, or the weights behind it, became NaN or infinite."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, listed_by: str | None = None) -> str:
    """Return the message for an unknown name: the nearest known names, then how to list the others.

    Args:
        kind: a singular noun ("teacher").
        name: the unknown name.
        known: the known ones.
        listed_by: the command that lists all, for kinds with many names. Without one up to 50 names are listed.
    """
    names = sorted(set(known))
    near = [f"'{near_name}'" for near_name in nearest_names(name, names)]
    hint = f" Did you mean {' or '.join(part for part in (', '.join(near[:-1]), near[-1]) if part)}?" if near else ""
    if listed_by is not None and len(names) > _FEW:
        return f"no {kind} is called '{name}'.{hint} `{listed_by}` lists all {len(names)}."
    listed = ", ".join(names[:_MANY]) + (f", ... ({len(names)} in all)" if len(names) > _MANY else "")
    return f"no {kind} is called '{name}'.{hint} Known: {listed}."


_FEW, _MANY = 12, 50
"""Names that a message always holds, and those that it holds at most."""


def nearest_names(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return the known names that may have been meant, the likeliest first. Case does not matter.

    They have a similar spelling, or contain every part of the name ("dinov2-l": dinov2-vit-l-14).
    """
    typed, lower = name.lower(), {spelled.lower(): spelled for spelled in known}
    if typed in lower:
        return [lower[typed]]
    parts = [part for part in re.split(r"[^a-z0-9]+", typed) if part]
    likeness: dict[str, float] = {}
    for spelled in lower:
        spelling = difflib.SequenceMatcher(None, spelled, typed).ratio()
        # One or two letters are part of too many names.
        holds = len(typed) > 2 and all(part in spelled for part in parts)
        # 0.6 is the default of `difflib.get_close_matches`.
        if holds or spelling >= 0.6:
            likeness[spelled] = spelling + 0.3 * holds
    # Equally likely names are sorted, so that a message is always the same.
    best = sorted(likeness, key=lambda spelled: (-likeness[spelled], spelled))[:count]
    return [lower[spelled] for spelled in best]
