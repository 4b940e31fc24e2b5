"""MLX-LM's generator, with what it lacks: stop strings, the end of learned positions, drafts that rewind."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cache import RECENT_STEPS
from .distributed import rank_0_samples
from .errors import PararnnError, one_line
from .model import Model
from .text.detokenizer import Detokenizer, StopMatcher
from .text.pieces import encode_in_pieces, has_bytes_alone

logger = logging.getLogger(__name__)

COLDEST = 1e-20  # dividing by a lower temperature overflows: the likeliest token is taken, as at 0
KEPT = 2048  # tokens of a prompt in pieces that logits processors see, besides the last that were not read

Prompt: TypeAlias = str | mx.array | list[int] | Iterator[str]


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    stop: str | Sequence[str] = (),
    json_schema: dict[str, Any] | None = None,
    draft_model: Model | None = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generate text piece by piece: `mlx_lm.stream_generate` for ParaRNN models.

    Where a sequence reaches the last learned position of a model that has them, generation stops with
    finish_reason "length" and a sentence in the log.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: text, token ids, or an iterator of texts, as an open file is, which are one text. Where tokens
            are bytes (`text.pieces.has_bytes_alone`) these are read one after another and not kept, so that
            a text of any length takes constant memory; logits processors then see its last tokens alone,
            2,048 or more, and prompt_progress_callback has None for the number of all. Else, and with a
            draft, they are joined. A prompt_cache has then read what stands before an error in them.
        max_tokens: at most so many tokens; -1 for no limit, as MLX-LM has it.
        stop: a string, or several, that end the text; they are not part of it.
        json_schema: the text is JSON that fits this schema, whatever the model would say, and ends where the
            JSON does. Where `max_tokens` ends it before, a sentence in the log says so.
        draft_model: a smaller model with the same tokens, whose guesses the model checks several at a time
            (`num_draft_tokens`, 2 if not given). The tokens are those that the model gives without it.
        kwargs: mlx_lm's: sampler, logits_processors, prompt_cache, prefill_step_size, ...

    Yields:
        mlx_lm's GenerationResponse: the piece of text, token, tokens per second, finish_reason ("stop",
        "length", or None if more follows).

    Raises:
        PararnnError: the prompt is empty, holds a token id that the model does not have, or leaves no
            position to generate at; max_tokens is 0 or below -1; the draft has another vocabulary; the schema
            cannot be kept to, or not together with a draft.
    """
    check_max_tokens(max_tokens)
    matcher = None
    if json_schema is not None:
        if draft_model is not None:
            raise PararnnError("json_schema and draft_model are not taken together; leave one out")
        matcher, processor_of = _grammar_of(json_schema, tokenizer, model.args.vocab_size)
    read, seconds, before = 0, 0.0, list[int]()
    if isinstance(prompt, Iterator):
        whole = draft_model is not None or kwargs.get("input_embeddings") is not None
        if whole or not reads_in_pieces(tokenizer):
            prompt = "".join(prompt)
        else:
            read, seconds, before, prompt = _read_in_pieces(model, tokenizer, prompt, kwargs)
    tokens = encode(tokenizer, prompt)
    check_tokens(tokens, model.args.vocab_size)
    cache = kwargs.get("prompt_cache")
    taken = len(tokens) + (cache[0].offset if cache else 0)
    room = find_room(model, taken)
    if draft_model is not None:
        kwargs.update(_for_draft(model, draft_model, cache, kwargs.get("num_draft_tokens")))
        rooms = [r for r in (room, find_room(draft_model, taken)) if r is not None]
        room = min(rooms, default=None)
    processors = list(kwargs.get("logits_processors") or [])
    if matcher is not None:
        processors.append(processor_of(len(before) + len(tokens)))
    if before:
        processors = [_after(before, process) for process in processors]
    kwargs["logits_processors"] = processors
    if model.group is not None:
        if draft_model is not None:
            raise PararnnError("a draft model is not taken by a model that is divided among processes")
        kwargs["sampler"] = rank_0_samples(model.group, kwargs.get("sampler") or likeliest)
    limited = room is not None and not 0 <= max_tokens <= room
    responses = mlx_lm_stream_generate(
        model, tokenizer, mx.array(tokens), max_tokens=cast(int, room) if limited else max_tokens, **kwargs
    )
    if model.group is not None:
        responses = _settled(responses)
    if read:
        responses = _with_read(responses, read, seconds)
    responses = _texts(responses, tokenizer, tokens)
    if matcher is not None:
        responses = _until_complete(responses, matcher)
    finish_reason = None
    stop = [stop] if isinstance(stop, str) else [word for word in stop if word]
    for response in _until(responses, stop) if stop else responses:
        finish_reason = response.finish_reason
        yield response
    if limited and finish_reason == "length":
        logger.warning(
            "stopped: the model's %d learned positions are used up", model.args.max_position_embeddings
        )


