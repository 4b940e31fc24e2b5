"""A conversation: state kept between turns, stopped, saved, loaded; the command in a pipe and a terminal."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.chat.conversation_file import OfAnotherModelError
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli import message_editor
from mlx_pararnn.cli.app import app
from mlx_pararnn.cli.chat_commands import Session
from mlx_pararnn.cli.sampling import LIKELIEST
from mlx_pararnn.cli.tool_lines import ToolLines
from mlx_pararnn.pocket.functions import Functions
from tests.support.demo import DEMO

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] | trim }}~{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def demo():
    return load_in_float32(DEMO)


def load_in_float32(folder):
    """Whether states are the same is asked of a model without float16's rounding."""
    model, tokenizer = mlx_pararnn.load(folder)
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    """The demo with a chat template; turns end with "~", its end-of-sequence token."""
    folder = shutil.copytree(DEMO, tmp_path_factory.mktemp("chat") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ord("~")}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def read(monkeypatch):
    """What the model has read, token by token, in order."""
    tokens = []
    call = mlx_pararnn.Model.__call__

    def recording(self, inputs, *args, **kwargs):
        tokens.extend(inputs[0].tolist())
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(mlx_pararnn.Model, "__call__", recording)
    return tokens


def say(conversation, text, **kwargs):
    return "".join(r.text for r in conversation.respond(text, **kwargs))


def state_of(model, tokens):
    cache = model.make_cache()
    model(mx.array([tokens]), cache=cache)
    return cache


def same_state(a, b):
    return all(
        mx.allclose(x, y, atol=1e-3)
        for c, d in zip(a, b, strict=True)
        for x, y in zip(c.cache, d.cache, strict=True)
    )


def test_without_a_template_the_text_goes_on(demo, read):
    model, tokenizer = demo
    conversation = Chat(model, tokenizer)
    first = say(conversation, "def main(", max_tokens=5)
    second = say(conversation, "import", max_tokens=6)
    assert bytes(read).decode() == "def main(" + first + "import" + second
    assert conversation.tokens == len(read)
    assert same_state(conversation.cache, state_of(model, list(read)))
    assert [m["content"] for m in conversation.messages] == ["def main(", first, "import", second]


def test_with_a_template_each_turn_is_read_once(templated, read):
    model, tokenizer = load_in_float32(templated)
    conversation = Chat(model, tokenizer, system="Be brief.")
    answers = [say(conversation, text, max_tokens=4) for text in ("one", "two", "three")]
    transcript = bytes(read).decode()
    expected = "[s]Be brief.~"
    for text, answer in zip(("one", "two", "three"), answers, strict=True):
        expected += f"[u]{text}~[a]{answer}~"
    assert transcript == expected[:-1]  # the last turn is not closed yet
    assert same_state(conversation.cache, state_of(model, list(read)))


def test_a_turn_that_the_model_ended_itself_is_not_ended_twice(templated, read):
    model, tokenizer = mlx_pararnn.load(templated)
    conversation = Chat(model, tokenizer)

    def end_after_two(logprobs, made=[]):  # noqa: B006 - counts its calls
        made.append(0)
        return mx.array([ord("~") if len(made) == 3 else ord("x")])

    assert say(conversation, "one", sampler=end_after_two) == "xx"
    say(conversation, "two", max_tokens=1)
    assert bytes(read).decode().startswith("[u]one~[a]xx~[u]two~[a]")


def test_stopping_keeps_what_was_said(demo, read):
    model, tokenizer = demo
    conversation = Chat(model, tokenizer)
    heard = []
    for response in conversation.respond("def main(", max_tokens=200, interrupted=lambda: len(heard) == 3):
        heard.append(response.text)
    assert heard == ["s", "e", "l"]
    assert conversation.messages[-1]["content"] == "sel"
    assert same_state(conversation.cache, state_of(model, list(b"def main(sel")))
    for response in conversation.respond("x", max_tokens=200):
        if response.generation_tokens == 2:
            break
    assert conversation.tokens == len(b"def main(sel") + 1 + 2


