"""The one thread that owns the model: it lets all jobs go on, at most one step of each at a time.

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
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...compute.module_arrays import named_arrays
from ...distributed import Group, all_numbers
from ...errors import LOST, PararnnError, is_lost
from ...images.image_model import ImageModel, load_with_images
from ...images.image_prompts import ImagePrompt, look
from ...loading import warm_up
from ...pocket.events import Event
from ...pocket.protocol import check_is_whole
from ...text.detokenizer import Detokenizer
from ..prompt_cache import SPACING, PromptCache
from .batch import PAUSE, Batch, Token
from .jobs import Job, Piece
from .metrics import Metrics
from .reading import read, score

logger = logging.getLogger(__name__)

BATCH = 64  # rows that generate together
TURN_STEP = 64  # events of a turn with tools between two steps of the others
SHARE = 128  # tokens that a row may generate while others wait for its place


class Engine:
    """Generates for all jobs, in a thread of its own.

    Args:
        path: a model folder, or a repository on the hub.
        prompts: where the states of prompts are kept.
        metrics: what is counted.
        adapters: a folder of adapters, or None.
        state: a file of initial states; None for the model's own.
        group: processes that the model is divided among, of which this is rank 0.

    Attributes:
        images: the model that sees, which `model` is the language model of; None for one that does not.
        on_failure: called in the engine's thread when it cannot go on.
        refusing: whether no new requests are to be taken; `stopping`: whether all jobs are ended.
    """

    model: Any
    tokenizer: Any
    images: ImageModel | None = None
    state_nbytes = 0

    def __init__(
        self,
        path: str | Path,
        prompts: PromptCache,
        metrics: Metrics,
        adapters: Path | None = None,
        state: Path | None = None,
        group: Group | None = None,
    ) -> None:
        self.failure: BaseException | None = None
        self.stopping = self.refusing = False
        self._source = path, prompts, adapters, state, group
        self._prompts, self._metrics = prompts, metrics
        self.on_failure: Callable[[], None] = lambda: None
        self._commands: queue.SimpleQueue[tuple[str, Job] | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._reading: deque[tuple[Job, Iterator[None]]] = deque()
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
                piece = await job.unread.get()
                job.taken += 1
                if job.parked and job.is_caught_up:
                    job.parked = False
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
            self._batch.end()
        except BaseException as failure:
            self.failure = failure
            error = EngineStopped(f"generation stopped: {LOST if is_lost(failure) else failure}")
        self.stopping = self.refusing = True
        reading = [job for job, _ in self._reading]
        for job in [*self._waiting, *reading, *self._batch.jobs, *self._turns, *self._parked]:
            self._outbox.append((job, Piece(error=error)))
        self._send()
        if self.failure is not None:
            self.on_failure()
            return
        while self._prompts.save_some():
            pass

    def _load(self) -> None:
        loaded = load_batch(*self._source)
        self.model, self.tokenizer, self.images, self._batch, self.state_nbytes = loaded
        self._end_tokens = set(self.tokenizer.eos_token_ids)

    def _take_commands(self) -> bool:
        """Apply what is asked for; wait where there is nothing else to do. False where it is to stop."""
        while True:
            self._metrics.running.set(self._busy)
            self._metrics.waiting.set(len(self._waiting))
            idle = not (self._waiting or self._busy)
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                if self._prompts.save_some(busy=not idle) and idle:
                    continue
                if not idle:
                    return not self.stopping
                command = self._wait_for_command()
            if command is None or self.stopping:
                return False
            action, job = command
            if action == "submit" or (job in self._parked and action == "resume"):
                self._parked.discard(job)
                self._waiting.append(job)
            elif action == "cancel":
                self._drop(job)

    def _wait_for_command(self) -> tuple[str, Job] | None:
        while self._batch.leads:
            try:
                return self._commands.get(timeout=PAUSE)
            except queue.Empty:
                self._batch.pause()
        return self._commands.get()

    @property
    def _busy(self) -> int:
        """How many jobs are being worked on."""
        return len(self._batch.jobs) + len(self._reading) + len(self._turns)

    def _step(self) -> None:
        self._make_room()
        while self._waiting and self._busy < BATCH:
            self._start(self._waiting.popleft())
        for job in list(self._turns):
            self._advance(job)
        if self._batch.jobs:
            for token in self._batch.step():
                self._take(token)
        if self._reading:
            job, steps = self._reading.popleft()
            if self._go_on(job, steps):
                self._reading.append((job, steps))
            else:
                self._insert(job)
        self._send()

    def _make_room(self) -> None:
        """Rows leave the batch that have had their share while others wait, or whose clients do not read."""
        for job in self._batch.jobs:
            if job.is_too_far_ahead:
                self._batch.suspend(job)
                self._park(job)
        excess = len(self._waiting) + self._busy - BATCH
        for job in sorted(self._batch.jobs, key=lambda job: -job.share)[: max(0, excess)]:
            if job.share >= SHARE:
                self._batch.suspend(job)
                self._waiting.append(job)

    def _park(self, job: Job) -> None:
        """Until its client has taken most of what is there."""
        job.parked = True
        if job.is_caught_up:  # it has just done so, and may not have seen that it was to wait
            self._waiting.append(job)
        else:
            self._parked.add(job)

    def _advance(self, job: Job) -> None:
        """Some events of a turn with tools."""
        assert job.events is not None
        try:
            for event in islice(job.events, TURN_STEP):
                piece = job.piece_of_event(event)
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
        elif job.is_too_far_ahead:
            self._turns.remove(job)
            self._park(job)

    def _start(self, job: Job) -> None:
        if job.turn is not None:
            if job.events is None:
                self._metrics.read.inc(len(job.prompt))
                job.events = job.turn()
            self._turns.append(job)
            return
        job.share = 0
        if job.pictures and not job.seen:
            assert self.images is not None
            job.look(look(self.images, ImagePrompt(job.prompt, list(job.pictures))))
        if job.cache is None and not job.score_prompt:
            self._batch.find(job)
            if not job.completion_tokens:
                job.cached_tokens = job.read
                self._metrics.cached.inc(job.cached_tokens)
        steps = self._score(job) if job.score_prompt else read(job, self._batch, self.images)
        self._reading.append((job, steps))
        if not self._go_on(job, steps):
            self._reading.pop()
            self._insert(job)

    def _score(self, job: Job) -> Iterator[None]:
        for infos in score(job, self._batch, Detokenizer(self.tokenizer)):
            self._put(job, Piece(tokens=infos))
            yield
        if not job.max_tokens:
            self._put(job, Piece(finish_reason="length"))

    def _go_on(self, job: Job, steps: Iterator[None]) -> bool:
        """One more step of a prompt; False where there is none, or the job has failed."""
        try:
            return next(steps, True) is None
        except BaseException as error:  # this job only
            if self._batch.failed or is_lost(error):
                raise
            self._put(job, Piece(error=_as_ours(error)))
            return False

    def _insert(self, job: Job) -> None:
        """Into the batch, which reads the rest of its prompt."""
        if job.ended:
            return
        if not job.completion_tokens:
            self._metrics.read.inc(len(job.tokens) - job.read)
        self._batch.insert(job)

    def _take(self, token: Token) -> None:
        """One token of a job."""
        job = token.job
        job.share += 1
        self._metrics.generated.inc()
        is_end = token.id in self._end_tokens and token.finish_reason == "stop"
        try:
            piece, ended = job.piece_of_token(token.id, token.logprobs, token.finish_reason, is_end)
        except BaseException as error:  # a tokenizer's panic is no Exception, and ends this job only
            piece, ended = Piece(error=_as_ours(error)), True
        if ended and token.finish_reason is None:
            self._batch.remove(job)
        if ended or piece.text or piece.tokens:
            self._put(job, piece)

    def _drop(self, job: Job) -> None:
        """Nobody waits for it any more."""
        self._parked.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)
        self._reading = deque(item for item in self._reading if item[0] is not job)
        if job in self._turns:
            self._turns.remove(job)
        if job in self._batch.jobs:
            self._batch.remove(job)
        self._end(job)

    def _end(self, job: Job) -> None:
        job.ended = True
        self._batch.forget(job)

    def _put(self, job: Job, piece: Piece) -> None:
        job.made += 1
        self._outbox.append((job, piece))
        if piece.finish_reason is not None or piece.error is not None:
            self._end(job)

    def _send(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, outbox)


class Loaded(NamedTuple):
    """What an engine works with; `state_nbytes` are those of one sequence's whole state."""

    model: Any
    tokenizer: Any
    images: ImageModel | None
    batch: Batch
    state_nbytes: int


