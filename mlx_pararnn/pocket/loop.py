"""The loop in which a model uses tools: it makes tokens, and what they ask for is done and fed to it.

`answers` has what users call. The loop takes a model as a `TokenSource`, so a script can stand in for it.
"""

import codecs
import json
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from typing import Protocol as Interface

import numpy as np

from ..errors import PararnnError
from ..text.grammars import Grammars, allowed_tokens
from .events import (
    Call,
    CommandGiven,
    Event,
    Finish,
    Observation,
    Reason,
    Result,
    Text,
    Thought,
)
from .functions import Functions, Outcome
from .pointer import PointerMemory
from .protocol import MARKS, Command, Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Where a turn ends, whatever the model does.

    Attributes:
        steps: tokens after the message, made or fed; a sum of two 1000-digit numbers takes some 35,000.
        answer: tokens of the answer, one a byte.
        calls: functions that are run; a further call gets an error as its result.
        seconds: for the whole turn, checked between two tokens.
    """

    steps: int = 200_000
    answer: int = 4096
    calls: int = 8
    seconds: float = 120.0


# So often in a row may nothing be read where the message has ended, and so many commands for each entry of
# the memory may go by without a word: a model that goes on has lost its way. Sorting takes some 25 of them.
MOST_EDGES = 8
MOST_COMMANDS = 30
MOST_WRITTEN = 256  # bytes of a call, and six for each byte of the message, which may be escaped there
LOST = "I lost my place in that message and cannot answer it."


class TokenSource(Interface):
    """What makes tokens: a model, or a record of one."""

    vocab_size: int

    def read(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the turn: fed ones, and those that were just chosen."""

    def choose(self, allowed: np.ndarray) -> int:
        """The next token; `allowed` (V,) is True where the protocol has a place for it."""


@dataclass
class External:
    """Functions that somebody else runs: the turn stops at a call of one. They go before the loop's own.

    Attributes:
        functions: OpenAI's: name, parameters.
        required: None, or the names of which one must be called.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    required: list[str] | None = None

    def schema(self, name: str) -> dict[str, Any] | None:
        """The JSON schema of a function's arguments; None if it is not one of these."""
        for function in self.functions:
            if function["name"] == name:
                return function.get("parameters") or {"type": "object"}
        return None


def run_turn(
    protocol: Protocol,
    source: TokenSource,
    prefix: Sequence[int],
    functions: Functions,
    limits: Limits,
    *,
    grammars: Grammars | None = None,
    external: External | None = None,
    read: int = 0,
) -> Iterator[Event]:
    """Let `source` go on after `prefix` to the end of the turn.

    Args:
        protocol: the token ids.
        source: makes tokens.
        prefix: the message, and calls with results if the turn has got that far.
        functions: those that the loop may run.
        limits: where it ends in any case.
        grammars: holds the JSON of calls to its schema; without it that is only checked.
        external: functions at whose call the turn stops.
        read: how many tokens of the prefix the source has read.
    """
    yield from _Turn(protocol, source, functions, limits, grammars, external or External()).run(prefix, read)


class _Over(Exception):
    """A limit has been reached."""

    def __init__(self, reason: Reason) -> None:
        self.reason: Reason = reason