def test_every_beginning_is_the_learned_one(tmp_path):
    """Where the model has states before the first token (`--state`): after /undo, in a branch, of a file."""
    model, tokenizer = mlx_pararnn.load(DEMO)
    mx.random.seed(0)
    for layer in model.layers:
        cell = layer.mixer.cell
        cell.add_initial_state(mx.random.normal((len(cell.cell.slots), cell.recurrent_weight.shape[1])))
    conversation = Chat(model, tokenizer)
    first = say(conversation, "def main(", max_tokens=12)
    assert first != say(Chat(*mlx_pararnn.load(DEMO)), "def main(", max_tokens=12)
    conversation.save(tmp_path / "saved")
    loaded = Chat(model, tokenizer)
    loaded.load(tmp_path / "saved")
    for other in (conversation, loaded, conversation.branch()):
        assert other.undo() == "def main("
        assert say(other.branch(), "def main(", max_tokens=12) == first
        assert say(other, "def main(", max_tokens=12) == first


def test_stopping_while_the_prompt_is_read_forgets_the_turn(demo):
    model, tokenizer = demo
    conversation = Chat(model, tokenizer)
    say(conversation, "def main(", max_tokens=5)
    before, messages, asked = conversation.tokens, list(conversation.messages), []

    def interrupted():
        asked.append(0)
        return len(asked) > 2

    assert say(conversation, "x" * 50, prefill_step_size=8, interrupted=interrupted) == ""
    assert (conversation.tokens, conversation.messages) == (before, messages)
    assert same_state(conversation.cache, state_of(model, list(b"def main(self,")))


