"""Decoding of image files to upright RGB images, or to an error of one sentence."""

import errno
import io
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from radio_cache.errors import ImageError, StorageError
from radio_cache.geometry.views import View

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""The formats that are opened, as PIL calls them; JPEG brings MPO. PIL has readers for forty more, and some of them hand the
file to other programs. Images come from untrusted places, and a file name does not determine the format. `open_image` is the
only way in."""

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
)
"""Lower-case file name endings that count as images when a folder or tar is listed."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded; PIL's own limit against decompression bombs (a quarter GiB)."""


_MAGIC_BYTES = 16
# Brands at bytes 4 to 12. PIL itself has no reader that could name this format.
_HEIF = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright."""

_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 259, 262, 284, 339
_ZERO_IS_WHITE, _SIGNED = 0, 2


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image of one of FORMATS; only its header is read. Raises as `PIL.Image.open` does.

    Takes no path: PIL maps an uncompressed TIFF at a path into memory, and scrambles it if its orientation tag is not 1.
    """
    return Image.open(file, formats=FORMATS)


def upright(image: Image.Image) -> Image.Image:
    """Load the image and return it turned by its EXIF orientation, without the metadata.

    `ImageOps.exif_transpose` writes all of the EXIF data again, and fails at any odd tag in it.
    """
    image.load()
    turn = None if _turns_itself(image) else _TURNS.get(_orientation(image))
    return image.copy() if turn is None else image.transpose(turn)


def is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF orientation turns or mirrors the image on its way to upright."""
    return _orientation(image) != 1


def upright_hw(image: Image.Image) -> tuple[int, int]:
    """Return height and width of an opened image as `upright` will have them."""
    # Orientations 5 to 8 exchange height and width.
    turned = not _turns_itself(image) and _orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _other_format(magic: bytes) -> str:
    """Return the reason why a file is not opened, from its first bytes alone: none of PIL's other readers gets to see it."""
    name = "HEIF" if magic[4:12] in _HEIF else ""
    Image.init()
    magic = magic.ljust(_MAGIC_BYTES, b"\0")  # some of PIL's checks index into the bytes without a length check
    for other, (_, accepts) in Image.OPEN.items():
        if not name and other not in FORMATS and accepts is not None and accepts(magic) is True:
            name = other
    if not name:
        return "not an image in a format PIL knows"
    return f"an image in the format {name}, which is not opened; convert it to one of {', '.join(FORMATS)}"


