"""Model folders with a change somewhere: they are used, or one sentence says why not; never anything else."""

import copy
import json
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest
from mlx_lm.utils import save_config, save_model
from typer.testing import CliRunner

import mlx_pararnn
from mlx_pararnn import Model, PararnnError
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files
from mlx_pararnn.model_config import ModelArgs

MEMORY = 3 << 30  # bytes of data that the process may take
COUNT = 300
SECONDS = 120  # that one folder may take
FILES = {
    "config.json": 10,  # of 100 changes so many are refused at least
    "model.safetensors": 10,
    "tokenizer.json": 10,
    "tokenizer_config.json": 10,
    "chat_template.jinja": 10,
    "generation_config.json": 0,
    "special_tokens_map.json": 0,
}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] | trim }}~{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}{% set a = namespace(b=1) %}{{ a.b + 1 }}"
)
VALUES = [None, True, -1, 0, 1, 2, 2**31, 2**70, 1e308, "", "x", [], {}, [1], {"a": 1}, [[[[]]]], "\ud800"]
PIECES = [b"{%", b"%}", b"{{", b"}}", b"|", b"(", b")", b"'", b"[0]", b".x", b"0", b"/", b"~", b"for", b"in"]


def small_model(folder):
    folder.mkdir()
    args = ModelArgs(
        hidden_size=16, num_hidden_layers=1, num_heads=2, vocab_size=256, intermediate_size=16, norm_eps=1e-6
    )
    save_model(folder, Model(args))
    save_config({**vars(args), "eos_token_id": 0, "bos_token_id": 1}, folder / "config.json")
    for name, text in byte_tokenizer_files().items():
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 3], "temperature": 0.5}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "a", "lstrip": false}}')
    return folder


def places(value):
    """(container, key) of everything inside a JSON value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed_json(content, rng):
    value = json.loads(content)
    for _ in range(rng.randint(1, 2)):
        inside, key = rng.choice(
            [place for place in places(value) if rng.random() < 0.5 or place[0] is value]
        )
        if rng.random() < 0.2 and isinstance(inside, dict):
            del inside[key]
        else:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
        if not value:
            break
    return json.dumps(value).encode()


def changed_bytes(content, rng, pieces):
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        # Half of the changes fall into the header.
        at = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 1000))
        if pieces:
            data[at : at + rng.randint(0, 3)] = rng.choice(PIECES)
        else:
            data[at] = rng.randrange(256)
    return bytes(data[: len(data) if rng.random() < 0.9 else rng.randrange(len(data))])


def use(folder):
    """What users do with a folder; whether it was taken."""
    taken = True
    try:
        model, tokenizer = mlx_pararnn.load(folder)
        list(Chat(model, tokenizer).respond("x", max_tokens=1))
    except PararnnError as error:
        taken, said = False, str(error)
        assert "\n" not in said
    for command in ("inspect", "verify"):
        result = CliRunner().invoke(app, [command, str(folder)])
        assert result.exit_code in (0, 1), (command, result.output, result.exception)
        assert "--debug" not in result.stderr, (command, result.stderr)
        assert result.exit_code == 0 or result.stdout or result.stderr.count("\n") == 1, result.output
    return taken


def use_changed(folder, name, first, count):
    """Use `folder` with the changes first..first+count of one file; says of each whether it was taken."""
    content = (folder / name).read_bytes()
    for seed in range(first, first + count):
        rng = random.Random(f"{name} {seed}")
        as_json = name.endswith(".json") and rng.random() < 0.7
        changed = (
            changed_json(content, rng) if as_json else changed_bytes(content, rng, name.endswith(".jinja"))
        )
        (folder / name).write_bytes(changed)
        signal.alarm(SECONDS)
        try:
            yield "taken" if use(folder) else "refused"
        finally:
            signal.alarm(0)
    (folder / name).write_bytes(content)


CHILD = """
import faulthandler, resource, signal, sys
from pathlib import Path
from tests.test_mutated_folders import MEMORY, use_changed
faulthandler.register(signal.SIGALRM, chain=True)
resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
for said in use_changed(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])):
    print(said, flush=True)
"""


def test_a_few_changes_of_every_file(tmp_path):
    def too_long(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    folder = small_model(tmp_path / "model")
    said = Counter(answer for name in FILES for answer in use_changed(folder, name, 0, 2))
    signal.signal(signal.SIGALRM, before)
    assert said.keys() == {"taken", "refused"}


@pytest.mark.large
@pytest.mark.parametrize("name", FILES)
def test_changes_of_one_file(name, tmp_path):
    """In a process of its own, which a signal ends if it takes too long, whatever native code does."""
    command = [sys.executable, "-c", CHILD, small_model(tmp_path / "model"), name, "0", str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True)
    # The tokenizers library prints lines of its own.
    said = Counter(line for line in done.stdout.splitlines() if line in ("taken", "refused"))
    assert done.returncode == 0, (said, (tmp_path / "model" / name).read_bytes()[:2000], done.stderr[-3000:])
    assert said.total() == COUNT
    assert said["refused"] * 100 >= FILES[name] * COUNT
