"""`mlx-pararnn draw` as a person sees it: bar and picture in terminals of each kind."""

import base64
import io
import os
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mlx_pararnn.cli.preview import Preview, terminal_kind
from tests.support.image_models import image_model, write_image_model
from tests.support.terminal import Terminal

TRUECOLOR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))


class Tty(io.StringIO):
    def isatty(self):
        return True


def console_on(environment, file):
    return Console(file=file, _environ=environment, height=24, width=80)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        (TRUECOLOR, "blocks"),
        ({**TRUECOLOR, "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({**TRUECOLOR, "TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, "blocks"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
    ],
)
def test_the_environment_says_how_a_terminal_shows_pictures(environment, kind):
    assert terminal_kind(console_on(environment, Tty()), environment) == kind
    assert terminal_kind(console_on(environment, io.StringIO()), environment) is None


def shown_on(kind, environment, *pictures):
    """What is written for pictures that follow each other, and for the last to stay."""
    file = Tty()
    console = console_on(environment, file)
    preview = Preview(kind, console, 8)
    for picture in pictures:
        preview.picture = picture
        console.print(preview, end="")
    preview.leave()
    return file.getvalue()


def test_kittys_graphics_replace_the_picture_and_leave_the_last():
    written = shown_on("kitty", {"TERM": "xterm-kitty"}, PICTURE, PICTURE.rotate(90))
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", written)
    placed = [
        dict(pair.split("=") for pair in keys.split(",")) for keys, _ in commands if not keys.startswith("m=")
    ]
    number = str(os.getpid() % 0xFFFFFF + 1)
    assert [(keys["a"], keys.get("i")) for keys in placed] == [
        ("T", number),
        ("d", number),
        ("T", number),
        ("d", number),
        ("T", None),
    ]
    assert all(keys["q"] == "2" for keys in placed)
    assert all(len(data) <= 4096 for _, data in commands)
    images = [i for i, (keys, _) in enumerate(commands) if "a=T" in keys]
    data = "".join(piece for _, piece in commands[images[-1] :])
    assert (np.array(Image.open(io.BytesIO(base64.b64decode(data))))[::32, ::32] == turned()).all()
    assert "\n" * 8 + "\x1b7\x1b[8A\r" in written


def turned():
    return np.array(PICTURE.rotate(90))


def test_iterms_inline_image():
    written = shown_on("iterm", {"TERM": "xterm-256color"}, PICTURE.rotate(90))
    found = re.findall(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", written)
    said, data = found[-1]
    assert said.startswith("inline=1;size=")
    assert "width=16;height=8" in said
    assert (np.array(Image.open(io.BytesIO(base64.b64decode(data))))[::32, ::32] == turned()).all()


def test_half_blocks_are_two_pixels_each():
    written = shown_on("blocks", TRUECOLOR, PICTURE)
    cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", written)
    last = np.array(cells[-8 * 16 :], int).reshape(8, 16, 6)
    pixels = np.array(PICTURE)
    assert (last[::1, ::2, :3] == pixels).all()  # 16 x 16 pixels: each of the picture's is four
    assert (last[::1, ::2, 3:] == pixels).all()


@pytest.mark.harness
@pytest.mark.parametrize(
    ("more", "environment", "is_shown"),
    [([], TRUECOLOR, True), (["--no-preview"], TRUECOLOR, False), ([], {"TERM": "xterm-256color"}, False)],
)
def test_a_terminal_shows_the_picture_as_it_is_made(tmp_path, more, environment, is_shown):
    folder = write_image_model(image_model(), tmp_path / "model")
    out = tmp_path / "a.png"
    terminal = Terminal("draw", "a dog", "-o", out, "--model", folder, "--steps", "3", *more, **environment)
    assert terminal.exit_code() == 0
    assert ("▀" in terminal.text) == is_shown
    assert str(out) in terminal.text.replace("\n", "")
    assert "drawing" not in terminal.text  # the bar has gone
