"""`mlx-pararnn chat`: chat with a model in the terminal."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError

from . import options
from .report import Debug, reports_errors

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from mlx_pararnn.chat.session import Chat

HELP = """\
/help        this list
/undo        take back the last question and its answer
/regenerate  answer the last question again
/branch NAME remember this point of the conversation; without NAME, list what is remembered
/goto NAME   go back to such a point
/reset       forget the conversation
/save FILE   write the conversation's whole memory to FILE
/load FILE   go on from what /save wrote
/stats       tokens so far, size of the state, speed of the last answer
/quit        leave (so does Ctrl-D); Ctrl-C stops an answer"""


@reports_errors
def chat(
    model: options.ModelPath = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system prompt, for models with a chat template.")
    ] = None,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Chat with a model. It keeps its state between turns: what was said is never read again.

    Lines from a pipe work too: echo "def f(" | mlx-pararnn chat --max-tokens 40
    """
    loaded, tokenizer = options.load(model, modules)
    chosen = options.sampling(temp, top_p, top_k, min_p, repetition_penalty, seed, loaded.args.vocab_size)

    from mlx_pararnn.chat.session import Chat

    session = _Session(
        Chat(loaded, tokenizer, system), {"max_tokens": max_tokens, "stop": stop or (), **chosen}
    )
    _say("/help lists the commands.")
    if not tokenizer.has_chat_template:
        _say("This model's tokenizer has no chat template: it continues what you type, as plain text.")
    for line in _lines():
        command, *rest = line.split(maxsplit=1) or [""]
        argument = rest[0].strip().strip("'\"") if rest else ""
        try:
            if command == "/quit":
                break
            if command.startswith("/"):
                session.run(command, argument)
            elif line.strip():
                session.stream(session.chat.respond, line)
        except BrokenPipeError:
            raise
        except (PararnnError, OSError) as error:
            _say(f"error: {error}")


class _Session:
    """The conversation, the points of it that have a name, and how answers are made."""

    def __init__(self, chat: "Chat", options: dict[str, Any]) -> None:
        self.chat = chat
        self.options = options
        self.branches: dict[str, Chat] = {}
        self.last: GenerationResponse | None = None

    def run(self, command: str, argument: str) -> None:
        """A line that begins with a slash."""
        chat = self.chat
        if command == "/help":
            _say(HELP)
        elif command == "/reset":
            chat.reset()
            _say("The conversation is forgotten.")
        elif command == "/undo":
            _say(f"Taken back: {chat.undo()}")
        elif command == "/regenerate":
            self.stream(chat.regenerate)
        elif command == "/branch" and not argument:
            _say(f"Points to go to: {', '.join(self.branches) or 'none'}")
        elif command == "/branch":
            self.branches[argument] = chat.branch()
            _say(f"/goto {argument} comes back to this point.")
        elif command == "/goto" and argument not in self.branches:
            _say(f"No point {argument!r}; /branch lists them.")
        elif command == "/goto":
            self.chat = self.branches[argument].branch()
            _say(f"Going on after {self.chat.tokens} tokens.")
        elif command in ("/save", "/load") and not argument:
            _say(f"{command} needs a file name.")
        elif command == "/save":
            _say(f"Saved to {chat.save(argument)}.")
        elif command == "/load":
            chat.load(argument)
            _say(f"Going on after {chat.tokens} tokens.")
        elif command == "/stats":
            speed = f"; last answer {self.last.generation_tps:.1f} tokens/s" if self.last else ""
            _say(f"{chat.tokens} tokens so far; state {chat.nbytes:,} bytes{speed}; {chat.undoable} to /undo")
        else:
            _say(f"No command {command}; /help lists them.")

    def stream(self, answer: "Callable[..., Iterator[GenerationResponse]]", *texts: str) -> None:
        """Print what `chat.respond` or `chat.regenerate` gives."""
        from .progress import PromptProgress

        with _ctrl_c() as pressed, PromptProgress() as progress:
            for response in answer(
                *texts,
                interrupted=lambda: bool(pressed),
                prompt_progress_callback=progress,
                **self.options,
            ):
                self.last = response
                print(response.text, end="", flush=True)
        print()
        if pressed:
            _say("(stopped)")


def _lines() -> Iterator[str]:
    """Lines from the terminal, with editing and history, or from a pipe."""
    if not sys.stdin.isatty():
        lines = (line.decode("utf-8", errors="surrogateescape") for line in sys.stdin.buffer)
        yield from (line.rstrip("\r\n") for line in lines)
        return
    with suppress(ImportError):
        import_module("readline")  # gives input() its line editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt: drop the line
            print()


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Collect Ctrl-C while an answer is made, to stop between two tokens; a second one raises."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
