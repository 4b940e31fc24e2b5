"""`generate` as a user has it: the command and the function."""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from unittest import mock

import hypothesis
import mlx.core as mx
import pytest
from hypothesis import strategies as st
from mlx_lm import sample_utils
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn import PararnnError, generation
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli import options
from mlx_pararnn.cli.app import app
from mlx_pararnn.cli.sampling import Sampling, sampler
from mlx_pararnn.convert.readers.forms import PACKAGE_KINDS
from mlx_pararnn.files.hub import BUNDLED
from mlx_pararnn.text import pieces
from tests.support.demo import DEMO
from tests.support.terminal import Terminal

BABYLM = "pararnn_torch/babylm_paragru"


def run(*args, **kwargs):
    return CliRunner().invoke(app, list(args), **kwargs)


@pytest.fixture(scope="module")
def demo():
    return mlx_pararnn.load(DEMO)


@pytest.fixture(scope="module")
def bytes_tokenizer(demo):
    return demo[1]


def test_greedy_continuation_of_the_golden_prompt(converted, data):
    golden = mx.load(str(data / "trained/paragru/golden.safetensors"))
    folder = converted("trained/paragru/final.pt", tokenizer="bytes")
    prompt = bytes(golden["prompt_ids"].tolist()).decode()
    result = run("generate", str(folder), "-p", prompt, "--max-tokens", "96", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["tokens"] == golden["greedy_ids"].tolist()
    assert answer["text"] == bytes(golden["greedy_ids"].tolist()).decode()
    assert answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] == 49
    assert answer["generation_tokens"] == 96


@pytest.mark.large
def test_greedy_tokens_of_pararnn_torch(converted, data):
    folder = "pararnn_torch/paraslstm_causal_lm_0"
    golden = mx.load(str(data / folder / "golden.safetensors"))
    model, _ = mlx_pararnn.load_model(converted(folder))
    tokens = golden["greedy_prompt"][0].tolist()
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(tokens), model, max_tokens=24)
    assert tokens + [token for token, _ in steps] == golden["greedy"][0].tolist()


def test_the_command():
    """A subprocess: text to stdout, statistics to stderr."""
    result = subprocess.run(
        [sys.executable, "-m", "mlx_pararnn.cli.app", "generate", DEMO, "-p", "def main(", "-m", "11"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "self, other\n"
    assert result.stderr.startswith("prompt: 9 tokens, ")
    assert result.stderr.rstrip().endswith("(length)")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n\n", "\n\n"), (r"\t", "\t"), (r"\\n", r"\n"), (r"a\nb", "a\nb"), (r"\d\x", r"\d\x"),
        ("\\", "\\"), ("\n", "\n"),
    ],
)  # fmt: skip
def teststop_strings_have_escapes(typed, meant):
    assert options.stop_strings([typed]) == [meant]


def test_a_new_line_can_stop_a_text():
    whole = run("generate", str(DEMO), "-p", "def main(", "-m", "40").stdout
    assert (
        run("generate", str(DEMO), "-p", "def main(", "-m", "40", "--stop", r"\n").stdout
        == whole.split("\n")[0] + "\n"
    )


def test_a_file_and_a_prompt_after_it(tmp_path):
    (tmp_path / "start.py").write_text("import os\n\n\n\n")
    both = run(
        "generate", str(DEMO), "-f", str(tmp_path / "start.py"), "-p", "def main(", "-m", "5", "--json"
    )
    assert json.loads(both.stdout)["prompt"] == "import os\n\n\n\ndef main("
    alone = run("generate", str(DEMO), "--file", str(tmp_path / "start.py"), "-m", "5", "--json")
    assert json.loads(alone.stdout)["prompt"] == "import os\n\n\n"
    missing = run("generate", str(DEMO), "-f", str(tmp_path / "nothing"), "-p", "x")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    assert "nothing" in missing.stderr


