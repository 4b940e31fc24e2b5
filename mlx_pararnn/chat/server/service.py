"""OpenAI's completions and chat: from requests to jobs, from their pieces to answers."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from mlx_lm.sample_utils import make_logits_processors

from ...errors import PararnnError
from ...generation import COLDEST
from ...images.picture import to_base64
from ...mlx_lm_internals import calls_tools_in_json
from ...pocket.events import Call
from ...pocket.protocol import find_protocol
from ...text.detokenizer import Detokenizer
from ...text.grammars import GrammarProcessor, Grammars
from .choices import MessageParser, Part, TokenTexts, chat_logprobs, completion_logprobs, usage_of
from .drawings import Drawings
from .engine import Engine
from .jobs import Job, Piece, TokenInfo
from .metrics import Metrics
from .prompts import Prompt, Prompts, run_apart
from .samplers import SeededSampler, shared_sampler
from .schema import ChatRequest, CompletionRequest, ImageRequest, Refused, Request
from .server_settings import Settings
from .text import AnswerText
from .turns import Turns, call_of

logger = logging.getLogger(__name__)

Event = dict[str, Any]
MOST_SCORED = 16_384  # tokens of a prompt whose own log probabilities are told
MOST_WEIGHT = 2**26  # of all jobs together, in units of `Job.weight`: 1 GiB


@dataclass
class Conversation:
    """A chat that is being answered.

    Attributes:
        request, prompt: what was asked.
        jobs: an answer each.
    """

    request: ChatRequest
    prompt: Prompt
    jobs: list[Job]


class Service:
    """Answers requests by one engine."""

    def __init__(self, engine: Engine, name: str, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.name, self.settings = engine, name, settings
        self._metrics = metrics
        images = engine.images
        self.prompts = Prompts(engine.model, engine.tokenizer, None if images is None else images.args)
        self.drawings = None if images is None else Drawings(images, engine)
        protocol = find_protocol(engine.tokenizer)
        self.turns = None if protocol is None else Turns(engine, protocol, settings.functions)
        self._grammars = Grammars(engine.tokenizer, engine.model.args.vocab_size)
        self.texts = TokenTexts(engine.tokenizer)
        self._started = int(time.time())
        self._other_names: set[str] = set()
        self._weight = 0  # of the jobs that are being answered

    def model_entry(self) -> Event:
        """The one model, as /v1/models lists it, with what the page shows."""
        return {
            "id": self.name,
            "object": "model",
            "created": self._started,
            "owned_by": "mlx-pararnn",
            "state_bytes": self.engine.state_nbytes,
            "has_chat_template": bool(self.engine.tokenizer.has_chat_template or self.turns),
            "sees": self.drawings is not None,
            "draws": self.drawings is not None and self.drawings.can_draw,
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "top_k": self.settings.top_k,
            "min_p": self.settings.min_p,
            "repetition_penalty": self.settings.repetition_penalty,
            "examples": self.settings.examples,
        }

    async def completion(self, request: CompletionRequest) -> Event:
        """The whole answer to /v1/completions."""
        prompts, jobs = await self._completion_jobs(request)
        pieces = await self._whole(jobs)
        choices = []
        for n, (job, answer) in enumerate(zip(jobs, pieces, strict=True)):
            echo = prompts[n // request.n][0] if request.echo else ""
            choice: Event = {
                "index": n,
                "text": echo + answer.text,
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
            if job.top_logprobs is not None:
                choice["logprobs"] = await asyncio.to_thread(completion_logprobs, self.texts, answer.tokens)
            choices.append(choice)
        return {**self._head("text_completion"), "choices": choices, "usage": usage_of(jobs, request.n)}

    async def completion_events(self, request: CompletionRequest) -> AsyncGenerator[Event, None]:
        """The same in chunks."""
        prompts, jobs = await self._completion_jobs(request)
        head = self._head("text_completion")
        begun: set[int] = set()
        async with aclosing(self.pieces(jobs)) as pieces:
            async for n, piece in pieces:
                echo = prompts[n // request.n][0] if request.echo and n not in begun else ""
                begun.add(n)
                choice: Event = {
                    "index": n,
                    "text": echo + piece.text,
                    "finish_reason": piece.finish_reason,
                    "logprobs": None,
                }
                if piece.tokens:
                    choice["logprobs"] = completion_logprobs(self.texts, piece.tokens)
                yield {**head, "choices": [choice]}
        if request.stream_options.include_usage:
            yield {**head, "choices": [], "usage": usage_of(jobs, request.n)}

    async def chat(self, request: ChatRequest) -> Event:
        """The whole answer to /v1/chat/completions."""
        conversation = await self.converse(request)
        answers = await self._whole(conversation.jobs)
        choices = []
        for n, (job, answer) in enumerate(zip(conversation.jobs, answers, strict=True)):
            part = self.part(conversation, self.parser(conversation), answer)
            logprobs = None
            if job.top_logprobs is not None:
                logprobs = await asyncio.to_thread(chat_logprobs, self.texts, answer.tokens)
            nothing = None if part.calls else ""
            message: Event = {"role": "assistant", **part.delta(), "content": part.content or nothing}
            for call in message.get("tool_calls", []):
                del call["index"]
            choices.append(
                {
                    "index": n,
                    "message": message,
                    "finish_reason": finish_reason(answer, bool(part.calls)),
                    "logprobs": logprobs,
                }
            )
        usage = usage_of(conversation.jobs, request.n)
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def chat_events(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """The same in chunks."""
        conversation = await self.converse(request)
        head = self._head("chat.completion.chunk")
        begun: set[int] = set()
        async with aclosing(self.parts(conversation)) as parts:
            async for n, part, piece, reason in parts:
                delta = part.delta()
                if n not in begun:
                    delta = {"role": "assistant", "content": "", **delta}
                    begun.add(n)
                logprobs = chat_logprobs(self.texts, piece.tokens) if piece.tokens else None
                choice = {"index": n, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
                yield {**head, "choices": [choice]}
        if request.stream_options.include_usage:
            yield {**head, "choices": [], "usage": usage_of(conversation.jobs, request.n)}

    async def images(self, request: ImageRequest) -> Event:
        """The answer to /v1/images/generations."""
        if self.drawings is None or not self.drawings.can_draw:
            raise Refused(404, "this model draws no images; /v1/images/generations needs one that does")
        self._note_name(request.model)
        jobs, made = await run_apart(self.drawings.begin, request)
        await self._whole(jobs)
        files = await run_apart(lambda: [to_base64(picture) for picture in made()])
        return {"created": int(time.time()), "data": [{"b64_json": file} for file in files]}

    async def prompt(self, request: ChatRequest) -> Prompt:
        """The tokens of a chat's messages."""
        self.check(request)
        return await run_apart(self.prompts.of_chat if self.turns is None else self.turns.prompt, request)

    async def converse(self, request: ChatRequest) -> Conversation:
        """Read a chat's messages and make its jobs."""
        prompt = await self.prompt(request)
        if self.turns is not None:
            return Conversation(
                request, prompt, [self._turn_job(request, prompt, n) for n in range(request.n)]
            )
        matcher = await run_apart(self._matcher, request)
        top = request.top_logprobs if request.logprobs else None
        jobs = [self._job(request, prompt, n, top, matcher) for n in range(request.n)]
        return Conversation(request, prompt, jobs)

    def parser(self, conversation: Conversation) -> MessageParser:
        """For one of a conversation's answers."""
        request = conversation.request
        most = None if request.parallel_tool_calls else 1
        return MessageParser(self.engine.tokenizer, request.tools, conversation.prompt.reasoning, most)

    def part(self, conversation: Conversation, parser: MessageParser, piece: Piece) -> Part:
        """A piece of an answer as part of a message."""
        if self.turns is None:
            return parser.add(piece.text, last=piece.finish_reason is not None)
        return Part(piece.text, calls=[call_of(call) for call in piece.calls])

    def _turn_job(self, request: ChatRequest, prompt: Prompt, n: int) -> Job:
        assert self.turns is not None
        wanted = self.settings.max_tokens if request.max_tokens is None else request.max_tokens
        return Job(
            prompt=prompt.tokens,
            max_tokens=min(wanted, self.settings.max_tokens),
            text=AnswerText(Detokenizer(self.engine.tokenizer)),
            sampler=(sampler := self._sampler(request, n)),
            turn=self.turns.begin(request, prompt, sampler, min(wanted, self.settings.max_tokens)),
        )

    async def parts(
        self, conversation: Conversation
    ) -> AsyncGenerator[tuple[int, Part, Piece, str | None], None]:
        """Which answer goes on, by what, the piece that it came from, and how the answer ended."""
        parsers = [self.parser(conversation) for _ in conversation.jobs]
        async with aclosing(self.pieces(conversation.jobs)) as pieces:
            async for n, piece in pieces:
                part = self.part(conversation, parsers[n], piece)
                reason = finish_reason(piece, parsers[n].calls > 0)
                if part.delta() or piece.tokens or reason:
                    yield n, part, piece, reason

    async def pieces(self, jobs: list[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all jobs as they come, with the job's number."""
        begin: float | None = time.monotonic()
        weight = self.weigh(jobs)
        found: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue(1)

        async def pump(n: int, job: Job) -> None:
            try:
                async with aclosing(self.engine.generate(job)) as pieces:
                    async for piece in pieces:
                        await found.put((n, piece))
            except Exception as error:
                await found.put((n, error))

        tasks = [asyncio.create_task(pump(n, job)) for n, job in enumerate(jobs)]
        self._weight += weight
        try:
            left = len(jobs)
            while left:
                n, piece = await found.get()
                if isinstance(piece, BaseException):
                    raise piece
                if begin is not None:
                    self._metrics.first_token.observe(time.monotonic() - begin)
                    begin = None
                left -= piece.finish_reason is not None
                yield n, piece
        finally:
            self._weight -= weight
            for task in tasks:
                task.cancel()

    def weigh(self, jobs: list[Job]) -> int:
        """What a request's jobs hold, in units of `Job.weight`.

        Raises:
            Refused: it is more than there is room for, now or ever.
        """
        weight = sum(job.weight for job in jobs)
        if weight > MOST_WEIGHT:
            raise Refused(
                400,
                f"prompts, n, max_tokens and logprobs of this request take up to {weight >> 16} MiB, and "
                f"{MOST_WEIGHT >> 16} are the most; ask for less at a time",
            )
        if self._weight + weight > MOST_WEIGHT:
            raise Refused(503, "too many long requests are being answered; try again in a moment")
        return weight

    def check(self, request: Request) -> None:
        """Refuse what this model or server cannot do."""
        self._note_name(request.model)
        vocab_size = self.engine.model.args.vocab_size
        for token in request.logit_bias:
            if int(token) >= vocab_size:
                raise Refused(400, f"logit_bias names token {token!r}, not one of 0 to {vocab_size - 1}")

    def _note_name(self, name: str) -> None:
        if name in (self.name, "default_model"):
            return
        name = name[:100]  # a client's, of any length
        if name not in self._other_names:
            # Many programs ask for one model by a name that they do not let their users change.
            if len(self._other_names) < 100:
                self._other_names.add(name)
            logger.info("asked for the model %r; %r, the only one here, answers", name, self.name)

    async def _completion_jobs(
        self, request: CompletionRequest
    ) -> tuple[list[tuple[str, Prompt]], list[Job]]:
        if self.turns is not None:
            raise Refused(
                400, "this model answers messages and continues no text; send them to /v1/chat/completions"
            )
        self.check(request)
        prompts = []
        for given in request.prompt:
            prompt = await run_apart(self.prompts.of_text, given)
            if request.scores_prompt and len(prompt.tokens) > MOST_SCORED:
                raise Refused(
                    400,
                    f"echo with logprobs is for prompts of {MOST_SCORED} tokens at most, and this one has "
                    f"{len(prompt.tokens)}; leave echo out, or send a part of it",
                )
            text = given if isinstance(given, str) else ""
            if request.echo and not isinstance(given, str):
                text = await run_apart(self.engine.tokenizer.decode, given)
            prompts.append((text, prompt))
        matcher = await run_apart(self._matcher, request)
        jobs = [
            self._job(request, prompt, n, request.logprobs, matcher, len(text) if request.echo else 0)
            for text, prompt in prompts
            for n in range(request.n)
        ]
        return prompts, jobs

    async def _whole(self, jobs: list[Job]) -> list[Piece]:
        texts = [""] * len(jobs)
        tokens: list[list[TokenInfo]] = [[] for _ in jobs]
        reasons: list[str | None] = [None] * len(jobs)
        calls: list[list[Call]] = [[] for _ in jobs]
        async with aclosing(self.pieces(jobs)) as pieces:
            async for n, piece in pieces:
                texts[n] += piece.text
                tokens[n] += piece.tokens
                reasons[n] = piece.finish_reason
                calls[n] += piece.calls
        return [
            Piece(text, infos, reason, calls=called)
            for text, infos, reason, called in zip(texts, tokens, reasons, calls, strict=True)
        ]

    def _job(
        self, request: Request, prompt: Prompt, n: int, top: int | None, matcher: Any, begin: int = 0
    ) -> Job:
        wanted = min(512, self.settings.max_tokens) if request.max_tokens is None else request.max_tokens
        penalty = chosen(request.repetition_penalty, self.settings.repetition_penalty)
        limits = [wanted, self.settings.max_tokens, prompt.room]
        processors: list[Any] = make_logits_processors(
            {int(token): float(bias) for token, bias in request.logit_bias.items()},
            None if penalty == 1 else penalty,
            request.repetition_context_size,
            request.presence_penalty,
            request.presence_context_size,
            request.frequency_penalty,
            request.frequency_context_size,
        )
        if matcher is not None:
            processors.append(GrammarProcessor(matcher.deep_copy(), len(prompt.tokens)))
        return Job(
            prompt=prompt.tokens,
            max_tokens=min(limit for limit in limits if limit is not None),
            text=AnswerText(Detokenizer(self.engine.tokenizer, prompt.tokens), request.stop),
            sampler=self._sampler(request, n),
            processors=processors,
            top_logprobs=None if top is None else min(top, self.engine.model.args.vocab_size, 20),
            score_prompt=request.scores_prompt,
            begin=begin,
            system_length=prompt.system_length,
            pictures=prompt.pictures,
        )

    def _sampler(self, request: Request, n: int) -> Any:
        settings = self.settings
        top_k = chosen(request.top_k, settings.top_k)
        arguments = {
            "temp": chosen(request.temperature, settings.temperature),
            "top_p": chosen(request.top_p, settings.top_p),
            "top_k": top_k if 0 < top_k < self.engine.model.args.vocab_size else 0,
            "min_p": chosen(request.min_p, settings.min_p),
        }
        # A nucleus of no mass is its likeliest token; MLX-LM would take 0 for no nucleus at all.
        if arguments["temp"] < COLDEST or arguments["top_p"] == 0:
            return shared_sampler(0.0)
        if request.xtc_probability:
            arguments["xtc_probability"] = request.xtc_probability
            arguments["xtc_threshold"] = request.xtc_threshold
            newline = self.engine.tokenizer.encode("\n", add_special_tokens=False)
            arguments["xtc_special_tokens"] = (*newline, *self.engine.tokenizer.eos_token_ids)
        if request.seed is None:
            return shared_sampler(**arguments)
        return SeededSampler(request.seed + n, **arguments)

    def _matcher(self, request: Request) -> Any:
        """The grammar that an answer must keep: of a format, or of calls of tools."""
        schema = request.format_schema
        tools = request.tools if isinstance(request, ChatRequest) and request.tool_choice != "none" else []
        if schema is not None and tools:
            raise Refused(400, "response_format is not taken together with tools")
        try:
            if schema is not None:
                return self._grammars.compile(self._grammars.json(schema))
            if tools:
                assert isinstance(request, ChatRequest)
                return self._tool_matcher(request)
        except PararnnError as error:
            raise Refused(400, f"{'response_format' if schema else 'tools'}: {error}") from error
        return None

    def _tool_matcher(self, request: ChatRequest) -> Any:
        tokenizer, choice = self.engine.tokenizer, request.tool_choice
        in_json = calls_tools_in_json(tokenizer)
        forced = choice != "auto"
        if not in_json and forced:
            raise Refused(400, "tool_choice can only be auto or none: this model does not call tools in JSON")
        if not in_json:
            return None
        functions = [tool["function"] for tool in request.tools]
        if isinstance(choice, dict):
            functions = [f for f in functions if f["name"] == choice["function"]["name"]]
        marks = tokenizer.tool_call_start, tokenizer.tool_call_end
        try:
            return self._grammars.compile(self._grammars.calls(functions, *marks, forced))
        except PararnnError:
            if forced:
                raise
            return None  # the calls are the model's own then

    def _head(self, kind: str) -> Event:
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }


def chosen(value: Any, default: Any) -> Any:
    """What a request says; the default where it says nothing."""
    return default if value is None else value


def finish_reason(piece: Piece, called: bool) -> str | None:
    """How an answer ended, in OpenAI's words; None where it has not."""
    return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason
