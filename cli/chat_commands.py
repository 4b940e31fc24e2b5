"""The commands of `chat`: what a line that begins with a slash does."""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from signal import SIGINT, signal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.process.watchdog import Watchdog, watched

from . import sampling
from .answer_text import answer_writer
from .draw import drawing_shown
from .options import PREFILL_STEP_SIZE
from .preview import show_picture
from .sampling import Sampling
from .tool_lines import ToolLines, say_why

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from mlx_pararnn.chat.session import Chat

HELP = """\
/help        this list (so does /?)
/undo        take back the last question and its answer
/regenerate  answer the last question again
/branch NAME remember this point of the conversation; without NAME, list them
/goto NAME   go back to such a point
/reset       forget the conversation
/save FILE   write the conversation's whole memory to FILE
/load FILE   go on from what /save wrote
/set         how answers are made; /set temp 0.7 changes it
/system TEXT another system prompt; without TEXT, show it
/stats       tokens so far, size of the state, speed of the last answer
/exit        leave (so do /quit and Ctrl-D); Ctrl-C stops an answer
Several lines: paste them, type them between two \"\"\", or use Alt-Enter."""
SEEING = "/image FILE  the next message asks about this image; a pasted path does too"
DRAWING = "/draw TEXT   a picture of what TEXT says, in a new file in this folder"
LEAVE = ("/exit", "/quit", "/bye")
COMMANDS = (
    *("/help", "/?", "/undo", "/regenerate", "/branch", "/goto", "/reset", "/save", "/load", "/set"),
    *("/system", "/stats", *LEAVE),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# A word that is meant for the program and not for the model.
HINTS = {
    **dict.fromkeys(("exit", "quit", "bye", ":q"), "/exit or Ctrl-D leaves."),
    **dict.fromkeys(("help", "?"), "/help lists the commands."),
}


class Session:
    """The conversation, the points of it that have a name, and how answers are made.

    Args:
        chat: the conversation.
        sampling, max_tokens, stop: how answers are made.
        lines: shows what a model with tools does.
        plain: answers are written as they come.
        ask: asks a person a question that y or n answers; None where there is nobody to ask.
        prefill_step_size: so many tokens of a message are read at once.
    """

    def __init__(
        self,
        chat: "Chat",
        sampling: Sampling,
        max_tokens: int,
        stop: list[str] | None,
        lines: ToolLines,
        plain: bool = False,
        ask: Callable[[str], bool] | None = None,
        prefill_step_size: int = PREFILL_STEP_SIZE,
    ) -> None:
        self.chat = chat
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = stop
        self.lines = lines
        self.plain = plain
        self.ask = ask
        self.prefill_step_size = prefill_step_size
        self.branches: dict[str, Chat] = {}
        self.image: Path | None = None  # what the next message asks about
        self.file: Path | None = None  # what the conversation was saved to or loaded from
        self.last: GenerationResponse | None = None
        self._make_answers()

    def completions(self, command: str) -> list[str] | None:
        """What may follow a command, or the commands for ""; None for a file's name."""
        if command in ("/save", "/load", "/image"):
            return None
        names = [name.replace("_", "-") for name in sampling.NAMES]
        return {
            "": [*COMMANDS, *self._image_commands],
            "/goto": list(self.branches),
            "/set": [*names, "max-tokens"],
        }.get(command, [])

    def run(self, command: str, argument: str) -> None:
        """Do what a command says; `argument` is the rest of its line."""
        chat = self.chat
        if command in ("/help", "/?"):
            say_list("\n".join([*self._image_commands.values(), HELP]))
        elif command == "/reset":
            chat.reset()
            self.file = None
            say("The conversation is forgotten.")
        elif command == "/undo":
            say(f"Taken back: {chat.undo()}")
        elif command == "/regenerate":
            self.stream(chat.regenerate)
        elif command == "/branch" and not argument:
            say(f"Points to go to: {', '.join(self.branches) or 'none'}")
        elif command == "/branch":
            self.branches[argument] = chat.branch()
            say(f"/goto {argument} comes back to this point.")
        elif command == "/goto" and argument not in self.branches:
            say(f"No point {argument!r}; /branch lists them.")
        elif command == "/goto":
            self.chat = self.branches[argument].branch()
            self.file = None
            say(f"Going on after {self.chat.tokens} tokens.")
        elif command in ("/save", "/load") and not argument:
            say(f"{command} needs a file name.")
        elif command == "/save":
            self._save(argument)
        elif command == "/load":
            self._load(argument)
        elif command == "/set":
            self._set(argument)
        elif command == "/system":
            self._system(argument)
        elif command == "/stats":
            speed = f"; last answer {self.last.generation_tps:.1f} tokens/s" if self.last else ""
            say(f"{chat.tokens} tokens so far; state {chat.nbytes:,} bytes{speed}; {chat.undoable} to /undo")
        else:
            self._image_command(command, argument)

    def respond(self, text: str) -> None:
        """Answer a message; an image that was shown belongs to it."""
        self.stream(partial(self.chat.respond, image=self.image), text)
        self.image = None

    def as_image(self, message: str) -> Path | None:
        """The image file whose path a message is, as terminals write one that is dropped on them."""
        if self.chat.images is None or "\n" in message.strip():
            return None
        path = dropped_path(message)
        return path if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() else None

    def show_image(self, path: Path) -> None:
        """The next message asks about this image.

        Raises:
            PararnnError: the model sees none, or the file is no image.
        """
        from mlx_pararnn.images.picture import pillow, read_picture

        if self.chat.images is None:
            raise PararnnError("this model sees no images")
        picture = read_picture(path, self.chat.images.args.size)
        self.image = path
        show_picture(pillow().Image.fromarray(picture))
        say(f"The next message asks about {path}.")

    @property
    def _image_commands(self) -> dict[str, str]:
        """The commands that this model has besides, and their help."""
        images = self.chat.images
        if images is None:
            return {}
        return {"/image": SEEING} | ({} if images.image_decoder is None else {"/draw": DRAWING})

    def _image_command(self, command: str, argument: str) -> None:
        if command == "/draw":
            self._draw(argument)
        elif command != "/image":
            say(f"No command {command}; /help lists them. With a space before it, it is a message.")
        elif argument or self.chat.images is None:
            self.show_image(dropped_path(argument))
        else:
            say(f"The next message asks about {self.image}." if self.image else "/image needs a file name.")

    def _draw(self, text: str) -> None:
        from mlx_pararnn.images.picture import write_picture
        from mlx_pararnn.images.use import draw

        if self.chat.images is None or self.chat.images.image_decoder is None:
            raise PararnnError("this model draws no images")
        path = free_path(Path("drawing.png"))
        try:
            with watched(), drawing_shown() as shown:
                seed = self.sampling.seed
                picture = draw(self.chat.images, self.chat.tokenizer, text, seed=seed, **shown)
                write_picture(picture, path)
        except KeyboardInterrupt:
            say("(stopped)")
            return
        say(f"Drawn: {path}")

    def stream(self, answer: "Callable[..., Iterator[GenerationResponse]]", *texts: str) -> None:
        """Write what `chat.respond` or `chat.regenerate` gives."""
        from mlx_pararnn.distributed import any_rank

        from .progress import PromptProgress

        group = self.chat.model.group
        writer = answer_writer(markup=self.chat.tokenizer.has_chat_template, plain=self.plain)
        with (
            watched() as watchdog,
            ctrl_c(watchdog) as pressed,
            PromptProgress() as progress,
            self.lines,
            writer as write,
        ):

            def computing(done: int, total: int) -> None:
                watchdog.computing()
                progress(done, total)

            for response in answer(
                *texts,
                interrupted=lambda: bool(pressed) if group is None else any_rank(group, bool(pressed)),
                prompt_progress_callback=computing,
                **self._options,
            ):
                self.last = response
                if (event := getattr(response, "event", None)) is not None:
                    self.lines.show(event)
                write(response.text, response.finish_reason is not None)
        if pressed:
            say("(stopped)")
        elif self.chat.uses_tools and self.last is not None:
            say_why(self.last.finish_reason)

    def _make_answers(self) -> None:
        """What `chat.respond` is told; the settings have changed."""
        vocabulary = self.chat.model.args.vocab_size
        if self.chat.uses_tools:
            chosen = {"sampler": sampling.tool_sampler(self.sampling, self.stop, vocabulary)}
        else:
            chosen = {"stop": self.stop or (), **sampling.sampler(self.sampling, vocabulary)}
        how = {"max_tokens": self.max_tokens, "prefill_step_size": self.prefill_step_size}
        self._options: dict[str, Any] = {**how, **chosen}

    def _set(self, argument: str) -> None:
        name, *value = argument.split() or [""]
        name = name.lstrip("-").replace("-", "_")
        name = "temp" if name == "temperature" else name
        if name and (name not in (*sampling.NAMES, "max_tokens") or len(value) != 1):
            say("/set takes a name and a number, as in /set temp 0.7; /set alone lists them.")
            return
        if name:
            number = _number(value[0])
            bound = 1 <= number < 2**31 and number == int(number)
            if not (bound if name == "max_tokens" else sampling.is_sound(name, number)):
                say(f"{name.replace('_', '-')} cannot be {value[0]}.")
                return
            self._change(name, number)
        settings = {**vars(self.sampling), "max_tokens": self.max_tokens}
        shown = [f"{k.replace('_', '-')} {v:g}" for k, v in settings.items() if v is not None]
        say(", ".join(shown))

    def _change(self, name: str, number: float) -> None:
        before = self.sampling, self.max_tokens
        if name == "max_tokens":
            self.max_tokens = int(number)
        else:
            whole = name in ("top_k", "seed")
            self.sampling = self.sampling.replaced(**{name: int(number) if whole else number})
        try:
            self._make_answers()
        except PararnnError:
            self.sampling, self.max_tokens = before
            raise

    def _system(self, text: str) -> None:
        if text:
            self.chat.set_system(text)
        say(f"System prompt: {self.chat.system or 'none'}")

    def _load(self, name: str) -> None:
        from mlx_pararnn.chat.conversation_file import OfAnotherModelError, saved_path

        path = saved_path(name)
        try:
            self.chat.load(name)
        except OfAnotherModelError:
            if self.ask is None:
                raise
            if not self.ask(f"{path} was saved with another model. Read its messages with this one?"):
                say("Not loaded.")
                return
            count = self.chat.read_again(path)
            self.file = path
            if self.chat.uses_tools:
                say("This model reads no earlier messages; the lists, timers and reminders are here.")
            else:
                say(f"{count} messages will be read with your next one.")
            return
        self.file = path
        say(f"Going on after {self.chat.tokens} tokens.")

    def _save(self, name: str) -> None:
        from mlx_pararnn.chat.conversation_file import saved_path

        path = saved_path(name)
        if path.exists():
            if self.ask is None and path != self.file:
                raise PararnnError(f"{path} exists, and there is nobody to ask; choose another name")
            if self.ask and not self.ask(f"{path} exists. Overwrite it?"):
                say("Not saved.")
                return
        say(f"Saved to {self.chat.save(path)}.")
        self.file = path


@contextmanager
def ctrl_c(watchdog: Watchdog) -> Iterator[list[int]]:
    """Collect Ctrl-C while an answer is made, to stop between two tokens; a second one raises."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        watchdog.heard()
        pressed.append(number)

    before = signal(SIGINT, note)
    try:
        yield pressed
    finally:
        signal(SIGINT, before)


def dropped_path(text: str) -> Path:
    """A path as it is typed, or as terminals write one that is dropped: quoted, escaped, or an address."""
    text = text.strip()
    if text.startswith("file://"):
        from urllib.request import url2pathname  # takes a fifth of the time of --help

        return Path(url2pathname(urlsplit(text).path))
    if not Path(text).expanduser().exists():
        with suppress(ValueError):  # a quote that is not closed
            words = shlex.split(text)
            text = words[0] if len(words) == 1 else text
    return Path(text).expanduser()


def free_path(path: Path) -> Path:
    """The path, or where a file has it the first with a number that none has."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def say(text: str) -> None:
    """A line that is no answer."""
    print(text, file=sys.stderr)


def say_list(text: str) -> None:
    """Lines that explain; a narrow terminal breaks them between words, and keeps their second column."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        lines = []
        for line in text.splitlines():
            column = re.match(r"/\S+(?: [A-Z]+)? +(?=\S)", line)
            indent = " " * (column.end() if column else 0)
            lines += textwrap.wrap(line, max(width, 40), subsequent_indent=indent, break_on_hyphens=False)
        text = "\n".join(lines)
    say(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
