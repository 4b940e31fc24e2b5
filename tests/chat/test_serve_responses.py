"""/v1/responses by OpenAI's own client: stateless and gone on from, whole and in events, sync and async."""

import asyncio
import json

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from mlx_pararnn.chat.server import responses
from mlx_pararnn.chat.server.schema import Refused
from tests.support.serving import client_of

SAID = {"model": "demo", "input": "def main(", "max_output_tokens": 12}


def test_an_answer_and_what_is_told_of_it(client):
    answer = client.responses.create(**SAID, metadata={"a": "b"})
    assert answer.output_text == "self, other)"
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (9, 12, 21)
    assert (answer.metadata, answer.previous_response_id, answer.model) == ({"a": "b"}, None, "demo")
    assert client.responses.retrieve(answer.id) == answer
    counted = client.responses.input_tokens.count(model="demo", input="def main(")
    assert counted.input_tokens == 9


def test_a_stop_string_completes_an_answer(client):
    answer = client.responses.create(**SAID, extra_body={"stop": "other"})
    assert (answer.output_text, answer.status, answer.incomplete_details) == ("self, ", "completed", None)


def test_events_are_those_that_the_client_puts_together(client):
    with client.responses.stream(**SAID, extra_body={"stop": ")"}) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == final.output_text == "self, other"
    cut = list(client.responses.create(**SAID, stream=True))
    assert (cut[-1].type, cut[-1].response.output_text) == ("response.incomplete", "self, other)")


def test_a_response_is_gone_on_from_by_its_id(client):
    first = client.responses.create(**SAID, instructions="# ")
    assert first.usage.input_tokens == len("# def main(")
    text = first.output_text
    second = client.responses.create(**{**SAID, "input": "\n"}, previous_response_id=first.id)
    # Earlier instructions are not carried over; earlier messages and answers are.
    assert second.usage.input_tokens == len(f"def main({text}\n")
    third = client.responses.create(**{**SAID, "input": "x"}, previous_response_id=second.id)
    told = [*first.output, {"role": "user", "content": "\n"}, *second.output]
    told = [item if isinstance(item, dict) else item.to_dict() for item in told]
    whole = client.responses.create(
        **{
            **SAID,
            "input": [{"role": "user", "content": "def main("}, *told, {"role": "user", "content": "x"}],
        }
    )
    assert third.output_text == whole.output_text
    assert third.usage.input_tokens == whole.usage.input_tokens
    # What was read and generated before is not read again.
    assert third.usage.input_tokens_details.cached_tokens == third.usage.input_tokens - len("x")


def test_what_is_not_stored_or_deleted_cannot_be_gone_on_from(client):
    kept = client.responses.create(**SAID)
    client.responses.delete(kept.id)
    for gone in (kept, client.responses.create(**SAID, store=False)):
        with pytest.raises(openai.NotFoundError, match="there is no response 'resp_"):
            client.responses.create(**SAID, previous_response_id=gone.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone.id)


class Choice(BaseModel):
    a: bool


def test_an_answer_of_a_schema_and_its_log_probabilities(client):
    answer = client.responses.parse(model="demo", input="x", text_format=Choice, max_output_tokens=50)
    assert answer.output_parsed in (Choice(a=True), Choice(a=False))
    answer = client.responses.create(**SAID, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = answer.output[0].content[0].logprobs
    assert "".join(token.token for token in logprobs) == answer.output_text
    assert [len(token.top_logprobs) for token in logprobs] == [2] * 12


def test_the_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            async with client.responses.stream(**SAID, extra_body={"stop": ")"}) as stream:
                streamed = await stream.get_final_response()
            whole = await client.responses.create(**SAID, extra_body={"stop": ")"})
            chat = await client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "def main("}], max_tokens=12
            )
            return streamed.output_text, whole.output_text, chat.choices[0].message.content

    assert asyncio.run(ask()) == ("self, other", "self, other", "self, other)")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"input": ""}, "input must be a string or a list of items"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input has an item of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text parts"),
        ({"input": [{"content": "x"}]}, "each of input must be an object with a role"),
        ({"background": True}, "background is not taken"),
        ({"conversation": "conv_1"}, "conversation is not taken"),
        ({"prompt": {"id": "p"}}, "prompt is not taken"),
        ({"tools": [{"type": "web_search"}]}, "tools of type 'web_search' are not taken"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice of type 'mcp' is not taken"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format can only be"),
        ({"max_output_tokens": 0}, "max_output_tokens must be at least 1"),
        ({"top_logprobs": 21}, "top_logprobs must be at most 20"),
    ],
)
def test_what_is_asked_wrongly_is_refused_by_name(server, fields, sentence):
    client = client_of(server)
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/responses", body={**SAID, **fields}, cast_to=Response)
    assert sentence in refused.value.body["message"]


def test_stored_responses_are_bounded(monkeypatch):
    monkeypatch.setattr(responses, "MOST_STORED", 2)
    stored = responses.StoredResponses()
    for name in "abc":
        stored.add([{"role": "user", "content": name}], {"id": name})
        stored.get("a" if name != "c" else "c")
    assert stored.get("a").messages[0]["content"] == "a"
    with pytest.raises(Refused, match="no response 'b'"):
        stored.get("b")
    monkeypatch.setattr(responses, "MOST_STORED_BYTES", 100)
    stored.add([{"role": "user", "content": "x" * 20}], {"id": "d"})
    assert len(json.dumps(stored.get("d").messages)) < 100
    with pytest.raises(Refused):
        stored.get("a")
