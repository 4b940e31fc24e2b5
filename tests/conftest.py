import logging
import os

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX's first matrix product: parity needs float32 ones

from collections import Counter
from pathlib import Path

import pytest

import mlx_pararnn  # loads OpenBLAS before a test imports MLX
from mlx_pararnn import cells
from mlx_pararnn.convert.families.names import REGISTERED
from tests.support import quick_run
from tests.support.golden import DATA, golden_file

LEFT_OUT = pytest.StashKey[str]()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests too that the quick run leaves out")
    parser.addoption(
        "--cpu", action="store_true", help="MLX on the CPU in this process, where there is a GPU too"
    )


def pytest_configure(config):
    for mark, what in quick_run.LEFT_OUT.items():
        config.addinivalue_line("markers", f"{mark}: {what}; only with --all or -m")
    config.addinivalue_line("markers", "sampled(mark, by=None): `mark` but for a few cases")
    if not (config.getoption("all") or config.getoption("markexpr")):
        os.environ["MLX_DISABLE_COMPILE"] = "1"  # in commands that tests run; here, see pytest_runtest_setup
    if config.getoption("cpu"):
        import mlx.core as mx

        mx.set_default_device(mx.cpu)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    quick_run.mark_what_is_left_out(items)
    if config.getoption("cpu"):
        items[:] = [item for item in items if not item.get_closest_marker("metal")]
    if config.getoption("all") or config.getoption("markexpr"):
        return
    marks = {item: quick_run.left_out_mark(item) for item in items}
    items[:] = [item for item in items if marks[item] is None]
    left_out = [item for item in marks if marks[item]]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        counts = Counter(mark for mark in marks.values() if mark)
        what = ", ".join(f"{count} {mark}" for mark, count in sorted(counts.items()))
        said = f"Left out of the quick run: {what}. Everything runs with: pytest --all"
        if hasattr(config, "workeroutput"):  # one of several processes: the first of all tells
            config.workeroutput["left_out"] = said
        else:
            config.stash[LEFT_OUT] = said


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Without the mark, functions given to mx.compile run as they are: g++ takes a second for each graph."""
    import mlx.core as mx

    (mx.enable_compile if item.get_closest_marker("compiled") else mx.disable_compile)()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    said = getattr(node, "workeroutput", {}).get("left_out")
    if said:
        node.config.stash[LEFT_OUT] = said


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Two processes for everything; none beside this one for a few files."""
    few = config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("keyword")
    return 0 if few or config.getoption("collectonly") else min(2, os.cpu_count() or 1)


def pytest_unconfigure(config):
    if LEFT_OUT in config.stash:
        config.get_terminal_writer().line(config.stash[LEFT_OUT])


@pytest.fixture(autouse=True)
def process_as_it_was():
    """What a test changes of the process it takes back: the next one in it would meet something else.

    Looked at are levels of logs, the working folder, and variables that there were, or that are MLX's.
    """
    before = _process()
    yield
    after = _process()
    added = {
        name for name in after if name.startswith("MLX")
    }  # other libraries add some as they are imported
    changed = {n: (before.get(n), after.get(n)) for n in {*before, *added} if before.get(n) != after.get(n)}
    assert not changed, f"changed and not taken back, (before, now): {changed}"


def _process():
    loggers = [logging.root, logging.getLogger("mlx_pararnn")]
    levels = {f"logger {log.name}": (log.level, log.disabled, log.propagate) for log in loggers}
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {**levels, "logging.disable": logging.root.manager.disable, "folder": os.getcwd(), **variables}


@pytest.fixture(autouse=True)
def registries_as_they_were(monkeypatch):
    """A cell or a family of checkpoints that a test registers is gone after it."""
    monkeypatch.setattr(cells, "_REGISTRY", dict(cells._REGISTRY))
    families = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(families)


@pytest.fixture(autouse=True)
def this_machines_backend(monkeypatch):
    monkeypatch.delenv("MLX_PARARNN_BACKEND", raising=False)


@pytest.fixture
def cpu_backend():
    """What the CPU backend needs: a C++ compiler, and MLX's CPU, on a machine with a GPU too."""
    import mlx.core as mx

    from mlx_pararnn.compute import cpu_build

    try:
        cpu_build.compiler()
    except cpu_build.BuildError as error:
        pytest.skip(str(error))
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture
def calls(monkeypatch):
    """Of each token so far, whether it went through the one call."""
    from mlx_pararnn.compute import cpu_token

    made = []
    decode = cpu_token.decode

    def spy(*arguments):
        y = decode(*arguments)
        made.append(y is not None)
        return y

    monkeypatch.setattr(cpu_token, "decode", spy)
    return made


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A function that converts a checkpoint of tests/data once, and gives the model folder."""
    from mlx_pararnn.convert.to_mlx import convert_to_mlx

    folders: dict[tuple, Path] = {}

    def convert(source: str, **options) -> Path:
        key = (source, *sorted((k, str(v)) for k, v in options.items()))
        if key not in folders:
            out = tmp_path_factory.mktemp("converted") / "model"
            options.setdefault("tokenizer", "none")
            convert_to_mlx(golden_file(source), out, **options)
            folders[key] = out
        return folders[key]

    return convert


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A small model that sees and draws."""
    from tests.support.image_models import image_model, write_image_model

    return write_image_model(image_model(), tmp_path_factory.mktemp("images") / "model")


@pytest.fixture(scope="module")
def image_pair(image_folder):
    """It, loaded, with its tokenizer."""
    return mlx_pararnn.load_image_model(image_folder)
