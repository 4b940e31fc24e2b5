"""Writes what the Swift tests compare with: probabilities by MLX-LM, token ids by Hugging Face's tokenizers,
completions by this package.

    python swift/make_vectors.py

Run it in an environment with mlx-pararnn[test] and Python 3.11, whose Unicode (14) the characters are taken
from; the files in ParaRNNTests/Data come out the same each time.
"""

import json
import math
import random
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from mlx_pararnn.cache import RecurrentCache
from mlx_pararnn.completion import Completer

# isort: split
import mlx.core as mx
import mlx_lm.sample_utils as sampling
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "ParaRNNTests" / "Data"

# --- probabilities ------------------------------------------------------------------------------------------

VOCABULARY = 40
OPTIONS: list[dict[str, float]] = [
    {"temperature": 1},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 0.7, "topK": 5},
    {"temperature": 1.3, "topK": 1},
    {"temperature": 1, "topK": 1000},
    {"temperature": 1, "topP": 0.9},
    {"temperature": 0.8, "topP": 0.35},
    {"temperature": 1, "topP": 0.01},
    {"temperature": 1, "minP": 0.1},
    {"temperature": 1.7, "minP": 0.5},
    {"temperature": 1, "repetitionPenalty": 1.3},
    {"temperature": 1, "repetitionPenalty": 0.7},
    {"temperature": 0.9, "topP": 0.8, "minP": 0.05, "topK": 7, "repetitionPenalty": 1.2},
    {"temperature": 1.1, "topP": 0.95, "topK": 12},
    {"temperature": 0, "repetitionPenalty": 1.5},
    {"temperature": 0},
]


def probabilities(logits: list[float], recent: list[int], options: dict[str, float]) -> list[float]:
    """What MLX-LM's sampler draws from, caught where it draws; one 1 where it takes the likeliest token."""
    caught: list[mx.array] = []

    def categorical(logprobs: mx.array, temp: float) -> mx.array:
        caught.append(mx.softmax(logprobs * (1.0 / temp), axis=-1))
        return mx.argmax(logprobs, axis=-1)

    original, sampling.categorical_sampling = sampling.categorical_sampling, categorical  # type: ignore[assignment]
    try:
        top_k = int(options.get("topK", 0))
        sampler = sampling.make_sampler(
            options["temperature"],
            options.get("topP", 1.0),
            options.get("minP", 0.0),
            top_k=top_k if top_k < len(logits) else 0,
        )
        processors = sampling.make_logits_processors(repetition_penalty=options.get("repetitionPenalty"))
        scores = mx.array([logits])
        for processor in processors:
            scores = processor(mx.array(recent), scores)
        chosen = sampler(scores - mx.logsumexp(scores, axis=-1, keepdims=True))
    finally:
        sampling.categorical_sampling = original
    if caught:
        return [float(p) for p in np.array(caught[0])[0]]
    return [float(i == chosen.item()) for i in range(len(logits))]


def sampling_cases() -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    cases = []
    for options in OPTIONS:
        for scale in (1.0, 6.0):
            # in float16's steps, as a package gives them
            logits = [float(x) for x in (scale * rng.standard_normal(VOCABULARY)).astype(np.float16)]
            recent = [int(t) for t in rng.integers(0, VOCABULARY, 30)]
            cases.append(
                {
                    "options": options,
                    "logits": logits,
                    "recent": recent,
                    "probabilities": [float(f"{p:.8g}") for p in probabilities(logits, recent, options)],
                }
            )
    return cases


# --- tokenizers ---------------------------------------------------------------------------------------------

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def added(content: str, token: int, **flags: bool) -> dict[str, Any]:
    return {
        "id": token,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    } | flags


def template(*before: str, after: tuple[str, ...] = ()) -> dict[str, Any]:
    def piece(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    single = [*map(piece, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(piece, after)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]} for name, token in SPECIAL.items()
        },
    }


SIZE = 900
SPECIAL = {"<|begin|>": SIZE, "<|end|>": SIZE + 1}
SPECIALS = [added(name, token) for name, token in SPECIAL.items()]