def test_json_says_what_was_asked():
    answer = json.loads(run("generate", "-p", "3 + 4", "--temp", "1", "--seed", "4", "--json").stdout)
    assert (answer["model"], answer["prompt"], answer["seed"]) == (BUNDLED.name, "3 + 4", 4)
    answer = json.loads(run("generate", str(DEMO), "-p", "def main(", "-m", "3", "--json").stdout)
    assert (answer["model"], answer["seed"]) == (str(DEMO), None)


def test_token_ids_need_no_tokenizer(tmp_path, demo):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, tmp_path)
    prompt = demo[1].encode("def main(")
    greedy = json.loads(run("generate", str(DEMO), "-p", "def main(", "-m", "6", "--json").stdout)["tokens"]
    ids = " ".join(map(str, prompt))
    assert run("generate", str(tmp_path), "--tokens", ids, "-m", "6").stdout.split() == [
        str(i) for i in greedy
    ]
    result = run("generate", str(tmp_path), "--tokens", ids.replace(" ", ","), "-m", "6", "--json")
    assert json.loads(result.stdout) == {
        "model": str(tmp_path), "prompt": prompt, "seed": None, "tokens": greedy
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "said"), [("1 x", "whole numbers"), ("", "the prompt is empty"), ("99999", "99999")]
)
def test_token_ids_that_are_none(ids, said):
    result = run("generate", str(DEMO), "--tokens", ids)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert said in result.stderr


def test_token_ids_end_where_the_config_says(tmp_path, demo):
    config = json.loads((DEMO / "config.json").read_text())
    ids = " ".join(map(str, demo[1].encode("def main(")))
    greedy = run("generate", str(DEMO), "--tokens", ids, "-m", "6").stdout.split()
    shutil.copy(DEMO / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": int(greedy[2])}))
    ended = run("generate", str(tmp_path), "--tokens", ids, "-m", "6").stdout.split()
    assert ended == greedy[: greedy.index(greedy[2]) + 1]
    assert run("generate", str(DEMO), "--tokens", ids, "-p", "x").exit_code == 2


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["def main("], "def main("),
        (["Once"], "Once"),
        (["what is 2 + 2?"], "what is 2 + 2?"),
        (["Once", "upon", "a time"], "Once upon a time"),
        ([DEMO, "Once", "upon"], "Once upon"),
    ],
)
def test_a_prompt_where_a_model_should_be(command, given, text):
    result = run(command, *map(str, given))
    assert result.exit_code == (1 if len(given) == 1 else 2)
    if (command, given) == ("chat", ["Once"]):  # a word alone is a model's name there
        assert result.stderr == run("generate", "Once", "-p", "x").stderr
        return
    model = [str(DEMO)] if DEMO in given else []
    meant = shlex.join(["mlx-pararnn", "generate", *model, "-p", text])
    assert f"; did you mean {meant}?" in result.stderr
    assert result.stderr.count("\n") == 1
    if len(given) == 1:  # as it is told where a prompt was given
        told = run("generate", text, "-p", "x").stderr.rstrip()
        assert result.stderr == f"{told}; did you mean {meant}?\n"


def test_the_words_for_a_wrong_model_stay_where_a_prompt_was_given():
    assert "did you mean" not in run("generate", "wrong-name", "-p", "x").stderr
    assert "did you mean" not in run("generate", DEMO.name, "extra", "-p", "x").stderr


def command(*args, **streams):
    return subprocess.Popen([sys.executable, "-m", "mlx_pararnn.cli.app", "generate", DEMO, *args], **streams)


@pytest.mark.large
def test_a_terminal_sees_the_prompt_dimly():
    ours, theirs = os.openpty()
    with command("-p", "def main(", "-m", "5", stdout=theirs, stderr=subprocess.DEVNULL) as process:
        assert process.wait() == 0
    os.close(theirs)
    assert os.read(ours, 4096).decode() == "\x1b[2mdef main(\x1b[0mself,\r\n"
    os.close(ours)


