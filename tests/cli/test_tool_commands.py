"""`generate` and `chat` with a model that uses tools: answers on stdout, the tools on stderr."""

import io
import json
import re
import shutil
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlx_pararnn import load
from mlx_pararnn.cache import RecurrentCache
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli.app import app
from mlx_pararnn.cli.chat import what_to_try
from mlx_pararnn.cli.sampling import CONVERSATION, LIKELIEST, Sampling
from mlx_pararnn.cli.tool_lines import ToolLines
from mlx_pararnn.pocket.events import CommandGiven, Result, Text
from mlx_pararnn.pocket.functions import Functions
from mlx_pararnn.pocket.loop import Limits
from mlx_pararnn.pocket.protocol import Command
from tests.support.demo import DEMO
from tests.support.scripted import Script, tools_folder, tools_protocol

CALL = '<|call|>{"name":"calculate","arguments":{"expression":"2+3"}}<|result|>'
SUM = f"<|right1|><|read1|>a{CALL}<|answer|>It is 5.<|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tools_folder(tmp_path_factory.mktemp("tools") / "model")


@pytest.fixture
def scripts(monkeypatch):
    """Scripts that stand in for the model, one a turn; the sources that were made of them."""
    waiting, sources = [], []

    def source(model, sampler, cache, progress, step_size):
        source = Script(waiting.pop(0) if waiting else SUM)
        source.cache, source.sampler = model.make_cache() if cache is None else cache, sampler
        read = source.read

        def counted(tokens):
            read(tokens)
            for layer in source.cache:
                layer.open(1)
                layer.advance(len(tokens))

        source.read = counted
        sources.append(source)
        return source

    monkeypatch.setattr("mlx_pararnn.pocket.answers.ModelTokens", source)
    return waiting, sources


def run(*args, **kwargs):
    return CliRunner().invoke(app, list(map(str, args)), **kwargs)


def test_generate_answers_by_tools_with_the_answer_alone_on_stdout(folder, scripts):
    result = run("generate", folder, "-p", "2+3?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "It is 5.\n"
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("(stop)\n")
    assert scripts[1][0].taken[:6] == tools_protocol().render_message("2+3?")


def test_show_tools_unfolds_what_was_done(folder, scripts):
    result = run("generate", folder, "-p", "2+3?", "--show-tools")
    assert result.stdout == "It is 5.\n"
    assert [line.split(maxsplit=1) for line in result.stderr.splitlines()[:7]] == [
        ["right", "pointer 1"],
        ["read", "pointer 1"],
        ["sees", "'2'"],
        ["thinks", "a"],
        ["calls", 'calculate {"expression":"2+3"}'],
        ["result", "2+3 is 5."],
        ["ends", result.stderr.splitlines()[6].split(maxsplit=1)[1]],
    ]


def test_a_terminal_gets_one_dim_line(folder, scripts, monkeypatch):
    monkeypatch.setattr("mlx_pararnn.cli.tool_lines.on_terminal", lambda: True)
    scripts[0].append(SUM.replace("2+3", "1+" * 60 + "1"))
    result = run("generate", folder, "-p", "1+" * 60 + "1", color=True)
    assert result.stdout == "It is 5.\n"
    (line,) = [line for line in result.stderr.splitlines() if "calculate" in line]
    assert line.startswith("\x1b[2m")  # dim
    assert "… → 1+1+1+1" in line
    assert line.endswith("… · 2 steps\x1b[0m")


def test_a_long_turn_shows_how_far_it_is(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console",
        lambda **options: Console(**{**options, "file": shown, "stderr": False, "force_terminal": True}),
    )
    monkeypatch.setattr("mlx_pararnn.cli.tool_lines.on_terminal", lambda: True)
    monkeypatch.setattr("mlx_pararnn.cli.tool_lines.PATIENCE", -1)
    with ToolLines(False) as lines:
        for _ in range(200):
            lines.show(CommandGiven(1234, Command("right", 1)))
            if "1,234 tokens" in shown.getvalue():
                break
            time.sleep(0.02)
        assert "1,234 tokens" in shown.getvalue()
        lines.show(Text(9999, "x"))
    after = len(shown.getvalue())
    lines.show(Text(9999, "y"))
    assert "9,999 tokens" not in shown.getvalue()[after:]


def test_what_a_model_writes_moves_no_cursor(folder, scripts):
    scripts[0].append("\x1b[2J\r<|answer|>x<|end|>")
    result = run("generate", folder, "-p", "x", "--show-tools")
    assert "\x1b" not in result.stderr
    assert r"\x1b[2J\r" in result.stderr


@pytest.mark.parametrize("command", [["generate", DEMO, "-p", "x"], ["chat", DEMO]], ids=lambda c: c[0])
def test_what_a_model_without_tools_does_is_not_shown(command):
    result = run(*command, "--show-tools", input="x\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: this model uses no tools; leave out --show-tools\n"


def test_json_has_the_calls(folder, scripts):
    answer = json.loads(run("generate", folder, "-p", "2+3?", "--json").stdout)
    assert (answer["text"], answer["finish_reason"]) == ("It is 5.", "stop")
    (call,) = answer["calls"]
    assert (call["name"], call["result"], call["failed"]) == ("calculate", "2+3 is 5.", False)
    assert answer["tokens"] > answer["made"] > 50


def test_a_limit_is_said(folder, scripts):
    result = run("generate", folder, "-p", "2+3?", "--max-tokens", "2")
    assert result.stdout == "It\n"
    assert "(the answer has reached its limit (--max-tokens))" in result.stderr


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("<|answer|><|end|>", 1),  # it has lost its way
        ("<|answer|>I" + " x" * 5000, 1),
        ("<|answer|>I cannot do that.<|end|>", 0),
    ],
    ids=["lost", "too long an answer", "refused"],
)
def test_an_answer_that_is_not_whole_is_a_failure(folder, scripts, script, code):
    for json_too in ((), ("--json",)):
        scripts[0][:] = [script]
        assert run("generate", folder, "-p", "x", *json_too).exit_code == code


