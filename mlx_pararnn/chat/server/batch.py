"""What is computed for jobs: prompts are read, and rows generate together by MLX-LM's batch generator."""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ...cache import RecurrentCache
from ...distributed import rank_0_samples
from ...mlx_lm_internals import BatchGenerator
from ..prompt_cache import PromptCache
from .jobs import Job
from .samplers import SeededSampler
from .together import Led, by_all

READ_STEP = 512  # tokens of a prompt that are read between two steps of the others
PAUSE = 0.1  # seconds; while others wait for rank 0 in MLX's ring they keep a core busy


@dataclass(frozen=True)
class Token:
    """A token of a job; with a `finish_reason` the row has left the batch."""

    job: Job
    id: int
    logprobs: mx.array
    finish_reason: str | None


class Batch(Led):
    """Jobs as rows of one generator; all use of the model that tokens alone are asked of.

    Where the model is divided among processes, its calls are made by all, and the tokens are rank 0's.

    Args:
        model: generates.
        end_tokens: ids that end a row.
        size: rows that generate together.
        prompts: keeps what rows have read when they leave.
    """

    def __init__(self, model: Any, end_tokens: set[int], size: int, prompts: PromptCache) -> None:
        super().__init__(model.group)
        self._model, self._prompts, self._group = model, prompts, model.group
        self._jobs: dict[int, Job] = {}
        self._next_rows: list[Job] = []  # of several processes: whose tokens are sampled next
        self._rows_sampler = rank_0_samples(self._group, self._sample)
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in end_tokens],
            completion_batch_size=size,
            prefill_step_size=READ_STEP,
            # What processes tell each other keeps its order on one stream only.
            stream=None if self._group is None else mx.default_stream(mx.default_device()),
        )

    @property
    def jobs(self) -> list[Job]:
        """The jobs that generate."""
        return list(self._jobs.values())

    @by_all
    def find(self, job: Job) -> None:
        """The stored state that has read most of a job's tokens, if there is one."""
        job.cache, _ = self._prompts.fetch_nearest_cache("", job.key(job.tokens))

    @by_all
    def read(self, job: Job, end: int, embeddings: mx.array | None = None) -> None:
        """Read a job's tokens up to `end`; the end of its system part is kept for other prompts.

        Args:
            embeddings: (1, T, D), used instead of the tokens' own.
        """
        job.cache = cache = job.cache or self._model.make_cache()
        tokens = mx.array([job.tokens[job.read : end]])
        self._model(tokens, cache=cache, input_embeddings=embeddings)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if end == job.system_length:
            self._prompts.insert_cache("", job.key(job.tokens[:end]), cache)

    @by_all
    def score(self, job: Job, end: int) -> np.ndarray:
        """Read a job's tokens up to `end`; the log probabilities (T, V) of what follows each, in float32."""
        job.cache = cache = job.cache or self._model.make_cache()
        logits = self._model(mx.array([job.tokens[job.read : end]]), cache=cache)[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    @by_all
    def insert(self, job: Job) -> None:
        """A row for a job, which first reads the rest of its prompt."""
        read = job.read
        if isinstance(job.sampler, SeededSampler):
            job.sampler.position = job.completion_tokens
        rest = job.tokens[read:]
        cuts = [0, *([job.system_length - read] if job.system_length > read else []), len(rest)]
        processors = [job.guarded(processor) for processor in job.processors]
        if self._group is not None:
            processors = [self._note(job), *processors] if self._group.rank() == 0 else []
        (uid,) = self._generator.insert_segments(
            [[rest[begin:end] for begin, end in pairwise(cuts)]],
            max_tokens=[job.max_tokens - job.completion_tokens],
            caches=[job.cache],  # type: ignore[list-item]  # None makes a new one
            all_tokens=[job.tokens[:read]],
            samplers=[job.sampler if self._group is None else self._rows_sampler],
            logits_processors=[processors],
        )
        job.cache = None
        self._jobs[uid] = job

    @by_all
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
            job.completion_tokens += 1
            if response.finish_reason is not None:
                del self._jobs[response.uid]
                self._prompts.insert_cache("", job.key(list(response.all_tokens)), response.prompt_cache)
            made.append(Token(job, response.token, response.logprobs, response.finish_reason))
        return made

    @by_all
    def remove(self, job: Job) -> None:
        """A row leaves for good; its state is kept for other prompts."""
        cache, tokens = self._take_out(job)
        if cache and tokens:
            self._prompts.insert_cache("", job.key(tokens), cache)

    @by_all
    def suspend(self, job: Job) -> None:
        """A row leaves, and can be inserted again to go on."""
        cache, tokens = self._take_out(job)
        if len(tokens) > len(job.tokens):  # else it has not begun: its prompt is read as if new
            job.tokens = tokens
        # The token that would come next is lost with the row, and what it has read cannot be asked again for
        # it: the row goes on from a snapshot before its end.
        places = [p for p in cache[0].positions() if p < len(job.tokens)] if cache else [0]
        job.cache = [layer.at(places[-1]) for layer in cache] if places[-1] else None

    @by_all
    def pause(self) -> None:
        """Rank 0 has nothing to do and waits for requests, the others sleep; who has ended is noticed."""
        if self._group is not None and self._group.rank():
            time.sleep(PAUSE)

    def _take_out(self, job: Job) -> tuple[list[RecurrentCache], list[int]]:
        uid = next(uid for uid, other in self._jobs.items() if other is job)
        del self._jobs[uid]
        cache, tokens = self._generator.remove([uid], return_prompt_caches=True)[uid]
        return cache, list(tokens)

    def _note(self, job: Job) -> Any:
        """A logits processor that changes nothing: MLX-LM calls each row's in order, then samples."""

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            self._next_rows.append(job)
            return logits

        return process

    def _sample(self, logprobs: mx.array) -> mx.array:
        """The tokens (B,) of all rows, each by its job's sampler, for log probabilities (B, V)."""
        samplers = [job.sampler for job in self._next_rows]
        self._next_rows = []
        if all(sampler is samplers[0] for sampler in samplers):
            return samplers[0](logprobs)  # type: ignore[no-any-return]
        return mx.concatenate([sampler(logprobs[n : n + 1]) for n, sampler in enumerate(samplers)])