@pytest.mark.large
def test_a_terminal_sees_the_end_of_a_long_prompt(tmp_path):
    """Once it is read, just before the text that continues it."""
    text = "".join(f"x{n} = {n}\n" for n in range(1000))
    (tmp_path / "long").write_text(text)
    terminal = Terminal("generate", DEMO, "-f", tmp_path / "long", "-p", "def main(", "-m", "5")
    assert terminal.exit_code() == 0
    shown, said = re.search(rb"\x1b\[2m(.*)\x1b\[0m(.*)\r\nprompt: ", terminal.raw, re.S).groups()
    assert shown.decode().replace("\r\n", "\n") == f"…{(text + 'def main(')[-4096:]}"
    assert said == b"self,"


@pytest.mark.large
def test_a_terminal_is_told_how_to_end_the_text():
    ours, theirs = os.openpty()
    pipe = subprocess.PIPE
    with command("-m", "5", stdin=theirs, stdout=pipe, stderr=pipe, text=True) as process:
        os.write(ours, b"def main(\n\x04")
        said, errors = process.communicate(timeout=120)
    os.close(theirs)
    os.close(ours)
    assert errors.startswith("Type the text; Ctrl-D on a line of its own ends it")
    assert said.startswith("self,")


def test_the_prompt_may_come_from_stdin():
    for args in ((), ("-p", "-")):
        for end in ("", "\n", "\r\n"):  # echo's new line is not part of the text
            result = run("generate", str(DEMO), *args, "-m", "5", input=f"def main({end}")
            assert result.stdout == "self,\n"


@pytest.mark.large
def test_what_is_piped_in_goes_before_the_prompt():
    pipe = subprocess.PIPE
    how = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True}
    for given, prompt in (("a, b\nc\n", "a, b\nc\ndef main("), ("", "def main(")):
        with command("-p", "def main(", "-m", "1", "--json", **how) as process:
            said, errors = process.communicate(given)
        assert (errors, json.loads(said)["prompt"]) == ("", prompt)
        with command("-p", "def main(", "-m", "1", **how) as process:  # in pieces
            assert process.communicate(given)[0] == json.loads(said)["text"] + "\n"
    with command("-p", "def main(", "-m", "1", "--json", **how) as process:  # closed late
        assert process.stderr.readline().startswith("Waiting for the end of the pipe at standard input")
        said, errors = process.communicate("late")
        assert (errors, json.loads(said)["prompt"]) == ("", "late\ndef main(")


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda file: os.popen("printf 'a\\nb\\n'"), "a\nb"),
        (lambda file: os.popen("sleep 0.3; printf 'late'"), "late"),
        (lambda file: file.write_text("of a file\n") and file.open(), "of a file"),
        (lambda file: Path(os.devnull).open(), ""),  # noqa: SIM115
        (lambda file: os.popen("true"), ""),
        (lambda file: socket.create_server(("127.0.0.1", 0)).makefile("r"), ""),
    ],
)
def test_what_standard_input_holds_besides_a_prompt(make, held, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options, "PIPE_SECONDS", 60.0)
    with make(tmp_path / "file") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert "".join(options.read_piped(None)) == held
    assert capsys.readouterr().err == ""


def test_a_text_without_an_end_is_refused_where_it_is_held(monkeypatch, tmp_path):
    """Where it is not, it is read until Ctrl-C: tests/cli/test_signals.py."""
    monkeypatch.setattr(options, "MAX_TEXT_BYTES", 1 << 20)
    (tmp_path / "most").write_bytes(b"x" * (1 << 20))
    assert "".join(options.read_file(tmp_path / "most", 1 << 20)) == "x" * (1 << 20)
    endless = str(Path(os.devnull).with_name("zero"))
    for model, *args in (
        (DEMO, "--file", endless, "--json"),
        (DEMO, "--json-schema", endless, "-p", "x"),
        (BUNDLED, "--file", endless),
    ):
        result = run("generate", str(model), *args)
        assert (result.exit_code, result.stderr) == (
            1, f"error: {endless} holds more than 1 MB, too much for one text; give a part of it\n"
        )  # fmt: skip
    result = run("generate", str(DEMO), "--json", input=b"x" * ((1 << 20) + 1))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: standard input holds more than 1 MB")
    monkeypatch.setattr(generation, "has_bytes_alone", lambda backend: False)
    result = run("generate", str(DEMO), "--file", endless)
    assert result.stderr.startswith(f"error: {endless} holds more than 1 MB")


