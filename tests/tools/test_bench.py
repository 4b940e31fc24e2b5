"""`mlx-pararnn bench` as a user has it, at sizes that take no time. What it says is true of a machine, so no
timing is asserted: only that everything asked for was measured and comes out whole."""

import json
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_pararnn import Model, ModelArgs, load_model
from mlx_pararnn.cli.app import app
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.hub import BUNDLED
from mlx_pararnn.tools import benchmark
from mlx_pararnn.tools.plot import Panel, draw
from tests.support.demo import DEMO

TINY = (*("-p", "4,9", "-c", "0,40", "-b", "1,2", "--steps", "1,3", "--widths", "8"), *("-g", "3", "-n", "1"))


def run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.fixture(scope="module")
def report():
    result = run(DEMO, *TINY, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_says_what_was_measured_where(report):
    about = {key: value for key, value in report.items() if key != "results"}
    assert about.keys() == {
        *("model", "cell", "parameters", "dtype", "device", "system", "mlx", "mlx-pararnn", "date"),
    }
    assert (about["cell"], about["parameters"], about["dtype"]) == ("gru", 812419, "float16")
    for result in report["results"]:
        assert result.keys() == {"section", "settings", "values", "runs"}
        assert result["runs"] == 1
        assert all(value > 0 for value in result["values"].values())


def test_every_size_is_there(report):
    def settings(section):
        return [result["settings"] for result in report["results"] if result["section"] == section]

    assert settings("prefill") == [{"tokens": 4}, {"tokens": 9}]
    assert settings("decode") == [{"context": 0}, {"context": 40}]
    assert settings("batch") == [{"sequences": 1}, {"sequences": 2}]
    assert settings("memory") == [{}]
    solved = {(s["T"], s["D"], s["method"], s["backend"]) for s in settings("recurrence")}
    assert {(T, 8, method, "ops") for T in (1, 3) for method in ("sequential", "newton")} < solved
    assert {(T, 8, "copy of as many bytes", "-") for T in (1, 3)} < solved


def test_units_fit_each_other(report):
    values = {(r["section"], *r["settings"].values()): r["values"] for r in report["results"]}
    prefill, decode = values["prefill", 9], values["decode", 40]
    assert prefill["tokens_per_second"] * prefill["first_token_milliseconds"] == pytest.approx(9000)
    assert decode["tokens_per_second"] * decode["milliseconds_per_token"] == pytest.approx(1000)
    memory = values["memory",]
    model = load_model(DEMO)[0]
    caches = model.make_cache()
    model(mx.array([[1]]), cache=caches)
    assert memory["state_bytes"] == sum(cache.nbytes for cache in caches)
    assert memory["weights_bytes"] == sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert memory["resident_bytes"] > 1e6


def test_table():
    result = run(DEMO, *TINY)
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"model {DEMO}, cell gru, parameters 812419, dtype float16, device ")
    assert [line for line in rest if line and not line.startswith(" ")] == [*benchmark.SECTIONS]
    decode = rest[rest.index("decode") :][:4]
    assert decode[1].split("  ")[1:] == ["context", "tokens per second", "milliseconds per token"]
    assert [line.split()[0] for line in decode[2:]] == ["0", "40"]
    assert result.stderr == ""  # the progress bar is for terminals


def test_progress_goes_to_a_terminal_on_stderr(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    result = run(DEMO, *TINY, "--json")
    assert result.exit_code == 0, result.output
    assert re.search(r"\d+/15", result.stderr)
    assert any(section in result.stderr for section in benchmark.SECTIONS)
    json.loads(result.stdout)


@pytest.mark.large
def test_plot(tmp_path):
    file = tmp_path / "speed.svg"
    assert run(DEMO, *TINY, "--plot", file).exit_code == 0
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    text = file.read_text()
    for title in ("Recurrence alone", "Reading a prompt", "Generating", "Generating in a batch"):
        assert f"<!-- {title} -->" in text


def test_plot_without_matplotlib_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_pararnn.tools.plot.find_spec", lambda name: None)
    result = run(DEMO, *TINY, "--plot", tmp_path / "speed.svg")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: --plot draws with matplotlib, which is missing: pip install 'mlx-pararnn[plot]'\n"
    )


def test_one_section_alone():
    result = run(DEMO, "--only", "decode", "-c", "5", "-g", "2", "-n", "1", "--json")
    assert [r["section"] for r in json.loads(result.stdout)["results"]] == ["decode"]


