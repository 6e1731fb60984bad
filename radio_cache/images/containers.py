"""The files that a cache's images came from: where each lies, and its bytes, whichever kind of container holds it."""

from radio_cache.errors import ImageError, UnsupportedFormatError
from radio_cache.format.schema import Container
from radio_cache.images.files import read_path_or_url, resolve_list_entry
from radio_cache.images.sparse_members import expanded


def read_image(container: Container, key: str, offset: int, length: int) -> bytes:
    """Return the bytes of one image, from its row of the image index.

    Raises ImageError with the reason if they cannot be had, StorageError if a bucket or a server does not answer,
    UnsupportedFormatError for a kind of container that only a newer radio-cache knows.
    """
    member = key.removeprefix(container.prefix)
    match container.kind:
        # Keys come from an index that may be hostile: `_inside` keeps them below the folder.
        case "folder":
            return read_path_or_url(f"{container.path.rstrip('/')}/{_inside(member)}")
        case "list":
            return read_path_or_url(resolve_list_entry(container.path, member))
        case "tar":
            if length < -1:  # a sparse member: its length is stored negated (images/sparse_members.py)
                return expanded(read_path_or_url(container.path, offset, -length))
            return read_path_or_url(container.path, offset, length)
        case "parquet":
            from radio_cache.images.parquet import read_row

            return read_row(container.path, container.column, offset)
        # A newer radio-cache may know more kinds. Such a cache opens; only its original files cannot be read.
        case _:
            raise UnsupportedFormatError(
                f"image {key} lies in a container of kind '{container.kind}' ({container.path}), which this radio-cache "
                "does not know: install a newer one"
            )


def _inside(member: str) -> str:
    """Return a path below a folder, itself."""
    if member.startswith("/") or ".." in member.split("/"):
        raise ImageError(f"cannot be read: {member!r:.80} is no path below a folder")
    return member
