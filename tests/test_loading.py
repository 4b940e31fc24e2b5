"""Loading model folders: whole, broken, hostile, from the hub's cache; and what importing costs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from tests.support.demo import DEMO


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "model")


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)


def test_importing_is_lazy():
    code = (
        "import sys, mlx_pararnn, mlx_pararnn.cli.app\n"
        "heavy = {'mlx.core', 'mlx_lm', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "print(heavy, 'openblas' in maps)"
    )
    assert run(code).stdout.strip() == "set() False"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS brings its own BLAS")
def test_openblas_is_loaded_before_mlx():
    from mlx_pararnn.compute.openblas import load_openblas

    if load_openblas() is None:
        pytest.skip("no OpenBLAS on this machine (Debian: libopenblas0-pthread)")
    code = (
        "import mlx_pararnn, mlx.core as mx\n"
        "x = mx.ones((8, 8)); mx.eval(x @ x)\n"
        "print('openblas' in open('/proc/self/maps').read())"
    )
    assert run(code).stdout.strip() == "True"


@pytest.mark.parametrize(
    ("code", "preload", "warned"),
    [
        ("import mlx.core, mlx_pararnn", {}, True),
        ("import mlx_pararnn, mlx.core", {}, False),
        ("import mlx.core, mlx_pararnn", {"LD_PRELOAD": "libopenblas.so.0"}, False),
    ],
)
def test_mlx_imported_first_is_told(code, preload, warned):
    from mlx_pararnn.compute.openblas import load_openblas

    if load_openblas() is None:
        pytest.skip("no OpenBLAS on this machine (Debian: libopenblas0-pthread)")
    done = run(code, env=os.environ | preload)
    assert done.returncode == 0, done.stderr
    assert ("import mlx_pararnn first" in done.stderr) == warned
    assert len(done.stderr.splitlines()) == warned


def test_an_openblas_older_than_the_cpu_takes_the_kernels_that_fit(monkeypatch):
    """It takes a Prescott's where it does not know the CPU; a user's own choice stays."""
    from mlx_pararnn.compute import openblas

    if sys.platform != "linux" or openblas.load_openblas() is None:
        pytest.skip("no OpenBLAS on this machine (Debian: libopenblas0-pthread)")
    code = (
        "import ctypes, os, mlx_pararnn, mlx.core; from mlx_pararnn.compute.openblas import openblas_core; "
        "print(openblas_core(ctypes.CDLL('libopenblas.so.0')), 'OPENBLAS_CORETYPE' in os.environ)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    features = Path("/proc/cpuinfo").read_text()
    if " avx2 " in features and " fma " in features:
        core, left_set = run(code, env=environment).stdout.split()
        assert (core != "Prescott", left_set) == (True, "False")
    asked = run(code, env={**environment, "OPENBLAS_CORETYPE": "Prescott"})
    assert asked.stdout.split() == ["Prescott", "True"]

    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    better = openblas._better_kernels("Prescott")
    assert better == ("SkylakeX" if " avx512vl " in features else "Haswell" if " avx2 " in features else None)
    assert openblas._better_kernels("Zen") is None


@pytest.mark.large
def test_a_checkout_finds_its_rooms():
    """From the repository's root, without an installation: convert/ and cli/ stand beside mlx_pararnn/."""
    code = (
        "import mlx_pararnn.cli.app, mlx_pararnn.convert, pkgutil\n"
        "print(*(module.name for module in pkgutil.walk_packages(mlx_pararnn.__path__, 'mlx_pararnn.')))"
    )
    root = Path(__file__).parents[1]
    result = run(code, cwd=root)
    rooms = {"mlx_pararnn": "", "convert": "mlx_pararnn.", "cli": "mlx_pararnn.", "metal": "mlx_pararnn."}
    files = [(file, prefix) for room, prefix in rooms.items() for file in (root / room).rglob("*.py")]
    modules = {prefix + ".".join(f.relative_to(root).with_suffix("").parts) for f, prefix in files}
    modules = {name.removesuffix(".__init__") for name in modules} - {"mlx_pararnn"}
    assert {*result.stdout.split()} == modules, result.stderr


