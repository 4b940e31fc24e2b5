"""The serve command in a process of its own, and models for it, for the tests of server and page."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import mlx.core as mx
import openai
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer

import mlx_pararnn
from mlx_pararnn import Model, ModelArgs
from tests.support.demo import DEMO

MOST = 300  # tokens that the tests' server gives at most
KEY = "a-key-of-ours"
PAGE_ORIGIN = "app://obsidian.md"  # that it lets in
COMMAND = [sys.executable, "-m", "mlx_pararnn.cli.app", "serve"]


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def folder_of(path, model, tokenizer=DEMO, **config):
    """A model folder: weights, config, and the tokenizer files of another."""
    path.mkdir()
    for file in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(file, path)
    (path / "generation_config.json").write_text('{"do_sample": false}')  # the likeliest tokens
    save_model(path, model)
    save_config({**asdict(model.args), **config}, path / "config.json")
    return path


def demo_in_float32(path):
    """The bundled model without float16's rounding, by which a row differs from the same row in a batch."""
    model, _ = mlx_pararnn.load(DEMO)
    model.set_dtype(mx.float32)
    return folder_of(path, model)


def calling_model(path):
    """The folder of a model without sense, bytes for tokens, a template with calls of tools in JSON."""
    words = shutil.copytree(DEMO, path.with_name("words"))
    tokenizer = Tokenizer.from_file(str(words / "tokenizer.json"))
    assert tokenizer.add_tokens(["<tool_call>", "</tool_call>"]) == 2
    tokenizer.save(str(words / "tokenizer.json"))
    mx.random.seed(0)
    folder_of(path, Model(ModelArgs(16, 1, 258, 16)), words, eos_token_id=None)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% for tool_call in m.tool_calls or [] %}<tool_call>"
        "{{ tool_call.name }}</tool_call>{% endfor %}{% endfor %}{% if tools %}tools{% endif %}"
    )
    return path


class Server:
    """`mlx-pararnn serve` on a free port."""

    def __init__(self, *args):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - no pipe, which a line for each request would fill
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, args), "--port", "0"],
            stderr=self.log,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.url = self.wait_for(r"Serving at (http://\S+)").group(1)

    def wait_for(self, pattern, seconds=120):
        deadline = time.monotonic() + seconds
        while True:
            left = self.process.poll() is not None
            if match := re.search(pattern, self.said):
                return match
            assert not left, f"the server has left: {self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    @property
    def said(self):
        """All that is on its stderr so far."""
        return os.pread(self.log.fileno(), 1 << 24, 0).decode(errors="replace")

    def stop(self, number=signal.SIGINT):
        """Exit code and the last words."""
        self.process.send_signal(number)
        self.process.wait(timeout=60)
        return self.process.returncode, self.said


def client_of(server, key="any"):
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


@contextmanager
def running(*args):
    server = Server(*args)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        server.log.close()


def request(server, method, path, body=None, **headers):
    """Status, headers and body of a request with nothing added to it."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, content, headers)
    response = connection.getresponse()
    try:
        return response.status, response.headers, response.read()
    finally:
        connection.close()