PARTS = st.sampled_from([b"\n", b"\r", "é🙂\ufeff".encode(), b"\xed\xa0\x80", b"\xf0", b"\x9f"])
ENDS = st.sampled_from([b"", b"\n", b"\r", b"\r\n", b"\n\r", b"\r\n\r\n", b"\xe6\x97"])


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(PARTS | st.binary(max_size=9)).map(b"".join), ENDS, st.integers(1, 5))
def test_blocks_are_the_text(data, end, size):
    """UTF-8 or not; one new line at the end is left out."""
    data += end
    with mock.patch.object(options, "BLOCK_BYTES", size):
        text = "".join(options.read_blocks(io.BytesIO(data), "x", None))
    whole = data.decode("utf-8", errors="surrogateescape")
    assert text == re.sub(r"(\r\n|\n|\r)\Z", "", whole)


@pytest.mark.parametrize(
    "given",
    [b"", b"\n", b"\r\n", b"\n\n", "\ufeff".encode(), "\ufeffdef main(\n".encode(), b"def main(",
     "größer 日本 🙂 ".encode() * 2 + b"\r\n", b"\0" * 20, b"de\xff", b"de" * 9 + b"\xe6\x97"],
)  # fmt: skip
@pytest.mark.parametrize("prompt", [None, "-", "日本"])
def test_a_text_read_in_pieces_is_continued_as_the_whole(given, prompt, tmp_path, monkeypatch):
    """From standard input or a file, with a prompt after it; --json holds the whole."""
    monkeypatch.setattr(options, "BLOCK_BYTES", 3)
    monkeypatch.setattr(pieces, "PIECE", 5)
    (tmp_path / "text").write_bytes(given)
    after = () if prompt is None else ("-p", prompt)
    for args, piped in ((("-f", str(tmp_path / "text"), *after), b"a\n"), (after, given)):
        how = ("generate", str(DEMO), *args, "-m", "4", "--prefill-step-size", "7")
        result, whole = run(*how, input=piped), run(*how, "--json", input=piped)
        assert result.exit_code == whole.exit_code
        if whole.exit_code:
            assert result.output == whole.output
            assert result.stderr.startswith("error: the prompt is ")
            continue
        told = json.loads(whole.stdout)
        assert result.stdout == told["text"] + "\n"
        assert result.stderr.startswith(f"prompt: {told['prompt_tokens']} tokens, ")


def test_a_file_may_be_a_pipe():
    ours, theirs = os.pipe()
    os.write(theirs, b"def main(\n")
    os.close(theirs)
    result = run("generate", str(DEMO), "--file", f"/dev/fd/{ours}", "-m", "5")
    os.close(ours)
    assert result.stdout == "self,\n"


@pytest.mark.large
def test_seeds_repeat_and_sampling_options_matter(converted):
    folder = str(converted("trained/paragru/final.pt", tokenizer="bytes"))  # in float16 greedy choices tie

    def sample(*args):
        return run("generate", folder, "-p", "import ", "-m", "30", *args).stdout

    warm = ("--temp", "1.5", "--seed", "7")
    assert sample(*warm) == sample(*warm)
    assert sample(*warm) != sample("--temp", "1.5", "--seed", "8")
    greedy = sample()
    assert sample(*warm, "--top-k", "1") == greedy
    assert sample(*warm, "--top-p", "0.000001") == greedy
    assert sample(*warm, "--min-p", "1.0") == greedy
    assert sample(*warm, "--top-k", "5000") == sample(*warm)
    assert sample("--repetition-penalty", "3.0") != greedy