def test_learned_positions_limit_the_defaults(converted):
    folder = converted("pararnn_torch/babylm_paralstm")
    result = run(folder, "--only", "decode", "--only", "prefill", "-n", "1", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    room = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    sizes = [*(n for r in report["results"] for n in r["settings"].values())]
    assert sizes
    assert max(sizes) <= room
    result = run(folder, "--only", "decode", "-c", "32768", "-n", "1")
    assert result.exit_code == 1
    assert f"do not fit this model's {room} learned positions" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--preset", "3b"], 1, "unknown preset '3b'; choose one of 400m, 1b, 2.9b, 7b"),
        (["--cell", "gnu", "--preset", "400m"], 1, "gnu"),
        ([DEMO, "--preset", "400m"], 1, "give a MODEL or a --preset"),
        ([DEMO, "--dtype", "float16"], 1, "give a MODEL or a --preset"),
        (["nowhere"], 1, "no such model folder: nowhere"),
        ([DEMO, "-p", "0"], 2, "'0' is not a whole number of at least 1"),
        ([DEMO, "-p", "12,"], 2, "'' is not a whole number"),
        ([DEMO, "--steps", "0,5"], 2, "'0' is not a whole number of at least 1"),
        ([DEMO, "--widths", "-8"], 2, "'-8' is not a whole number"),
        ([DEMO, "-c", "x"], 2, "'x' is not a whole number of at least 0"),
        ([DEMO, "-b", "0"], 2, "'0' is not a whole number of at least 1"),
        ([DEMO, "-g", "0"], 2, "-g"),
        ([DEMO, "-n", "0"], 2, "-n"),
        ([DEMO, "--only", "speed"], 2, "speed"),
        ([DEMO, "--plot", "no/folder/x.svg"], 1, "--plot: there is no folder no/folder"),
    ],
)
def test_bad_input(arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_presets_have_their_dtype(monkeypatch):
    small = ModelArgs(hidden_size=8, num_hidden_layers=1, vocab_size=10, intermediate_size=8)
    monkeypatch.setattr(ModelArgs, "preset", classmethod(lambda cls, name, cell: replace(small, cell=cell)))
    result = run("--preset", "400m", "--cell", "lstm", "--dtype", "bfloat16", *TINY, "--json")
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout)
    assert (about["model"], about["cell"], about["dtype"]) == ("400m", "lstm", "bfloat16")
    weights = benchmark.preset_model("400m", "gru", "float16").model.layers[0].mixer
    assert weights.out_proj.weight.dtype == mx.float16
    assert weights.cell.recurrent_weight.dtype == mx.float32


def test_decoding_goes_on_from_the_context():
    model = load_model(DEMO)[0]
    caches = benchmark._cache_after(model, 4096)
    assert [cache.offset for cache in caches] == [4096] * len(model.layers)
    benchmark.decode(model, caches, 3)
    assert {cache.offset for cache in caches} <= {4096 + 4, 4096 + 5}  # generate_step works one token ahead


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("cell", ["gru", "lstm", "nlru", "slstm"])
def test_every_cell_and_a_plain_model_are_measured(cell):
    tiny = replace(benchmark.SHORT, steps=(3,), prompts=(3,), contexts=(2,), batches=(2,), generated=2)
    args = ModelArgs(8, 1, 10, 8, cell=cell, mixer="plain", norm="layer", mlp="gelu")
    measured = [case.measure(1).section for case in benchmark.cases(Model(args), tiny)]
    assert list(dict.fromkeys(measured)) == [*benchmark.SECTIONS]


def test_alone_it_takes_the_bundled_model():
    result = run("--only", "decode", "-c", "0", "-g", "1", "-n", "1", "--json")
    assert result.exit_code == 0, result.output
    weights = tree_flatten(load_model(BUNDLED)[0].parameters())
    assert json.loads(result.stdout)["parameters"] == sum(weight.size for _, weight in weights)


def test_ctrl_c_prints_what_there_is(monkeypatch):
    measure, done = benchmark.Case.measure, []

    def interrupted(case, *arguments):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return measure(case, *arguments)

    monkeypatch.setattr(benchmark.Case, "measure", interrupted)
    result = run(DEMO, "--only", "decode", "-c", "0,40", "-g", "2", "-n", "1")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == ["decode", "context", "0"]


@pytest.mark.large
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c(tmp_path):
    plot, begun = tmp_path / "never.svg", tmp_path / "begun"
    (tmp_path / "says_so.py").write_text("open('begun', 'w').close()")
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "bench", DEMO, "--import", "says_so"]
    with subprocess.Popen(
        [*command, "--only", "decode", "-g", "1000000", "--plot", plot],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while not begun.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")
    assert not plot.exists()


def test_the_page_has_the_newest_results():
    """docs/performance.md and docs/coreai.md: what was measured benchmarks/report.py put there."""
    script = Path(__file__).parents[2] / "benchmarks" / "report.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("mlx_pararnn", {"mlx.core", "ctypes", "typing", "importlib.abc", "importlib.resources"}),
        ("mlx_pararnn.cli.app", {"mlx.core", "mlx_lm", "numpy", "rich", "importlib.metadata"}),
    ],
)
def test_what_an_import_leaves_for_later(module, kept_out):
    """What `import mlx_pararnn` and `mlx-pararnn --help` take is what they import."""
    script = f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not kept_out & set(done.stdout.split())


def test_chart(tmp_path):
    lines = {"first": [(0, 1.0), (1000, 2.0)], "second": [(0, 50.0)], "nothing": []}
    draw([Panel("one", "x", "y", lines), Panel("two", "x", "y", {"z": [(3, 0.0)]})], tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    for word in ("one", "two", "first", "nothing", "1000", "50"):
        assert f"<!-- {word} -->" in text
    with pytest.raises(PararnnError, match="choose an ending"):
        draw([Panel("one", "x", "y", lines)], tmp_path / "c.doc")
