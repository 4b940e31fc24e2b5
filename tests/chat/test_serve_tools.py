"""The server with a model that uses tools: turns in the engine, OpenAI's tool calls and their results."""

import json

import pytest
from openai.types.responses import Response
from starlette.testclient import TestClient

from mlx_pararnn.chat.prompt_cache import PromptCache
from mlx_pararnn.chat.server.endpoints import make_app
from mlx_pararnn.chat.server.engine import Engine
from mlx_pararnn.chat.server.metrics import Metrics
from mlx_pararnn.chat.server.server_settings import Settings
from mlx_pararnn.chat.server.service import Service
from mlx_pararnn.pocket.protocol import call_text
from tests.support.scripted import Script, tokens_of, tools_folder, tools_protocol

LAMP = {
    "type": "function",
    "function": {
        "name": "set_lamp",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}},
            "required": ["room"],
            "additionalProperties": False,
        },
    },
}
LAMP_CALL = '<|call|>{"name":"set_lamp","arguments":{"room":"hall"}}<|result|>'
SUM_CALL = '<|call|>{"name":"calculate","arguments":{"expression":"2+3"}}<|result|>'


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tools_folder(tmp_path_factory.mktemp("served") / "model")
    metrics = Metrics()
    engine = Engine(folder, PromptCache(), metrics)
    engine.wait()
    yield engine, metrics
    engine.stop()
    engine.thread.join(60)


@pytest.fixture
def served(engine, monkeypatch):
    """Clients of the server by its settings; scripts that stand in for the model; what they were given."""
    scripts, sources = [], []

    def source(model, sampler):
        sources.append(Script(scripts.pop(0)))
        return sources[-1]

    monkeypatch.setattr("mlx_pararnn.chat.server.turns.ModelTokens", source)

    def client(**settings):
        chosen = Settings(**settings)
        service = Service(engine[0], "tools", chosen, engine[1])
        return TestClient(make_app(service, chosen, engine[1]), base_url="http://127.0.0.1:8080")

    return client, scripts, sources


def ask(client, *messages, **fields):
    given = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    return client.post("/v1/chat/completions", json={"messages": given, **fields})


def test_an_answer(served):
    client, scripts, sources = served
    scripts.append("<|right1|><|read1|>hm<|answer|>five é<|end|>")
    response = ask(client(), "earlier", {"role": "assistant", "content": "x"}, "2+3?").json()
    (choice,) = response["choices"]
    assert choice["message"] == {"role": "assistant", "content": "five é"}
    assert choice["finish_reason"] == "stop"
    assert sources[0].taken[:6] == tools_protocol().render_message("2+3?")
    assert response["usage"]["prompt_tokens"] == 6
    assert response["usage"]["completion_tokens"] == 14


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["2+3?", [1, 2], ["2+3?", "x"]])
def test_a_text_is_not_continued(served, prompt, stream):
    """What the model made of it would be its own marks."""
    client, _, sources = served
    response = client().post("/v1/completions", json={"prompt": prompt, "stream": stream})
    assert response.status_code == 400
    assert "send them to /v1/chat/completions" in response.json()["error"]["message"]
    assert not sources


def test_an_answer_in_chunks(served):
    client, scripts, _ = served
    scripts.append("<|answer|>five<|end|>")
    events = [
        json.loads(line.removeprefix("data: "))
        for line in ask(client(), "2+3?", stream=True).text.splitlines()
        if line.startswith("data: {")
    ]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "five"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_the_clients_function_and_its_result(served, stream):
    client, scripts, sources = served
    scripts += [f"hm{LAMP_CALL}", "<|answer|>The lamp is on.<|end|>"]
    response = ask(client(), "light!", tools=[LAMP], stream=stream)
    if stream:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
        reason = chunks[-1]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        calls, reason = choice["message"]["tool_calls"], choice["finish_reason"]
    (call,) = calls
    assert reason == "tool_calls"
    assert call["function"]["name"] == "set_lamp"
    assert json.loads(call["function"]["arguments"]) == {"room": "hall"}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "on <|end|>"}
    answer = ask(client(), "light!", said, result, tools=[LAMP]).json()["choices"][0]
    assert answer["message"]["content"] == "The lamp is on."
    begin = [*tokens_of(f"<|user|>light!<|end|>{LAMP_CALL}"), *tools_protocol().render_result("on <|end|>")]
    assert sources[1].taken[: len(begin)] == begin


def test_a_call_can_be_required(served):
    client, scripts, _ = served
    scripts.append(LAMP_CALL)
    (choice,) = ask(client(), "hi", tools=[LAMP], tool_choice="required").json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "set_lamp"


def test_the_packages_functions_run_only_where_they_are_allowed(served):
    client, scripts, sources = served
    scripts += [f"{SUM_CALL}<|answer|><|end|>"] * 2
    (choice,) = ask(client(functions=True), "2+3?").json()["choices"]
    assert choice["message"]["content"] == "2+3 is 5."
    assert "tool_calls" not in choice["message"]
    (choice,) = ask(client(), "2+3?").json()["choices"]
    assert choice["message"]["content"] == "error: there is no function 'calculate'; there are: none"
    assert tools_protocol().decode(sources[1].taken).count("no function") == 1


def list_call(name, **arguments):
    return f"<|call|>{call_text(name, arguments)}<|result|><|answer|><|end|>"