def test_an_error_in_the_middle_leaves_the_state_sound(demo):
    model, tokenizer = demo
    conversation = Chat(model, tokenizer)
    say(conversation, "def main(", max_tokens=5)

    def broken(logprobs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        say(conversation, "more", sampler=broken)
    assert conversation.tokens == 14
    assert same_state(conversation.cache, state_of(model, list(b"def main(self,")))


def test_the_state_is_as_large_after_a_long_conversation():
    conversation = Chat(*mlx_pararnn.load(DEMO))
    say(conversation, "a", max_tokens=1)
    before = conversation.nbytes
    say(conversation, "b" * 3000, max_tokens=100)
    assert conversation.nbytes == before == 3840


def test_undo_regenerate_and_branch_read_nothing_again(templated, read):
    model, tokenizer = load_in_float32(templated)
    conversation = Chat(model, tokenizer, system="Be brief.")
    first = say(conversation, "one", max_tokens=4)
    at_one = state_of_copy(conversation)
    second = say(conversation, "two", max_tokens=4)
    read.clear()

    assert conversation.undo() == "two"
    assert not read
    assert same_state(conversation.cache, at_one)
    assert [m["content"] for m in conversation.messages] == ["Be brief.", "one", first]
    assert say(conversation, "two", max_tokens=4) == second
    read.clear()

    again = "".join(r.text for r in conversation.regenerate(max_tokens=9))
    assert again.startswith(second)
    assert bytes(read).decode() == "]" + again  # the last token of the question is where an answer begins
    assert [m["content"] for m in conversation.messages[2:]] == [first, "two", again]
    once_more = "".join(r.text for r in conversation.regenerate(max_tokens=4))
    assert once_more == second
    read.clear()

    other = conversation.branch()
    assert not read
    said = [
        say(t, text, max_tokens=5)
        for t, text in ((conversation, "left"), (other, "right"), (conversation, "more"))
    ]
    assert other.messages[-2:] == [
        {"role": "user", "content": "right"},
        {"role": "assistant", "content": said[1]},
    ]
    assert len(conversation.messages) == len(other.messages) + 2
    straight = Chat(model, tokenizer, system="Be brief.")
    for text, tokens in (("one", 4), ("two", 4), ("right", 5)):
        say(straight, text, max_tokens=tokens)
    assert straight.messages == other.messages
    assert same_state(straight.cache, other.cache)

    for text in ("right", "two", "one"):
        assert other.undo() == text
    assert (other.tokens, other.undoable) == (0, 0)
    for nothing in (other.undo, lambda: list(other.regenerate())):
        with pytest.raises(PararnnError, match="no answer to go back from"):
            nothing()


def state_of_copy(conversation):
    return conversation.branch().cache


def test_a_new_answer_that_is_stopped_early(demo):
    """Before it has begun the old one stays; after that it is the answer."""
    model, tokenizer = demo
    conversation = Chat(model, tokenizer)
    old = say(conversation, "def main(", max_tokens=5)
    before = state_of_copy(conversation)
    assert list(conversation.regenerate(interrupted=lambda: True)) == []
    assert conversation.messages[-1]["content"] == old
    assert same_state(conversation.cache, before)

    def broken(logprobs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(conversation.regenerate(sampler=broken))
    assert same_state(conversation.cache, before)
    answer = conversation.regenerate(max_tokens=100)
    heard = next(answer).text + next(answer).text
    answer.close()
    assert conversation.messages == [
        {"role": "user", "content": "def main("},
        {"role": "assistant", "content": heard},
    ]
    assert conversation.tokens == 11
    assert conversation.undo() == "def main("
    assert conversation.tokens == 0


def test_so_many_answers_can_be_undone(demo, monkeypatch):
    monkeypatch.setattr("mlx_pararnn.chat.session.UNDO_LIMIT", 3)
    conversation = Chat(*demo)
    for _ in range(5):
        say(conversation, "a", max_tokens=1)
    assert conversation.undoable == 3
    for _ in range(3):
        conversation.undo()
    assert conversation.tokens == 4
    assert conversation.nbytes == 6144


def test_save_and_load_go_on_as_if_nothing_had_happened(templated, tmp_path):
    model, tokenizer = mlx_pararnn.load(templated)
    conversation = Chat(model, tokenizer)
    say(conversation, "one", max_tokens=6)
    file = conversation.save(tmp_path / "conversation")
    assert file == tmp_path / "conversation.safetensors"
    assert os.listdir(tmp_path) == ["conversation.safetensors"]
    other = Chat(*mlx_pararnn.load(templated))
    other.load(tmp_path / "conversation")
    assert other.messages == conversation.messages
    assert say(other, "two", max_tokens=20) == say(conversation, "two", max_tokens=20)
    conversation.reset()
    assert (conversation.tokens, conversation.messages, conversation.nbytes) == (0, [], 0)
    conversation.load(file)
    assert conversation.messages == [{"role": "user", "content": "one"}, other.messages[1]]


def test_undo_and_regenerate_survive_load(templated, tmp_path, read):
    """The last eight turns; the states before them are in the file, after those that MLX-LM reads."""
    model, tokenizer = load_in_float32(templated)
    conversation = Chat(model, tokenizer, system="Be brief.")
    answers = [say(conversation, str(n), max_tokens=2) for n in range(9)]
    file = conversation.save(tmp_path / "talk")
    assert len(load_prompt_cache(str(file))) == len(conversation.cache)
    other = Chat(model, tokenizer)
    other.load(file)
    assert (other.undoable, other.system) == (8, "Be brief.")
    assert "".join(r.text for r in other.regenerate(max_tokens=2)) == answers[8]
    assert other.messages == conversation.messages
    read.clear()
    for n in range(8, 0, -1):
        assert other.undo() == str(n)
        assert conversation.undo() == str(n)
        assert other.messages == conversation.messages
        assert same_state(other.cache, conversation.cache)
    assert not read
    assert say(other, "1", max_tokens=2) == answers[1]
    with pytest.raises(PararnnError, match="no answer to go back from"):
        [other.undo() for _ in range(3)]


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, meta: meta.update({"0.turns": "[[1, 0, 0, null]]"}),
        lambda arrays, meta: meta.update({"0.turns": '[["x", 0, "0", null]]'}),
        lambda arrays, meta: meta.update({"0.turns": "{"}),
        lambda arrays, meta: meta.update({"0.turns": '[["x", 0, 0, null, 5]]'}),
        lambda arrays, meta: meta.update({"0.turns": '[["x", 0, 0, null, "[]"]]'}),
        lambda arrays, meta: meta.update({"0.turns": '[["x", 0, 0, null, "", ""]]'}),
        lambda arrays, meta: meta.update({"0.memory": "null"}),
        lambda arrays, meta: meta.update({"0.memory": '{"timers": [["", "soon"]]}'}),
        lambda arrays, meta: arrays.update({"6.0.0": mx.zeros((3,))}),
        lambda arrays, meta: meta.update({"0.messages": meta["0.messages"].replace("content", "contNnt")}),
        lambda arrays, meta: meta.update({"0.messages": meta["0.messages"].replace("role", "r", 1)}),
    ],
)
def test_a_file_whose_earlier_states_are_none(change, demo, tmp_path):
    conversation = Chat(*demo)
    for text in ("one", "two"):
        say(conversation, text, max_tokens=2)
    file = conversation.save(tmp_path / "talk")
    arrays, metadata = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    change(arrays, metadata)
    mx.save_safetensors(str(file), arrays, metadata)
    with pytest.raises(PararnnError, match=r"not a conversation saved by /save|is damaged"):
        Chat(*demo).load(file)