def load_batch(
    path: str | Path, prompts: PromptCache, adapters: Path | None, state: Path | None, group: Group | None
) -> Loaded:
    """Load a model, or this process's part of it, and compile; arguments as `Engine` has them."""
    model, tokenizer, images = load_with_images(path, adapter_path=adapters, state=state, group=group)
    check_is_whole(model, tokenizer)
    model.snapshot_spacing = SPACING
    state_nbytes = sum(layer.state_nbytes for layer in warm_up(model))
    if group is not None:
        own, weights = state_nbytes, sum(array.nbytes for _, array in named_arrays(model.parameters()))
        state_nbytes = sum(all_numbers(group, own))
        prompts.share = Fraction(own, state_nbytes)
        parts = [f"{nbytes / 1e6:.1f} MB in rank {n}" for n, nbytes in enumerate(all_numbers(group, weights))]
        logger.info("weights: %s", ", ".join(parts))
    prompts.open(model)
    batch = Batch(model, set(tokenizer.eos_token_ids), BATCH, prompts)
    return Loaded(model, tokenizer, images, batch, state_nbytes)


class EngineStopped(Exception):
    """The engine takes no jobs: the server stops, or generation failed."""


def _deliver(outbox: list[tuple[Job, Piece]]) -> None:
    for job, piece in outbox:
        job.unread.put_nowait(piece)


def _as_ours(error: BaseException) -> PararnnError:
    if isinstance(error, PararnnError):
        return error
    logger.error("a request failed: %s: %s", type(error).__name__, error)
    return PararnnError(f"the answer cannot be made ({type(error).__name__}: {str(error)[:300]})")
