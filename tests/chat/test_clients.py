"""Clients that people use, each against the running server, where it is installed (extra `clients`).

OpenAI's and Anthropic's own are in test_serve_responses.py and test_serve_requests.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.toolchain

PROMPT, SAID = "def main(", "self, other)"
MESSAGES = [{"role": "user", "content": PROMPT}]


class Choice(BaseModel):
    a: bool


@pytest.fixture
def url(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    return f"{server.url}/v1"


def test_llm(url, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    pytest.importorskip("llm")
    from llm.default_plugins.openai_models import Chat, Completion

    named = {"model_name": "demo", "api_base": url, "key": "any"}
    model = Chat("demo", supports_schema=True, **named)
    assert model.prompt(PROMPT, max_tokens=12).text() == SAID
    assert model.prompt(PROMPT, max_tokens=12, stream=False).text() == SAID
    said = model.prompt("x", schema=Choice, max_tokens=50).text()
    Choice.model_validate_json(said)
    assert Completion("demo", **named).prompt(PROMPT, max_tokens=12).text() == SAID


def test_llm_by_the_recipe_of_the_docs(url, tmp_path, monkeypatch):
    pytest.importorskip("llm")
    docs = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    recipe = docs.partition("```yaml\n- model_id")[2].partition("```")[0]
    (tmp_path / "extra-openai-models.yaml").write_text(
        "- model_id" + recipe.replace("http://127.0.0.1:8080/v1", url)
    )
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    options = ["-o", "max_tokens", "12", "-o", "temperature", "0"]
    command = [sys.executable, "-m", "llm", "-m", "pararnn", PROMPT, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{SAID}\n"), done.stderr


def test_litellm(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm")
    named = {"model": "openai/demo", "api_base": url, "api_key": "any"}
    answer = litellm.completion(messages=MESSAGES, max_tokens=12, **named)
    assert answer.choices[0].message.content == SAID
    chunks = litellm.completion(messages=MESSAGES, max_tokens=12, stream=True, **named)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    answer = litellm.completion(messages=MESSAGES, max_tokens=50, response_format=Choice, **named)
    Choice.model_validate_json(answer.choices[0].message.content)
    answer = litellm.responses(input=PROMPT, max_output_tokens=12, **named)
    assert answer.output[0].content[0].text.startswith(SAID)  # it asks for 16 tokens at least


def test_langchain(url):
    langchain = pytest.importorskip("langchain_openai")
    named = {"model": "demo", "base_url": url, "api_key": "any", "max_retries": 0}
    for responses in (False, True):
        chat = langchain.ChatOpenAI(max_tokens=12, use_responses_api=responses, **named)
        assert chat.invoke(PROMPT).text == SAID
        assert "".join(chunk.text for chunk in chat.stream(PROMPT)) == SAID
    held = langchain.ChatOpenAI(max_tokens=50, **named)
    assert isinstance(held.with_structured_output(Choice, method="json_schema").invoke("x"), Choice)
    assert langchain.OpenAI(max_tokens=12, temperature=0, **named).invoke(PROMPT) == SAID


def test_instructor(url):
    instructor = pytest.importorskip("instructor")
    import openai

    client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    patched = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    answer = patched.chat.completions.create(
        model="demo", messages=MESSAGES, response_model=Choice, max_tokens=60, max_retries=0
    )
    assert isinstance(answer, Choice)


def test_lm_eval(url, folder):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    named = {"model": "demo", "num_concurrent": 1, "max_retries": 1}
    scored = LocalCompletionsAPI(base_url=f"{url}/completions", tokenizer=str(folder), **named)
    pairs = [(PROMPT, "self"), (PROMPT, "#")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    (likely, greedy), (unlikely, other) = scored.loglikelihood(requests)
    assert (greedy, other) == (True, False)
    assert unlikely < likely < 0
    settings = {"until": [")"], "max_gen_toks": 20, "temperature": 0}
    wanted = [Instance("generate_until", {}, (PROMPT, settings), 0)]
    assert scored.generate_until(wanted) == ["self, other"]
    chat = LocalChatCompletion(base_url=f"{url}/chat/completions", **named)
    rendered = chat.apply_chat_template([{"role": "user", "content": PROMPT}])
    assert chat.generate_until([Instance("generate_until", {}, (rendered, settings), 0)]) == ["self, other"]


NODE = """
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText } from "ai";
const baseURL = process.argv[2], messages = [{ role: "user", content: "def main(" }], said = {};
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const chat = await client.chat.completions.create({ model: "demo", messages, max_tokens: 12 });
said.chat = chat.choices[0].message.content;
const asked = { model: "demo", input: "def main(", max_output_tokens: 12 };
said.responses = (await client.responses.create(asked)).output_text;
said.events = "";
for await (const event of await client.responses.create({ ...asked, stream: true }))
  if (event.type === "response.output_text.delta") said.events += event.delta;
const model = createOpenAICompatible({ name: "local", baseURL, supportsStructuredOutputs: true })("demo");
const wanted = { model, prompt: "def main(", maxOutputTokens: 12 };
said.text = (await generateText(wanted)).text;
said.stream = "";
for await (const part of streamText(wanted).textStream) said.stream += part;
const schema = jsonSchema({ type: "object", properties: { a: { type: "boolean" } }, required: ["a"] });
said.object = typeof (await generateObject({ ...wanted, schema, maxOutputTokens: 50 })).object.a;
console.log(JSON.stringify(said));
"""


def test_npm_clients(url, tmp_path):
    """`openai`, `ai` and `@ai-sdk/openai-compatible` in the folder that NODE_CLIENTS names."""
    modules = Path(os.environ.get("NODE_CLIENTS", "")) / "node_modules" / "@ai-sdk"
    if shutil.which("node") is None or not modules.is_dir():
        pytest.skip("NODE_CLIENTS names no folder where npm installed the clients")
    (tmp_path / "node_modules").symlink_to(modules.parent)
    (tmp_path / "ask.mjs").write_text(NODE)
    result = subprocess.run(
        ["node", "--preserve-symlinks", "--preserve-symlinks-main", "ask.mjs", url],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said.pop("object") == "boolean"
    assert said == dict.fromkeys(("chat", "responses", "events", "text", "stream"), SAID)
