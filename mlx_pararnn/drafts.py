"""Speculative decoding of a batch: a small model guesses for each row, the large one checks all at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from .cache import RecurrentCache
from .errors import PararnnError
from .generation import check_tokens, find_room
from .model import Model

READ_STEP = 512  # tokens of a prompt that are read at once
NO_END = 2**62  # room where there are no learned positions


@dataclass
class Drafted:
    """What a row got.

    Attributes:
        tokens: those generated; an end token is the last.
        guessed: how many of them were guesses of the draft.
        rounds: calls of the model that they took.
    """

    tokens: list[int]
    guessed: int = 0
    rounds: int = 0


def generate_with_draft(
    model: Model,
    draft: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 256,
    *,
    num_draft_tokens: int = 3,
    end_tokens: Iterable[int] = (),
) -> list[Drafted]:
    """The likeliest tokens after several prompts, which generate together, by speculative decoding.

    In a round the draft makes `num_draft_tokens` guesses for each row, and the model reads them all in one
    call. Each row keeps as many as are the model's own choices, and the model's next token after them; both
    states of the row go back to where that ends (`RecurrentCache.rewind`), the very states that were computed
    there. Rows go on by steps of their own, without padding: a recurrent state has no places in common. The
    tokens are those that the model gives without a draft, but for ties within rounding.

    Args:
        model: whose tokens are wanted.
        draft: a smaller model with the same tokens.
        prompts: token ids of each row.
        max_tokens: of each row, at most.
        num_draft_tokens: guesses a round, 1 or more.
        end_tokens: ids that end a row.

    Raises:
        PararnnError: a prompt is empty, holds an id that the model does not have, or leaves no position; the
            draft has another vocabulary; a number is out of range; the model is divided among processes.
    """
    if draft.args.vocab_size != model.args.vocab_size:
        raise PararnnError(
            f"the draft has a vocabulary of {draft.args.vocab_size} tokens and the model one of "
            f"{model.args.vocab_size}; both need the same tokenizer"
        )
    if num_draft_tokens < 1 or max_tokens < 1:
        raise PararnnError("num_draft_tokens and max_tokens must be at least 1")
    if model.group is not None or draft.group is not None:
        raise PararnnError("a draft model is not taken by a model that is divided among processes")
    ends, limits, rooms = set(end_tokens), [], []
    for prompt in prompts:
        check_tokens(list(prompt), model.args.vocab_size)
        found = [find_room(m, len(prompt)) for m in (model, draft)]
        rooms.append(min((room for room in found if room is not None), default=NO_END))
        limits.append(min(max_tokens, rooms[-1]))
    results = [Drafted([]) for _ in prompts]
    if not results:
        return results
    rows = list(range(len(prompts)))  # those that are not at their end
    caches = [_read(m, prompts) for m in (model, draft)]
    last = [prompt[-1] for prompt in prompts]
    while rows:
        made = {row: len(results[row].tokens) for row in rows}
        wanted = max(limits[row] - made[row] for row in rows)
        count = min([num_draft_tokens, wanted, *(rooms[row] - made[row] for row in rows)])
        for layer in (*caches[0], *caches[1]):
            layer.remember(count, layer.spacing)
        guesses = _guess(draft, caches[1], last, count)
        inputs = mx.concatenate([mx.array(last)[:, None], guesses], axis=1)
        chosen = mx.argmax(model(inputs, cache=caches[0]), axis=-1)
        mx.eval(guesses, chosen)
        made_and_right = [cast(list[list[int]], array.tolist()) for array in (guesses, chosen)]
        back, going_on, last = [], [], []
        for n, (guessed, right) in enumerate(zip(*made_and_right, strict=True)):
            result, limit = results[rows[n]], limits[rows[n]]
            result.rounds += 1
            kept = next((k for k in range(count) if guessed[k] != right[k]), count)
            for k, token in enumerate(right[: kept + 1]):
                result.tokens.append(token)
                result.guessed += k < kept
                if token in ends or len(result.tokens) == limit:
                    break
            else:
                going_on.append(n)
                last.append(right[kept])
            back.append(count - kept)
        for cache in caches:
            for layer in cache:
                layer.rewind(back)
                if len(going_on) < len(rows):
                    layer.filter(going_on)
        rows = [rows[n] for n in going_on]
    return results


def _read(model: Model, prompts: Sequence[Sequence[int]]) -> list[RecurrentCache]:
    """The states after all of each prompt but its last token, which the first round reads."""
    rows = []
    for prompt in prompts:
        cache = model.make_cache()
        for begin in range(0, len(prompt) - 1, READ_STEP):
            model(mx.array([prompt[begin : min(begin + READ_STEP, len(prompt) - 1)]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        rows.append(cache)
    return [RecurrentCache.merge(layers) for layers in zip(*rows, strict=True)]


def _guess(draft: Model, cache: list[RecurrentCache], last: list[int], count: int) -> mx.array:
    """Guesses (B, count), all of which the draft has read."""
    token, guesses = mx.array(last)[:, None], []
    for _ in range(count):
        token = mx.argmax(draft(token, cache=cache), axis=-1)
        mx.async_eval(token)
        guesses.append(token)
    draft(token, cache=cache)
    return mx.concatenate(guesses, axis=1)