def test_lists_are_those_of_the_messages(served):
    """What earlier answers of the same conversation have put on them, and nothing of another's."""
    client, scripts, _ = served
    asked, said = client(functions=True), []
    turns = [
        (
            "add milk and eggs",
            list_call("add_to_list", items="milk and eggs"),
            "Added milk and eggs to your to-do list.",
        ),
        ("hi", "<|answer|>Hello.<|end|>", "Hello."),
        ("milk is here", list_call("remove_from_list", items="milk"), "Removed milk from your lists."),
        ("show it", list_call("show_list"), "To-do list: eggs."),
    ]
    for question, script, answer in turns:
        scripts.append(script)
        (choice,) = ask(asked, *said, question).json()["choices"]
        assert choice["message"]["content"] == answer
        said += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    scripts.append(list_call("show_list"))
    (choice,) = ask(asked, "show it").json()["choices"]
    assert choice["message"]["content"] == "Your to-do list is empty."


def test_nothing_is_set_that_would_not_ring(served):
    client, scripts, _ = served
    scripts.append(list_call("set_timer", duration="5 minutes"))
    (choice,) = ask(client(functions=True), "set a timer for 5 minutes").json()["choices"]
    assert choice["message"]["content"].startswith("I cannot set timers here, as nothing would ring")


@pytest.mark.parametrize(
    ("messages", "fields", "said"),
    [
        ([{"role": "system", "content": "x"}], {}, "one of a user"),
        ([{"role": "usr", "content": "x"}], {}, "the role 'usr', not one of system, user, assistant, tool"),
        ([""], {}, "one of a user"),
        (["x", {"role": "assistant", "content": "y"}], {}, "must end with a user's"),
        (["x", {"role": "tool", "content": "y", "tool_call_id": "a"}], {}, "for each of tool_calls"),
        (["x"], {"stop": ["a"]}, "stop is not taken"),
        (["x"], {"presence_penalty": 1}, "presence_penalty is not taken"),
        (["x"], {"repetition_penalty": 1.1}, "repetition_penalty is not taken"),
        (["x"], {"logprobs": True}, "logprobs is not taken"),
        (["x"], {"response_format": {"type": "json_object"}}, "response_format is not taken"),
    ],
)
def test_what_cannot_be_asked_is_refused(served, messages, fields, said):
    response = ask(served[0](), *messages, **fields)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_a_long_message_is_read_in_pieces(served):
    client, scripts, sources = served
    scripts.append("<|last1|><|left1|><|read1|><|answer|>ok<|end|>")
    message = "".join(map(str, range(1000)))
    assert ask(client(), message).json()["choices"][0]["message"]["content"] == "ok"
    begin = tools_protocol().render_message(message)
    assert sources[0].taken == [*begin, *tokens_of("<|last1|><|left1|><|read1|>9<|answer|>ok")]


def test_limits_end_an_answer(served):
    client, scripts, _ = served
    scripts.append("<|answer|>abc")
    (choice,) = ask(client(), "x", max_tokens=5).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abccc", "length")


def test_a_turn_that_fails_ends_alone(served):
    client, scripts, _ = served
    scripts += ["<|edge|>", "<|answer|>ok<|end|>"]
    assert ask(client(), "x").status_code == 500
    assert ask(client(), "x").json()["choices"][0]["message"]["content"] == "ok"


def test_several_answers_and_anthropics_protocol(served):
    client, scripts, _ = served
    scripts += ["<|answer|>a<|end|>", "<|answer|>b<|end|>", LAMP_CALL]
    choices = ask(client(), "x", n=2).json()["choices"]
    assert sorted(choice["message"]["content"] for choice in choices) == ["a", "b"]
    tool = {"name": "set_lamp", "input_schema": LAMP["function"]["parameters"]}
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "light!"}], "tools": [tool]}
    answer = client().post("/v1/messages", json=body).json()
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"][-1]["input"] == {"room": "hall"}


def test_a_call_of_the_clients_function_in_responses(served):
    """By the id of the response before, and by sending all items again."""
    client, scripts, sources = served
    scripts += [LAMP_CALL, LAMP_CALL, *["<|answer|>The lamp is on.<|end|>"] * 2]
    tool = {"type": "function", **LAMP["function"]}
    body = {"input": "light!", "tools": [tool], "tool_choice": {"type": "function", "name": "set_lamp"}}
    asked = client()
    streamed = asked.post("/v1/responses", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    kinds = [event["type"].removeprefix("response.") for event in events]
    call_kinds = ["function_call_arguments.delta", "function_call_arguments.done"]
    assert kinds == [
        "created", "in_progress", "output_item.added", *call_kinds, "output_item.done", "completed",
    ]  # fmt: skip
    whole = asked.post("/v1/responses", json=body).json()
    for first in (events[-1]["response"], whole):
        Response.model_validate(first, strict=True)
        (call,) = first["output"]
        assert json.loads(call["arguments"]) == {"room": "hall"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "on"}
    for again in (
        {"input": [result], "previous_response_id": whole["id"]},
        {"input": [{"role": "user", "content": "light!"}, *whole["output"], result]},
    ):
        answer = asked.post("/v1/responses", json={"tools": [tool], **again}).json()
        assert answer["output"][0]["content"][0]["text"] == "The lamp is on."
        begin = [*tokens_of(f"<|user|>light!<|end|>{LAMP_CALL}"), *tools_protocol().render_result("on")]
        assert sources[-1].taken[: len(begin)] == begin