def test_a_message_from_a_pipe_ends_before_its_last_newline(folder, scripts):
    assert run("generate", folder, input="2+3?\n").stdout == "It is 5.\n"
    assert scripts[1][0].taken[:6] == tools_protocol().render_message("2+3?")


def test_no_text_is_continued(folder):
    """As /v1/completions has it: what came would be the model's own marks."""
    result = run("generate", folder, "-p", "2", "--ignore-chat-template", "-m", "3")
    assert (result.exit_code, result.stdout) == (1, "")
    said = "this model answers messages and continues no text; leave out --ignore-chat-template"
    assert result.stderr == f"error: {said}\n"


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("option", [["--stop", "x"], ["--repetition-penalty", "1.1"]])
def test_options_without_a_place_are_refused(folder, command, option):
    given = ["-p", "x"] if command == "generate" else []
    result = run(command, folder, *given, *option)
    assert result.exit_code == 1
    assert "ends its answers itself" in result.stderr


def test_an_empty_message_is_one_sentence(folder):
    result = run("generate", folder, input="")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: the message is empty; write what the model should answer\n",
    )


@pytest.mark.parametrize(
    ("settings", "options", "sampled"),
    [
        ({}, [], False),
        ({"do_sample": True, "temperature": 0.5}, [], True),
        ({"do_sample": False, "temperature": 0.5}, [], False),
        ({"do_sample": True, "temperature": "hot"}, [], True),
        ({"do_sample": True}, ["--temp", "0"], False),
        ({}, ["--temp", "0.5"], True),
    ],
)
def test_sampling_defaults_are_the_models_own(folder, scripts, tmp_path, settings, options, sampled):
    own = shutil.copytree(folder, tmp_path / "model")
    (own / "generation_config.json").write_text(json.dumps(settings))
    assert run("generate", own, "-p", "x", *options).exit_code == 0
    assert (scripts[1][0].sampler is not None) == sampled


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_penalty_of_the_models_own_file_is_passed_over(folder, scripts, tmp_path, command):
    """No option was given that could be refused."""
    own = shutil.copytree(folder, tmp_path / "model")
    (own / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    result = run(command, own, *(["-p", "2+3?"] if command == "generate" else []), input="2+3?\n")
    assert (result.exit_code, result.stdout) == (0, "It is 5.\n"), result.stderr
    assert scripts[1][0].sampler is None


@pytest.mark.parametrize(
    ("tools", "config", "options", "expected"),
    [
        (False, {}, [], CONVERSATION),
        (False, {"repetition_penalty": 1.1}, [], CONVERSATION.replaced(repetition_penalty=1.1)),
        (True, {}, [], LIKELIEST),
        (True, {"repetition_penalty": 1.1}, [], LIKELIEST),
        (True, {"temperature": 0.5, "repetition_penalty": 1.1}, [], Sampling(temp=0.5)),
        (True, {}, ["--temp", "0.3"], Sampling(temp=0.3)),
    ],
)
def test_serve_draws_as_chat_does(folder, tmp_path, monkeypatch, tools, config, options, expected):
    own = shutil.copytree(folder if tools else DEMO, tmp_path / "model")
    (own / "generation_config.json").write_text(json.dumps(config))
    started = []
    monkeypatch.setattr(
        "mlx_pararnn.chat.server.serve", lambda path, settings, ready: started.append(settings)
    )
    result = run("serve", own, *options)
    assert result.exit_code == 0, result.stderr
    (told,) = started
    names = ("top_p", "top_k", "min_p", "repetition_penalty")
    assert Sampling(told.temperature, *(getattr(told, name) for name in names)) == expected


def test_chat_opens_with_two_lines_to_try_and_answers(folder, scripts):
    result = run("chat", folder, input="2+3?\n\n/stats\n/quit\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "It is 5.\n"
    first, second, *rest = result.stderr.splitlines()
    assert first.startswith("Try: ")
    assert second.startswith("Or:  ")
    assert "/help" in second
    assert "1 to /undo" in rest[-1]


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ('{"examples": ["add 1 and 2", "sort 3 1 2", "more"]}', ["Try: add 1 and 2", "Or:  sort 3 1 2"]),
        (r'{"examples": ["\u001b[2J"]}', [r"Try: \x1b[2J", "Or:  what is 1234"]),
        ('{"examples": 5}', ["Try: what is 1234", "Or:  what day"]),
        ("[", ["Try: what is 1234", "Or:  what day"]),
        (None, ["Try: what is 1234", "Or:  what day"]),
    ],
)
def test_what_to_try_comes_from_the_model_folder(folder, tmp_path, config, lines):
    own = shutil.copytree(folder, tmp_path / "model")
    if config is not None:
        (own / "generation_config.json").write_text(config)
    shown = what_to_try(load(own)[1])
    assert [line.startswith(start) for line, start in zip(shown, lines, strict=True)] == [True, True]