def test_public_names():
    for name in mlx_pararnn.__all__:
        assert getattr(mlx_pararnn, name) is not None
    assert set(dir(mlx_pararnn)) == set(mlx_pararnn.__all__)
    with pytest.raises(AttributeError):
        mlx_pararnn.nothing  # noqa: B018


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    "code",
    [
        "import mlx_lm, mlx_pararnn, mlx_lm.models.cache as c; print(c.RecurrentCache.__module__)",
        "import mlx_pararnn, mlx_lm, mlx_lm.models.cache as c; print(c.RecurrentCache.__module__)",
        "import mlx_pararnn.cache, mlx_lm.models.cache as c; print(c.RecurrentCache.__module__)",
        "import mlx_pararnn, mlx_lm.models.pararnn as p; print(p.Model.__module__)",
    ],
)
def test_registration_works_whichever_is_imported_first(code):
    assert run(code).stdout.strip() in ("mlx_pararnn.cache", "mlx_pararnn.model")


@pytest.mark.large
def test_a_model_folder_never_runs_python(folder):
    (folder / "evil.py").write_text("open('ran', 'w'); Model = ModelArgs = None")
    edit_config(folder, model_file="evil.py", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    code = f"import mlx_pararnn; mlx_pararnn.load({str(folder)!r}); print('loaded')"
    result = run(code, cwd=folder)
    assert result.stdout.strip() == "loaded", result.stderr
    assert not (folder / "ran").exists()


@pytest.mark.large
def test_a_hub_model_comes_from_the_local_cache(folder, tmp_path, monkeypatch):
    """The layout that huggingface_hub keeps, with the network switched off."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    code = (
        "import mlx_pararnn\n"
        "model, tokenizer = mlx_pararnn.load('someone/tiny')\n"
        "print(mlx_pararnn.generate(model, tokenizer, 'def main(', max_tokens=4))\n"
        "mlx_pararnn.load('someone/else')"
    )
    import os

    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = run(code, env=env)
    assert result.stdout.startswith("self"), result.stderr
    assert "someone/else: not a folder here, and Hugging Face could not be reached" in result.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama', not 'pararnn'; convert a PyTorch checkpoint first"),
        ({"model_type": "pararnn_cell"}, "a single cell is loaded with mlx_pararnn.load_cell"),
        ({"cell": "gru2"}, "unknown cell 'gru2'"),
        ({"hidden_size": 64}, "do not fit its config.json"),
        ({"num_hidden_layers": 4}, "do not fit its config.json"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_configs_that_do_not_fit(folder, fields, message):
    edit_config(folder, **fields)
    with pytest.raises(PararnnError) as error:
        mlx_pararnn.load(folder)
    assert message in str(error.value)


@pytest.fixture
def cell_folder(tmp_path):
    """A GRU cell as `mlx-pararnn convert` leaves it: 5 inputs, 6 channels."""
    cell = {"W_x.weight": np.zeros((18, 5), "f4"), "W_x.bias": np.zeros(18, "f4")}
    cell |= {name: np.full(6, 0.5, "f4") for name in ("a_z", "a_r", "a_n")}
    save_file(cell, tmp_path / "cell.safetensors")
    convert_to_mlx(tmp_path / "cell.safetensors", tmp_path / "cell")
    return tmp_path / "cell"


def test_a_cell_is_loaded(cell_folder):
    layer, config = mlx_pararnn.load_cell(cell_folder)
    assert (config["cell"], config["input_size"], config["hidden_size"]) == ("gru", 5, 6)
    hidden = layer(mx.ones((2, 3, 5)))
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert hidden.shape == (2, 3, 6)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_cells_folder_is_refused_and_not_waited_for(cell_folder, name):
    (cell_folder / name).unlink()
    os.mkfifo(cell_folder / name)
    with pytest.raises(PararnnError, match=f"{name} cannot be read: not a regular file"):
        mlx_pararnn.load_cell(cell_folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json in"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "do not fit its config.json"),
        (lambda f: edit_config(f, hidden_size=7), "do not fit its config.json"),
        (lambda f: edit_config(f, cell="gru2"), "unknown cell 'gru2'"),
        (lambda f: edit_config(f, model_type="pararnn"), "has model_type 'pararnn', not 'pararnn_cell'"),
    ],
)
def test_broken_folders_of_a_cell(cell_folder, break_it, message):
    break_it(cell_folder)
    with pytest.raises(PararnnError) as error:
        mlx_pararnn.load_cell(cell_folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such model folder"),
        (lambda f: (f / "config.json").unlink(), "no config.json in"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "no model*.safetensors in"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "do not fit its config.json"),
        (lambda f: [x.unlink() for x in f.glob("tokenizer*")], "no tokenizer in"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read"),
    ],
)
def test_broken_folders(folder, break_it, message):
    break_it(folder)
    with pytest.raises(PararnnError) as error:
        mlx_pararnn.load(folder)
    assert message in str(error.value)


def test_a_checkpoint_is_not_a_model_folder(data):
    with pytest.raises(PararnnError, match="convert it first: mlx-pararnn convert"):
        mlx_pararnn.load(data / "trained/paragru/final.pt")


def test_a_conversion_gives_the_same_files_again(converted):
    made = converted("trained/paragru/final.pt", dtype="float16", tokenizer="bytes")
    demo = mx.load(str(DEMO / "model.safetensors"))
    again = mx.load(str(made / "model.safetensors"))
    assert demo.keys() == again.keys()
    assert all(mx.array_equal(demo[k], again[k]) for k in demo)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (DEMO / name).read_bytes() == (made / name).read_bytes()
    assert sum(f.stat().st_size for f in DEMO.iterdir()) < 2_000_000


def run_python(code, **environment):
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False, timeout=120
    )


@pytest.mark.large
def test_a_hub_that_never_answers_is_given_up(tmp_path):
    """A server that takes the connection and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import logging, mlx_pararnn.files.hub as hub; logging.basicConfig(level=logging.INFO)\n"
            "hub.SECONDS, hub.SILENT_SECONDS = 1.0, 0.1\n"
            "try: hub.find_model('someone/model')\n"
            "except hub.PararnnError as error: print(error)"
        )
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = run_python(code, HF_ENDPOINT=endpoint, HF_HUB_CACHE=str(tmp_path / "hub"))
    said = "someone/model: not a folder here, and Hugging Face could not be reached"
    assert result.stdout.startswith(said), result.stderr
    assert "looking for someone/model on Hugging Face" in result.stderr


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "def main("])
def test_a_wrong_path_is_told_before_anything_heavy_is_imported(name):
    code = (
        "import sys; from mlx_pararnn.cli import options\n"
        f"try: options.load({name!r}, None)\n"
        "except ValueError as error: print(error)\n"
        "print(sorted({'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    result = run_python(code)
    assert result.stdout.splitlines()[0].startswith(f"no such model folder: {name};"), result.stderr
    assert result.stdout.splitlines()[1] == "[]"


@pytest.mark.sampled("large", by=lambda command: [command.split()[0]])
@pytest.mark.parametrize(
    "command",
    [
        *("generate nosuch -p x", "chat nosuch", "serve nosuch", "lm generate --model nosuch"),
        *("bench nosuch", "inspect nosuch", "inspect nosuch.pt", "convert nosuch.pt -o out"),
        *("verify nosuch", "verify --against nosuch.pt", "verify --logits nosuch"),
        *("train nosuch -o out", "train . --valid nosuch -o out", "train . --init nosuch -o out"),
        *("draw x -o x.png --model nosuch", "add-tokenizer nosuch bytes"),
    ],
)
def test_every_command_tells_a_wrong_path_before_mlx_is_imported(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        "import sys; from mlx_pararnn.cli.app import main\n"
        f"sys.argv = ['mlx-pararnn', *{command.split()!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code)\n"
        "print(sorted({'mlx', 'mlx_lm', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = run_python(code, PYTHONPATH=str(Path(__file__).parents[1]))
    assert re.fullmatch(r"error: (no such model folder: )?nosuch(\.pt)?\b.*\n", result.stderr)
    assert result.stdout.split("\n")[:2] == ["1", "[]"]


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_head_that_a_file_repeats_is_the_embedding(differs, folder):
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    edit_config(folder, tie_word_embeddings=True)
    head = embedding + embedding.dtype.type(differs)
    weights.pop("lm_head.weight", None)
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "mlx"})
    if differs:
        with pytest.raises(PararnnError, match=r"lm_head\.weight that differs from it; put the model's own"):
            mlx_pararnn.load(folder)
    else:
        assert "lm_head" not in mlx_pararnn.load(folder)[0]


def test_a_cell_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        with pytest.raises(PararnnError, match="not a model folder"):
            mlx_pararnn.load_cell(path)
