"""What holds for every command: its streams, paths, interrupts, and errors that are nobody's."""

import ast
import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.cli.app import COMMANDS, app
from mlx_pararnn.cli.chat_commands import DRAWING, HELP, SEEING
from mlx_pararnn.cli.report import passed_or_not
from mlx_pararnn.cli.sampling import CONVERSATION, LIKELIEST, Sampling, choose_sampling
from mlx_pararnn.process.address_space import LEAST
from tests.support.demo import DEMO
from tests.support.golden import golden_file
from tests.support.serving import folder_of
from tests.support.terminal import Terminal

COMMAND = [sys.executable, "-m", "mlx_pararnn"]


@pytest.fixture
def checkpoint():
    return golden_file("lm/paragru_s64/state_dict.pt")


@pytest.mark.large
@pytest.mark.parametrize("closed", ["2>&-", "<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, checkpoint, tmp_path):
    text = f'exec "$@" {closed}'
    arguments = ["convert", str(checkpoint), "-o", str(tmp_path / "out"), "--tokenizer", "none"]
    done = subprocess.run(["sh", "-c", text, "sh", *COMMAND, *arguments], check=False)
    assert done.returncode == 0
    assert (tmp_path / "out/config.json").exists()
    if closed == "<&-":  # a file that a library opens gets no number of a stream
        arguments = [str(tmp_path / "out"), "--json"]
        done = subprocess.run(["sh", "-c", text, "sh", *COMMAND, "verify", *arguments], check=False)
        assert done.returncode == 0


def test_a_tilde_is_the_home_folder_in_every_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    run = CliRunner().invoke
    arguments = ["convert", "~/model.pt", "--output=~/out", "--config=~/config.json", "--tokenizer", "none"]
    assert run(app, arguments).exit_code == 0
    assert '"eos_token_id": 3' in (tmp_path / "out/config.json").read_text()
    assert run(app, ["inspect", "~/out"]).exit_code == 0
    assert run(app, ["verify", "~/out", "--against=~/model.pt"]).exit_code == 0
    assert "owner/name" not in run(app, ["generate", "~/out", "-p", "a"]).stderr
    assert run(app, ["convert", "~/model.pt", "-o", "~/x", "--tokenizer", "~/none"]).stderr.startswith(
        f"error: {tmp_path}/none: no such folder"
    )


INTERRUPTED = """
import os, signal, sys
wanted = sys.argv.pop(1)
def hook(event, arguments):
    global wanted
    if event == "import" and arguments[0] == wanted:
        wanted = None
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
from mlx_pararnn.__main__ import main
main()
"""


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    "imported", ["typer", "mlx_pararnn.cli.report", "mlx_pararnn.convert.to_mlx", "numpy"]
)
def test_ctrl_c_while_something_is_imported(imported, checkpoint, tmp_path):
    arguments = ["convert", checkpoint, "-o", tmp_path / "out", "--tokenizer", "none"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, imported, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) in ((-signal.SIGINT, ""), (130, "interrupted\n"))
    assert not (tmp_path / "out").exists()


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    ("imported", "arguments"),
    [
        ("mlx_lm.utils", ["generate", DEMO, "-p", "x"]),
        ("mlx_pararnn.pocket.answers", ["generate", "-p", "x"]),
        ("mlx_pararnn.chat.session", ["chat"]),
        ("mlx_pararnn.chat.server.engine", ["serve", "--port", "0"]),
        ("mlx_pararnn.tools.benchmark", ["bench"]),
        ("mlx_pararnn.tools.verification", ["verify"]),
        ("mlx_pararnn.training.trainer", ["train", __file__, "-o", "never"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_ctrl_c_before_the_first_token(imported, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, imported, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "command", [["generate", "-p", "x"], ["chat"], ["serve", "--port", "0"], ["verify"]], ids=lambda c: c[0]
)
def test_a_terminal_sees_life_before_anything_heavy_is_imported(command, tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/__init__.py").write_text("raise ImportError('imported', name='mlx')")
    terminal = Terminal(*command, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert terminal.exit_code() == 1
    assert "MLX cannot be loaded here (imported)" in terminal.text
    what = b"Checking" if command == ["verify"] else b"Loading"
    assert terminal.raw.startswith(b"\r\x1b[K%s the bundled model ..." % what)


@pytest.mark.large
def test_a_terminal_is_told_that_the_cost_of_quantizing_is_measured(tmp_path):
    source = golden_file("trained/paragru/final.pt")
    terminal = Terminal("convert", source, "-o", tmp_path / "out", "--tokenizer", "bytes", "-q", columns=200)
    assert terminal.exit_code() == 0
    assert b"\r\x1b[KMeasuring what quantizing cost ...\r\x1b[K" in terminal.raw
    assert "Measuring" not in terminal.text
    assert "its cost on a bundled text: perplexity" in terminal.text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit is not kept")
@pytest.mark.parametrize(
    "megabytes", [60, 1000]
)  # too little to import NumPy; enough to start what then spins
def test_a_limit_of_the_address_space_is_one_sentence(megabytes):
    import resource

    most = megabytes * 10**6
    done = subprocess.run(
        [*COMMAND, "generate", DEMO, "-p", "x", "-m", "1"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the address space is limited to {megabytes} MB (ulimit -v ")
    assert len(done.stderr.splitlines()) == 1


LIMITED = """
import resource, sys
from mlx_pararnn.process.address_space import LEAST
resource.setrlimit(resource.RLIMIT_AS, (LEAST + (200 << 20),) * 2)
import mlx.core as mx
from mlx_pararnn import PararnnError, load_model
from mlx_pararnn.tools.benchmark import preset_model
model, _ = load_model(sys.argv[1])
cache = model.make_cache()
mx.eval(model(mx.zeros((1, 512), mx.int32), cache=cache))
for ask in (lambda: model(mx.zeros((1, 1 << 20), mx.int32), cache=cache), lambda: preset_model("7b")):
    try:
        ask()
    except PararnnError as error:
        print(error)
mx.eval(model(mx.zeros((1, 512), mx.int32), cache=cache))
"""


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit is not kept")
def test_what_a_limit_of_the_address_space_has_no_room_for_is_refused():
    """MLX would end the process by a signal."""
    done = subprocess.run([sys.executable, "-c", LIMITED, DEMO], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reading, weights = done.stdout.splitlines()
    assert reading.startswith("reading 1048576 tokens at once takes about ")
    assert reading.endswith(f"; {READ_FEWER} or raise the limit")
    assert weights.startswith("the weights of 7b take about 2")


READ_FEWER = "read fewer at once (--prefill-step-size, in Python prefill_step_size)"


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit is not kept")
def test_a_prompt_that_a_limit_has_no_room_for_is_read_in_smaller_pieces(tmp_path):
    """The sentence names the option, and with it the same prompt is read."""
    folder = folder_of(tmp_path / "wide", Model(ModelArgs(64, 1, 256, 65536)))
    prompt = tmp_path / "prompt"
    prompt.write_text("a line of the text\n" * 300)
    limited = ["sh", "-c", f'ulimit -v {LEAST + (200 << 20) >> 10} && exec "$@"', "sh", *COMMAND]

    def run(size, command, *arguments):
        with prompt.open() as stdin:
            return subprocess.run(
                [*limited, command, folder, "-m", "1", "--prefill-step-size", f"{size}", *arguments],
                stdin=stdin, capture_output=True, text=True, timeout=300,
            )  # fmt: skip

    whole, pieces = run(10**6, "generate", "-f", prompt), run(500, "generate", "-f", prompt)
    assert (whole.returncode, len(whole.stderr.splitlines())) == (1, 1), whole.stderr
    assert whole.stderr.startswith("error: reading 5698 tokens at once takes about ")
    assert READ_FEWER in whole.stderr
    assert (pieces.returncode, "prompt: 5699 tokens" in pieces.stderr) == (0, True), pieces.stderr
    prompt.write_text("a line of the text " * 300)
    said = run(10**6, "chat", "--no-history")
    assert (said.returncode, READ_FEWER in said.stderr) == (0, True), said.stderr


@pytest.mark.large
def test_a_prompt_is_read_in_pieces_of_the_size_that_is_given(monkeypatch):
    """Of text, of ids, of a message to a model with tools; in `chat` too."""
    read = []
    call = Model.__call__

    def count(model, inputs, *arguments, **options):
        read.append(inputs.shape[1])
        return call(model, inputs, *arguments, **options)

    monkeypatch.setattr(Model, "__call__", count)
    ids = " ".join(["65"] * 40)
    for arguments, stdin in (
        (["generate", DEMO, "-p", "x" * 40], None),
        (["generate", DEMO, "--tokens", ids], None),
        (["generate", "-p", "x" * 40], None),
        (["chat", DEMO, "--no-history"], "x" * 40),
        (["chat", "--no-history"], "x" * 40),
    ):
        read.clear()
        command = [*map(str, arguments), "-m", "1", "--prefill-step-size", "16"]
        result = CliRunner().invoke(app, command, input=stdin)
        assert result.exit_code == 0, result.output
        assert (max(read), read.count(16) >= 2) == (16, True), (arguments, read)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize(
    "arguments",
    [["inspect", DEMO], pytest.param(["generate", DEMO, "-p", "x", "-m", "1"], marks=pytest.mark.large)],
    ids=["at the end", "at once"],
)
def test_an_output_that_takes_nothing_is_one_sentence(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["convert", "CHECKPOINT", "-o", "out", "--tokenizer", "none"], 0),
        (["convert", "nowhere", "-o", "out"], 1),
        (["convert", "--no-such-option"], 2),
        (["generate", DEMO, "-p", "x", "-m", "1"], 0),
        (["train", "CHECKPOINT", "-o", "out"], 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_what_stderr_does_not_take_is_lost_and_the_work_goes_on(arguments, code, checkpoint, tmp_path):
    given = [checkpoint if argument == "CHECKPOINT" else argument for argument in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *given], stdout=subprocess.PIPE, stderr=full, cwd=tmp_path, check=False
        )
    assert done.returncode == code
    assert (tmp_path / "out/config.json").exists() == (arguments[0] == "convert" and code == 0)


def test_a_panic_of_a_rust_library_is_one_sentence(monkeypatch, checkpoint, tmp_path):
    class PanicException(BaseException):
        """As pyo3_runtime's."""

    def panic(*_, **__):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("mlx_pararnn.convert.to_mlx.convert_to_mlx", panic)
    arguments = ["convert", str(checkpoint), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: a library failed on this input: index out of bounds\n",
    )
    with pytest.raises(PanicException):
        CliRunner().invoke(app, [*arguments, "--debug"])


@pytest.mark.parametrize(
    ("raised", "code", "said"), [(KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(143), 143, "")]
)
def test_a_signal_that_python_wraps_ends_a_command_as_any(
    raised, code, said, monkeypatch, checkpoint, tmp_path
):
    """Python 3.11 makes a RuntimeError of what is raised while a class is made, as in an import."""

    def wrapped(*_, **__):
        raise RuntimeError("Error calling __set_name__") from raised

    monkeypatch.setattr("mlx_pararnn.convert.to_mlx.convert_to_mlx", wrapped)
    result = CliRunner().invoke(app, ["convert", str(checkpoint), "-o", str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (code, said)


def test_version():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mlx-pararnn {mlx_pararnn.__version__}\n"
    assert mlx_pararnn.__version__[0].isdigit()


def test_short_help_and_summaries_that_fit():
    """Of a summary that is too long for its line the end is left out."""
    for argument in ("-h", "--help"):
        shown = subprocess.run(
            [sys.executable, "-m", "mlx_pararnn", argument],
            env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "..." not in shown.stdout.partition("Commands:")[2]
        assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    in_chat = [*HELP.splitlines(), SEEING, DRAWING]
    assert [line for line in in_chat if len(line) > 79] == []
    assert "--temp, --temperature" in CliRunner().invoke(app, ["chat", "-h"]).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_fits_and_its_example_stands_on_one_line(name):
    shown = CliRunner().invoke(app, [name, "-h"], env={"COLUMNS": "80"}).stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    example = re.search(r"^ *(?:Example: |echo .*\| )(mlx-pararnn .*)$", shown, re.M)
    assert example is not None
    assert shlex.split(example[1])[1] == name  # an example that is broken lacks its last quote or a word
    assert not re.search(r"^ *Example: .*\n *\S", shown, re.M)


def test_a_command_imports_no_other():
    code = "import sys; from mlx_pararnn.cli.app import app; app(['cache', '-h'], standalone_mode=False)"
    code += "; print({name for name in sys.modules if name.startswith('mlx_pararnn.cli.')})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = ast.literal_eval(done.stdout.splitlines()[-1])
    assert "mlx_pararnn.cli.cache_command" in imported
    assert not imported & {f"mlx_pararnn.cli.{name}" for name in ("chat", "convert", "generate", "serve")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--nonsense"], "No such option: --nonsense"),
        (["generate", "--temp", "hot"], "Invalid value for '--temp'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["generat"], "No such command 'generat'. Did you mean 'generate'?"),
        (["convert"], "Missing argument"),
        (
            ["convert", "a", "-o", "b", "--to", "c"],
            "Invalid value for '--to': 'c' is not one of 'mlx', 'coreml'",
        ),
        (["bench", "--preset"], "Option '--preset' requires an argument"),
    ],
)
def test_wrong_usage_is_told_as_every_error(arguments, said):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("--help)\n") or arguments[-1] == "--preset"


GIVEN = (None, "", "x", "0", "1", "4", "007", "-1", "+1", "1_0", " 7", "7\n", "\u0663", "9" * 30, "0.5",
         "1.", ".5", "1e3", "nan", "inf", "true", "mlx", "float16", 3, 0.5)  # fmt: skip


def outcome(parameter, context, value):
    try:
        made = parameter.get_runtime_param().coerce(value, param=parameter, ctx=context)
    except typer.BadParameter as error:
        return error.format_message()
    return type(made), repr(made)


@pytest.mark.parametrize("name", COMMANDS)
def test_values_are_as_typer_makes_them(name):
    """Those that are taken as they are, too, and it has the last word on the others."""
    command = typer.main.get_command(app).get_command(None, name)
    context = command.context_class(command)
    for quick in command.get_params(context):
        if "get_runtime_param" not in vars(quick):  # -h
            continue
        plain = copy.copy(quick)
        del vars(plain)["get_runtime_param"]
        for value in GIVEN:
            if not isinstance(value, str | None) and (quick.multiple or quick.nargs != 1):
                continue
            assert outcome(quick, context, value) == outcome(plain, context, value), (quick.name, value)


def test_options_of_generate_and_chat_need_no_pydantic():
    code = "import sys; from mlx_pararnn.cli.app import app; sys.argv[1:] = {}\n"
    code += "try: app()\nexcept SystemExit: print('pydantic' in sys.modules)"
    for words in (
        ["generate", "Once", "-m", "1", "--temp", "0.5", "--seed", "3"],
        ["chat", "Once"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(words)], capture_output=True, text=True, check=True
        )
        assert "no such model folder" in done.stderr
        assert done.stdout == "False\n"


def test_completion_of_commands():
    environment = {**os.environ, "_MLX_PARARNN_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['mlx-pararnn']; from mlx_pararnn.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"COMP_WORDS": "mlx-pararnn ver"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["verify"]


def test_cache_is_shown_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mlx-pararnn"
    folder.mkdir(mode=0o700)
    (folder / "kernel.so").write_bytes(bytes(200_000))
    assert f"{folder}  0.2 MB" in CliRunner().invoke(app, ["cache"]).stdout
    assert CliRunner().invoke(app, ["cache", "clear"]).stdout == f"deleted {folder}: 0.2 MB\n"
    assert not folder.exists()
    assert CliRunner().invoke(app, ["cache", "clear"]).exit_code == 0


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({}, {}, CONVERSATION),
        ({"do_sample": False, "temperature": 0.9}, {}, LIKELIEST),
        ({"do_sample": True}, {}, Sampling(temp=1.0)),
        ({"temperature": 0.5, "top_k": 20}, {}, Sampling(temp=0.5, top_k=20)),
        ({"temperature": 0.5, "top_p": "x", "top_k": 1e99, "min_p": True}, {}, Sampling(temp=0.5)),
        ({"temperature": 0.5, "top_p": 0.8}, {"temp": 0.0, "top_p": None}, Sampling(temp=0.0, top_p=0.8)),
        ({"repetition_penalty": 1.1}, {"seed": 3}, CONVERSATION.replaced(repetition_penalty=1.1, seed=3)),
        ([], {}, CONVERSATION),
    ],
)
def test_sampling_is_what_was_given_then_the_models_then_the_commands(config, given, expected, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert choose_sampling(tmp_path, CONVERSATION, given) == expected


def test_marks_have_colour_on_a_terminal_unless_it_is_refused(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert passed_or_not(True) == "ok  "
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert passed_or_not(False) == "\x1b[31mFAIL\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert passed_or_not(False) == "FAIL"
