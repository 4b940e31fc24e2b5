"""Reading a prompt piece by piece, so that other answers go on between its pieces."""

from collections.abc import Iterator

from ...images.image_model import ImageModel
from ...images.image_prompts import embeddings
from ...text.detokenizer import Detokenizer
from .batch import READ_STEP, Batch
from .jobs import Job, TokenInfo, token_info

SCORE_STEP = 128  # tokens that are read at a time where the logits of each are needed


def read(job: Job, batch: Batch, images: ImageModel | None = None) -> Iterator[None]:
    """Read a long prompt but for a short rest, which the batch reads along with its rows.

    All of a prompt up to the end of its last image is read here: rows take tokens alone.
    """
    while (begin := job.read) < job.images_end or len(job.tokens) - begin > 2 * READ_STEP:
        end, embedded = begin + READ_STEP, None
        if begin < job.images_end:
            assert images is not None
            end = min(end, job.images_end)
        if begin < job.system_length < end:
            end = job.system_length
        if begin < job.images_end and images is not None:
            embedded = embeddings(images, job.tokens, job.seen, begin, end)[None]
        batch.read(job, end, embedded)
        yield


def score(job: Job, batch: Batch, detokenizer: Detokenizer) -> Iterator[list[TokenInfo]]:
    """Read a prompt but for its last token; gives each token's log probability after those before it.

    Args:
        detokenizer: a new one, which tells where each token's text begins.
    """
    tokens, position = job.prompt, 0

    def offset(token: int) -> int:
        nonlocal position
        begin = position
        detokenizer.add_token(token)
        position += len(detokenizer.last_segment)
        return begin

    infos = [TokenInfo(tokens[0], None, offset=offset(tokens[0]))]
    while (begin := job.read) < len(tokens) - 1:
        end = min(begin + SCORE_STEP, len(tokens) - 1)
        logprobs = batch.score(job, end)
        for token, row in zip(tokens[begin + 1 : end + 1], logprobs, strict=True):
            infos.append(token_info(token, row, job.top_logprobs or 0, offset(token)))
        yield infos
        infos = []
    if infos:  # a prompt of one token
        yield infos
    job.score_prompt = False
