"""Requests for pictures: from a text to jobs whose steps go on between those of all other answers."""

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import numpy as np

from ...images.modules import ImageModules
from ...images.picture import quantized
from ...images.use import GUIDANCE, STEPS, check_drawing, drawing, drawing_prompt
from ...pocket.events import Event, Finish
from ...text.detokenizer import Detokenizer
from .engine import Engine
from .jobs import Job
from .samplers import shared_sampler
from .schema import ImageRequest, Refused
from .text import AnswerText


class Drawings:
    """Makes pictures with one model.

    Args:
        images: the model; it is used in the engine's thread only.
        engine: runs the jobs.
    """

    def __init__(self, images: ImageModules, engine: Engine) -> None:
        self._images, self._engine = images, engine

    @property
    def can_draw(self) -> bool:
        """Whether the model has an image decoder."""
        return self._images.image_decoder is not None

    def begin(self, request: ImageRequest) -> tuple[list[Job], Callable[[], list[np.ndarray]]]:
        """A job for each picture, and what gives the pictures (S, S, 3), uint8, once all have ended.

        Raises:
            Refused: the model does not draw in that size.
            PararnnError: there is nothing to draw, or too much.
        """
        side = self._images.args.size
        if request.size not in ("auto", f"{side}x{side}"):
            raise Refused(400, f"size can only be auto or {side}x{side}: this model draws no other")
        check_drawing(request.prompt, STEPS, GUIDANCE, 1.0)
        prompt = drawing_prompt(self._images, self._engine.tokenizer, request.prompt)
        made: dict[int, np.ndarray] = {}
        jobs = [
            Job(
                prompt=prompt,
                max_tokens=self._images.args.tokens,
                text=AnswerText(Detokenizer(self._engine.tokenizer)),
                sampler=shared_sampler(1.0),
                turn=partial(self._draw, request, n, len(prompt), made),
            )
            for n in range(request.n)
        ]
        return jobs, lambda: [made[n] for n in range(request.n)]

    def _draw(
        self, request: ImageRequest, number: int, read: int, made: dict[int, np.ndarray]
    ) -> Iterator[Event]:
        """In the engine's thread: an event for each step, after which others go on."""
        begin, tokens = perf_counter(), self._images.args.tokens
        seed = None if request.seed is None else (request.seed + number) % 2**64
        steps = drawing(self._images, self._engine.tokenizer, request.prompt, seed=seed)
        for done, pixels in enumerate(steps, 1):
            if pixels is not None:
                made[number] = quantized(pixels)
            yield Event(read + min(done, tokens))
        yield Finish(read + tokens, "stop", tokens, 0, perf_counter() - begin)
