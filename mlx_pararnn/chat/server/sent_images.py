"""Images in requests: `data:` URLs in messages, opened in bounded memory. No other address is ever opened."""

import re
import threading
from typing import Any

import numpy as np

from ...errors import PararnnError
from ...images.picture import from_base64, read_picture

MOST_IMAGES = 16  # in the messages of a request
# Less than a command takes of its own user; a WebP of so many pixels takes 260 MB while it is made small.
MOST_PIXELS = 16_000_000
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)
NOT_TAKEN = (
    "only text parts, and image_url parts with a data: URL (data:image/png;base64,...), are taken in "
    "content: this server opens no addresses"
)
_decoding = threading.Lock()


def url_of(part: dict[str, Any]) -> str | None:
    """The URL of a message's part where that is an image in OpenAI's forms, else None.

    Raises:
        ValueError: it is an image, and has no `data:` URL.
    """
    if part.get("type") not in ("image_url", "input_image"):
        return None
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not (isinstance(url, str) and DATA_URL.match(url)):
        raise ValueError(NOT_TAKEN)
    return url


def open_images(urls: list[str], size: int) -> list[np.ndarray]:
    """The pictures (size, size, 3), uint8, of `data:` URLs.

    Raises:
        PararnnError: there are too many, or one cannot be read.
    """
    if len(urls) > MOST_IMAGES:
        raise PararnnError(f"messages have {len(urls)} images; {MOST_IMAGES} are the most")
    with _decoding:  # one at a time, so that memory is bounded
        return [read_picture(from_base64(url.partition(",")[2]), size, MOST_PIXELS) for url in urls]
