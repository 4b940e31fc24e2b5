"""Feeds an exported folder as docs/coreml.md tells an app to: prefill in chunks, then token by token."""

import json
from pathlib import Path

import numpy as np

from tests.support.coreml.interpreter import Package


class Runner:
    """One sequence read by the package of an exported folder.

    Attributes:
        info: pararnn.json.
        package: the package.
        position: tokens read so far.
        predictions: those made so far: the function's name, its inputs and its outputs.
    """

    def __init__(self, folder, mode="float16", package=None):
        folder = Path(folder)
        self.info = json.loads((folder / "pararnn.json").read_text())
        self.package = package or Package(folder / self.info["package"])
        self._functions = {name: self.package.function(name, mode) for name in self.info["functions"]}
        self.reset()

    def reset(self):
        self.position, self.predictions = 0, []
        self._passed = {}
        self.state = self._functions["decode"].new_state()
        if self.info["state"] == "io":
            self.state = self._passed = {
                s["name"]: np.zeros(s["shape"], s["dtype"]) for s in self.info["states"]
            }

    def call(self, name, tokens):
        """One prediction; returns the logits (vocab_size,), or the token with --argmax."""
        inputs = {"tokens": np.array([tokens], np.int32)}
        if self.info["max_position_embeddings"] is not None:
            inputs["position"] = np.array([self.position], np.int32)
        count = 1 if name == "decode" else self.info.get("parts", 1)
        for part in [name] if count == 1 else [f"{name}_part_{n}" for n in range(1, count + 1)]:
            inputs |= self._passed
            outputs = self._functions[part](inputs, {} if self._passed else self.state)
            self.predictions.append((part, inputs, outputs))
            if self._passed:
                self.state = self._passed = {key: outputs[f"{key}_out"] for key in self._passed}
            inputs = {"hidden": outputs.get("hidden_out")}
        self.position += len(tokens)
        y = outputs[self.info["output"]]
        if self.info["output"] == "token":
            return int(y.item())
        return y[0, 0]

    def read(self, tokens):
        """A whole piece of text; returns what the last call gave."""
        tokens, result = [int(t) for t in tokens], None
        while tokens:  # by the largest that fits
            fitting = {n: name for name, n in self.info["chunks"].items() if n <= len(tokens)}
            count = max(fitting, default=1)
            result = self.call(fitting.get(count, "decode"), tokens[:count])
            tokens = tokens[count:]
        return result

    def decode(self, tokens):
        """Token by token; returns all logits (T, vocab_size)."""
        return np.stack([self.call("decode", [int(t)]) for t in tokens])

    def generate(self, prompt, count):
        """The greedy continuation."""
        result, tokens = self.read(prompt), []
        while True:
            tokens.append(result if self.info["output"] == "token" else int(np.argmax(result)))
            if len(tokens) == count:
                return tokens
            result = self.call("decode", tokens[-1:])
