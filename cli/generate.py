"""`mlx-pararnn generate`: continue a prompt."""

import json
import sys
from typing import Annotated, Any

import typer

from . import options
from .report import Debug, reports_errors
from .tool_lines import ShowTools, ToolLines, say_why


@reports_errors
def generate(
    model: options.ModelPath = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The text to continue; '-', or nothing, reads standard input."),
    ] = None,
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template",
            help="Continue the text itself, even if the tokenizer has a chat template.",
        ),
    ] = False,
    max_tokens: options.MaxTokens = None,
    temp: options.TempOrModels = None,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
    show_tools: ShowTools = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Continue a prompt, or answer it where the model uses tools: text to stdout, statistics to stderr.

    Example: mlx-pararnn generate my-model -p "Once upon a time" --temp 0.8 --seed 1
    """
    loaded, tokenizer = options.load(model, modules)
    from mlx_pararnn.generation import render, stream_generate
    from mlx_pararnn.pocket.protocol import find_protocol

    text = options.read_stdin() if prompt in (None, "-") else prompt or ""
    if find_protocol(tokenizer) is not None and not ignore_chat_template:
        sampler = options.tool_sampling(
            temp, top_p, top_k, min_p, repetition_penalty, seed, stop, loaded, tokenizer
        )
        _answer(loaded, tokenizer, text.removesuffix("\n"), max_tokens, sampler, as_json, show_tools)
        return
    tokens: str | list[int] = text
    if tokenizer.has_chat_template and not ignore_chat_template:
        tokens = render(tokenizer, [{"role": "user", "content": text}])
    chosen = options.sampling(
        temp or 0.0, top_p, top_k, min_p, repetition_penalty, seed, loaded.args.vocab_size
    )

    from .progress import PromptProgress

    pieces, ids = [], []
    with PromptProgress() as progress:
        for response in stream_generate(
            loaded,
            tokenizer,
            tokens,
            max_tokens or options.MAX_TOKENS,
            stop=stop or (),
            prompt_progress_callback=progress,
            **chosen,
        ):
            pieces.append(response.text)
            ids.append(response.token)
            if not as_json:
                print(response.text, end="", flush=True)
    if as_json:
        print(
            json.dumps(
                {
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
    print()
    print(
        f"prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s; "
        f"generated: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s "
        f"({response.finish_reason})",
        file=sys.stderr,
    )


def _answer(
    model: Any,
    tokenizer: Any,
    message: str,
    max_tokens: int | None,
    sampler: Any,
    as_json: bool,
    show_tools: bool,
) -> None:
    """The answer of a model that uses tools."""
    from mlx_pararnn.pocket.answers import stream_answer
    from mlx_pararnn.pocket.events import Call, Finish, Result, Text
    from mlx_pararnn.pocket.loop import Limits

    from .progress import PromptProgress

    limits = Limits() if max_tokens is None else Limits(answer=max_tokens)
    pieces: list[str] = []
    calls: list[dict[str, Any]] = []
    with PromptProgress() as progress, ToolLines(show_tools) as lines:
        for event in stream_answer(
            model, tokenizer, message, limits=limits, sampler=sampler, progress=progress
        ):
            lines.show(event)
            if isinstance(event, Text):
                pieces.append(event.text)
                if not as_json:
                    print(event.text, end="", flush=True)
            elif isinstance(event, Call):
                calls.append({"name": event.name, "arguments": event.arguments})
            elif isinstance(event, Result):
                calls[-1] |= {"result": event.text, "failed": event.failed}
    assert isinstance(event, Finish)
    if as_json:
        found = {"text": "".join(pieces), "finish_reason": event.reason, "calls": calls}
        print(json.dumps({**found, "tokens": event.tokens, "made": event.made, "seconds": event.seconds}))
        return
    print()
    say_why(event.reason)
    print(f"{event.tokens:,} tokens in {event.seconds:.2f} s ({event.reason})", file=sys.stderr)
