"""`mlx-pararnn generate`: continue a prompt."""

import json
import sys
from typing import Annotated

import typer

from . import options
from .report import Debug, reports_errors


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
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Continue a prompt: text to stdout as it comes, statistics to stderr.

    Example: mlx-pararnn generate my-model -p "Once upon a time" --temp 0.8 --seed 1
    """
    loaded, tokenizer = options.load(model, modules)
    from mlx_pararnn.generation import render, stream_generate

    text = options.read_stdin() if prompt in (None, "-") else prompt
    tokens: str | list[int] = text
    if tokenizer.has_chat_template and not ignore_chat_template:
        tokens = render(tokenizer, [{"role": "user", "content": text}])
    chosen = options.sampling(temp, top_p, top_k, min_p, repetition_penalty, seed, loaded.args.vocab_size)

    from .progress import PromptProgress

    pieces, ids = [], []
    with PromptProgress() as progress:
        for response in stream_generate(
            loaded,
            tokenizer,
            tokens,
            max_tokens,
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
