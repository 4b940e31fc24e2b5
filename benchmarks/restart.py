"""Time to the first token of a long prompt after a restart: with saved states and without.

python benchmarks/restart.py [--tokens 2000] [--write]      about a minute
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

from machine import table, write_results
from models import pararnn

# isort: split
from mlx_lm.utils import save_config, save_model

from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2000, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, states = Path(folder) / "model", Path(folder) / "states"
        write_model(model)
        rows = []
        saving = ["--prompt-cache-dir", str(states)]
        for name, options in (("without", []), ("with --prompt-cache-dir", saving)):
            ask(model, args.tokens, options)  # the server before the restart
            runs = [ask(model, args.tokens, options) for _ in range(args.repeats)]
            seconds, cached = statistics.median(run[0] for run in runs), runs[0][1]
            rows.append([name, f"{seconds * 1e3:.0f} ms", cached])
    header = ["after a restart", "first token", "tokens that were not read again"]
    caption = (
        f"The same prompt of {args.tokens} tokens; d = 1024, 4 layers, float32; median of {args.repeats}"
    )
    print(*table(header, rows), sep="\n")
    if args.write:
        write_results("restart", caption, header, rows)


def write_model(folder):
    model = pararnn()
    save_model(folder, model)
    save_config(asdict(model.args) | {"eos_token_id": 0}, folder / "config.json")
    for name, text in byte_tokenizer_files().items():
        (folder / name).write_text(text)


def ask(model, tokens, options):
    """Seconds to the first token by a fresh server, and how much of the prompt it had."""
    command = [sys.executable, "-m", "mlx_pararnn.cli.app", "serve", str(model), "--port", "0", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = next(line for line in server.stderr if "Serving at" in line).split()[2]
        post(url, [5, 6], 1)  # what is compiled and loaded at first use
        begin = time.perf_counter()
        usage = post(url, [n * 7919 % 251 + 1 for n in range(tokens)], 1)["usage"]
        return time.perf_counter() - begin, usage["prompt_tokens_details"]["cached_tokens"]
    finally:
        server.terminate()
        server.wait()


def post(url, prompt, max_tokens):
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode()
    with urllib.request.urlopen(f"{url}/v1/completions", body) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