class _Instead(Exception):
    """What is said instead of what the model would."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence


class _Masks(NamedTuple):
    """The tokens (V,) that may stand in each place."""

    thinking: np.ndarray
    answering: np.ndarray
    calling: np.ndarray
    commands: np.ndarray
    only_result: np.ndarray
    only_call: np.ndarray


class _Turn:
    def __init__(
        self,
        protocol: Protocol,
        source: TokenSource,
        functions: Functions,
        limits: Limits,
        grammars: Grammars | None,
        external: External,
    ) -> None:
        self.protocol, self.source, self.functions = protocol, source, functions
        self.limits, self.grammars, self.external = limits, grammars, external
        self.begin = time.monotonic()
        self.tokens = self.steps = self.made = self.calls = self.answered = self.edges = 0
        self.wordless = self.entries = 0
        self.masks = _masks(protocol, source.vocab_size)
        self.said = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def run(self, prefix: Sequence[int], read: int) -> Iterator[Event]:
        protocol = self.protocol
        self.memory = PointerMemory(prefix, protocol.edge)
        self.message = protocol.decode(prefix[1 : [*prefix].index(protocol.end)])
        self.source.read(prefix[read:])
        self.tokens = len(prefix)
        mask = self.masks.thinking if self.external.required is None else self.masks.only_call
        event: type[Thought] | type[Text] = Thought
        reason: Reason = "stop"
        result: Result | None = None
        called = protocol.call in prefix
        self.check = self.functions.check_answer(self.message)
        try:
            while (token := self.choose(mask)) != protocol.end:
                if token in protocol.commands:
                    yield from self.command(protocol.commands[token])
                elif token == protocol.call:
                    call = yield from self.read_call()
                    yield call
                    if self.external.schema(call.name) is not None:
                        raise _Over("tool_calls")
                    result, called = self.result(call), True
                    yield result
                    mask = self.masks.thinking
                elif token == protocol.answer:
                    yield from self.rest(event)
                    self.memory.append(token)
                    mask, event = self.masks.answering, Text
                else:
                    yield from self.byte(token, event, called)
            if not called:
                self.hold(self.said, ended=True)
            if not self.answered and (result is not None or protocol.call not in prefix):
                raise _Instead(LOST)
        except _Over as over:
            reason = over.reason
        except _Instead as instead:
            yield from self.rest(event)
            sentence = instead.sentence
            if result is not None and not self.answered:  # what was done is told
                sentence = result.text
            elif sentence == LOST:
                sentence = (None if called else self.check("", True)) or LOST
                reason = "lost" if sentence == LOST else reason
            goes_on = sentence.startswith(self.said)
            yield Text(self.tokens, sentence[len(self.said) :] if goes_on else f"\n{sentence}")
        yield from self.rest(event)
        yield Finish(self.tokens, reason, self.made, self.calls, time.monotonic() - self.begin)

    def byte(self, token: int, event: type[Thought] | type[Text], called: bool) -> Iterator[Event]:
        """A byte of a thought or of the answer."""
        self.memory.append(token)
        piece = self.decoder.decode(bytes([self.protocol.bytes_of[token]]))
        if piece and event is Text:
            if not called:
                self.hold(self.said + piece, ended=False)
            self.said += piece
        if piece:
            yield event(self.tokens, piece)
        if event is Text:
            self.answered += 1
            if self.answered >= self.limits.answer:
                raise _Over("length")

    def hold(self, said: str, ended: bool) -> None:
        """End an answer that is not what it has to be."""
        if (sentence := self.check(said, ended)) is not None:
            self.decoder.reset()
            raise _Instead(sentence)

    def choose(self, allowed: np.ndarray) -> int:
        """The source's next token, which it has then read; at the end of the turn it has not."""
        if self.steps >= self.limits.steps:
            raise _Over("steps")
        if time.monotonic() - self.begin > self.limits.seconds:
            raise _Over("time")
        token = self.source.choose(allowed)
        if not allowed[token]:
            raise PararnnError(f"{self.protocol.name(token)} was chosen, which cannot stand here")
        self.steps += 1
        self.made += 1
        self.tokens += 1
        if token != self.protocol.end:
            self.source.read([token])
        return token

    def feed(self, tokens: Sequence[int]) -> None:
        self.source.read(tokens)
        self.steps += len(tokens)
        self.tokens += len(tokens)

    def command(self, command: Command) -> Iterator[Event]:
        yield CommandGiven(self.tokens, command)
        self.wordless = self.wordless + 1 if self.entries == len(self.memory.entries) else 0
        self.entries = len(self.memory.entries)
        if self.wordless > MOST_COMMANDS * self.entries:
            raise _Instead(LOST)
        match command.action:
            case "right":
                self.memory.move(command.pointer, 1)
            case "left":
                self.memory.move(command.pointer, -1)
            case "last":
                self.memory.jump_to_last(command.pointer)
            case "read":
                token = self.memory.read(command.pointer)
                self.feed([token])
                yield Observation(self.tokens, token, self.protocol.name(token))
                self.edges = self.edges + 1 if token == self.protocol.edge else 0
                if self.edges == MOST_EDGES:
                    raise _Instead(LOST)

    def rest(self, event: type[Thought] | type[Text]) -> Iterator[Event]:
        """A character that has not been completed."""
        piece = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        if event is Text:
            self.said += piece
        if piece:
            yield event(self.tokens, piece)

    def read_call(self) -> Generator[Event, None, Call]:
        """A call, up to and with <|result|>. The name is decided first; then its schema is known."""
        protocol, grammars = self.protocol, self.grammars
        self.memory.append(protocol.call)
        if grammars is None:
            return self.parsed((yield from self.write(self.masks.calling)))
        matcher = grammars.compile(grammars.call_name(self.external.required))
        head = yield from self.write(self.masks.calling, matcher)
        name = json.loads(head + "{}}")["name"]
        arguments = yield from self.write(self.masks.calling, self.arguments_matcher(grammars, name))
        self.memory.append(self.choose(self.masks.only_result))
        return Call(self.tokens, name, arguments[:-1])

    def arguments_matcher(self, grammars: Grammars, name: str) -> Any:
        """Of a function's arguments: any object where its schema cannot be kept to, or it does not exist."""
        schema = self.external.schema(name)
        if schema is None and name in self.functions:
            schema = self.functions[name].parameters
        try:
            return grammars.compile(grammars.call_arguments(schema or {"type": "object"}))
        except PararnnError as error:
            logger.info("calls of %s are only checked: %s", name, error)
            return grammars.compile(grammars.call_arguments({"type": "object"}))

    def write(self, mask: np.ndarray, matcher: Any = None) -> Generator[Event, None, str]:
        """Bytes, until the matcher is complete or, without one, until <|result|> is the source's choice."""
        written = bytearray()
        longest = MOST_WRITTEN + 6 * len(self.message.encode())
        while matcher is None or not matcher.is_stopped():
            allowed = mask
            if matcher is not None:
                allowed = mask & (allowed_tokens(matcher, self.source.vocab_size) | self.masks.commands)
            token = self.choose(allowed)
            if token in self.protocol.commands:
                yield from self.command(self.protocol.commands[token])
                continue
            self.memory.append(token)
            if token == self.protocol.result:
                break
            written.append(self.protocol.bytes_of[token])
            if matcher is not None:
                matcher.consume_token(token)
                if len(written) > longest:
                    raise _Instead(LOST)
        return written.decode(errors="replace")

    def parsed(self, text: str) -> Call:
        """A call that no grammar has held; one that is none has no name."""
        try:
            call = json.loads(text)
            return Call(self.tokens, str(call["name"]), json.dumps(call["arguments"], ensure_ascii=False))
        except (ValueError, LookupError, TypeError, RecursionError):
            return Call(self.tokens, "", text)

    def result(self, call: Call) -> Result:
        """Run a call, and feed what comes of it."""
        if self.calls >= self.limits.calls:
            outcome = Outcome(f"error: no more than {self.limits.calls} calls in a turn", True)
        elif not call.name:
            outcome = Outcome('error: that is no call; write {"name": ..., "arguments": {...}}', True)
        else:
            self.calls += 1
            refusal = self.functions.instead(self.message, call.name, call.arguments)
            outcome = Outcome(refusal, True) if refusal else self.functions.call(call.name, call.arguments)
        tokens = self.protocol.render_result(outcome.text)
        for token in tokens:
            self.memory.append(token)
        self.feed(tokens)
        return Result(self.tokens, outcome.text, outcome.failed)


def _masks(protocol: Protocol, vocab_size: int) -> _Masks:
    highest = max(*protocol.byte_ids, *protocol.commands, *(getattr(protocol, mark) for mark in MARKS))
    if highest >= vocab_size:
        raise PararnnError(
            f"the tokenizer has token {highest}, but the model has ids 0 to {vocab_size - 1}; use the "
            "tokenizer that the model was trained with"
        )

    def mask(*tokens: int) -> np.ndarray:
        allowed = np.zeros(vocab_size, bool)
        allowed[list(tokens)] = True
        return allowed

    free = (*protocol.byte_ids, *protocol.commands)
    return _Masks(
        thinking=mask(*free, protocol.call, protocol.answer),
        answering=mask(*free, protocol.end),
        calling=mask(*free, protocol.result),
        commands=mask(*protocol.commands),
        only_result=mask(protocol.result),
        only_call=mask(protocol.call),
    )