def test_a_file_from_before_there_was_memory(demo, tmp_path):
    conversation = Chat(*demo)
    say(conversation, "one", max_tokens=2)
    file = conversation.save(tmp_path / "talk")
    arrays, metadata = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    del metadata["0.memory"]
    metadata["0.turns"] = json.dumps([turn[:4] for turn in json.loads(metadata["0.turns"])])
    mx.save_safetensors(str(file), arrays, metadata)
    other = Chat(*demo)
    other.load(file)
    assert other.messages == conversation.messages
    assert other.undo() == "one"


def called(conversation, name, **arguments):
    """What a function says that is called while an answer is made."""
    answer = conversation.respond("x", max_tokens=2)
    next(answer)
    said = conversation.functions.call(name, json.dumps(arguments)).text
    assert len(list(answer)) > 0
    return said


def test_what_functions_remember_belongs_to_the_conversation(demo, tmp_path):
    """It is saved, undone, branched and forgotten with it; a branch has the same functions."""
    conversation = Chat(*demo)
    called(conversation, "add_to_list", items="milk")
    other = conversation.branch()
    called(other, "add_to_list", items="bread")
    assert called(conversation, "show_list") == "To-do list: milk."
    assert called(other, "show_list") == "To-do list: milk, bread."
    loaded = Chat(*demo)
    loaded.load(conversation.save(tmp_path / "talk"))
    assert called(loaded, "show_list") == "To-do list: milk."
    loaded.undo(), loaded.undo(), loaded.undo()
    assert called(loaded, "show_list") == "Your to-do list is empty."
    conversation.reset()
    assert called(conversation, "show_list") == "Your to-do list is empty."
    assert conversation.branch().functions is conversation.functions
    own = Functions()
    assert Chat(*demo, functions=own).functions is own


def test_another_system_prompt_reads_the_conversation_again(templated, read):
    model, tokenizer = load_in_float32(templated)
    conversation = Chat(model, tokenizer, system="Be brief.")
    answer = say(conversation, "one", max_tokens=2)
    conversation.set_system("Be long.")
    read.clear()
    say(conversation, "two", max_tokens=1)
    assert bytes(read).decode().startswith(f"[s]Be long.~[u]one~[a]{answer.strip()}~[u]two~[a]")
    assert (conversation.undo(), conversation.undo(), conversation.tokens) == ("two", "one", 0)
    assert [message["content"] for message in conversation.messages] == ["Be long."]


def changed_slightly(folder):
    """Another model by its fingerprint, as one that was quantized is."""
    model, tokenizer = load_in_float32(folder)
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = weight.at[-1, -1].add(1)
    return model, tokenizer


def test_the_messages_of_another_models_conversation_are_read_again(templated, read, tmp_path, capsys):
    other = Chat(*changed_slightly(templated), system="Be brief.")
    answer = say(other, "one", max_tokens=2)
    file = other.save(tmp_path / "talk")
    conversation = Chat(*load_in_float32(templated))
    questions = []

    def session(ask):
        return Session(conversation, LIKELIEST, 1, None, ToolLines(False), plain=True, ask=ask)

    with pytest.raises(OfAnotherModelError, match="was saved with another model; load that model to go on"):
        session(None).run("/load", str(file))
    session(lambda question: questions.append(question)).run("/load", str(file))  # no
    assert questions == [f"{file} was saved with another model. Read its messages with this one?"]
    assert conversation.messages == []
    session(lambda question: True).run("/load", str(tmp_path / "talk"))
    assert capsys.readouterr().err == "Not loaded.\n3 messages will be read with your next one.\n"
    assert (conversation.messages, conversation.system) == (other.messages, "Be brief.")
    read.clear()
    say(conversation, "two", max_tokens=1)
    assert bytes(read).decode().startswith(f"[s]Be brief.~[u]one~[a]{answer.strip()}~[u]two~[a]")
    assert (conversation.undo(), conversation.undo(), conversation.tokens) == ("two", "one", 0)


def test_without_a_template_they_are_the_text_before_the_next(templated, demo, read, tmp_path):
    other = Chat(*changed_slightly(templated), system="Be brief.")
    answer = say(other, "one", max_tokens=2)
    conversation = Chat(*demo)
    assert conversation.read_again(other.save(tmp_path / "talk")) == 2
    read.clear()
    say(conversation, "two", max_tokens=1)
    assert bytes(read).decode().startswith(f"one{answer}two")