# What real tokenizers put around the same vocabulary.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"pre_tokenizer": GPT2},
    "prefix space": {"pre_tokenizer": GPT2 | {"add_prefix_space": True}, "added_tokens": SPECIALS},
    "llama3": {
        "pre_tokenizer": sequence(split(LLAMA3), BYTES_ONLY),
        "post_processor": {
            "type": "Sequence",
            "processors": [GPT2 | {"use_regex": True}, template("<|begin|>", after=("<|end|>",))],
        },
        "added_tokens": SPECIALS,
        "ignore_merges": True,
    },
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence(split(QWEN2), BYTES_ONLY),
        "added_tokens": SPECIALS,
    },
    "removed": {"pre_tokenizer": sequence(split(LLAMA3, "Removed", True), BYTES_ONLY)},
    "digits": {
        "pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, GPT2),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]},
        "added_tokens": [
            added("<|begin|>", SIZE, lstrip=True),
            added("<|end|>", SIZE + 1, rstrip=True),
            added("<|", SIZE + 2, special=False, normalized=True),
        ],
    },
    "whole texts": {"pre_tokenizer": BYTES_ONLY},
    "roberta": {
        "pre_tokenizer": GPT2,
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": ["<|end|>", SIZE + 1],
            "cls": ["<|begin|>", SIZE],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        "added_tokens": SPECIALS,
    },
}

# Vocabularies of characters, as SentencePiece's are converted; the parts that models in use have.
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
SPACES_AGAIN = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def decoder(*steps: Any) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "decoders": [SPACES_AGAIN, {"type": "ByteFallback"}, {"type": "Fuse"}, *steps],
    }


def metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}


CHARACTER_VARIANTS: dict[str, dict[str, Any]] = {
    "llama2": {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
        "decoder": decoder(FIRST_SPACE),
    },
    "mistral": {"pre_tokenizer": metaspace("first", False), "decoder": decoder(FIRST_SPACE)},
    "gemma": {
        "normalizer": REPLACE,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "decoder": decoder(),
    },
    "words": {"pre_tokenizer": metaspace("always", True), "decoder": metaspace("always", True)},
    "unknown": {
        "pre_tokenizer": metaspace("never", True), "decoder": metaspace("never", True),
        "byte_fallback": False,
    },
}  # fmt: skip

# First and last code points of blocks of many scripts, letters and marks, digits, signs, spaces, emoji.
RANGES = [
    (0x20, 0x7E), (0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF),
    (0x400, 0x52F), (0x531, 0x58A), (0x591, 0x5F4), (0x600, 0x6FF), (0x700, 0x74F), (0x780, 0x7B1),
    (0x900, 0x97F), (0x980, 0x9FE), (0xA01, 0xA76), (0xA81, 0xAFF), (0xB01, 0xB77), (0xB82, 0xBFA),
    (0xC00, 0xC7F), (0xC80, 0xCF2), (0xD00, 0xD7F), (0xD81, 0xDF4), (0xE01, 0xE5B), (0xE81, 0xEDF),
    (0xF00, 0xFDA), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x139F), (0x13A0, 0x13FD),
    (0x1401, 0x167F), (0x16A0, 0x16F8), (0x1780, 0x17F9), (0x1800, 0x18AA), (0x1E00, 0x1FFE),
    (0x2000, 0x206F), (0x2070, 0x20BF), (0x2100, 0x21FF), (0x2200, 0x22FF), (0x2460, 0x24FF),
    (0x2C80, 0x2CFF), (0x2D30, 0x2D7F), (0x3000, 0x30FF), (0x3105, 0x312F), (0x3131, 0x318E),
    (0x4E00, 0x9FFF), (0x4E00, 0x9FFF), (0xA000, 0xA48C), (0xAC00, 0xD7A3), (0xF900, 0xFAFF),
    (0xFB00, 0xFDFF), (0xFE00, 0xFE0F), (0xFF01, 0xFFEE), (0x10000, 0x100FA), (0x10330, 0x1034A),
    (0x12000, 0x12399), (0x13000, 0x1342E), (0x1D400, 0x1D7FF), (0x1F300, 0x1F64F),
    (0x1F900, 0x1F9FF), (0x20000, 0x2A6DF),
]  # fmt: skip
SPACES = [" ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u0085", "\u000b", "\u3000", "\u2028", "\ufeff"]
BY_HAND = [
    "", " ", "  ", "\n", "\r\n\r\n", " \n x", "a  b   c", "trailing   ", "It's we'LL they'd 'tis can't",
    "x=1234567 3.14159e-10 0x1F", "e\u0301 \u00e9 \u1e9b\u0323 \ufb01", "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☺️",
    "\x00\x01\x1f\x7f", "<|begin|>hello<|end|>", "  <|begin|>  x  <|end|>  y",
    "<|begin|><|begin|> <|en|> <| <|end",
    "\ufffd \ufffe",
    "a" * 300, "ab" * 200, " " * 50 + "x", "\n" * 40, "日本語の文章です。混在 with English 123、です！",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n", "Ελληνικά ΟΔΟΣ Σίσυφος", "İstanbul ıI ſK",
]  # fmt: skip


