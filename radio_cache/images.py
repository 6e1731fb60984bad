"""From file bytes to an upright RGB image, or to one sentence that says why not."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from radio_cache.errors import ImageError
from radio_cache.extra_views import View

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Lower-case file name endings that count as images when a folder or tar is listed."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded; PIL's own limit against decompression bombs (a quarter GiB)."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, least_px: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, turned upright by its EXIF orientation.

    least_px: a JPEG may come at a half, a quarter or an eighth of its size, as long as both sides keep so many pixels,
    which takes less time; the colours of a few pixels become one, as in a box filter.
    Grey, palette, CMYK and transparent images become RGB as `Image.convert("RGB")` does, which is what the teachers'
    own pipelines do. 16-bit grey is scaled to 8 bits (PIL alone would clip it to white). An animation gives its first
    frame. Raises ImageError with the reason: empty, not an image, truncated, too many pixels, or float pixels.
    """
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        # PIL's own limit holds for the whole process and knows nothing of ours: it must never be the lower one.
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as exc:
        raise ImageError("not an image in a format PIL knows") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageError(f"decompression bomb: {str(exc).rstrip('.')}; raise --max-pixels if you trust it") from exc
    except Exception as exc:  # PIL's parsers raise anything from SyntaxError to struct.error on hostile headers
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
            image.draft(None, (least_px, least_px))  # pyright: ignore[reportArgumentType]  # None keeps the mode
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except ImageError:
        raise
    except Exception as exc:  # as above: truncated data surfaces as OSError, SyntaxError, ValueError, struct.error ...
        raise ImageError(f"cannot be decoded: {exc}") from exc


def _refuse_misread_tiff(image: Image.Image) -> None:
    """PIL reads uncompressed planes of 16 bits as if they had 8, and returns noise without a word."""
    if isinstance(image, TiffImageFile):
        tags: dict[int, Any] = dict(image.tag_v2)
        planar, raw = tags.get(284) == 2, tags.get(259, 1) == 1
        bits: tuple[int, ...] = tags.get(258, (1,))
        if planar and raw and len(bits) > 1 and max(bits) > 8:
            raise ImageError(
                f"a TIFF with separate planes of {max(bits)} bits, which PIL decodes wrongly; save it interleaved, or with 8 bits"
            )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ImageError("32-bit float pixels have no agreed range; convert the file to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("32-bit integer pixels beyond 0 to 65535 have no agreed range; convert to 8 or 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # The same RGB as a direct conversion, without PIL's warning about transparency given as bytes.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def cut_view(image: Image.Image, view: View) -> Image.Image:
    """The image that a view shows."""
    cut = image if view.box_xyxy == (0, 0, image.width, image.height) else image.crop(view.box_xyxy)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else cut


def as_array(image: Image.Image) -> NDArray[np.uint8]:
    """(h, w, 3) uint8."""
    return np.asarray(image, dtype=np.uint8)