def test_a_model_that_uses_tools_takes_over_what_is_remembered(demo, tmp_path):
    other, plain = Chat(*mlx_pararnn.load()), Chat(*demo)
    called(other, "add_to_list", items="milk")
    weight = (changed := mlx_pararnn.load())[0].model.embed_tokens.weight
    changed[0].model.embed_tokens.weight = weight.at[-1, -1].add(1)
    conversation = Chat(*changed)
    assert conversation.read_again(other.save(tmp_path / "talk")) == 0
    assert called(conversation, "show_list") == "To-do list: milk."
    say(plain, "def", max_tokens=1)
    with pytest.raises(PararnnError, match="a model that uses tools reads no earlier messages"):
        conversation.read_again(plain.save(tmp_path / "plain"))


def test_what_cannot_be_read_again_changes_nothing(demo, tmp_path):
    conversation = Chat(*demo)
    say(conversation, "def", max_tokens=3)
    before = conversation.messages
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    seen = Chat(*demo)
    say(seen, "x", max_tokens=1)
    seen.messages[0]["image"] = "pixels"
    seen.save(tmp_path / "seen")
    damaged = seen.save(tmp_path / "damaged")
    arrays, metadata = mx.load(str(damaged), return_metadata=True)
    mx.eval(arrays)
    mx.save_safetensors(str(damaged), arrays, {**metadata, "0.messages": '[{"role": "user"}]'})
    for file, message in (
        ("nowhere", "no such file"),
        ("noise", "is not a conversation saved by /save"),
        (DEMO / "model", "is not a conversation saved by /save"),
        ("damaged", "is not a conversation saved by /save"),
        ("seen", "this conversation has an image, and this model sees none"),
    ):
        with pytest.raises(PararnnError, match=message):
            conversation.read_again(tmp_path / file)
    assert (conversation.messages, conversation.tokens) == (before, 6)


def test_what_cannot_be_loaded_changes_nothing(demo, converted, tmp_path):
    conversation = Chat(*demo)
    say(conversation, "def", max_tokens=3)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    model, _ = mlx_pararnn.load_model(converted("trained/paragru/final.pt"))
    Chat(model, demo[1]).save(tmp_path / "other")
    Chat(*changed_slightly(DEMO)).save(tmp_path / "nearly")
    for file, message in (
        ("nowhere", "no such file"),
        (
            "noise",
            "is not a conversation saved by /save, nor a prompt cache that MLX-LM wrote for this model",
        ),
        (DEMO / "model", "is not a conversation saved by /save"),
        ("other", "was saved with another model"),
        ("nearly", "was saved with another model"),
    ):
        with pytest.raises(PararnnError, match=message):
            conversation.load(tmp_path / file)
    assert conversation.tokens == 6
    with pytest.raises(PararnnError, match="no such folder"):
        conversation.save(tmp_path / "no" / "folder")


@pytest.mark.parametrize("model", [[], [str(DEMO)]])
@pytest.mark.parametrize("name", ["none", "other", "."])
def test_what_cannot_be_loaded_is_told_before_anything_is_offered(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"x")
    result = CliRunner().invoke(app, ["chat", *model, "--load", name])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .+\n", result.stderr)


def test_saving_overwrites_a_saved_conversation_and_nothing_else(demo, tmp_path):
    conversation = Chat(*demo)
    say(conversation, "def", max_tokens=3)
    conversation.save(tmp_path / "conversation")
    conversation.save(tmp_path / "conversation")
    model = shutil.copy(DEMO / "model.safetensors", tmp_path)
    for name in ("model.safetensors", "model"):
        with pytest.raises(PararnnError, match="exists and is not a saved conversation; choose another name"):
            conversation.save(tmp_path / name)
    assert mx.load(str(model)).keys() == mx.load(str(DEMO / "model.safetensors")).keys()
    for folder in ("/", tmp_path):
        with pytest.raises(PararnnError, match="is a folder; give a file name"):
            conversation.save(folder)


def test_a_system_prompt_needs_a_template(demo):
    with pytest.raises(PararnnError, match="no chat template, so it can take no system prompt"):
        Chat(*demo, system="Be brief.")


COMMAND = [sys.executable, "-m", "mlx_pararnn.cli.app", "chat", DEMO]


