"""A picture in the terminal: by kitty's or iTerm2's graphics, else as coloured half blocks."""

import base64
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.segment import Segment

Kind = Literal["kitty", "iterm", "blocks"]
MOST_ROWS, FEWEST_ROWS = 16, 4
_OTHER_ROWS = 4  # of the terminal, which stay free
_SIDE = 256  # pixels of what goes to a terminal with graphics
_CHUNK = 4096  # characters of data in one of kitty's commands


@contextmanager
def previewing(wanted: bool = True) -> "Iterator[Preview | None]":
    """What shows a picture as it is made, on stderr; None where it is not wanted or cannot be shown."""
    from rich.console import Console

    console = Console(stderr=True)
    kind, rows = terminal_kind(console, os.environ), min(MOST_ROWS, console.height - _OTHER_ROWS)
    if not wanted or kind is None or rows < FEWEST_ROWS or console.width < 2 * rows:
        yield None
        return
    preview = Preview(kind, console, rows)
    try:
        yield preview
    finally:
        preview.clear()


def show_picture(picture: "Image", wanted: bool = True) -> None:
    """A picture on stderr, where a terminal can show it."""
    with previewing(wanted) as preview:
        if preview is not None:
            preview.picture = picture
            preview.leave()


def terminal_kind(console: "Console", environment: Mapping[str, str]) -> Kind | None:
    """How the terminal behind `console` can show a picture; None where it cannot, or is asked not to."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM")
    if not console.file.isatty() or console.is_dumb_terminal or console.no_color:
        return None
    if "TMUX" in environment or term.startswith(("tmux", "screen")):
        pass  # these let no graphics through
    elif "KITTY_WINDOW_ID" in environment or program == "ghostty" or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    elif program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "blocks" if console.color_system == "truecolor" else None


class Preview:
    """A square picture on the terminal, for rich to show: alone, or above a bar that is drawn many times.

    Args:
        kind: how the terminal shows pictures.
        console: the terminal.
        rows: of the terminal, as high as the picture; it is twice as many columns wide.

    Attributes:
        picture: what is shown; None for nothing yet.
    """

    def __init__(self, kind: Kind, console: "Console", rows: int) -> None:
        self.picture: Image | None = None
        self._kind, self._console, self._rows = kind, console, rows
        self._id = os.getpid() % 0xFFFFFF + 1  # of kitty's image, so that the next one replaces it
        self._made: tuple[Image | None, list[Segment]] = None, []

    def leave(self) -> None:
        """Let the picture stay on the terminal, above what is written next."""
        if self.picture is not None:
            self.clear()
            self._id = 0
            self._made = None, []
            self._console.print(self, end="")

    def clear(self) -> None:
        """Take away what lies above the terminal's text."""
        if self._kind == "kitty" and self._id and self._made[0] is not None:
            self._console.file.write(_kitty({"a": "d", "d": "I", "i": self._id}))
            self._console.file.flush()

    def __rich_console__(self, console: Any, options: Any) -> "Iterable[Segment]":
        """Rich's protocol."""
        picture = self.picture
        if picture is not None and self._made[0] is not picture:
            self._made = picture, self._blocks(picture) if self._kind == "blocks" else self._graphics(picture)
        segments = self._made[1]
        if self._kind == "kitty" and segments:  # which keeps it when lines are drawn again
            self._made = picture, segments[: self._rows]
        return segments

    def _graphics(self, picture: "Image") -> "list[Segment]":
        """Empty lines, and from below them the picture over them: so it never scrolls the terminal."""
        from rich.segment import ControlType, Segment

        data, size = _png(picture), {"c": 2 * self._rows, "r": self._rows}
        if self._kind == "kitty":
            known = {"i": self._id} if self._id else {}
            image = _kitty({"a": "T", "f": 100, "C": 1, **size, **known}, data)
            if known and self._made[0] is not None:
                image = _kitty({"a": "d", "d": "I", **known}) + image
        else:
            encoded = base64.b64encode(data).decode()
            shown = f"inline=1;size={len(data)};width={size['c']};height={size['r']};preserveAspectRatio=1"
            image = f"\x1b]1337;File={shown}:{encoded}\x07"
        over = f"\x1b7\x1b[{self._rows}A\r{image}\x1b8"
        return [*[Segment.line()] * self._rows, Segment(over, None, [(ControlType.HOME,)])]

    def _blocks(self, picture: "Image") -> "list[Segment]":
        """Each character is two pixels, one above the other."""
        import numpy as np
        from rich.color import Color
        from rich.segment import Segment
        from rich.style import Style

        side = 2 * self._rows
        pixels = np.asarray(_resized(picture, side)).tolist()
        segments = []
        for y in range(0, side, 2):
            for x in range(side):
                above, below = (Color.from_rgb(*pixels[y + half][x]) for half in range(2))
                segments.append(Segment("▀", Style(color=above, bgcolor=below)))
            segments.append(Segment.line())
        return segments


def _resized(picture: "Image", side: int) -> "Image":
    """Its pixels stay squares where there are more of them."""
    from PIL.Image import Resampling

    enlarged = picture.width <= side
    return picture.convert("RGB").resize((side, side), Resampling.NEAREST if enlarged else Resampling.BOX)


def _png(picture: "Image") -> bytes:
    data = io.BytesIO()
    _resized(picture, _SIDE).save(data, "PNG")
    return data.getvalue()


def _kitty(keys: dict[str, Any], data: bytes = b"") -> str:
    """A command of kitty's graphics protocol, in pieces; q=2 keeps the terminal from answering."""
    text = base64.b64encode(data).decode()
    chunks = [text[k : k + _CHUNK] for k in range(0, len(text), _CHUNK)] or [""]
    said = ",".join(f"{key}={value}" for key, value in {**keys, "q": 2}.items())
    commands = []
    for number, chunk in enumerate(chunks):
        more = f"m={int(number < len(chunks) - 1)}"
        commands.append(f"\x1b_G{f'{said},{more}' if number == 0 else more};{chunk}\x1b\\")
    return "".join(commands)
