"""A stand-in for a model that uses tools: it makes the tokens of a script, and records what it is fed."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.pocket.protocol import Protocol, find_protocol, tokenizer_files


@lru_cache
def tools_tokenizer() -> TokenizerWrapper:
    backend = Tokenizer.from_str(tokenizer_files()["tokenizer.json"])
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"))


@lru_cache
def tools_protocol() -> Protocol:
    protocol = find_protocol(tools_tokenizer())
    assert protocol is not None
    return protocol


def tokens_of(script: str) -> list[int]:
    """The tokens of a text in which special tokens are written by their names."""
    tokens: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", script):
        special = re.fullmatch(r"<\|\w+\|>", part)
        tokens += [tools_tokenizer().convert_tokens_to_ids(part)] if special else list(part.encode())
    return tokens


class Script:
    """A source of tokens for the loop; after the script's end it repeats its last token."""

    vocab_size = 278

    def __init__(self, script: str | Sequence[int]) -> None:
        self.tokens = tokens_of(script) if isinstance(script, str) else list(script)
        self.made = 0
        self.taken: list[int] = []

    def read(self, tokens: Sequence[int]) -> None:
        self.taken += tokens

    def choose(self, allowed: np.ndarray) -> int:
        assert allowed.shape == (self.vocab_size,)
        token = self.tokens[min(self.made, len(self.tokens) - 1)]
        self.made += 1
        return token


def tools_folder(folder: Path, **changes: Any) -> Path:
    """A model folder that speaks the protocol, with random weights."""
    args = ModelArgs(
        cell="gru", hidden_size=32, num_hidden_layers=2, num_heads=2, intermediate_size=32,
        vocab_size=Script.vocab_size, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    mx.random.seed(4)
    save_model(folder, Model(args))
    save_config(asdict(args) | {"eos_token_id": tools_protocol().end}, folder / "config.json")
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def as_recorded(event):
    """An event of a turn as the records for other languages have it: all but how long it took."""
    fields = {name: value for name, value in vars(event).items() if name != "seconds"}
    if "command" in fields:
        fields["command"] = fields["command"].name
    return {"event": type(event).__name__, **fields}