def assigned(c: str) -> bool:
    return unicodedata.category(c) not in ("Cn", "Cs", "Co")


def strings(count: int) -> list[str]:
    rng = random.Random(11)

    def word() -> str:
        first, last = rng.choice(RANGES)
        characters: list[str] = []
        while len(characters) < rng.randint(1, 5):
            c = chr(rng.randint(first, last))
            if assigned(c):
                characters.append(c)
        return "".join(characters)

    texts = list(BY_HAND)
    while len(texts) < count:
        parts = [
            word() + rng.choice([*SPACES, "", "", "", ", ", "'s ", "12 "]) for _ in range(rng.randint(1, 4))
        ]
        texts.append("".join(parts))
    return texts


def fingerprint(tokens: list[int]) -> str:
    """FNV-1a, 32 bits, over the ids as four bytes each: thousands of them take little room."""
    value = 0x811C9DC5
    for token in tokens:
        for byte in token.to_bytes(4, "little"):
            value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"


def vocabulary(texts: list[str]) -> dict[str, Any]:
    """A tokenizer.json trained on some of the strings and on this repository's English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    english = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([english] * 3 + texts[::5], trainer)
    return json.loads(tokenizer.to_str())


def tokenizer_cases() -> dict[str, Any]:
    texts = strings(2500)
    base = vocabulary(texts)
    assert len(base["model"]["vocab"]) == SIZE
    variants = []
    for name, parts in VARIANTS.items():
        parts = dict(parts)
        whole = json.loads(json.dumps(base))
        whole["model"]["ignore_merges"] = parts.pop("ignore_merges", False)
        whole |= {"normalizer": None, "post_processor": None, "added_tokens": []} | parts
        tokenizer = Tokenizer.from_str(json.dumps(whole))
        ids = [tokenizer.encode(text).ids for text in texts]
        variants.append(
            {
                "name": name,
                "parts": {
                    k: whole[k] for k in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")
                },
                "ignore_merges": whole["model"]["ignore_merges"],
                "fingerprints": "".join(map(fingerprint, ids)),
                "by_hand": ids[: len(BY_HAND)],
                "decoded": [tokenizer.decode(i, skip_special_tokens=False) for i in ids[: len(BY_HAND)]],
            }
        )
    rng = random.Random(5)
    pieces = [[rng.randrange(SIZE) for _ in range(6)] for _ in range(200)]
    plain = Tokenizer.from_str(json.dumps(base))
    return {
        "tokenizer": base,
        "texts": texts,
        "variants": variants,
        "decoding": [{"ids": ids, "text": plain.decode(ids)} for ids in pieces],
    }


def character_vocabulary(texts: list[str]) -> dict[str, Any]:
    """A tokenizer.json whose merges are between characters; those that it lacks are written in bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<unk>", "<s>", "</s>", *names],
        limit_alphabet=300,
        show_progress=False,
    )
    english = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").splitlines()
    # Characters that are canonically equivalent, and have tokens of their own.
    tokenizer.train_from_iterator([*english * 3, "\u212b \u00c5 " * 200, *texts[::5]], trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] not in names]
    whole["added_tokens"][2]["rstrip"] = True
    whole["post_processor"] = template("<s>") | {
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    }
    return whole


