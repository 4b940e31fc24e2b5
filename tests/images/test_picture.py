"""Image files of every kind that people and attackers have: read as they look, or refused in a sentence."""

import contextlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from mlx_pararnn import PararnnError
from mlx_pararnn.images import picture
from mlx_pararnn.images.picture import read_picture, to_picture, to_pixels, write_picture

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def left_red(mode="RGB", size=(8, 8), other=BLUE):
    """Its left half is red."""
    image = Image.new("RGB", size, other)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def near(found, colour, by=40):
    return np.abs(found.astype(int) - colour).max() <= by


def png_of(width, height, kind=0, depth=1):
    """A PNG header that promises so many pixels, and no more than that."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format(kind, tmp_path):
    path = tmp_path / "a.image"
    path.write_bytes(encoded(left_red(size=(64, 64)), kind))
    found = read_picture(path, 16)
    assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8)
    assert near(found[:, :7], RED)
    assert near(found[:, 9:], BLUE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_colours(mode):
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    image = left_red()
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    found = read_picture(encoded(image.convert(mode) if mode != "LAB" else image, kind), 8)
    assert near(found[:, :4], RED)
    assert near(found[:, 4:], BLUE)


def test_cmyk_jpeg():
    found = read_picture(encoded(left_red("CMYK", (64, 64)), "JPEG"), 8)
    assert near(found[:, :3], RED)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_every_mode_of_greys(mode):
    greys = np.zeros((8, 8), np.uint8)
    greys[:, :4] = 255
    image = Image.fromarray(greys)
    image = Image.fromarray(greys.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    found = read_picture(encoded(image), 8)
    assert near(found[:, :4], WHITE)
    assert near(found[:, 4:], (0, 0, 0))


def transparent(mode):
    """The left half is red, the right one clear, over black."""
    image = left_red(other=(0, 0, 0)).convert("RGBA")
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize(
    "data",
    [
        encoded(transparent("RGBA")),
        encoded(transparent("P")),
        encoded(transparent("RGBA"), "WEBP", lossless=True),
        encoded(left_red(other=(0, 0, 0)), transparency=(0, 0, 0)),
    ],
    ids=["RGBA", "palette", "WebP", "colour key"],
)
def test_what_is_transparent_shows_white(data):
    found = read_picture(data, 8)
    assert near(found[:, :4], RED)
    assert near(found[:, 4:], WHITE)


@pytest.mark.sampled("large")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_is_followed(orientation, kind):
    """As a viewer shows it: the red corner is where EXIF's table says."""
    image = Image.new("RGB", (64, 64), BLUE)
    image.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_picture(encoded(image, kind, exif=exif), 8)
    row, column = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)][orientation - 1]
    corners = found[[[2], [6]], [[2, 6]]]
    assert [place for place in np.ndindex(2, 2) if near(corners[place], RED)] == [(row, column)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    assert near(read_picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), 8), RED)


@pytest.mark.parametrize("size", [(64, 16), (16, 64), (3000, 1), (1, 3000)])
def test_what_is_not_square_is_whole_on_white(size):
    found = read_picture(encoded(Image.new("RGB", size, RED)), 16)
    wide = size[0] > size[1]
    line = found[:, 8] if wide else found[8]
    red = [near(pixel, RED) for pixel in line]
    assert sum(red) == max(1, 16 * min(size) // max(size))
    assert near(found[0, 0], WHITE)


def test_a_large_photo_is_read_small(monkeypatch):
    """A JPEG of 48 million pixels is decoded at an eighth of its side, never whole."""
    data = encoded(Image.new("RGB", (8000, 6000), RED), "JPEG")
    loaded = []
    load = ImageFile.ImageFile.load

    def noted(image):
        loaded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    found = read_picture(data, 32)
    assert near(found[16], RED)
    assert loaded[0] == (1000, 750)


MEASURE = """
import resource, sys
from mlx_pararnn.images.picture import pillow, read_picture
pillow().Image.preinit()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_picture(sys.argv[1], 32)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.large
@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("RGB", "JPEG")])
def test_memory_is_bounded_by_the_pixels(mode, kind, tmp_path):
    """At most 17 bytes each."""
    file, side = tmp_path / "a.image", 4000
    options = {"transparency": 0} if mode == "P" else {"progressive": True} if kind == "JPEG" else {}
    file.write_bytes(encoded(Image.new(mode, (side, side)), kind, **options))
    taken = subprocess.run(
        [sys.executable, "-c", MEASURE, file], check=True, capture_output=True, text=True
    ).stdout
    assert int(taken) < 17 * side**2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is not an image of a known kind"),
        (b"hello, this is text", "is not an image of a known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "is not an image of a known kind"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "cannot be read as an image"),
        (encoded(left_red(size=(64, 64)), "JPEG")[:400], "cannot be read as an image"),
        (png_of(30_000, 30_000), "more than 64 million pixels"),
        (png_of(12_000, 8_000), "more than 64 million pixels"),
        (png_of(2**31 - 1, 2**31 - 1), "more than 64 million pixels"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "its pixels are no colours"),
    ],
)
def test_what_is_refused(data, said, monkeypatch):
    """In one sentence, and what is too large before any of it is decoded."""
    if "million" in said:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(PararnnError, match=said) as error:
        read_picture(data, 8)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(PararnnError, match="no such file"):
        read_picture(tmp_path / "none.png", 8)
    with pytest.raises(PararnnError, match="cannot be read"):
        read_picture(tmp_path, 8)
    monkeypatch.setattr(picture, "MAX_BYTES", 1 << 20)
    (tmp_path / "large.png").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(PararnnError, match="is larger than 1 MB"):
        read_picture(tmp_path / "large.png", 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.sampled("large")
@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_are_read_or_refused(kind, seed):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("BMP", "GIF") else {"exif": exif}
    data = bytearray(encoded(left_red(size=(40, 30)), kind, **options))
    rng = np.random.default_rng(seed)
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 1 + rng.integers(4)):
            damaged[place] = rng.integers(256)
        if rng.random() < 0.3:
            del damaged[rng.integers(len(data)) :]
        with contextlib.suppress(PararnnError):
            assert read_picture(bytes(damaged), 8).shape == (8, 8, 3)


def test_pixels_and_back(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert (np.array(to_picture(to_pixels(image))) == image).all()
    write_picture(to_picture(to_pixels(image)), tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 8) == image).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_what_cannot_be_written(tmp_path, monkeypatch):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(PararnnError, match=r"ends in \.png, \.jpg"):
        write_picture(image, tmp_path / "a.txt")
    with pytest.raises(PararnnError, match="lies in no folder"):
        write_picture(image, tmp_path / "none" / "a.png")

    def full(_, path, *__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(PararnnError, match="No space left on device"):
        write_picture(image, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