def test_a_line_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(message_editor, "MAX_TEXT_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"12345678\r\n\n" + bytes(100))))
    lines = message_editor.read_messages(lambda _: (), keep_history=False)
    assert [next(lines), next(lines)] == ["12345678", ""]
    with pytest.raises(PararnnError, match="too much for one message"):
        next(lines)


def test_in_a_pipe(tmp_path):
    lines = (
        "def main(\n/stats\n/save said\n\n/reset\n/stats\n/load said\n/load no\n/what\n/save\n/help\n"
        "import\n/undo\n/stats\n/branch here\n/branch\nmore\n/goto there\n/goto here\n/stats\n"
        "/save /\nBYTES\n/reset\n/undo\n/regenerate\ndef main(\n/regenerate\n/quit\nnever\n"
    )
    typed = lines.encode().replace(b"BYTES", b"\xff\xfe")
    result = subprocess.run([*COMMAND, "-m", "5"], input=typed, capture_output=True, cwd=tmp_path, check=True)
    assert result.stdout.startswith(b"self,\n")
    assert result.stdout.count(b"\n") >= 2
    said = result.stderr.decode()
    assert "no chat template: it continues what you type" in said
    assert "14 tokens so far; state 3,840 bytes; last answer" in said
    assert "Saved to said.safetensors." in said
    assert "0 tokens so far; state 0 bytes" in said
    assert "Going on after 14 tokens." in said
    assert "error: no such file: no.safetensors" in said
    assert "No command /what; /help lists them." in said
    assert "/save needs a file name." in said
    assert "/reset       forget the conversation" in said
    assert "Taken back: import" in said
    assert "14 tokens so far; state 3,840 bytes" in said.partition("Taken back: import")[2]
    assert "/goto here comes back to this point." in said
    assert "Points to go to: here" in said
    assert "No point 'there'; /branch lists them." in said
    assert "error: there is no answer to go back from" in said
    assert result.stdout.endswith(b"self,\nself,\n")
    assert "error: / is a folder; give a file name" in said
    assert "error: the prompt is not UTF-8 text" in said
    assert "Traceback" not in said


def test_in_a_pipe_no_file_is_lost(demo, tmp_path, capsys):
    """But what the conversation comes from is written over: it goes on."""
    chat = Chat(*demo)

    def session():
        return Session(chat.branch(), LIKELIEST, 1, None, ToolLines(False), plain=True)

    def messages():
        chat.load(kept)
        return len(chat.messages)

    kept = chat.save(tmp_path / "kept")
    first = session()
    with pytest.raises(PararnnError, match="exists, and there is nobody to ask; choose another name"):
        first.run("/save", str(kept))
    first.run("/load", str(kept))
    first.respond("x")
    first.run("/save", str(tmp_path / "kept"))
    first.respond("y")
    first.run("/save", str(kept))
    assert messages() == 4
    first.run("/branch", "a")
    first.run("/save", str(tmp_path / "new"))
    for away in ("/reset", "/goto"):
        first.run("/load", str(kept))
        first.run(away, "a")
        with pytest.raises(PararnnError, match="exists"):
            first.run("/save", str(kept))
    assert messages() == 4


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages.a.b }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_named_and_nothing_was_asked(template, templated, tmp_path):
    folder = shutil.copytree(templated, tmp_path / "model")
    model, tokenizer = mlx_pararnn.load(folder)
    chat = Chat(model, tokenizer)
    list(chat.respond("Hello", max_tokens=2))
    messages, tokens = list(chat.messages), chat.tokens
    tokenizer.chat_template = template
    for conversation in (chat, Chat(model, tokenizer)):
        with pytest.raises(PararnnError, match=r"chat template in .*model fails"):
            list(conversation.respond("Hello again", max_tokens=2))
    assert (chat.messages, chat.tokens) == (messages, tokens)
    (folder / "chat_template.jinja").write_text(template)
    done = CliRunner().invoke(app, ["generate", str(folder), "-p", "x", "--max-tokens", "2"])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)  # else there was a traceback
    assert "Traceback" not in done.stderr
    assert "chat template in" in done.stderr


@pytest.mark.large
def test_an_answer_ends_before_what_stderr_says_next():
    """Into one pipe, as with 2>&1; Python's own buffering must not turn them round."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        [sys.executable, "-m", "mlx_pararnn.cli.app", "chat", DEMO, "--max-tokens", "5"], env=environment,
        input="def main(\n/stats\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert re.search(r"^14 tokens so far", result.stdout, re.M), result.stdout
