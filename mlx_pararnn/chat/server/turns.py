"""Requests to a model that uses tools: from messages to a turn, and from its calls to OpenAI's form."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from ...generation import find_room
from ...pocket.answers import ModelTokens, assistant_functions, check_message
from ...pocket.assistant import Assistant
from ...pocket.events import Call, Event
from ...pocket.functions import Functions
from ...pocket.loop import External, Limits, run_turn
from ...pocket.protocol import Protocol
from ...text.grammars import Grammars
from .batch import READ_STEP
from .engine import Engine
from .prompts import Prompt, plain
from .schema import ChatRequest, Refused

# Fields that such a turn has no place for, and what they may be where nothing is asked.
NOT_TAKEN: dict[str, tuple[Any, ...]] = {
    "stop": ([],), "logit_bias": ({},), "logprobs": (False,), "repetition_penalty": (None, 0.0, 1.0),
    "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "xtc_probability": (0.0,),
    "format_schema": (None,),
}  # fmt: skip
ROLES = ("system", "user", "assistant", "tool")


class Turns:
    """Makes turns for one model.

    Args:
        engine: runs them; its model is used in its thread only.
        protocol: the model's token ids.
        own_functions: whether the package's own functions run in the server.
    """

    def __init__(self, engine: Engine, protocol: Protocol, own_functions: bool) -> None:
        self._engine, self._protocol, self._own = engine, protocol, own_functions
        self._grammars = Grammars(engine.tokenizer, engine.model.args.vocab_size)

    def prompt(self, request: ChatRequest) -> Prompt:
        """The last user message, the calls with their results that follow it, and the lists so far."""
        for name, nothing in NOT_TAKEN.items():
            if getattr(request, name) not in nothing:
                field = "response_format" if name == "format_schema" else name
                raise Refused(400, f"{field} is not taken: this model uses tools and ends its answers itself")
        messages = [plain(message) for message in request.messages]
        for message in messages:
            if message["role"] not in ROLES:
                raise Refused(
                    400, f"messages has the role {message['role'][:60]!r}, not one of {', '.join(ROLES)}"
                )
        asked = [n for n, message in enumerate(messages) if message["role"] == "user"]
        if not asked or not messages[asked[-1]]["content"]:
            raise Refused(400, "messages must have one of a user that is not empty")
        check_message(self._engine.tokenizer, messages[asked[-1]]["content"])
        tokens = self._protocol.render_message(messages[asked[-1]]["content"])
        rest = messages[asked[-1] + 1 :]
        results = {
            message.get("tool_call_id"): message["content"] for message in rest if message["role"] == "tool"
        }
        calls = [call for message in rest for call in message.get("tool_calls") or []]
        if (rest and rest[-1]["role"] != "tool") or len(results) != len(calls):
            raise Refused(400, "messages must end with a user's, or with a tool's for each of tool_calls")
        for call in calls:
            if call.get("id") not in results:
                raise Refused(400, f"there is no message of a tool for the call {str(call.get('id'))[:60]!r}")
            function = call["function"]
            tokens += self._protocol.render_call(str(function.get("name")), function["arguments"])
            tokens += self._protocol.render_result(results[call["id"]])
        assistant = Assistant()
        if self._own:
            assistant.hear(message["content"] for message in messages if message["role"] == "assistant")
        return Prompt(tokens, find_room(self._engine.model, len(tokens)), memory=assistant.memory())

    def begin(
        self, request: ChatRequest, prompt: Prompt, sampler: Any, answer: int
    ) -> Callable[[], Iterator[Event]]:
        """What begins the turn, in the engine's thread."""
        steps = Limits.steps if prompt.room is None else min(Limits.steps, prompt.room)
        assistant = Assistant(rings=False)
        assistant.recall(prompt.memory)
        functions = assistant_functions(assistant) if self._own else Functions()

        def events() -> Iterator[Event]:
            source, read = ModelTokens(self._engine.model, sampler), 0
            while len(prompt.tokens) - read > READ_STEP:  # between the steps of other requests
                source.read(prompt.tokens[read : read + READ_STEP])
                read += READ_STEP
                yield Event(read)
            yield from run_turn(
                self._protocol,
                source,
                prompt.tokens,
                functions,
                Limits(steps=steps, answer=answer),
                grammars=self._grammars,
                external=_external(request),
                read=read,
            )

        return events


def call_of(call: Call) -> dict[str, Any]:
    """A call in OpenAI's form."""
    return {
        "index": 0,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _external(request: ChatRequest) -> External:
    """The client's functions, and whether one of them must be called."""
    if request.tool_choice == "none":
        return External()
    functions = [tool["function"] for tool in request.tools]
    if isinstance(request.tool_choice, dict):
        return External(functions, [request.tool_choice["function"]["name"]])
    required = [function["name"] for function in functions] if request.tool_choice == "required" else None
    return External(functions, required)
