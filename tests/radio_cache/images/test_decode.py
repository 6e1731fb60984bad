"""Every kind of image file people have: decoded as their own tools show it, or refused in a sentence that says why."""

import ast
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, features

import radio_cache
from radio_cache.errors import ImageError
from radio_cache.images.decode import as_array, decode_image


def file_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_with_header(width: int, height: int) -> bytes:
    """A few dozen bytes of PNG that claim to be a large image."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def gradient(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    w, h = size
    down, across = np.mgrid[0:h, 0:w]
    pixels = np.stack([across * 255 // w, down * 255 // h, (across + down) % 256], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


# ---------------------------------------------------------------- formats that give a picture


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_files_keep_every_pixel(kind: str) -> None:
    np.testing.assert_array_equal(as_array(decode_image(file_bytes(gradient(), kind))), as_array(gradient()))


def test_cmyk_jpeg_has_the_colours_it_was_made_from() -> None:
    flat = Image.new("RGB", (32, 32), (200, 60, 30))
    decoded = decode_image(file_bytes(flat.convert("CMYK"), "JPEG", quality=95))
    assert decoded.mode == "RGB"
    np.testing.assert_allclose(as_array(decoded).mean(axis=(0, 1)), [200, 60, 30], atol=6)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255, 128])], ids=["one index", "alpha per index"])
def test_palette_with_transparency_keeps_its_colours(transparency: int | bytes) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    image.putdata([0, 1, 2, 1, 1, 0, 2, 0])
    expected = as_array(image.convert("RGB"))
    np.testing.assert_array_equal(as_array(decode_image(file_bytes(image, "PNG", transparency=transparency))), expected)


def test_transparent_pixels_keep_their_own_colour() -> None:
    image = Image.new("RGBA", (3, 3), (90, 120, 150, 0))
    np.testing.assert_array_equal(as_array(decode_image(file_bytes(image, "PNG")))[0, 0], [90, 120, 150])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits_and_not_clipped_to_white(kind: str) -> None:
    values = np.array([[0, 255, 256, 1000], [20000, 32768, 65279, 65535]], dtype=np.uint16)
    decoded = as_array(decode_image(file_bytes(Image.fromarray(values), kind)))
    np.testing.assert_array_equal(decoded, np.repeat((values // 256)[..., None], 3, axis=2))


def test_16_bit_rgb_png_keeps_the_high_byte() -> None:
    raw = np.array([[[0x1234, 0x8000, 0xFFFF], [0x00FF, 0x0100, 0xABCD]]], dtype=">u2")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + raw.tobytes()))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(as_array(decode_image(data)), (raw >> 8).astype(np.uint8))


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bit_rgb_tiff_keeps_the_high_byte(byteorder: str) -> None:
    raw = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, raw, photometric="rgb", byteorder=byteorder)
    np.testing.assert_array_equal(as_array(decode_image(file.getvalue())), (raw >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(orientation: int) -> None:
    upright = gradient(size=(6, 4))
    # How a camera held that way would have stored the upright scene: the inverse of what a viewer does.
    turn = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(file_bytes(turn(upright), "PNG", exif=exif.tobytes()))
    assert (decoded.height, decoded.width) == (4, 6)
    np.testing.assert_array_equal(as_array(decoded), as_array(upright))


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_and_black_and_white_images_become_rgb(mode: str) -> None:
    image = gradient(mode)
    decoded = decode_image(file_bytes(image, "PNG"))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(as_array(decoded)[..., 1], as_array(image.convert("L")))


def test_one_pixel_is_an_image() -> None:
    assert as_array(decode_image(file_bytes(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"))).tolist() == [[[1, 2, 3]]]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    decoded = decode_image(file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert as_array(decoded)[0, 0].tolist() == [255, 0, 0]


# ---------------------------------------------------------------- files that do not


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"these are words, not pixels", "not an image in a format PIL knows"),
        (b"<html><body>404 Not Found</body></html>", "not an image in a format PIL knows"),
        (file_bytes(gradient(size=(200, 200)), "JPEG")[:1500], "cannot be decoded: .*truncated"),
        (file_bytes(gradient(), "PNG")[:100], "cannot be decoded: .*"),
        (file_bytes(gradient(), "PNG")[:20], "broken header|not an image"),
        (png_with_header(30, 20), "cannot be decoded: .*"),
        (file_bytes(Image.new("F", (4, 4)), "TIFF"), "32-bit float pixels have no agreed range; convert the file"),
        (file_bytes(Image.new("I", (4, 4), 70000), "TIFF"), "32-bit integer pixels beyond 0 to 65535"),
    ],
    ids=["empty", "text", "html", "cut JPEG", "cut PNG", "cut header", "no pixel data", "float TIFF", "32-bit TIFF"],
)
def test_a_file_without_a_picture_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", np.linspace(0, 0.98, 25).tolist())
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_file_cut_anywhere_is_refused_and_never_half_decoded(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    data = file_bytes(noise, kind)
    with pytest.raises(ImageError):
        decode_image(data[: int(share * len(data))])


@pytest.mark.parametrize("warning_filter", ["default", "error"])
@pytest.mark.parametrize("side", [9_500, 20_000, 100_000])
def test_a_small_file_with_a_huge_size_is_refused_before_it_is_decoded(side: int, warning_filter: str) -> None:
    with warnings.catch_warnings(record=warning_filter == "default"):
        warnings.simplefilter(warning_filter)
        with pytest.raises(ImageError, match=r"pixels.*raise --max-pixels if you trust it"):
            decode_image(png_with_header(side, side))


def test_the_limit_on_pixels_can_be_lowered_and_is_named() -> None:
    data = file_bytes(gradient(size=(40, 30)), "PNG")
    decode_image(data, max_pixels=1200)
    with pytest.raises(ImageError, match="40 x 30 pixels is more than the limit of 1199; raise --max-pixels"):
        decode_image(data, max_pixels=1199)


@pytest.mark.parametrize("pils_limit", [1000, 100], ids=["PIL warns", "PIL refuses"])
def test_a_raised_limit_counts_more_than_pils_own(pils_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pils_limit)
    assert decode_image(file_bytes(gradient(size=(40, 30)), "PNG"), max_pixels=1200).size == (40, 30)


def planar_tiff(bits: int, compression: str | None) -> tuple[bytes, NDArray[np.uint8]]:
    """A TIFF whose three colours lie in planes one after the other, and its pixels in 8 bits."""
    values = np.linspace(0, 2**bits - 1, 20 * 30 * 3).reshape(20, 30, 3).astype(f"uint{bits}")
    file = io.BytesIO()
    tifffile.imwrite(
        file, np.moveaxis(values, 2, 0).copy(), photometric="rgb", planarconfig="separate", compression=compression
    )
    return file.getvalue(), (values >> (bits - 8)).astype(np.uint8)


@pytest.mark.parametrize(("bits", "compression"), [(8, None), (8, "zlib"), (16, "zlib")])
def test_planes_are_joined_where_pil_can(bits: int, compression: str | None) -> None:
    data, expected = planar_tiff(bits, compression)
    assert np.array_equal(as_array(decode_image(data)), expected)


def test_raw_planes_of_16_bits_are_refused_instead_of_decoded_to_noise() -> None:
    with pytest.raises(
        ImageError, match="a TIFF with separate planes of 16 bits, which PIL decodes wrongly; save it inter"
    ):
        decode_image(planar_tiff(16, None)[0])


# ---------------------------------------------------------------- TIFFs of other depths


def tiff(
    values: NDArray[np.integer], *, bits: int, photometric: int = 1, sample_format: int = 1, data: bytes = b""
) -> bytes:
    """An uncompressed grey TIFF of one strip, little-endian. data: the pixels as they are stored, if the array is not."""
    height, width = values.shape
    data = data or values.astype(f"<{'i' if sample_format == 2 else 'u'}{bits // 8}").tobytes()
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    padded = data + bytes(len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + bytes(4)


GREYS = np.array([[0, 256, 1000, 4095], [20000, 32768, 65279, 65535]])


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_tiff_whose_zero_is_white_is_no_negative(compression: str | None, dtype: type) -> None:
    values = (GREYS // 256 if dtype is np.uint8 else GREYS).astype(dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="miniswhite", compression=compression)
    expected = 255 - GREYS // 256
    np.testing.assert_array_equal(as_array(decode_image(file.getvalue()))[..., 0], expected)


def test_12_bits_are_scaled_to_8() -> None:
    packed = bytes(b for x, y in ((0, 255), (2048, 4095)) for b in (x >> 4, (x & 15) << 4 | y >> 8, y & 255))
    decoded = as_array(decode_image(tiff(np.zeros((1, 4), np.uint16), bits=12, data=packed)))
    assert decoded[0, :, 0].tolist() == [0, 15, 128, 255]


@pytest.mark.parametrize(
    ("bits", "sample_format", "values", "reason"),
    [
        (32, 1, [[0, 255]], "32-bit integer pixels have no agreed range"),
        (32, 2, [[0, 65535]], "32-bit integer pixels have no agreed range"),
        (32, 2, [[-1, 255]], "32-bit integer pixels beyond 0 to 65535 have no agreed range"),
        (16, 2, [[0, 32767]], "signed 16-bit pixels have no agreed range"),
    ],
)
def test_integers_without_an_agreed_range_are_refused_and_not_black(
    bits: int, sample_format: int, values: list[list[int]], reason: str
) -> None:
    with pytest.raises(ImageError, match=f"{reason}; convert to 8 or 16 bits"):
        decode_image(tiff(np.array(values), bits=bits, sample_format=sample_format))


# ---------------------------------------------------------------- what is opened, and odd metadata


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"),
        ("ICO", file_bytes(gradient(), "ICO")),
        ("PCX", file_bytes(gradient(), "PCX")),
        ("JPEG2000", file_bytes(gradient(), "JPEG2000")),
        ("HEIF", b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(100)),
    ],
)
def test_formats_that_are_not_documented_are_not_opened(name: str, data: bytes) -> None:
    with pytest.raises(
        ImageError, match=f"an image in the format {name}, which is not opened; convert it to one of JPEG, PNG,"
    ):
        decode_image(data)


def test_every_image_is_opened_by_the_one_function_that_names_the_formats() -> None:
    root = Path(radio_cache.__file__).parents[1]
    files = [
        file for name in ("radio_cache", "cache_builder", "trainer", "evals") for file in (root / name).rglob("*.py")
    ]
    calls = [
        (file.relative_to(root).as_posix(), ast.unparse(node))
        for file in files
        if "Image.open" in (text := file.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")
    ]
    assert calls == [("radio_cache/images/decode.py", "Image.open(file, formats=FORMATS)")]


def test_avif_and_the_several_pictures_of_a_camera_are_decoded() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    decoded = decode_image(file_bytes(gradient(size=(64, 48)), "AVIF", quality=95))
    assert np.abs(as_array(decoded).astype(int) - as_array(gradient(size=(64, 48)))).mean() < 4
    several = file_bytes(gradient(), "MPO", save_all=True, append_images=[gradient().rotate(180)])
    assert decode_image(several).size == (40, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_odd_tag_beside_the_orientation_does_not_refuse_a_photo(kind: str) -> None:
    # ImageWidth as text, which is a number by the standard; then the orientation.
    entries = struct.pack("<HHI4s", 256, 2, 4, b"abc\0") + struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + entries + bytes(4)
    decoded = decode_image(file_bytes(gradient(), kind, exif=exif))
    assert decoded.size == (30, 40)
    plain = as_array(decode_image(file_bytes(gradient(), kind)))
    np.testing.assert_array_equal(as_array(decoded), np.rot90(plain, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_data_that_cannot_be_read_leave_the_photo_as_it_is() -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        data = file_bytes(gradient(), "JPEG")
        block = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        np.testing.assert_array_equal(as_array(decode_image(data[:2] + block + data[2:])), as_array(decode_image(data)))


@pytest.mark.parametrize("data", [b"x", b"ab", b"abc\0", b"\0" * 7, b"not an image"])
def test_a_file_of_a_few_bytes_is_no_image(data: bytes) -> None:
    with pytest.raises(ImageError, match="not an image in a format PIL knows"):
        decode_image(data)
