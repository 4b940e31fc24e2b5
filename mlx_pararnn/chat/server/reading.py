"""Reading a prompt piece by piece, so that other answers go on between its pieces."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ...images.image_model import ImageModel
from ...images.image_prompts import embeddings
from ...text.detokenizer import Detokenizer
from ..prompt_cache import PromptCache
from .jobs import Job, TokenInfo, token_info

READ_STEP = 512  # tokens of a prompt that are read between two steps of the others
SCORE_STEP = 128  # the same where the logits of each are needed


def read(job: Job, model: Any, prompts: PromptCache, images: ImageModel | None = None) -> Iterator[None]:
    """Read a long prompt but for a short rest, which the batch reads; `prompts` keeps the system part.

    All of a prompt up to the end of its last image is read here: the batch takes tokens alone.
    """
    cache = job.cache or model.make_cache()
    while (begin := cache[0].offset) < job.images_end or len(job.tokens) - begin > 2 * READ_STEP:
        end, more = begin + READ_STEP, {}
        if begin < job.images_end:
            assert images is not None
            end = min(end, job.images_end)
        if begin < job.system_length < end:
            end = job.system_length
        if begin < job.images_end and images is not None:
            more["input_embeddings"] = embeddings(images, job.tokens, job.seen, begin, end)[None]
        model(mx.array([job.tokens[begin:end]]), cache=cache, **more)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if end == job.system_length:
            prompts.insert_cache("", job.key(job.tokens[:end]), cache)
        yield
    if cache[0].offset:
        job.cache = cache


def score(job: Job, model: Any, detokenizer: Detokenizer) -> Iterator[list[TokenInfo]]:
    """Read a prompt but for its last token; gives each token's log probability after those before it.

    Args:
        detokenizer: a new one, which tells where each token's text begins.
    """
    cache, tokens, position = model.make_cache(), job.prompt, 0

    def offset(token: int) -> int:
        nonlocal position
        begin = position
        detokenizer.add_token(token)
        position += len(detokenizer.last_segment)
        return begin

    infos = [TokenInfo(tokens[0], None, offset=offset(tokens[0]))]
    while (begin := cache[0].offset) < len(tokens) - 1:
        end = min(begin + SCORE_STEP, len(tokens) - 1)
        logits = model(mx.array([tokens[begin:end]]), cache=cache)[0].astype(mx.float32)
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for token, row in zip(tokens[begin + 1 : end + 1], logprobs, strict=True):
            infos.append(token_info(token, row, job.top_logprobs or 0, offset(token)))
        yield infos
        infos = []
    if infos:  # a prompt of one token
        yield infos
    job.score_prompt = False
    if len(tokens) > 1:
        job.cache = cache
