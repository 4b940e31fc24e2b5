"""Records what a package answers, call by call, for a runner's tests on machines without Core ML.

python -m tests.support.coreml.record_transcript OUT TRANSCRIPT.json [--prompt TEXT] [--tokens N]

OUT is what `mlx-pararnn convert ... --to coreml` wrote, with a tokenizer. The transcript is JSON:

* `settings`: pararnn.json; `prompt`, `prompt_tokens`; `tokens`, `text`: the greedy continuation (of equal
  logits the first);
* `predictions`: in order, each with `function`, `inputs` and `outputs` by name. Token ids and positions are
  lists, logits are numbers with the five digits that give a float16 back. With `--state io` the states are
  {"base64", "shape", "dtype"}, little-endian, as outputs only: a call's state inputs are the call before's
  outputs, and zeros at first.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tests.support.coreml.runner import Runner

PROMPT = "class Reader:\n    def read(self, size=None):\n        if size is "
SURE = 0.5  # how far the likeliest logit leads at every token: other processors, in float16, choose the same


def transcript(folder: Path, prompt: str = PROMPT, count: int = 32) -> dict:
    """Read `prompt` and continue it by `count` tokens, in float16 as the program says.

    Raises:
        SystemExit: a runner on another processor may choose otherwise.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    runner = Runner(folder)
    tokens = runner.generate(prompt_tokens, count)
    for token, (_, _, outputs) in zip(tokens, runner.predictions[-count:], strict=True):
        second, first = np.sort(outputs["logits"].ravel())[-2:]
        if first - second <= SURE:
            sys.exit(
                f"{prompt!r}: {tokenizer.decode([token])!r} leads by {first - second:.2g} only, and {SURE} "
                "tells processors from errors; take another prompt, or fewer tokens"
            )
    states = {s["name"]: s["dtype"] for s in runner.info["states"]}

    def plain(name, array):
        if name == "logits":
            return [float(f"{x:.5g}") for x in array.ravel()]
        dtype = states.get(name.removesuffix("_out"))
        if dtype is None:
            return array.ravel().tolist()
        data = base64.b64encode(array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()).decode()
        return {"base64": data, "shape": list(array.shape), "dtype": dtype}

    return {
        "settings": runner.info,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "predictions": [
            {
                "function": name,
                "inputs": {k: plain(k, v) for k, v in inputs.items() if k not in states},
                "outputs": {k: plain(k, v) for k, v in outputs.items()},
            }
            for name, inputs, outputs in runner.predictions
        ],
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Record what a Core ML package answers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("transcript", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    recorded = transcript(given.folder, given.prompt, given.tokens)
    given.transcript.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")
    print(f"{given.transcript}: {len(recorded['predictions'])} predictions, continues {recorded['text']!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
