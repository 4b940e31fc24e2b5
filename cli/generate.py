"""`mlx-pararnn generate`: continue a prompt."""

import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.process.watchdog import watched

from . import options, sampling
from .report import Debug, reports_errors
from .tool_lines import ShowTools, ToolLines, check_shows_tools, say_why

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_pararnn.images.image_model import ImageModel
    from mlx_pararnn.model import Model

SHOWN = 4096  # characters of the text that a terminal sees again; of a longer one the last


@reports_errors
@watched()
def generate(
    model: options.ModelPath = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The text to continue, after what is piped in; '-', or nothing, reads standard input alone.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="Read the text from a file; --prompt follows it."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="FILE", help="An image that the text asks about, for models that see."
        ),
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            metavar="IDS",
            help='Continue token ids, as in "105 109", and print ids: for models without a tokenizer.',
        ),
    ] = None,
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template",
            help="Continue the text itself, even if the tokenizer has a chat template.",
        ),
    ] = False,
    max_tokens: options.MaxTokens = None,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema",
            metavar="FILE|JSON",
            help="Answer in JSON that fits this JSON schema: a file, or the schema itself.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
    show_tools: ShowTools = False,
    adapter_path: options.Adapters = None,
    state: options.InitialState = None,
    prefill_step_size: options.PrefillStepSize = options.PREFILL_STEP_SIZE,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Continue a prompt, or answer it.

    The text goes to stdout, statistics go to stderr. A model with a chat template or with tools answers.

    Example: mlx-pararnn generate my-model -p "Once upon a time" --temp 0.8
    """
    given = options.given_sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    if prompt is None and file is None and token_ids is None:
        options.check_for_prompt(model, or_word=True)
    if token_ids is not None:
        if prompt is not None or file is not None or image is not None or stop or json_schema or show_tools:
            raise typer.BadParameter(
                "--tokens goes without --prompt, --file, --image, --stop, --json-schema, --show-tools"
            )
        changes = adapter_path, state
        _continue_ids(model, modules, changes, token_ids, max_tokens, given, as_json, prefill_step_size)
        return
    schema = None if json_schema is None else _schema(json_schema)
    sees, loaded, tokenizer = _load(image, model, modules, adapter_path, state)
    from mlx_pararnn.generation import reads_in_pieces, render, stream_generate
    from mlx_pararnn.pocket.protocol import find_protocol

    uses_tools = sees is None and find_protocol(tokenizer) is not None
    if uses_tools and ignore_chat_template:
        raise PararnnError(
            "this model answers messages and continues no text; leave out --ignore-chat-template"
        )
    check_shows_tools(show_tools, uses_tools)
    answers = sees is not None or uses_tools or (tokenizer.has_chat_template and not ignore_chat_template)
    continues = not answers and not as_json
    in_pieces = continues and reads_in_pieces(tokenizer)
    blocks = options.blocks_from_rank_0(_blocks(prompt, file, None if in_pieces else options.MAX_TEXT_BYTES))
    text = "" if continues else "".join(blocks)
    how = sampling.choose_sampling(sampling.folder_of(tokenizer), sampling.LIKELIEST, given, uses_tools)
    asked = {"model": model or Path(tokenizer.name_or_path).name, "prompt": text, "seed": seed}
    if uses_tools:
        if schema is not None:
            raise PararnnError("this model uses tools and ends its answers itself; it takes no --json-schema")
        sampler = sampling.tool_sampler(how, stop, loaded.args.vocab_size)
        told = asked if as_json else None
        _answer(loaded, tokenizer, text, max_tokens, sampler, told, show_tools, prefill_step_size)
        return
    tokens: Iterator[str] | str | list[int] = text
    seen: dict[str, Any] = {}
    end = deque[str](maxlen=SHOWN + 1)
    if sees is not None and image is not None:
        from mlx_pararnn.images.use import image_prompt

        tokens, seen["input_embeddings"] = image_prompt(sees, tokenizer, image, text)
        asked["image"] = str(image)
    elif answers:
        tokens = render(tokenizer, [{"role": "user", "content": text}])
    elif continues:
        tokens = _noted(blocks, end) if sys.stdout.isatty() else blocks
    chosen = sampling.sampler(how, loaded.args.vocab_size)

    from .progress import PromptProgress

    pieces, ids = [], []
    with PromptProgress() as progress:
        for response in stream_generate(
            loaded,
            tokenizer,
            tokens,
            max_tokens or options.MAX_TOKENS,
            stop=stop or (),
            json_schema=schema,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=progress,
            **chosen,
            **seen,
        ):
            if end:
                _show_dimly("".join(end))
                end.clear()
            pieces.append(response.text)
            ids.append(response.token)
            if not as_json:
                print(response.text, end="", flush=True)
    if as_json:
        print(
            json.dumps(
                {
                    **asked,
                    "text": "".join(pieces),
                    "tokens": ids,
                    "finish_reason": response.finish_reason,
                    "prompt_tokens": response.prompt_tokens,
                    "prompt_tps": response.prompt_tps,
                    "generation_tokens": response.generation_tokens,
                    "generation_tps": response.generation_tps,
                }
            )
        )
        return
    print(flush=True)  # before what follows on stderr
    print(
        f"prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s; "
        f"generated: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s "
        f"({response.finish_reason})",
        file=sys.stderr,
    )


def _load(
    image: Path | None, model: str | None, *how: Any
) -> "tuple[ImageModel | None, Model, TokenizerWrapper]":
    """The model that sees, if there is an image to see; its language model; and the tokenizer."""
    if image is None:
        return None, *options.load(model, *how)
    sees, tokenizer = options.load_image_model(model, *how)
    return sees, sees.language_model, tokenizer


def _blocks(prompt: str | None, file: Path | None, most: int | None) -> Iterator[str]:
    """The text to continue: the file's or what is piped in, and after it on a new line the prompt's."""
    if file is not None:
        yield from options.read_file(file, most)
        if prompt is not None:
            yield "\n"
            yield from options.read_stdin(most) if prompt == "-" else [prompt]
    elif prompt in (None, "-"):
        yield from options.read_stdin(most)
    else:
        piped = False
        for block in options.read_piped(most):
            piped = piped or block != ""
            yield block
        yield f"\n{prompt}" if piped else prompt or ""


def _noted(blocks: Iterator[str], end: deque[str]) -> Iterator[str]:
    """The same blocks; their last characters stay in `end`."""
    for block in blocks:
        end.extend(block)
        yield block


def _show_dimly(text: str) -> None:
    """What a text ends with, before what continues it."""
    if len(text) > SHOWN:
        text = f"…{text[1:]}"
    typer.secho(text, dim=True, nl=False)


def _schema(given: str) -> dict[str, Any]:
    """A JSON schema from its text, or from a file."""
    text, where = given, "--json-schema"
    if not given.lstrip().startswith("{"):
        text, where = "".join(options.read_file(Path(given), options.MAX_TEXT_BYTES)), given
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PararnnError(f"{where} is not JSON ({error})") from None
    if not isinstance(schema, dict):
        raise PararnnError(
            f"{where} is not a JSON schema: it must be an object, as in " + '{"type": "object"}'
        )
    return schema


def _continue_ids(
    model: str | None,
    modules: list[str] | None,
    changes: tuple[Path | None, Path | None],
    given: str,
    max_tokens: int | None,
    how: dict[str, Any],
    as_json: bool,
    prefill_step_size: int,
) -> None:
    """Token ids that follow token ids; no tokenizer is read."""
    try:
        prompt = [int(number) for number in given.replace(",", " ").split()]
    except ValueError:
        raise PararnnError(f'--tokens takes whole numbers, as in "105 109", and got {given[:60]!r}') from None
    loaded, config, path = options.load_model(model, modules, *changes)
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from mlx_pararnn.distributed import rank_0_samples
    from mlx_pararnn.generation import check_tokens, find_room, likeliest

    check_tokens(prompt, loaded.args.vocab_size)
    room = find_room(loaded, len(prompt))
    limit = max_tokens or options.MAX_TOKENS
    chosen = sampling.sampler(sampling.choose_sampling(path, sampling.LIKELIEST, how), loaded.args.vocab_size)
    chosen["sampler"] = rank_0_samples(loaded.group, chosen.get("sampler") or likeliest)
    steps = generate_step(
        mx.array(prompt),
        loaded,
        max_tokens=limit if room is None else min(limit, room),
        prefill_step_size=prefill_step_size,
        **chosen,
    )
    ends = config.get("eos_token_id")
    ids: list[int] = []
    for token, _ in steps:
        ids.append(int(token))
        if not as_json:
            print(ids[-1], end=" ", flush=True)
        if ids[-1] in (ends if isinstance(ends, list) else [ends]):
            break
    asked = {"model": model or path.name, "prompt": prompt, "seed": how["seed"]}
    print(json.dumps({**asked, "tokens": ids}) if as_json else "")


def _answer(
    model: Any,
    tokenizer: Any,
    message: str,
    max_tokens: int | None,
    sampler: Any,
    asked: dict[str, Any] | None,
    show_tools: bool,
    prefill_step_size: int,
) -> None:
    """The answer of a model that uses tools; with `asked`, as JSON after those fields."""
    from mlx_pararnn.pocket.answers import stream_answer
    from mlx_pararnn.pocket.events import Call, Finish, Result, Text
    from mlx_pararnn.pocket.loop import Limits

    from .progress import PromptProgress

    limits = Limits() if max_tokens is None else Limits(answer=max_tokens)
    pieces: list[str] = []
    calls: list[dict[str, Any]] = []
    with PromptProgress() as progress, ToolLines(show_tools) as lines:
        for event in stream_answer(
            model,
            tokenizer,
            message,
            limits=limits,
            sampler=sampler,
            progress=progress,
            prefill_step_size=prefill_step_size,
        ):
            lines.show(event)
            if isinstance(event, Text):
                pieces.append(event.text)
                if asked is None:
                    print(event.text, end="", flush=True)
            elif isinstance(event, Call):
                calls.append({"name": event.name, "arguments": event.arguments})
            elif isinstance(event, Result):
                calls[-1] |= {"result": event.text, "failed": event.failed}
    assert isinstance(event, Finish)
    if asked is not None:
        found = {**asked, "text": "".join(pieces), "finish_reason": event.reason, "calls": calls}
        print(json.dumps({**found, "tokens": event.tokens, "made": event.made, "seconds": event.seconds}))
    else:
        print(flush=True)  # before what follows on stderr
        say_why(event.reason)
        print(f"{event.tokens:,} tokens in {event.seconds:.2f} s ({event.reason})", file=sys.stderr)
    if event.reason != "stop" and not (event.reason == "length" and max_tokens):
        raise typer.Exit(1)
