"""One image file of every kind: modes, metadata, several frames, damage, bombs."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.dataset_files import data_error, random_images
from utils.images import read_image


def grey16(values):
    return Image.fromarray(np.array([values], dtype=np.uint16))


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    return image


@pytest.mark.parametrize(
    "image, format, options, expected",
    [
        (Image.fromarray(np.array([[0, 200]], np.uint8)), "PNG", {}, [[0] * 3, [200] * 3]),
        (Image.fromarray(np.array([[False, True]])), "PNG", {}, [[0] * 3, [255] * 3]),
        (Image.new("LA", (1, 1), (100, 255)), "PNG", {}, [[100] * 3]),
        (Image.new("LA", (1, 1), (100, 0)), "PNG", {}, [[255] * 3]),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 255)), "PNG", {}, [[10, 20, 30]]),
        # 0.2 v + 0.8 * 255
        (Image.new("RGBA", (1, 1), (10, 20, 30, 51)), "PNG", {}, [[206, 208, 210]]),
        (Image.new("RGB", (1, 1), (9, 9, 9)), "PNG", {"transparency": (9, 9, 9)}, [[255] * 3]),
        (palette_with_transparency(), "PNG", {}, [[10, 20, 30], [40, 50, 60]]),
        (palette_with_transparency(), "PNG", {"transparency": 1}, [[10, 20, 30], [255] * 3]),
        (palette_with_transparency(), "GIF", {}, [[10, 20, 30], [40, 50, 60]]),
        # v / 257, rounded
        (
            grey16([0, 128, 129, 25700, 65406, 65407, 65535]),
            "PNG",
            {},
            [[v] * 3 for v in (0, 0, 1, 100, 254, 255, 255)],
        ),
        (grey16([0, 25700]), "PNG", {"transparency": 25700}, [[0] * 3, [255] * 3]),
        (grey16([0, 25700]), "TIFF", {}, [[0] * 3, [100] * 3]),
        (grey16([0, 25700]), "TIFF", {"compression": "tiff_lzw"}, [[0] * 3, [100] * 3]),
        (Image.fromarray(np.array([[0, 25700]], ">u2")), "TIFF", {}, [[0] * 3, [100] * 3]),
        (grey16([0, 25700]), "TIFF", {"tiffinfo": {262: 0}}, [[255] * 3, [155] * 3]),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF", {}, [[0, 255, 255]]),
    ],
)
def test_kinds_of_images(tmp_path, image, format, options, expected):
    image.save(tmp_path / "image", format, **options)
    read = read_image(tmp_path / "image")
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read)[0], expected)


def test_cmyk_jpeg_is_close_to_its_colour(tmp_path):
    Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK").save(tmp_path / "image.jpg", quality=95)
    assert Image.open(tmp_path / "image.jpg").mode == "CMYK"
    np.testing.assert_allclose(np.asarray(read_image(tmp_path / "image.jpg"))[4, 4], (200, 100, 50), atol=4)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "image.tiff")
    data_error(lambda: read_image(tmp_path / "image.tiff"), tmp_path / "image.tiff", "save it with 8 bits")


@pytest.mark.parametrize(
    "data",
    [
        b"P5 3 1 65535\n" + struct.pack(">3H", 0, 25700, 65535),
        b"P2 3 1 65535\n0 25700 65535\n",
        b"P2 3 1 1020\n0 400 1020\n",
    ],
)
def test_grey_of_more_than_8_bits_in_netpbm(tmp_path, data):
    (tmp_path / "image.pgm").write_bytes(data)
    assert np.asarray(read_image(tmp_path / "image.pgm"))[0, :, 1].tolist() == [0, 100, 255]


def test_the_first_picture_of_several_is_read(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for name in ("a.gif", "a.webp", "a.png", "a.tiff", "a.mpo"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        np.testing.assert_allclose(np.asarray(read_image(tmp_path / name))[4, 4], (255, 0, 0), atol=1)


def exif(*entries):
    """EXIF data of (tag, type, four bytes) in the order given."""
    body = b"".join(struct.pack(">HHI", tag, kind, 1) + value for tag, kind, value in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)


ON_ITS_SIDE = (0x0112, 3, b"\0\6\0\0")  # the camera was turned: show the picture rotated by 90 degrees clockwise


@pytest.mark.parametrize(
    "metadata, turned",
    [
        (exif(ON_ITS_SIDE), True),
        (exif(ON_ITS_SIDE, (0x011A, 2, b"72\0\0")), True),
        (exif(ON_ITS_SIDE, (0x8769, 4, b"\xff" * 4), (0x8825, 4, b"\0\0\0\1")), True),
        (exif(ON_ITS_SIDE)[:-4], True),
        (exif(ON_ITS_SIDE)[:18], False),
        (exif((0x0112, 3, b"\0\x09\0\0")), False),
        (exif((0x0112, 2, b"6\0\0\0")), False),
        (b"Exif\0\0", False),
        (b"Exif\0\0nonsense", False),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore:::PIL")
def test_metadata_turns_a_picture_or_is_ignored(tmp_path, metadata, turned, format):
    picture = Image.fromarray(random_images(1, 24, 16, seed=0)[0])
    options = {"quality": 100, "subsampling": 0, "lossless": True}
    picture.save(tmp_path / "image", format, exif=metadata, **options)
    expected = np.asarray(picture).astype(int)
    np.testing.assert_allclose(
        np.asarray(read_image(tmp_path / "image")), np.rot90(expected, k=-1) if turned else expected, atol=4
    )


def png_chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_with(tmp_path, chunk, at_end=False):
    """A path of a PNG that has a chunk after its header or before its end, and its pixels, turned as its EXIF says."""
    pixels, path = random_images(1, 24, 16, seed=0)[0], tmp_path / "image.png"
    Image.fromarray(pixels).save(path, exif=exif(ON_ITS_SIDE))
    whole = path.read_bytes()
    place = len(whole) - 12 if at_end else 33
    path.write_bytes(whole[:place] + chunk + whole[place:])
    return path, np.rot90(pixels, k=-1)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2 * 10**6))),
        png_chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(2 * 10**6))),
        png_chunk(b"tEXt", b"key\0" + b"a" * 10**7),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(np.random.default_rng(0).bytes(2 * 10**6))),
    ],
    ids=["text, compressed", "international text, compressed", "text", "profile"],
)
def test_a_png_is_read_whatever_long_text_stands_beside_its_pixels(tmp_path, chunk, at_end):
    path, expected = png_with(tmp_path, chunk, at_end)
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)


@pytest.mark.parametrize("chunk", [png_chunk(b"tEXt", b"key\0text", crc=0), png_chunk(b"gAMA", b"")])
def test_a_damaged_png_is_named(tmp_path, chunk):
    path, _ = png_with(tmp_path, chunk)
    data_error(lambda: read_image(path), path)


def test_decompression_bomb(tmp_path):
    side = 20_000
    rows = zlib.compress(bytes((side // 8 + 1) * side), 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    data_error(lambda: read_image(tmp_path / "image.png"), tmp_path / "image.png", "decompression bomb")
