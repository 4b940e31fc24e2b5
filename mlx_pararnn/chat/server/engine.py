"""The one thread that owns the model: it batches all requests, at most one step of each at a time.

Requests come as jobs and get their pieces back through the event loop. A job waits, is read (long prompts
piece by piece, between the steps of those that generate), generates in the batch, and ends. It leaves the
batch before its end where others wait and it has had its share, or where its client does not take what is
there: its state is kept, and it goes on from the last snapshot later.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from ...cache import RecurrentCache
from ...errors import PararnnError
from ...grammars import GrammarProcessor
from ...loading import load
from ...pocket.events import Call, Event, Finish, Text
from ..prompt_cache import SPACING, PromptCache
from .metrics import Metrics
from .sampling import SeededSampler
from .text import AnswerText

logger = logging.getLogger(__name__)

BATCH = 64  # rows that generate together
READ_STEP = 512  # tokens of a prompt that are read between two steps of the others
TURN_STEP = 64  # events of a turn with tools, the same
SCORE_STEP = 128  # the same where the logits of each are needed
SHARE = 128  # tokens that a row may generate while others wait for its place
MOST_UNSENT, FEW_UNSENT = 256, 64  # pieces that wait for a slow client: above it is parked, below it goes on


@dataclass(frozen=True)
class TokenInfo:
    """A token with its log probability, the likeliest ones beside it, and where its text begins."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """What came of one step: text, its tokens where asked for, how the answer ended, calls of tools."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None
    calls: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: at most so many; 0 only scores the prompt.
        text: makes text of its tokens.
        sampler: log probabilities (B, V) to tokens (B,).
        processors: functions of the tokens so far and the logits (1, V).
        top_logprobs: so many likeliest tokens beside each; None for no log probabilities at all.
        score_prompt: whether the prompt's own log probabilities are wanted, in the first piece.
        system_length: how much of the prompt other conversations begin with too; kept by itself.
        turn: for a model that uses tools: begins the turn; its events take the place of the batch.
        cached_tokens, completion_tokens: counted on the way.
    """

    prompt: list[int]
    max_tokens: int
    text: AnswerText
    sampler: Any
    processors: list[Any] = field(default_factory=list)
    top_logprobs: int | None = None
    score_prompt: bool = False
    system_length: int = 0
    turn: Callable[[], Iterator[Event]] | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self.failure: BaseException | None = None
        self.ended = False
        self._tokens = list(self.prompt)  # what a row that goes on must have read
        self._cache: list[RecurrentCache] | None = None
        self._share = 0
        self._length = self._sent_length = 0  # characters of the answer
        self._unsent_tokens: list[TokenInfo] = []
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._made = self._taken = 0
        self._parked = False
        self._events: Iterator[Event] | None = None
        self._call: Call | None = None

    def _piece_of(self, event: Event) -> Piece | None:
        """What a client gets of an event: text, and the call that it is to run itself."""
        match event:
            case Text(text=text):
                return Piece(text)
            case Call():
                self._call = event
            case Finish(reason="tool_calls"):
                return Piece(calls=[self._call] if self._call else [], finish_reason="tool_calls")
            case Finish(reason=reason):
                return Piece(finish_reason="stop" if reason == "stop" else "length")
        return None


class Engine:
    """Generates for all jobs, in a thread of its own.

    Args:
        path: a model folder, or a repository on the hub.
        prompts: where the states of prompts are kept.
        metrics: what is counted.

    Attributes:
        on_failure: called in the engine's thread when it cannot go on.
        refusing: whether no new requests are to be taken; `stopping`: whether all jobs are ended.
    """

    model: Any
    tokenizer: Any
    state_nbytes = 0

    def __init__(self, path: str | Path, prompts: PromptCache, metrics: Metrics) -> None:
        self.failure: BaseException | None = None
        self.stopping = self.refusing = False
        self._path, self._prompts, self._metrics = path, prompts, metrics
        self.on_failure: Callable[[], None] = lambda: None
        self._commands: queue.SimpleQueue[tuple[str, Job] | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._reading: deque[tuple[Job, Iterator[None]]] = deque()
        self._running: dict[int, Job] = {}
        self._turns: list[Job] = []
        self._parked: set[Job] = set()
        self._outbox: list[tuple[Job, Piece]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loaded = threading.Event()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the model is loaded; raises what loading it raised."""
        while not self._loaded.wait(0.1):  # in turns: a plain wait does not see Ctrl-C everywhere
            pass
        if self.failure is not None:
            raise self.failure

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The pieces of a job; left early, the job ends.

        Raises:
            EngineStopped: the server stops, or its engine has failed.
            PararnnError: this job failed.
        """
        self._loop = asyncio.get_running_loop()
        if self.stopping:
            raise EngineStopped("the server is stopping")
        self._commands.put(("submit", job))
        try:
            while True:
                piece = await job._pieces.get()
                job._taken += 1
                if job._parked and job._made - job._taken < FEW_UNSENT:
                    job._parked = False
                    self._commands.put(("resume", job))
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            if not job.ended:
                self._commands.put(("cancel", job))

    def stop(self) -> None:
        """End all jobs, and the thread."""
        self.stopping = self.refusing = True
        self._commands.put(None)

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as failure:
            self.failure = failure
            return
        finally:
            self._loaded.set()
        error: BaseException = EngineStopped("the server is stopping")
        try:
            while self._take_commands():
                self._step()
        except BaseException as failure:
            self.failure = failure
            error = EngineStopped(f"generation stopped: {failure}")
        self.stopping = self.refusing = True
        for job in [
            *self._waiting,
            *(job for job, _ in self._reading),
            *self._running.values(),
            *self._turns,
            *self._parked,
        ]:
            self._put(job, Piece(error=error))
        self._send()
        if self.failure is not None:
            self.on_failure()

    def _load(self) -> None:
        model, tokenizer = load(self._path)
        model.snapshot_spacing = SPACING
        probe = model.make_cache()
        mx.eval(model(mx.array([[0]]), cache=probe))
        self.state_nbytes = sum(layer.state_nbytes for layer in probe)
        self.model, self.tokenizer = model, tokenizer
        self._eos = set(tokenizer.eos_token_ids)
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in self._eos],
            completion_batch_size=BATCH,
            prefill_step_size=READ_STEP,
        )

    def _take_commands(self) -> bool:
        """Apply what is asked for; wait where there is nothing else to do. False where it is to stop."""
        while True:
            self._metrics.running.set(self._busy)
            self._metrics.waiting.set(len(self._waiting))
            idle = not (self._waiting or self._busy)
            try:
                command = self._commands.get() if idle else self._commands.get_nowait()
            except queue.Empty:
                return not self.stopping
            if command is None or self.stopping:
                return False
            action, job = command
            if action == "submit" or (job in self._parked and action == "resume"):
                self._parked.discard(job)
                self._waiting.append(job)
            elif action == "cancel":
                self._drop(job)

    @property
    def _busy(self) -> int:
        """How many jobs are being worked on."""
        return len(self._running) + len(self._reading) + len(self._turns)

    def _step(self) -> None:
        self._make_room()
        while self._waiting and self._busy < BATCH:
            self._start(self._waiting.popleft())
        for job in list(self._turns):
            self._advance(job)
        if self._running:
            read, generated = self._generator.next()
            for response in read:
                if response.end_of_segment and not response.end_of_prompt and response.uid in self._running:
                    cache, tokens = self._generator.extract_cache([response.uid])[response.uid]
                    self._prompts.insert_cache("", list(tokens), cache)
            for response in generated:
                if response.uid in self._running:
                    self._take(response)
        if self._reading:
            job, steps = self._reading.popleft()
            try:
                next(steps)
                self._reading.append((job, steps))
            except StopIteration:
                self._insert(job)
        self._send()

    def _make_room(self) -> None:
        """Rows leave the batch that have had their share while others wait, or whose clients do not read."""
        for uid, job in list(self._running.items()):
            if job._made - job._taken > MOST_UNSENT:
                job._parked = True
                self._suspend(uid)
                (self._parked.add if job._made - job._taken >= FEW_UNSENT else self._waiting.append)(job)
        excess = len(self._waiting) + self._busy - BATCH
        longest = sorted(self._running.items(), key=lambda item: -item[1]._share)
        for uid, job in longest[: max(0, excess)]:
            if job._share >= SHARE:
                self._suspend(uid)
                self._waiting.append(job)

    def _suspend(self, uid: int) -> None:
        job = self._running.pop(uid)
        cache, tokens = self._generator.remove([uid], return_prompt_caches=True)[uid]
        if len(tokens) > len(job._tokens):  # else it has not begun: its prompt is read as if new
            job._tokens = list(tokens)
        # The token that would come next is lost with the row, and what it has read cannot be asked again for
        # it: the row goes on from a snapshot before its end.
        places = [p for p in cache[0].positions() if p < len(job._tokens)] if cache else [0]
        job._cache = [layer.at(places[-1]) for layer in cache] if places[-1] else None

    def _advance(self, job: Job) -> None:
        """Some events of a turn with tools."""
        assert job._events is not None
        try:
            for event in islice(job._events, TURN_STEP):
                piece = job._piece_of(event)
                made = max(0, event.tokens - len(job.prompt) - job.completion_tokens)
                job.completion_tokens += made
                self._metrics.generated.inc(made)
                if piece is not None:
                    self._put(job, piece)
                if type(event) is Event:  # a piece of a long prompt
                    break
        except BaseException as error:  # a sampler, say: this job only
            self._put(job, Piece(error=_as_ours(error)))
        if job.ended:
            self._turns.remove(job)
        elif job._made - job._taken > MOST_UNSENT:
            job._parked = True
            self._turns.remove(job)
            (self._parked.add if job._made - job._taken >= FEW_UNSENT else self._waiting.append)(job)

    def _start(self, job: Job) -> None:
        if job.turn is not None:
            if job._events is None:
                self._metrics.read.inc(len(job.prompt))
                job._events = job.turn()
            self._turns.append(job)
            return
        job._share = 0
        if job._cache is None and not job.score_prompt:
            job._cache, rest = self._prompts.fetch_nearest_cache("", job._tokens)
            if not job.completion_tokens:
                job.cached_tokens = len(job._tokens) - len(rest)
                self._metrics.cached.inc(job.cached_tokens)
        steps = self._score(job) if job.score_prompt else self._read(job)
        self._reading.append((job, steps))
        try:
            next(steps)
        except StopIteration:
            self._reading.pop()
            self._insert(job)

    def _read(self, job: Job) -> Iterator[None]:
        """Read a long prompt until a short rest is left, which is read in the batch."""
        cache = job._cache or self.model.make_cache()
        while len(job._tokens) - cache[0].offset > 2 * READ_STEP:
            begin = cache[0].offset
            end = begin + READ_STEP
            if begin < job.system_length < end:
                end = job.system_length
            self.model(mx.array([job._tokens[begin:end]]), cache=cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
            if end == job.system_length:
                self._prompts.insert_cache("", job._tokens[:end], cache)
            yield
        if cache[0].offset:
            job._cache = cache

    def _score(self, job: Job) -> Iterator[None]:
        """Read a prompt but for its last token, and tell each token's log probability after those before."""
        cache = self.model.make_cache()
        tokens = job.prompt
        infos = [TokenInfo(tokens[0], None)]
        while (begin := cache[0].offset) < len(tokens) - 1:
            end = min(begin + SCORE_STEP, len(tokens) - 1)
            logits = self.model(mx.array([tokens[begin:end]]), cache=cache)[0].astype(mx.float32)
            logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            for token, row in zip(tokens[begin + 1 : end + 1], logprobs, strict=True):
                infos.append(_token_info(token, row, job.top_logprobs or 0))
            yield
        job.score_prompt = False
        self._put(job, Piece(tokens=infos, finish_reason=None if job.max_tokens else "length"))
        if len(tokens) > 1:
            job._cache = cache

    def _insert(self, job: Job) -> None:
        """Into the batch, which reads the rest of its prompt."""
        if job.ended:
            return
        read = job._cache[0].offset if job._cache else 0
        if not job.completion_tokens:
            self._metrics.read.inc(len(job._tokens) - read)
        if isinstance(job.sampler, SeededSampler):
            job.sampler.position = job.completion_tokens
        cuts = [0, *([job.system_length - read] if job.system_length > read else []), len(job._tokens) - read]
        rest = job._tokens[read:]
        (uid,) = self._generator.insert_segments(
            [[rest[begin:end] for begin, end in pairwise(cuts)]],
            max_tokens=[job.max_tokens - job.completion_tokens],
            caches=[job._cache],  # type: ignore[list-item]  # None makes a new one
            all_tokens=[job._tokens[:read]],
            samplers=[job.sampler],
            logits_processors=[[_guarded(job, processor) for processor in job.processors]],
        )
        job._cache = None
        self._running[uid] = job

    def _take(self, response: Any) -> None:
        """One token of a job."""
        job = self._running[response.uid]
        job.completion_tokens += 1
        job._share += 1
        self._metrics.generated.inc()
        finish_reason = response.finish_reason
        try:
            if job.failure is not None:
                raise job.failure
            piece, ended = self._piece(job, response)
        except BaseException as error:  # a tokenizer's panic is no Exception, and ends this job only
            piece, ended = Piece(error=_as_ours(error)), True
        if finish_reason is not None:
            self._running.pop(response.uid)
            self._prompts.insert_cache("", response.all_tokens, response.prompt_cache)
        elif ended:
            self._remember_and_remove(response.uid)
        if ended or piece.text or piece.tokens:
            self._put(job, piece)

    def _piece(self, job: Job, response: Any) -> tuple[Piece, bool]:
        offset = job._length
        text = ""
        is_end = response.token in self._eos and response.finish_reason == "stop"
        if not is_end:
            if job.top_logprobs is not None:
                logprobs = np.array(response.logprobs.astype(mx.float32))
                info = _token_info(response.token, logprobs, job.top_logprobs, offset)
                job._unsent_tokens.append(info)
            text = job.text.add(response.token)
            job._length = job.text.length
        finish_reason = response.finish_reason
        grammars = [p for p in job.processors if isinstance(p, GrammarProcessor)]
        if job.text.stopped or any(grammar.finished for grammar in grammars):
            finish_reason = "stop"
        if finish_reason is not None and not job.text.stopped:
            text += job.text.finish()
            if job.text.stopped:
                finish_reason = "stop"
        job._sent_length += len(text)
        tokens = job._unsent_tokens
        if finish_reason is None or job.text.stopped:
            tokens = [info for info in tokens if info.offset < job._sent_length]
        job._unsent_tokens = job._unsent_tokens[len(tokens) :]
        return Piece(text, tokens, finish_reason), finish_reason is not None

    def _remember_and_remove(self, uid: int) -> None:
        self._running.pop(uid)
        cache, tokens = self._generator.remove([uid], return_prompt_caches=True)[uid]
        if cache and tokens:
            self._prompts.insert_cache("", list(tokens), cache)

    def _drop(self, job: Job) -> None:
        """Nobody waits for it any more."""
        job.ended = True
        self._parked.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)
        self._reading = deque(item for item in self._reading if item[0] is not job)
        if job in self._turns:
            self._turns.remove(job)
        for uid, other in list(self._running.items()):
            if other is job:
                self._remember_and_remove(uid)

    def _put(self, job: Job, piece: Piece) -> None:
        job.ended = job.ended or piece.finish_reason is not None or piece.error is not None
        job._made += 1
        self._outbox.append((job, piece))

    def _send(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, outbox)


class EngineStopped(Exception):
    """The engine takes no jobs: the server stops, or generation failed."""


def _deliver(outbox: list[tuple[Job, Piece]]) -> None:
    for job, piece in outbox:
        job._pieces.put_nowait(piece)


def _token_info(token: int, logprobs: np.ndarray, top: int, offset: int = 0) -> TokenInfo:
    """A token among log probabilities (V,)."""
    best: list[int] = []
    if top:
        best = np.argpartition(-logprobs, min(top, len(logprobs) - 1))[:top].tolist()
        best.sort(key=lambda other: -logprobs[other])
    return TokenInfo(token, float(logprobs[token]), [(b, float(logprobs[b])) for b in best], offset)


def _guarded(job: Job, processor: Any) -> Any:
    """A logits processor whose failure is this job's and not the batch's."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if job.failure is None:
            try:
                return processor(tokens, logits)
            except BaseException as error:
                job.failure = error
        return logits

    return process


def _as_ours(error: BaseException) -> PararnnError:
    if isinstance(error, PararnnError):
        return error
    logger.error("a request failed: %s: %s", type(error).__name__, error)
    return PararnnError(f"the answer cannot be made ({type(error).__name__}: {str(error)[:300]})")
