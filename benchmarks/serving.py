"""A server under load: 64 clients that stream for ten minutes, then 10,000 short requests; and a peer's.

python benchmarks/serving.py streaming|short [--minutes 10] [--requests 10000] [--alone] [--write]

The peer is MLX-LM's own server with its llama, as many parameters, the same tokenizer and OpenBLAS. It is
asked for a fifth of the time, and for a tenth of the requests, after ours, on the same machine. `streaming`
takes thirteen minutes, `short` some three. Server and clients share the machine's cores.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from machine import table, write_results
from models import Sizes, llama, parameters, pararnn

# isort: split
import mlx.core as mx
from mlx_lm.utils import save_config, save_model

from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files

SIZES = Sizes(512, 4, 256, 1408, 4)  # bytes are its tokens
CLIENTS, AT_ONCE = 64, 8
TURNS = 4  # of a conversation, each of which goes on from the one before
COMMAND = [sys.executable, "-m", "mlx_pararnn.cli.app"]


@dataclass
class Client:
    """What one client got."""

    tokens: int = 0
    requests: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token of each answer
    errors: list[str] = field(default_factory=list)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["streaming", "short"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--alone", action="store_true", help="our server only; written as serving-PART-alone")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "pararnn", Path(folder) / "llama"
        sizes = [write_model(path, make(sizes=SIZES)) for path, make in ((ours, pararnn), (theirs, llama))]
        servers = (
            ("`mlx-pararnn serve`", [*COMMAND, "serve", str(ours)], 1.0),
            (
                "`mlx_lm.server`, llama",
                [*COMMAND, "lm", "server", "--model", str(theirs), "--decode-concurrency", str(CLIENTS)],
                0.2 if args.part == "streaming" else 0.1,
            ),
        )
        columns = []
        servers = servers[: 1 if args.alone else None]
        for name, command, share in servers:
            print(f"== {name}", flush=True)
            with Running(command) as server:
                if args.part == "streaming":
                    columns.append(asyncio.run(stream(server, 60 * args.minutes * share)))
                else:
                    columns.append(asyncio.run(ask_shortly(server, int(args.requests * share))))
    header = ["", *(name for name, _, _ in servers)]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    models = (
        f"d = {SIZES.d}, {SIZES.layers} layers, {sizes[0] / 1e6:.1f}M and {sizes[1] / 1e6:.1f}M parameters"
    )
    what = (
        f"{CLIENTS} clients, each of which streams one answer of 32 to 128 tokens after the other, in "
        f"conversations of {TURNS} turns with 20 to 200 new tokens each"
        if args.part == "streaming"
        else f"Completions of 16 tokens after 24, not streamed, {AT_ONCE} at a time, a connection for each"
    )
    caption = (
        f"{what}. Random weights, {models}, float32, the likeliest tokens; clients on the same cores. "
        "Memory is RssAnon of the server's processes."
    )
    print(*table(header, rows), sep="\n")
    if args.write:
        write_results(f"serving-{args.part}{'-alone' * args.alone}", caption, header, rows)


def write_model(folder, model):
    """A folder, whose model says printable ASCII only, so that a character is a token; its parameters."""
    head = model.lm_head
    printable = (mx.arange(SIZES.vocabulary) >= 32) & (mx.arange(SIZES.vocabulary) < 127)
    head.weight = head.weight * printable[:, None]
    folder.mkdir()
    save_model(folder, model)
    config = {name: value for name, value in asdict(model.args).items() if value is not None}
    save_config(config | {"eos_token_id": 0}, folder / "config.json")
    for name, text in byte_tokenizer_files().items():
        (folder / name).write_text(text)
    return parameters(model)


class Running:
    """A server's process, once it has answered."""

    def __init__(self, command):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self):
        body = json.dumps(asked("warm up", 8, False)).encode()
        for _ in range(3000):
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request) as response:
                    response.read()
                return self
            except urllib.error.HTTPError as error:
                raise SystemExit(f"the server refuses: {error.read()!r}") from error
            except OSError:
                if self._process.poll() is not None:
                    raise SystemExit("the server has ended") from None
                time.sleep(0.1)
        raise SystemExit("the server does not answer")

    def __exit__(self, *error):
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def megabytes(self):
        """RssAnon of the process and of those that it started."""
        return sum(_resident(pid) for pid in _family(self._process.pid)) / 1024


def _family(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid, *(other for child in children.read_text().split() for other in _family(int(child)))]


