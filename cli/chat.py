"""`mlx-pararnn chat`: talk with a model in the terminal."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError

from . import options
from .report import Debug, reports_errors

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from mlx_pararnn.chat import Chat

HELP = """\
/help        this list
/reset       forget the talk
/save FILE   write the talk's whole memory to FILE
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
    """Talk with a model. It keeps its state between turns: what was said is never read again.

    Lines from a pipe work too: echo "def f(" | mlx-pararnn chat --max-tokens 40
    """
    loaded, tokenizer = options.load(model, modules)
    chosen = options.sampling(temp, top_p, top_k, min_p, repetition_penalty, seed, loaded.args.vocab_size)

    from mlx_pararnn.chat import Chat

    talk = Chat(loaded, tokenizer, system)
    _say("/help lists the commands.")
    if not tokenizer.has_chat_template:
        _say("This model's tokenizer has no chat template: it continues what you type, as plain text.")
    last: GenerationResponse | None = None
    for line in _lines():
        command, *rest = line.split(maxsplit=1) or [""]
        argument = rest[0].strip().strip("'\"") if rest else ""
        try:
            if command == "/quit":
                break
            if command.startswith("/"):
                _run(command, argument, talk, last)
            elif line.strip():
                last = _answer(talk, line, max_tokens=max_tokens, stop=stop or (), **chosen) or last
        except BrokenPipeError:
            raise
        except (PararnnError, OSError) as error:
            _say(f"error: {error}")


def _run(command: str, argument: str, talk: "Chat", last: "GenerationResponse | None") -> None:
    if command == "/help":
        _say(HELP)
    elif command == "/reset":
        talk.reset()
        _say("The talk is forgotten.")
    elif command in ("/save", "/load") and not argument:
        _say(f"{command} needs a file name.")
    elif command == "/save":
        _say(f"Saved to {talk.save(argument)}.")
    elif command == "/load":
        talk.load(argument)
        _say(f"Going on after {talk.tokens} tokens.")
    elif command == "/stats":
        speed = f"; last answer {last.generation_tps:.1f} tokens/s" if last else ""
        _say(f"{talk.tokens} tokens so far; state {talk.nbytes:,} bytes{speed}")
    else:
        _say(f"No command {command}; /help lists them.")


def _answer(talk: "Chat", line: str, **kwargs: Any) -> "GenerationResponse | None":
    from .progress import PromptProgress

    response = None
    with _ctrl_c() as pressed, PromptProgress() as progress:
        for response in talk.respond(
            line, interrupted=lambda: bool(pressed), prompt_progress_callback=progress, **kwargs
        ):
            print(response.text, end="", flush=True)
    print()
    if pressed:
        _say("(stopped)")
    return response


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