def say(conversation, text, **kwargs):
    return "".join(response.text for response in conversation.respond(text, **kwargs))


def test_a_conversation_goes_on_from_its_state(folder, scripts):
    conversation = Chat(*load(folder))
    assert conversation.uses_tools
    assert say(conversation, "2+3?") == "It is 5."
    before = conversation.tokens
    scripts[0].append("<|answer|>Again.<|end|>")
    assert say(conversation, "and?") == "Again."
    end, *turn = scripts[1][1].taken
    assert end == tools_protocol().end  # of the first turn, which nobody had read
    assert turn[:6] == tools_protocol().render_message("and?")
    assert conversation.tokens == before + 1 + len(turn)
    assert [message["content"] for message in conversation.messages] == ["2+3?", "It is 5.", "and?", "Again."]
    assert conversation.undo() == "and?"
    assert conversation.tokens == before
    scripts[0].append("<|answer|>5<|end|>")
    assert "".join(response.text for response in conversation.regenerate()) == "5"
    assert conversation.messages[-2:] == [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "5"},
    ]
    assert scripts[1][2].taken[0] == tools_protocol().user  # from the state before the question


def test_timers_and_lists_last_as_long_as_the_conversation(folder, scripts):
    conversation = Chat(*load(folder))
    call = '<|call|>{"name":"add_to_list","arguments":{"items":"milk"}}<|result|><|answer|><|end|>'
    show = '<|call|>{"name":"show_list","arguments":{}}<|result|><|answer|><|end|>'
    scripts[0][:] = [call, show]
    say(conversation, "put milk on my list")
    assert "milk" in say(conversation, "what is on my list?")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("set a timer for 5 minutes", '"set_timer","arguments":{"duration":"5 minutes"}'),
        ("set an alarm for 7:30", '"set_alarm","arguments":{"time":"7:30"}'),
        ("remind me to call at 7:30", '"set_reminder","arguments":{"text":"call","time":"7:30"}'),
    ],
)
def test_in_a_pipe_nothing_is_set_that_would_not_ring(folder, scripts, message, call):
    """The process ends with its input."""
    scripts[0].append(f'<|call|>{{"name":{call}}}<|result|><|answer|><|end|>')
    result = run("chat", folder, input=f"{message}\n")
    assert result.exit_code == 0
    assert re.match(r"I cannot set \w+ here, as nothing would ring", result.stdout)


def test_a_conversation_calls_the_functions_it_was_given(folder, scripts):
    rung = []

    def ring(times: int) -> str:
        rung.append(times)
        return "rung"

    conversation = Chat(*load(folder), functions=Functions([ring]))
    scripts[0].append('<|call|>{"name":"ring","arguments":{"times":2}}<|result|><|answer|><|end|>')
    responses = list(conversation.respond("ring!"))
    assert rung == [2]
    assert [response.event.text for response in responses if isinstance(response.event, Result)] == ["rung"]
    assert conversation.messages[-1]["content"] == "rung"
    assert responses[-1].finish_reason == "stop"
    assert say(conversation.branch(), "2+3?") == "It is 5."


@pytest.mark.parametrize("when", ["thinking", "answering"])
def test_a_turn_that_is_stopped_keeps_what_was_said(folder, scripts, when):
    conversation = Chat(*load(folder))
    scripts[0].append("<|right1|>" if when == "thinking" else "<|answer|>abc")
    count = 0

    def interrupted():
        nonlocal count
        count += 1
        return count > 20

    said = say(conversation, "x", interrupted=interrupted)
    assert said == ("" if when == "thinking" else "abc" + "c" * 18)
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    assert say(conversation, "2+3?") == "It is 5."


def test_a_conversation_is_saved_and_loaded(folder, tmp_path):
    """With the model itself: the state is a real one."""
    model, tokenizer = load(folder)
    conversation, other = Chat(model, tokenizer), Chat(model, tokenizer)
    say(conversation, "x", limits=Limits(steps=30))
    other.load(conversation.save(tmp_path / "conversation"))
    assert isinstance(other.cache[0], RecurrentCache)
    assert other.tokens == conversation.tokens
    more = [list(chat.respond("y", limits=Limits(steps=60)))[-1] for chat in (conversation, other)]
    assert more[0].event.tokens == more[1].event.tokens
    assert conversation.tokens == other.tokens
    assert conversation.messages == other.messages