def _settled(
    responses: Generator[GenerationResponse, None, None],
) -> Generator[GenerationResponse, None, None]:
    """Responses, each once the step after it has ended, which MLX-LM begins before it gives one.

    What processes tell each other keeps its order on one stream only, and MLX-LM's steps have their own.
    """
    for response in responses:
        mx.synchronize(generation_stream)
        yield response


def likeliest(logprobs: mx.array) -> mx.array:
    """The sampler that takes the likeliest token, as MLX-LM does without one."""
    return mx.argmax(logprobs, axis=-1)


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: Prompt, **kwargs: Any) -> str:
    """The text that `stream_generate` yields, in one piece; same arguments."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **kwargs))


def check_max_tokens(max_tokens: int) -> None:
    """Raise PararnnError for a limit that is none: 0, or below MLX-LM's -1 for no limit."""
    if max_tokens == 0 or max_tokens < -1:
        raise PararnnError(f"max_tokens must be at least 1, or -1 for no limit, and it is {max_tokens}")


def check_text(text: str) -> None:
    """Raise PararnnError for a text that holds bytes which were no UTF-8 (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PararnnError(
            "the prompt is not UTF-8 text; convert it first, for instance with iconv"
        ) from None


def reads_in_pieces(tokenizer: TokenizerWrapper) -> bool:
    """Whether a text of any length takes constant memory with this tokenizer."""
    return has_bytes_alone(getattr(tokenizer, "backend_tokenizer", None))


def _read_in_pieces(
    model: Model, tokenizer: TokenizerWrapper, texts: Iterator[str], kwargs: dict[str, Any]
) -> tuple[int, float, list[int], list[int]]:
    """Read a text but for its last tokens, from which MLX-LM goes on, in the steps in which it would.

    Args:
        kwargs: MLX-LM's; the cache is there afterwards, and its progress counts on from what was read.

    Returns:
        How many tokens were read, in how many seconds, the last of them, and the tokens that follow.
    """

    def checked() -> Iterator[str]:
        for text in texts:
            check_text(text)
            yield text

    cache = kwargs["prompt_cache"] = kwargs.get("prompt_cache") or model.make_cache()
    step = kwargs.get("prefill_step_size", 2048)  # MLX-LM's
    progress = kwargs.get("prompt_progress_callback") or (lambda done, total: None)
    read, seconds, rest = 0, 0.0, list[int]()
    before = deque[int](maxlen=KEPT)
    progress(0, None)
    with wired_limit(model):
        for piece in encode_in_pieces(tokenizer.backend_tokenizer, checked()):
            rest += piece
            if piece:
                check_tokens(piece, model.args.vocab_size)
            find_room(model, cache[0].offset + len(rest))
            end = (len(rest) - 1) // step * step  # one at least is left
            for begin in range(0, end, step):
                tokens, tic = rest[begin : begin + step], time.perf_counter()
                with mx.stream(generation_stream):
                    model(mx.array([tokens]), cache=cache)
                    mx.eval([layer.state for layer in cache])
                mx.clear_cache()
                seconds += time.perf_counter() - tic
                before.extend(tokens)
                read += step
                progress(read, None)
            rest = rest[end:]
    kwargs["prompt_progress_callback"] = lambda done, total: progress(read + done, read + total)
    return read, seconds, list(before), rest


def _after(before: list[int], process: Callable[..., mx.array]) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that sees tokens before those which MLX-LM knows."""
    earlier = mx.array(before)
    return lambda tokens, logits: process(mx.concatenate([earlier, tokens]), logits)


def _with_read(
    responses: Generator[GenerationResponse, None, None], read: int, seconds: float
) -> Generator[GenerationResponse, None, None]:
    """The responses with the numbers of a prompt of which so many tokens were read before."""
    for response in responses:
        count = read + response.prompt_tokens
        took = seconds + response.prompt_tokens / response.prompt_tps
        yield replace(response, prompt_tokens=count, prompt_tps=count / took)


