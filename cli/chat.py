"""`mlx-pararnn chat`: chat with a model in the terminal."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.process.watchdog import watched

from . import options, sampling
from .chat_commands import HINTS, LEAVE, Session, say, say_list
from .message_editor import read_messages
from .report import Debug, reports_errors
from .tool_lines import ShowTools, ToolLines, check_shows_tools

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

EXAMPLES = [
    "what is 12345678901234567890 + 98765432109876543210?",
    "what day is 90 days after 3 March?",
]


@reports_errors
def chat(
    model: options.ModelPath = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system prompt, for models with a chat template.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option("--load", metavar="FILE", help="Go on from what /save wrote.")
    ] = None,
    max_tokens: options.MaxTokens = None,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    show_tools: ShowTools = False,
    adapter_path: options.Adapters = None,
    state: options.InitialState = None,
    prefill_step_size: options.PrefillStepSize = options.PREFILL_STEP_SIZE,
    plain: Annotated[
        bool, typer.Option("--plain", help="Print answers as they come: no Markdown, no word wrap.")
    ] = False,
    keep_history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            envvar="MLX_PARARNN_HISTORY",
            show_envvar=True,
            help="Keep what is typed for the next time.",
        ),
    ] = True,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Chat with a model in the terminal.

    It keeps its state between turns: what was said is never read again. Lines from a pipe work too:

    echo "def f(" | mlx-pararnn chat --max-tokens 40
    """
    options.check_for_prompt(model, or_word=False)
    with watched():
        loaded, tokenizer, images = options.load_with_images(model, modules, adapter_path, state)

    from mlx_pararnn.chat.session import Chat
    from mlx_pararnn.pocket.loop import Limits

    typed = sys.stdin.isatty()  # else the process ends with its input, before anything could ring
    conversation = Chat(loaded, tokenizer, system, images=images, rings=typed)
    uses_tools = conversation.uses_tools
    check_shows_tools(show_tools, uses_tools)
    chosen = sampling.choose_sampling(
        sampling.folder_of(tokenizer),
        sampling.CONVERSATION,
        options.given_sampling(temp, top_p, top_k, min_p, repetition_penalty, seed),
        uses_tools,
    )
    session = Session(
        conversation,
        chosen,
        max_tokens or (Limits.answer if uses_tools else options.MAX_TOKENS),
        stop,
        ToolLines(show_tools),
        plain,
        _ask if typed else None,
        prefill_step_size,
    )
    if load is not None:
        session.run("/load", str(load))
    if uses_tools:
        for line in what_to_try(tokenizer):
            say_list(line)
    else:
        say("/help lists the commands.")
        if not tokenizer.has_chat_template:
            say("This model's tokenizer has no chat template: it continues what you type, as plain text.")
    for message in read_messages(session.completions, keep_history, lambda: session.chat.due()):
        if not _do(session, message):
            break


def _do(session: Session, message: str) -> bool:
    """Answer a message or follow a command; False for the one that leaves."""
    command, *rest = message.split(maxsplit=1) or [""]
    try:
        if (image := session.as_image(message)) is not None:
            session.show_image(image)
        elif message.startswith("/") and "\n" not in message:
            if command in LEAVE:
                return False
            session.run(command, rest[0].strip().strip("'\"") if rest else "")
        elif session.ask and message.strip().lower() in HINTS:
            say(HINTS[message.strip().lower()])
        elif message.strip():
            session.respond(message)
    except BrokenPipeError:
        raise
    except (PararnnError, OSError) as error:
        say(f"error: {error}")
    return True


def _ask(question: str) -> bool:
    """Whether a person says yes; Ctrl-C and Ctrl-D say no."""
    try:
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return False


def what_to_try(tokenizer: "TokenizerWrapper") -> list[str]:
    """Two lines: of `examples` in the model folder's generation_config.json, or what such models can do."""
    examples = sampling.suggested_questions(sampling.folder_of(tokenizer))
    first, second = [*examples, *EXAMPLES][:2]
    return [f"Try: {first}", f"Or:  {second}   (/help lists the commands)"]
