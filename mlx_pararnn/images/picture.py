"""Image files of anyone's: opened in bounded memory, turned upright, made square.

What is decoded has at most MAX_PIXELS pixels. With Pillow 13.0 on Linux a PNG took up to 9 bytes a pixel and
a WebP 16, which is 1 GB at that size; tests/images/test_picture.py holds it.
"""

import base64
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PararnnError, one_line
from ..files.model_files import open_regular
from ..files.whole_file import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
# Formats that a decoder in Pillow itself reads; of the others some start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
_BACKGROUND = (255, 255, 255)
# EXIF's orientation -> what makes the picture upright
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_picture(
    source: "Path | str | bytes | Image", size: int, most_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """A picture as (size, size, 3), uint8 RGB: the whole of it, centred on white where it is not square.

    Of an animation it is the first frame; transparency shows white; EXIF's orientation is followed; CMYK,
    grey and palettes become RGB.

    Args:
        source: a file, its bytes, or an image of Pillow's.
        size: of the square, in pixels.
        most_pixels: that the image may have, MAX_PIXELS at most.

    Raises:
        PararnnError: it is no image of FORMATS, is broken, or is larger than MAX_BYTES or `most_pixels`.
    """
    name = str(source) if isinstance(source, Path | str) else "the image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it skips in a damaged file
        opened = _open(source, name)
        _check_size(opened, name, most_pixels)
        try:
            return _as_it_looks(opened, size)
        except Exception as error:  # of a broken file Pillow's decoders raise whatever it leads them to
            raise _broken(name, error) from error


def to_pixels(pictures: np.ndarray) -> np.ndarray:
    """uint8 RGB (B, S, S, 3) to float32 from -1 to 1."""
    return pictures.astype(np.float32) / 127.5 - 1


def to_picture(pixels: np.ndarray) -> "Image":
    """Pixels (S, S, 3) from -1 to 1, cut off there, as an image of Pillow's."""
    return pillow().Image.fromarray(quantized(pixels))  # type: ignore[no-any-return]


def quantized(pixels: np.ndarray) -> np.ndarray:
    """Pixels from -1 to 1, cut off there, as uint8."""
    return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def to_base64(picture: np.ndarray) -> str:
    """A picture (S, S, 3), uint8, as base64 of a PNG."""
    data = io.BytesIO()
    pillow().Image.fromarray(picture).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def from_base64(text: str) -> bytes:
    """An image file's bytes; raises PararnnError where the text is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise PararnnError("the image is not base64 of an image file") from None


def check_output(path: Path) -> str:
    """The format of an image file that is to be written; raises PararnnError where it cannot be."""
    if path.suffix.lower() not in SUFFIXES:
        raise PararnnError(f"{path}: give an image file a name that ends in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise PararnnError(f"{path}: is a folder, or lies in no folder; choose another file")
    pillow()
    return SUFFIXES[path.suffix.lower()]


def write_picture(picture: "Image", path: Path) -> None:
    """Write an image file, whole or not at all; raises PararnnError where it cannot be written."""
    kind = check_output(path)
    try:
        with whole_file(path) as partial:
            picture.save(partial, kind)
    except OSError as error:
        raise PararnnError(
            f"{path}: could not be written ({error.strerror or error}); choose another file"
        ) from error


def pillow() -> Any:
    """The package PIL with its modules Image and ImageOps; raises PararnnError where it is not installed."""
    try:
        import PIL
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise PararnnError(
            "images need Pillow, which is missing: pip install 'mlx-pararnn[images]'"
        ) from None
    return PIL


def _open(source: "Path | str | bytes | Image", name: str) -> "Image":
    """Without decoding more than the header."""
    PIL = pillow()
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, Path | str):
        try:
            with open_regular(Path(source)) as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise PararnnError(f"{name}: no such file; give an image file") from None
    else:
        return source.copy()
    if len(data) > MAX_BYTES:
        raise PararnnError(f"{name}: is larger than {MAX_BYTES >> 20} MB; save the image smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            return PIL.Image.open(io.BytesIO(data), formats=FORMATS)  # type: ignore[no-any-return]
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except PIL.UnidentifiedImageError:
        raise PararnnError(
            f"{name}: is not an image of a known kind ({', '.join(FORMATS)}); convert it to PNG"
        ) from None
    except Exception as error:
        raise _broken(name, error) from error


def _check_size(image: "Image", name: str, most_pixels: int) -> None:
    if image.width * image.height > most_pixels:
        raise _too_large(name, f"{image.width} x {image.height} pixels, ", most_pixels)
    if image.mode in ("I", "F") or not (image.width and image.height):
        raise PararnnError(f"{name}: its pixels are no colours (mode {image.mode}); save it with 8 bits each")


def _as_it_looks(image: "Image", size: int) -> np.ndarray:
    image.draft("RGB", (2 * size, 2 * size))  # a JPEG's decoder can leave out detail as it reads
    image.load()
    turn = _TURNS.get(_orientation(image) or 1)
    small = _on_white(_reduced(_in_eight_bits(image), size))
    return _square(small if turn is None else small.transpose(pillow().Image.Transpose[turn]), size)


def _orientation(image: "Image") -> int | None:
    try:
        return image.getexif().get(0x0112)
    except Exception:  # EXIF that cannot be read tells nothing; the picture itself may be sound
        return None


def _in_eight_bits(image: "Image") -> "Image":
    """In a mode whose neighbouring pixels can be averaged."""
    if image.mode.startswith("I;16"):
        return pillow().Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # type: ignore[no-any-return]
    if "transparency" in image.info or image.mode == "PA":
        return image.convert("RGBA")
    return image.convert("RGB") if image.mode in ("P", "1") else image


def _reduced(image: "Image", size: int) -> "Image":
    """Nearer to the size that is wanted, by a whole factor, before its many pixels are copied again."""
    factor = min(image.width, image.height) // (4 * size)
    return image.reduce(factor) if factor > 1 else image


def _on_white(image: "Image") -> "Image":
    if image.mode not in ("RGBA", "LA"):
        return image.convert("RGB")
    clear = image.convert("RGBA")
    ground = pillow().Image.new("RGB", clear.size, _BACKGROUND)
    ground.paste(clear, mask=clear.getchannel("A"))
    return ground  # type: ignore[no-any-return]


def _square(image: "Image", size: int) -> np.ndarray:
    share = size / max(image.size)
    width, height = (max(1, round(share * side)) for side in image.size)
    Image = pillow().Image
    square = Image.new("RGB", (size, size), _BACKGROUND)
    square.paste(
        image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2)
    )
    return np.array(square)


def _too_large(name: str, what: str = "it has ", most_pixels: int = MAX_PIXELS) -> PararnnError:
    return PararnnError(f"{name}: {what}more than {most_pixels / 1e6:.0f} million pixels; save it smaller")


def _broken(name: str, error: Exception) -> PararnnError:
    return PararnnError(f"{name}: cannot be read as an image ({one_line(error)}); save it again")
