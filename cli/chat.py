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
from .tool_lines import ShowTools, ToolLines, printable, say_why

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_pararnn.chat.session import Chat

EXAMPLES = [
    "what is 12345678901234567890 + 98765432109876543210?",
    "what day is 90 days after 3 March?",
]
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
    max_tokens: options.MaxTokens = None,
    temp: options.TempOrModels = None,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    show_tools: ShowTools = False,
    adapter_path: options.Adapters = None,
    state: options.InitialState = None,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Chat with a model. It keeps its state between turns: what was said is never read again.

    Lines from a pipe work too: echo "def f(" | mlx-pararnn chat --max-tokens 40
    """
    loaded, tokenizer = options.load(model, modules, adapter_path, state)

    from mlx_pararnn.chat.session import Chat
    from mlx_pararnn.pocket.loop import Limits

    conversation = Chat(loaded, tokenizer, system)
    if conversation.uses_tools:
        sampler = options.tool_sampling(
            temp, top_p, top_k, min_p, repetition_penalty, seed, stop, loaded, tokenizer
        )
        answering = {"max_tokens": max_tokens or Limits.answer, "sampler": sampler}
        for line in what_to_try(tokenizer):
            _say(line)
    else:
        chosen = options.sampling(
            temp or 0.0, top_p, top_k, min_p, repetition_penalty, seed, loaded.args.vocab_size
        )
        answering = {"max_tokens": max_tokens or options.MAX_TOKENS, "stop": stop or (), **chosen}
        _say("/help lists the commands.")
        if not tokenizer.has_chat_template:
            _say("This model's tokenizer has no chat template: it continues what you type, as plain text.")
    session = _Session(conversation, answering, ToolLines(show_tools))
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

    def __init__(self, chat: "Chat", options: dict[str, Any], lines: ToolLines) -> None:
        self.chat = chat
        self.options = options
        self.lines = lines
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

        with _ctrl_c() as pressed, PromptProgress() as progress, self.lines:
            for response in answer(
                *texts,
                interrupted=lambda: bool(pressed),
                prompt_progress_callback=progress,
                **self.options,
            ):
                self.last = response
                if (event := getattr(response, "event", None)) is not None:
                    self.lines.show(event)
                print(response.text, end="", flush=True)
        print(flush=True)  # before what follows on stderr
        if pressed:
            _say("(stopped)")
        elif self.chat.uses_tools and self.last is not None:
            say_why(self.last.finish_reason)


def what_to_try(tokenizer: "TokenizerWrapper") -> list[str]:
    """Two lines: of `examples` in the model folder's generation_config.json, or what such models can do."""
    examples = options.generation_config(tokenizer).get("examples")
    if not isinstance(examples, list) or not all(isinstance(text, str) for text in examples[:2]):
        examples = []
    first, second = [printable(text)[:200] for text in [*examples[:2], *EXAMPLES][:2]]
    return [f"Try: {first}", f"Or:  {second}   (/help lists the commands)"]


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