def _grammar_of(
    schema: dict[str, Any], tokenizer: TokenizerWrapper, vocab_size: int
) -> tuple[Any, Callable[[int], Any]]:
    """A matcher of a schema's JSON; by a prompt's length, the logits processor that lets such through."""
    from .text.grammars import GrammarProcessor, Grammars

    grammars = Grammars(tokenizer, vocab_size)
    matcher = grammars.compile(grammars.json(schema))
    return matcher, partial(GrammarProcessor, matcher.deep_copy())


def _until_complete(
    responses: Generator[GenerationResponse, None, None], matcher: Any
) -> Generator[GenerationResponse, None, None]:
    """Responses up to the one whose token completes what the grammar allows."""
    for response in responses:
        if response.finish_reason != "stop":
            matcher.consume_token(response.token)
        if matcher.is_stopped():
            yield replace(response, finish_reason="stop")
            return
        yield response
    if not matcher.is_accepting():
        logger.warning("stopped: the text ends before its JSON is complete; allow more tokens")


def _texts(
    responses: Generator[GenerationResponse, None, None], tokenizer: TokenizerWrapper, prompt: list[int]
) -> Generator[GenerationResponse, None, None]:
    """The responses with the text that goes on from the prompt's: prompt and text are the decoded whole."""
    detokenizer = Detokenizer(tokenizer, prompt)
    for response in responses:
        if response.finish_reason != "stop":  # that is the end token's, which is not part of the text
            detokenizer.add_token(response.token)
        if response.finish_reason is not None:
            detokenizer.finalize()
        yield replace(response, text=detokenizer.last_segment)


def _until(
    responses: Generator[GenerationResponse, None, None], stop: Sequence[str]
) -> Generator[GenerationResponse, None, None]:
    """Responses up to the first stop string; text that may be the start of one is held back."""
    matcher = StopMatcher(stop)
    for response in responses:
        text = matcher.add(response.text)
        if matcher.found is not None:
            yield replace(response, text=text, finish_reason="stop")
            return
        if response.finish_reason is not None:
            text += matcher.flush()
        yield replace(response, text=text)


def _for_draft(
    model: Model, draft: Model, cache: list[Any] | None, num_draft_tokens: int | None
) -> dict[str, Any]:
    """MLX-LM's arguments for speculative decoding, with states that remember as many steps as are guessed."""
    if draft.args.vocab_size != model.args.vocab_size:
        raise PararnnError(
            f"the draft has a vocabulary of {draft.args.vocab_size} tokens and the model one of "
            f"{model.args.vocab_size}; both need the same tokenizer"
        )
    if cache is None:
        cache = [*model.make_cache(), *draft.make_cache()]
        for c in cache:
            c.remember(max(RECENT_STEPS, num_draft_tokens or 0), c.spacing)
    return {"draft_model": draft, "prompt_cache": cache}


def encode(tokenizer: TokenizerWrapper, prompt: str | mx.array | list[int]) -> list[int]:
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


def render(tokenizer: TokenizerWrapper, messages: list[dict[str, str]], tokenize: bool = True) -> Any:
    """Messages as the chat template writes them, up to where the model answers: token ids, or text.

    Raises:
        PararnnError: the template is no valid one, fails on these messages, or takes too much memory or time.
    """
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize)
    except PararnnError:
        raise
    except Exception as error:  # a template is a program, which raises what it likes
        raise PararnnError(
            f"the chat template in {tokenizer.name_or_path} fails ({one_line(error)}); correct "
            "chat_template.jinja or tokenizer_config.json, or remove the template"
        ) from error


def check_tokens(tokens: list[int], vocab_size: int) -> None:
    """Raise PararnnError for a prompt that is empty or holds ids that the model does not have."""
    if not tokens:
        raise PararnnError("the prompt is empty; give at least one token")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise PararnnError(
                f"the prompt holds token id {token}, but the model has ids 0 to {vocab_size - 1}; use "
                "the tokenizer that the model was trained with"
            )


def find_room(model: Model, taken: int) -> int | None:
    """How many tokens can follow `taken` ones; None if there is no end. Raises PararnnError if none can."""
    positions = model.args.max_position_embeddings
    if positions is None:
        return None
    if taken >= positions:
        raise PararnnError(
            f"no room to generate: the text so far takes {taken} of the model's {positions} learned "
            "positions; shorten the prompt, or reset the chat"
        )
    return positions - taken
