"""A Hugging Face tokenizer whose ids are the bytes of UTF-8: for models trained on raw bytes."""

import json
from typing import Any

BYTE_COUNT = 256


def byte_tokenizer_files() -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json: a byte-level BPE with 256 tokens in order and no merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        # In a sequence of one, MLX-LM decodes by the tokenizer itself. Its detokenizer for a plain ByteLevel
        # drops a first space and garbles byte 0.
        "decoder": {"type": "Sequence", "decoders": [byte_level]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_characters())},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _characters() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte.

    Bytes that Latin-1 prints stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    characters, others = [], 0
    for byte in range(BYTE_COUNT):
        characters.append(chr(byte if byte in printable else BYTE_COUNT + others))
        others += byte not in printable
    return characters
