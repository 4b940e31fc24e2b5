"""The rows that generate together, by MLX-LM's batch generator."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

from ...cache import RecurrentCache
from ...mlx_lm_internals import BatchGenerator
from ..prompt_cache import PromptCache
from .jobs import Job
from .reading import READ_STEP
from .samplers import SeededSampler


@dataclass(frozen=True)
class Token:
    """A token of a job; with a `finish_reason` the row has left the batch."""

    job: Job
    id: int
    logprobs: mx.array
    finish_reason: str | None


class Batch:
    """Jobs as rows of one generator.

    Args:
        model: generates.
        end_tokens: ids that end a row.
        size: rows that generate together.
        prompts: keeps what rows have read when they leave.
    """

    def __init__(self, model: Any, end_tokens: set[int], size: int, prompts: PromptCache) -> None:
        self._prompts = prompts
        self._jobs: dict[int, Job] = {}
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in end_tokens],
            completion_batch_size=size,
            prefill_step_size=READ_STEP,
        )

    @property
    def jobs(self) -> list[Job]:
        """The jobs that generate."""
        return list(self._jobs.values())

    def insert(self, job: Job) -> None:
        """A row for a job, which first reads the rest of its prompt."""
        read = job.cache[0].offset if job.cache else 0
        if isinstance(job.sampler, SeededSampler):
            job.sampler.position = job.completion_tokens
        rest = job.tokens[read:]
        cuts = [0, *([job.system_length - read] if job.system_length > read else []), len(rest)]
        (uid,) = self._generator.insert_segments(
            [[rest[begin:end] for begin, end in pairwise(cuts)]],
            max_tokens=[job.max_tokens - job.completion_tokens],
            caches=[job.cache],  # type: ignore[list-item]  # None makes a new one
            all_tokens=[job.tokens[:read]],
            samplers=[job.sampler],
            logits_processors=[[job.guarded(processor) for processor in job.processors]],
        )
        job.cache = None
        self._jobs[uid] = job

    def step(self) -> list[Token]:
        """One token of each row that has read its prompt."""
        read, generated = self._generator.next()
        for response in read:
            job = self._jobs.get(response.uid)
            if response.end_of_segment and not response.end_of_prompt and job is not None:
                cache, tokens = self._generator.extract_cache([response.uid])[response.uid]
                self._prompts.insert_cache("", job.key(list(tokens)), cache)
        made = []
        for response in generated:
            job = self._jobs.get(response.uid)
            if job is None:
                continue
            if response.finish_reason is not None:
                del self._jobs[response.uid]
                self._prompts.insert_cache("", job.key(list(response.all_tokens)), response.prompt_cache)
            made.append(Token(job, response.token, response.logprobs, response.finish_reason))
        return made

    def remove(self, job: Job) -> None:
        """A row leaves for good; its state is kept for other prompts."""
        cache, tokens = self._take_out(job)
        if cache and tokens:
            self._prompts.insert_cache("", job.key(tokens), cache)

    def suspend(self, job: Job) -> None:
        """A row leaves, and can be inserted again to go on."""
        cache, tokens = self._take_out(job)
        if len(tokens) > len(job.tokens):  # else it has not begun: its prompt is read as if new
            job.tokens = tokens
        # The token that would come next is lost with the row, and what it has read cannot be asked again for
        # it: the row goes on from a snapshot before its end.
        places = [p for p in cache[0].positions() if p < len(job.tokens)] if cache else [0]
        job.cache = [layer.at(places[-1]) for layer in cache] if places[-1] else None

    def _take_out(self, job: Job) -> tuple[list[RecurrentCache], list[int]]:
        uid = next(uid for uid, other in self._jobs.items() if other is job)
        del self._jobs[uid]
        cache, tokens = self._generator.remove([uid], return_prompt_caches=True)[uid]
        return cache, list(tokens)
