"""MLX-LM's generator, with what its command lines lack: stop strings, and the end of learned positions."""

import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse, TextStateMachine
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import PararnnError
from .model import Model


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    *,
    stop: str | Sequence[str] = (),
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text piece by piece: `mlx_lm.stream_generate` for ParaRNN models.

    Where a sequence reaches the last learned position of a model that has them, generation stops with
    finish_reason "length" and one sentence on stderr.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: text or token ids.
        max_tokens: at most so many tokens; -1 for no limit.
        stop: a string, or several, that end the text; they are not part of it.
        kwargs: mlx_lm's: sampler, logits_processors, prompt_cache, prefill_step_size, ...

    Yields:
        mlx_lm's GenerationResponse: the piece of text, token, tokens per second, finish_reason ("stop",
        "length", or None if more follows).

    Raises:
        PararnnError: the prompt is empty, holds a token id that the model does not have, or leaves no
            position to generate at.
    """
    tokens = _encode(tokenizer, prompt)
    _check_tokens(tokens, model.args.vocab_size)
    room = _room(model, tokens, kwargs.get("prompt_cache"))
    limited = room is not None and not 0 <= max_tokens <= room
    responses = mlx_lm_stream_generate(
        model, tokenizer, mx.array(tokens), max_tokens=cast(int, room) if limited else max_tokens, **kwargs
    )
    finish_reason = None
    stop = [stop] if isinstance(stop, str) else [word for word in stop if word]
    for response in _until(responses, stop) if stop else responses:
        finish_reason = response.finish_reason
        yield response
    if limited and finish_reason == "length":
        print(
            f"stopped: the model's {model.args.max_position_embeddings} learned positions are used up",
            file=sys.stderr,
        )


def generate(
    model: Model, tokenizer: TokenizerWrapper, prompt: str | mx.array | list[int], **kwargs: Any
) -> str:
    """The text that `stream_generate` yields, in one piece; same arguments."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **kwargs))


def check_text(text: str) -> None:
    """Raise PararnnError for a text that holds bytes which were no UTF-8 (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PararnnError(
            "the prompt is not UTF-8 text; convert it first, for instance with iconv"
        ) from None


def _until(
    responses: Generator[GenerationResponse, None, None], stop: Sequence[str]
) -> Generator[GenerationResponse, None, None]:
    """Responses up to the first stop string; text that may be the start of one is held back."""
    machine = TextStateMachine({"text": [(word, None) for word in stop]})
    state = machine.make_state("text")
    for response in responses:
        state, segments = machine.split(state, response.text)
        text = "".join(part for _, part in segments)
        if state[0] is None:
            yield replace(response, text=text, finish_reason="stop")
            return
        if response.finish_reason is not None:
            state, held_back, _ = machine.flush(state)
            text += held_back
        yield replace(response, text=text)


def _encode(tokenizer: TokenizerWrapper, prompt: str | mx.array | list[int]) -> list[int]:
    """Token ids of a prompt; a text that starts with the beginning-of-sequence token gets no second one."""
    if not isinstance(prompt, str | list):
        prompt = cast(list[int], np.array(prompt).reshape(-1).tolist())  # an array of MLX or NumPy
    if isinstance(prompt, str):
        check_text(prompt)
        bos = tokenizer.bos_token
        tokens: list[int] = tokenizer.encode(
            prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
        )
        return tokens
    return list(prompt)


def _check_tokens(tokens: list[int], vocab_size: int) -> None:
    if not tokens:
        raise PararnnError("the prompt is empty; give at least one token")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise PararnnError(
                f"the prompt holds token id {token}, but the model has ids 0 to {vocab_size - 1}; use "
                "the tokenizer that the model was trained with"
            )


def _room(model: Model, tokens: list[int], cache: list[Any] | None) -> int | None:
    """How many tokens can follow the prompt; None if there is no end."""
    positions = model.args.max_position_embeddings
    if positions is None:
        return None
    taken = len(tokens) + (cache[0].offset if cache else 0)
    if taken >= positions:
        raise PararnnError(
            f"no room to generate: the text so far takes {taken} of the model's {positions} learned "
            "positions; shorten the prompt, or reset the chat"
        )
    return positions - taken