def _turns_itself(image: Image.Image) -> bool:
    """Return whether PIL turns an image when it loads it, as it does a TIFF, whose size is so from the beginning."""
    return isinstance(image, TiffImageFile)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 where there is none, and where the EXIF data cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # as with all of PIL's parsers: SyntaxError, struct.error ...
        return 1
    return orientation if orientation in _TURNS else 1


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, least_px: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, rotated upright by its EXIF orientation.

    Grey, palette, CMYK and transparent images become RGB as `Image.convert("RGB")` does, which the teachers'
    own pipelines use. Grey of 12 and 16 bits is scaled to 8 (PIL alone would clip it to white). An animation gives its first
    frame.

    Args:
        data: bytes of the file.
        max_pixels: largest accepted size.
        least_px: a JPEG may be decoded at a half, a quarter or an eighth of its size, if both sides keep this many pixels. This
            is faster, and averages pixels as a box filter does.

    Raises:
        ImageError: with the reason: empty, not an image, truncated, too many pixels, or pixels without an agreed range.
        MemoryError: if the system refuses memory, which reveals nothing about the image.
        StorageError: if the system refuses a file of PIL's own code.
    """
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        # PIL's own limit holds for the whole process and would refuse first, so it must never be the lower one.
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = open_image(io.BytesIO(data))
    except UnidentifiedImageError as exc:
        raise ImageError(_other_format(data[:_MAGIC_BYTES])) from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageError(f"decompression bomb: {str(exc).rstrip('.')}; raise --max-pixels if you trust it") from exc
    except MemoryError:
        raise
    except Exception as exc:  # PIL's parsers raise anything from SyntaxError to struct.error on hostile headers
        _raise_if_of_the_system(exc)
        raise ImageError(f"broken header: {exc}") from exc
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width} x {image.height} pixels is more than the limit of {max_pixels}; "
            "raise --max-pixels if you trust it"
        )
    if image.width * image.height == 0:
        raise ImageError("the image has no pixels")
    _refuse_misread_tiff(image)
    try:
        if least_px is not None:
            # Scales a JPEG by 1/2, 1/4 or 1/8 while it is decoded; other formats ignore it.
            image.draft(None, (least_px, least_px))  # pyright: ignore[reportArgumentType]  # None keeps the mode
        turned = upright(image)
        return _to_rgb(_grey_8_bits(turned, image) if turned.mode.startswith("I") else turned)
    except (ImageError, MemoryError):
        raise
    except Exception as exc:  # as above: truncated data surfaces as OSError, SyntaxError, ValueError, struct.error ...
        _raise_if_of_the_system(exc)
        raise ImageError(f"cannot be decoded: {exc}") from exc


_OF_THE_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)


def _raise_if_of_the_system(error: Exception) -> None:
    """Raise MemoryError or StorageError for errors of the system: PIL reads images from memory, but its code from files."""
    if "out of memory" in str(error).lower():  # codecs report it as an OSError without errno
        raise MemoryError(str(error)) from error
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        raise StorageError(
            f"Pillow cannot load its own files ({error}): free memory or file descriptors (`ulimit -n`), and run the same "
            "command again"
        ) from error


def _refuse_misread_tiff(image: Image.Image) -> None:
    """Refuse TIFFs with uncompressed planes of 16 bits, which PIL reads as planes of 8 bits, without an error."""
    if isinstance(image, TiffImageFile):
        tags: dict[int, Any] = dict(image.tag_v2)
        planar, raw = tags.get(_PLANES) == 2, tags.get(_COMPRESSION, 1) == 1
        bits: tuple[int, ...] = tags.get(_BITS_PER_SAMPLE, (1,))
        if planar and raw and len(bits) > 1 and max(bits) > 8:
            raise ImageError(
                f"a TIFF with separate planes of {max(bits)} bits, which PIL decodes wrongly; save it interleaved, or with 8 bits"
            )


def _grey_8_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Scale an image of integers wider than 8 bits to 8.

    Args:
        image: upright.
        opened: the file's image before it was rotated, which has the file's tags.
    """
    # (h, w), signed and wide, so that values beyond 0 to 65535 are visible below instead of wrapped around.
    values = np.asarray(image, dtype=np.int64)
    bits, inverted = 16, False
    if isinstance(opened, TiffImageFile):
        tags: dict[int, Any] = dict(opened.tag_v2)
        bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
        inverted = tags.get(_PHOTOMETRIC) == _ZERO_IS_WHITE  # PIL inverts only up to 8 bits by itself
        if bits > 16 or _SIGNED in tags.get(_SAMPLE_FORMAT, (1,)):
            kind = f"{bits}-bit integer pixels" if bits > 16 else f"signed {bits}-bit pixels"
            beyond = " beyond 0 to 65535" if values.min() < 0 or values.max() > 65535 else ""
            raise ImageError(f"{kind}{beyond} have no agreed range; convert to 8 or 16 bits")
    if inverted:
        # Zero is white: inverted in the full range, before the scaling.
        values = (1 << bits) - 1 - values
    # The highest 8 bits, so that the range of the file is that of the result.
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ImageError("32-bit float pixels have no agreed range; convert the file to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        # The same RGB as a direct conversion, without PIL's warning about transparency given as bytes.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def cut_view(image: Image.Image, view: View) -> Image.Image:
    """Return the image that a view shows."""
    cut = image if view.box_xyxy == (0, 0, image.width, image.height) else image.crop(view.box_xyxy)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else cut


def as_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return (h, w, 3) uint8."""
    return np.asarray(image, dtype=np.uint8)