def _resident(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    return 0


def asked(prompt, tokens, stream):
    return {
        "model": "default_model",
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": stream,
        "temperature": 0,
    }


async def stream(server, seconds):
    """All clients at once, for so long."""
    clients = [Client() for _ in range(CLIENTS)]
    begin = time.monotonic()
    tasks = [
        asyncio.create_task(converse(server.port, client, random.Random(n), begin + seconds))
        for n, client in enumerate(clients)
    ]
    memory = []
    while (passed := time.monotonic() - begin) < seconds:
        memory.append((passed, server.megabytes()))
        await asyncio.sleep(min(2, seconds - passed))
    memory.append((seconds, server.megabytes()))
    await asyncio.gather(*tasks)
    rates = sorted(client.tokens / seconds for client in clients)
    first = [value for client in clients for value in client.first]
    errors = [error for client in clients for error in client.errors]
    print(*sorted(set(errors))[:5], sep="\n")
    half = (
        [m for t, m in memory if seconds / 5 <= t < 3 * seconds / 5],
        [m for t, m in memory if t >= 3 * seconds / 5],
    )
    return {
        "minutes": f"{seconds / 60:.1f}",
        "answers": sum(client.requests for client in clients),
        "errors": len(errors),
        "tokens/s, all clients": f"{sum(rates):.0f}",
        "tokens/s, median client": f"{statistics.median(rates):.2f}",
        "tokens/s, slowest client": f"{rates[0]:.2f}",
        "median over slowest": f"{statistics.median(rates) / max(rates[0], 1e-9):.2f}",
        "first token, p50": f"{percentile(first, 50):.2f} s",
        "first token, p99": f"{percentile(first, 99):.2f} s",
        "memory after a fifth of the time": f"{half[0][0]:.0f} MB",
        "largest until three fifths": f"{max(half[0]):.0f} MB",
        "largest in the last two fifths": f"{max(half[1]):.0f} MB",
    }


async def converse(port, client, chance, end):
    """Conversations one after the other, until the time is over."""
    text = ""
    while time.monotonic() < end:
        if client.requests % TURNS == 0:
            text = ""
        text += "".join(chance.choices("abcdefgh \n", k=chance.randint(20, 200)))
        try:
            async for piece in answer(port, asked(text, chance.randint(32, 128), True), client, end):
                text += piece
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            client.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.5)


async def answer(port, body, client, end):
    """The pieces of a streamed answer; one that the end of the time cuts short counts up to there."""
    begin, begun = time.monotonic(), False
    reader, writer = await send(port, body)
    try:
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                if line.startswith(b"data: [DONE]"):
                    client.requests += 1
                    return
                continue
            choice = json.loads(line[6:])["choices"][0]
            now = time.monotonic()
            if now >= end:
                return
            if choice["text"]:
                if not begun:
                    client.first.append(now - begin)
                begun = True
                client.tokens += len(choice["text"])
                yield choice["text"]
        raise ValueError("the answer ended early")
    finally:
        writer.close()


async def send(port, body):
    """What answers, after its head; ValueError where that is no 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    content = json.dumps(body).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
    )
    status = await reader.readline()
    if status.split()[1:2] != [b"200"]:
        writer.close()
        raise ValueError(f"status {status!r}")
    while (await reader.readline()).strip():
        pass
    return reader, writer


async def ask_shortly(server, requests):
    """So many short completions."""
    chance, left, seconds, errors = random.Random(0), iter(range(requests)), [], []
    before = server.megabytes()

    async def work():
        for _ in left:
            begin = time.monotonic()
            try:
                reader, writer = await send(
                    server.port, asked("".join(chance.choices("abcdefgh ", k=24)), 16, False)
                )
                said = await reader.read()
                writer.close()
                if (
                    len(json.loads(said[said.index(b"{") : said.rindex(b"}") + 1])["choices"][0]["text"])
                    != 16
                ):
                    raise ValueError("not 16 tokens")
                seconds.append(time.monotonic() - begin)
            except (OSError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")

    begin = time.monotonic()
    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    took = time.monotonic() - begin
    print(*sorted(set(errors))[:5], sep="\n")
    return {
        "requests": requests,
        "errors": len(errors),
        "requests/s": f"{requests / took:.1f}",
        "a request, p50": f"{percentile(seconds, 50) * 1e3:.0f} ms",
        "a request, p99": f"{percentile(seconds, 99) * 1e3:.0f} ms",
        "memory before": f"{before:.0f} MB",
        "memory after": f"{server.megabytes():.0f} MB",
    }


def percentile(values, part):
    return sorted(values)[min(len(values) - 1, len(values) * part // 100)] if values else float("nan")


if __name__ == "__main__":
    main()