@pytest.mark.parametrize("stop", ["other", ", oth", "s", "nowhere"])
def teststop_strings(stop):
    plain = run("generate", str(DEMO), "-p", "def main(", "-m", "11", "--json")
    text = json.loads(plain.stdout)["text"]
    result = json.loads(
        run("generate", str(DEMO), "-p", "def main(", "-m", "11", "--json", "--stop", stop).stdout
    )
    assert result["text"] == text.split(stop)[0]
    assert result["finish_reason"] == ("stop" if stop in text else "length")


def test_of_severalstop_strings_the_first_one_met_ends_the_text(demo):
    model, tokenizer = demo
    stop = ["xyz", "ther", ", o"]
    text = mlx_pararnn.generate(model, tokenizer, "def main(", max_tokens=30, stop=stop)
    assert text == "self"


def test_end_of_sequence_tokens_end_the_text(tmp_path):
    """eos_token_id of config.json: here the comma."""
    folder = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ord(",")}))
    result = json.loads(run("generate", str(folder), "-p", "def main(", "--json").stdout)
    assert result["text"] == "self"
    assert result["finish_reason"] == "stop"


def test_utf8_is_not_cut(demo):
    tokenizer = demo[1]
    text = "größer 日本 🙂"
    assert tokenizer.encode(text) == list(text.encode())
    detokenizer = tokenizer.detokenizer
    pieces = []
    for token in tokenizer.encode(text):
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert "".join(pieces) + detokenizer.last_segment == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_learned_positions_run_out(converted, bytes_tokenizer, caplog):
    model, _ = mlx_pararnn.load_model(converted(BABYLM))  # 64 positions
    for limit in (-1, 1000):
        responses = list(mlx_pararnn.stream_generate(model, bytes_tokenizer, [1] * 50, max_tokens=limit))
        assert responses[-1].finish_reason == "length"
        assert responses[-1].generation_tokens == 14
        assert caplog.messages == ["stopped: the model's 64 learned positions are used up"]
        caplog.clear()
    responses = list(mlx_pararnn.stream_generate(model, bytes_tokenizer, [1] * 50, max_tokens=14))
    assert caplog.messages == []
    cache = model.make_cache()
    model(mx.array([[1] * 40]), cache=cache)
    *_, last = mlx_pararnn.stream_generate(
        model, bytes_tokenizer, [1] * 20, max_tokens=99, prompt_cache=cache
    )
    assert last.generation_tokens == 4
    with pytest.raises(PararnnError, match="the text so far takes 84 of the model's 64 learned positions"):
        next(mlx_pararnn.stream_generate(model, bytes_tokenizer, [1] * 20, prompt_cache=cache))