def character_cases() -> dict[str, Any]:
    """On the texts of tokenizers.json."""
    texts = strings(2500)
    base = character_vocabulary(texts)
    variants = []
    for name, parts in CHARACTER_VARIANTS.items():
        parts = {"normalizer": None, "pre_tokenizer": None} | parts
        whole = json.loads(json.dumps(base))
        whole["model"]["byte_fallback"] = parts.pop("byte_fallback", True)
        whole |= parts
        tokenizer = Tokenizer.from_str(json.dumps(whole))
        ids = [tokenizer.encode(text).ids for text in texts]
        rng = random.Random(5)
        drawn = [[rng.randrange(len(base["model"]["vocab"])) for _ in range(8)] for _ in range(100)]
        drawn += [[3 + byte for byte in b"\xe2\x82\xacx\xe2\x82"], *ids[: len(BY_HAND)]]
        variants.append(
            {
                "name": name,
                "parts": parts,
                "byte_fallback": whole["model"]["byte_fallback"],
                "fingerprints": "".join(map(fingerprint, ids)),
                "by_hand": ids[: len(BY_HAND)],
                "decoding": [
                    {"ids": some, "text": tokenizer.decode(some, skip_special_tokens=False)} for some in drawn
                ],
            }
        )
    return {"tokenizer": base, "variants": variants}


# --- completions --------------------------------------------------------------------------------------------

END = SIZE  # the added token that ends a text, and goes before one


class HashModel:
    """The tests' stand-in for a package: a logit is a hash of the tokens before and its own."""

    args = SimpleNamespace(vocab_size=SIZE + 1, max_position_embeddings=None)

    def make_cache(self) -> list[RecurrentCache]:
        return [RecurrentCache()]

    def __call__(self, tokens: mx.array, cache: list[RecurrentCache]) -> mx.array:
        (row,) = np.array(tokens)
        value = 0 if cache[0][0] is None else int(cache[0][0].item())
        for token in row:
            value = ((value ^ (int(token) + 1)) * 0x9E3779B1 + (value >> 15)) % 2**32
        cache[0][0] = mx.array([[[value]]], mx.uint32)
        cache[0].advance(len(row))
        mixed = (value ^ (np.arange(1, SIZE + 2, dtype=np.uint64) * 0x85EBCA6B)) * 0xC2B2AE35 % 2**32
        return mx.array(((mixed >> 21) / 16).astype(np.float32))[None, None]


def typed_texts() -> list[str]:
    """The texts before a cursor: somebody types, takes back, jumps, pastes, changes what stands before."""
    chance = random.Random(4)
    text, place = "def f(x):\n    retu", 17
    texts = []
    for _ in range(80):
        texts.append(text[:place])
        action = chance.random()
        if action < 0.6:
            new = chance.choice(
                ["t", "i", "on", " the", "\n", "    ", "é", "日本", "👍", " Softwa", "(", "12", "'s"]
            )
            text, place = text[:place] + new + text[place:], place + len(new)
        elif action < 0.8:
            back = min(place, chance.choice([1, 1, 4]))
            text, place = text[: place - back] + text[place:], place - back
        elif action < 0.9:
            place = chance.randrange(len(text) + 1)
        elif place > 9:
            text, place = text[: place - 9] + "right" + text[place - 9 :], place + 5
    return texts


def completion_cases() -> list[dict[str, Any]]:
    whole = json.loads((DATA / "tokenizers.json").read_text(encoding="ascii"))["tokenizer"]
    whole["added_tokens"] = [added("<|x|>", END)]
    backend = Tokenizer.from_str(json.dumps(whole))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|x|>")
    completer = Completer(cast(Any, HashModel()), cast(Any, tokenizer))
    cases = []
    for prefix in typed_texts():
        found = completer.complete(prefix, max_tokens=3, max_lines=2, min_probability=0)
        pieces = [{"text": text, "probability": float(f"{p:.8g}")} for text, p in found.pieces]
        cases.append({"prefix": prefix, "pieces": pieces})
    return cases


def write(name: str, content: Any) -> None:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    (DATA / name).write_text(text + "\n", encoding="ascii")
    print(f"{name}: {len(text):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    assert math.isclose(sum(sampling_cases()[0]["probabilities"]), 1, rel_tol=1e-5)
    DATA.mkdir(exist_ok=True)
    write("sampling.json", sampling_cases())
    write("tokenizers.json", tokenizer_cases())
    write("characters.json", character_cases())
    write("completions.json", completion_cases())