@pytest.mark.parametrize("limit", [0, -2])
def test_a_limit_of_no_token_is_refused(demo, limit):
    said = f"max_tokens must be at least 1, or -1 for no limit, and it is {limit}"
    with pytest.raises(PararnnError, match=said):
        mlx_pararnn.generate(*demo, "x", max_tokens=limit)
    for pair in (demo, mlx_pararnn.load()):
        with pytest.raises(PararnnError, match=said):
            next(Chat(*pair).respond("x", max_tokens=limit))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1, 256], "token id 256, but the model has ids 0 to 255"),
        ([-1], "token id -1"),
    ],
)
def test_prompts_that_cannot_be(demo, prompt, message):
    model, tokenizer = demo
    with pytest.raises(PararnnError) as error:
        mlx_pararnn.generate(model, tokenizer, prompt)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("no/such/place", "-p", "x"), "error: no such model folder: no/such/place"),
        ((".", "-p", "x"), "error: no config.json in ."),
        (("README.md", "-p", "x"), "error: README.md is a file, not a model folder; give one that"),
        (
            ("a.pt", "-p", "x"),
            "error: a.pt is a file, not a model folder; convert it first: mlx-pararnn convert",
        ),
        (("coreml", "-p", "x"), "error: coreml is a Core ML package, which Swift runs"),
        (("coreai", "-p", "x"), "error: coreai is a Core AI package, which Swift runs"),
        (("-f", "none.txt"), "error: no such file: none.txt"),
        (("-f", "coreml"), "error: coreml is a folder; give a file"),
        ((str(DEMO), "-p", "x", "--json-schema", "coreml"), "error: coreml is a folder; give a file"),
        ((str(DEMO), "-p", ""), "error: the prompt is empty; give at least one token"),
        ((str(DEMO), "-p", "a\udcff"), "error: the prompt is not UTF-8 text"),
        (("-p", ""), "error: the message is empty; write what the model should answer"),
        (
            ("-p", "a line\n" * 2000),
            "error: the bundled model answers messages of at most 10,000 characters, and this one has 14,000",
        ),
        (("-p", "a\udcff"), "error: the text is not UTF-8"),
        (("-p", "x", "--import", "no_such_module"), "error: --import no_such_module: ModuleNotFoundError"),
        (("-p", "x", "--import", "./a.py"), "error: --import ./a.py: TypeError"),
    ],
)
def test_bad_input_is_one_sentence(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("README.md", "a.pt"):
        Path(file).write_text("")
    for kind in PACKAGE_KINDS:
        (Path(kind.format.removeprefix("pararnn-")) / kind.name).mkdir(parents=True)
    result = run("generate", *args)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "args",
    [
        ("--no-such-option",),
        *(("--temp", value) for value in ("-1", "nan", "inf")),
        *(("--top-p", value) for value in ("0", "2", "nan")),
        *(("--repetition-penalty", value) for value in ("0", "inf", "nan", "101")),
        ("-m", "0"),
        ("--seed", "-1"),
        ("--seed", "18446744073709551616"),
        ("--stop", ""),
        ("a", "b"),
    ],
)
def test_wrong_usage_is_exit_code_2(args):
    result = run("generate", str(DEMO), "-p", "x", *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_standard_input_that_is_no_text(tmp_path):
    result = run("generate", str(DEMO), input=b"\xff\xfe\x80")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the prompt is not UTF-8 text")


@pytest.mark.large
def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m mlx_pararnn.cli.app generate {DEMO} -p x -m 5000 | head -c 20"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert len(result.stdout) == 20


def test_debug_shows_the_traceback():
    result = run("generate", "no/such/place", "-p", "x", "--debug")
    assert isinstance(result.exception, PararnnError)


@pytest.mark.large
def test_a_cell_of_ones_own_is_found_again(tmp_path, monkeypatch):
    """Save a model with a registered cell; a new process finds the cell by --import, or says how."""
    (tmp_path / "my_cell.py").write_text(
        "from mlx_pararnn import Cell, register_cell\n"
        "@register_cell\n"
        "class Leaky(Cell):\n"
        "    name, gates, slots, output, params = 'leaky', ('n', 'g'), ('h',), 'h', ('a',)\n"
        "    def step(self, state, u, params, F):\n"
        "        g = F.sigmoid(u['g'] + params['a'] * state[0])\n"
        "        return (g * state[0] + (1 - g) * F.tanh(u['n']),)\n"
    )
    make = (
        "import json, shutil, my_cell, mlx.core as mx\n"
        "from mlx.utils import tree_flatten\n"
        "from mlx_pararnn import Model, ModelArgs\n"
        f"DEMO = {str(DEMO)!r}\n"
        "shutil.copytree(DEMO, 'model')\n"
        "fields = dict(cell='leaky', hidden_size=32, num_hidden_layers=2, vocab_size=256,\n"
        "              intermediate_size=48)\n"
        "open('model/config.json', 'w').write(json.dumps(dict(model_type='pararnn', **fields)))\n"
        "model = Model(ModelArgs(**fields))\n"
        "mx.save_safetensors('model/model.safetensors', dict(tree_flatten(model.parameters())))\n"
    )
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "generate", "model", "-p", "abc", "-m", "4"]
    result = subprocess.run(
        [*command, "--import", "my_cell"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "generated: 4 tokens" in result.stderr
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "unknown cell 'leaky'" in result.stderr
    assert "--import MODULE" in result.stderr

    # an installed package's entry point
    info = tmp_path / "my_cell-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-cell\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlx_pararnn.cells]\nleaky = my_cell\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "name": {"enum": ["é😀", "y"]}},
    "required": ["ok", "name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("as_file", [False, True])
def test_json_schema_is_kept_to_and_ends_the_text(tmp_path, caplog, as_file):
    given = json.dumps(SCHEMA)
    if as_file:
        (tmp_path / "schema.json").write_text(given)
        given = str(tmp_path / "schema.json")
    asked = ("generate", str(DEMO), "-p", "x", "--json-schema", given, "--temp", "1", "--seed", "1")
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    said = json.loads(answer["text"])
    assert set(said) == {"ok", "name"}
    assert said["name"] in ("é😀", "y")
    assert answer["finish_reason"] == "stop"
    text = answer["text"].encode()
    # The last token completes it, and one fewer is said to be cut.
    cut = run(*asked, "-m", str(len(text) - 1))
    assert cut.stdout.encode() == text[:-1] + b"\n"
    assert "ends before its JSON is complete" in caplog.text
    caplog.clear()
    whole = run(*asked, "-m", str(len(text)))
    assert (whole.stdout.encode(), "complete" in caplog.text) == (text + b"\n", False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no-such-file.json", "no such file: no-such-file.json"),
        ("{", "--json-schema is not JSON"),
        ('{"type": "foo"}', "the schema cannot be kept to"),
    ],
)
def test_a_json_schema_that_cannot_be_used(given, said):
    result = run("generate", str(DEMO), "-p", "x", "--json-schema", given)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr


def test_a_json_schema_is_not_taken_with_a_draft(demo):
    model, tokenizer = demo
    with pytest.raises(PararnnError, match="json_schema and draft_model"):
        mlx_pararnn.generate(model, tokenizer, "x", json_schema=SCHEMA, draft_model=model)


@pytest.mark.large
def test_a_terminal_sees_life_and_compiling_on_one_line_that_goes(tmp_path):
    """Before anything is generated; afterwards nothing of it is left."""
    terminal = Terminal("generate", "-p", "12 + 34", XDG_CACHE_HOME=str(tmp_path))
    terminal.wait_for(r"\ALoading the bundled model \.\.\.")
    terminal.wait_for(r"\ALoading the bundled model: compiling [\w-]+ for this CPU, on")
    terminal.wait_for(r"\A\d+ steps\n46\n\d+ tokens in")
    assert terminal.exit_code() == 0
    assert b"compiling" not in terminal.raw.partition(b"46")[2]


@pytest.mark.large
def test_a_server_compiles_before_it_serves(tmp_path):
    """On the same line; a first request, of a prompt, finds all libraries there."""
    terminal = Terminal("serve", "--port", "0", XDG_CACHE_HOME=str(tmp_path))
    terminal.wait_for(r"\ALoading the bundled model: compiling [\w-]+ for this CPU, on")
    url = terminal.wait_for(r"\AServing at (\S+) ")[1]
    libraries = set(tmp_path.rglob("*.so"))
    body = json.dumps({"messages": [{"role": "user", "content": "12 + 34"}]}).encode()
    asked = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == "46"
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    assert b"compiling" not in terminal.raw.partition(b"Serving at")[2]
    assert set(tmp_path.rglob("*.so")) == libraries


def test_a_sampler_is_compiled_before_a_text_is_timed_and_seeded_after(monkeypatch):
    made, asked = sample_utils.make_sampler, []

    def noted(*args, **options):
        draw = made(*args, **options)
        return lambda rows: asked.append(rows.shape) or draw(rows)

    monkeypatch.setattr(sample_utils, "make_sampler", noted)
    draw = sampler(Sampling(0.7, seed=1), 300)["sampler"]
    assert asked == [(1, 300)]
    rows = mx.zeros((8, 300))
    drawn = draw(rows).tolist()
    mx.random.seed(1)
    assert made(0.7)(rows).tolist() == drawn
