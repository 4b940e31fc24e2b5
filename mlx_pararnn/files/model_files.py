"""The small files of a model folder: their names, and how those that others made are opened.

A file may be a pipe or a device, which would wait for ever, and a small JSON text may unfold into gigabytes.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import PararnnError

# What a tokenizer is made of; of a model folder's other text files none is copied or fetched for it.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
# Any one of these holds its tokens.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

_TOKENS_OF_USE = {"bos_token", "eos_token", "unk_token", "pad_token"}
# What transformers calls a tokenizer that it reads from tokenizer.json as it stands.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# It makes this one of tokenizer.json's vocabulary and merges, and of what `_is_neox` asks for.
_NEOX_CLASSES = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
_NEOX_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | {
    "pad_token": "<|padding|>"
}
_NEOX_SETTINGS = {"add_prefix_space", "trim_offsets", "errors", "add_bos_token", "add_eos_token"}
_LFS_POINTER = b"version https://git-lfs"
# Of files that MLX-LM and transformers open.
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
# The largest tokenizer.json in use are a third of these.
_MAX_JSON_BYTES = 64 << 20
_MAX_JSON_ENTRIES = 3_000_000
# Of a safetensors header, in which a model of 100,000 tensors has a third of these.
MAX_HEADER_BYTES = 32 << 20
MAX_HEADER_ITEMS = 3_000_000
_MAX_TEMPLATE_BYTES = 1 << 20


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without waiting for anything.

    Raises:
        PararnnError: it is a folder, a pipe, a device or a socket, or may not be read.
        FileNotFoundError: there is nothing there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PararnnError(f"{path} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return open(descriptor, "rb")


def check_safetensors(path: Path) -> None:
    """Refuse what a library would wait for, or unfold into gigabytes: safetensors' own limit is 100 MB.

    Raises:
        PararnnError: it is not a regular file, or its header is larger than any model's.
        FileNotFoundError: there is nothing there.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:  # damaged: what reads the file next says so
            return
        header = file.read(min(length, MAX_HEADER_BYTES))
    if length > MAX_HEADER_BYTES or json_entries(header) > MAX_HEADER_ITEMS:
        raise PararnnError(
            f"{path} cannot be read: its header is larger than any model's ({MAX_HEADER_BYTES >> 20} MB, "
            f"{MAX_HEADER_ITEMS:,} entries at most)"
        )


def check_files(folder: Path) -> None:
    """Refuse what would keep a library waiting, or be read as something else.

    Raises:
        PararnnError: where a library may look for a file of its own accord there is a pipe, a device, a link
            to nothing, or a pointer of Git LFS.
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.suffix not in _SUFFIXES or path.is_dir():
            continue
        if not path.exists():
            raise PararnnError(
                f"{path} is a link to a file that is not there; copy or download the folder again"
            )
        if not path.is_file():
            raise _not_regular(path)
        if path.stat().st_size < 1024 and _begins_as_pointer(path):
            raise PararnnError(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")


def _begins_as_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:  # what reads the file next says so
        return False


def check_json(path: Path) -> None:
    """Raise PararnnError for a JSON file, if it is there, that `read_json` would not parse for its size."""
    if path.is_file():
        _read(path)


def read_json(path: Path) -> Any:
    """What the JSON file at `path` says.

    Raises:
        PararnnError: it is not a regular file, too large, or not valid JSON.
        FileNotFoundError: there is nothing there.
    """
    try:
        return json.loads(_read(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, PararnnError):
            raise
        raise PararnnError(
            f"{path} cannot be read: not valid JSON ({' '.join(str(error).split())})"
        ) from error


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PararnnError(f"{path} cannot be read ({error.strerror})") from error
    if len(text) > _MAX_JSON_BYTES or json_entries(text) > _MAX_JSON_ENTRIES:
        raise PararnnError(
            f"{path} cannot be read: larger than any model's ({_MAX_JSON_BYTES >> 20} MB, "
            f"{_MAX_JSON_ENTRIES:,} entries at most); put the model's own file there"
        )
    return text


def has_plain_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is its tokenizer.json and at most a chat template: no class or tokens besides.

    What tokenizer_config.json and special_tokens_map.json say of tokens, tokenizer.json says too: those that
    have a use are special tokens there. What cannot be read is not plain.
    """
    others = ("added_tokens.json", "chat_template.json", "additional_chat_templates")
    if any((folder / name).exists() for name in others):
        return False
    template = folder / "chat_template.jinja"
    try:
        config = read_json(folder / "tokenizer_config.json")
        tokenizer = read_json(folder / "tokenizer.json")
        has_map = (folder / "special_tokens_map.json").exists()
        named = read_json(folder / "special_tokens_map.json") if has_map else None
        if template.exists() and template.stat().st_size > _MAX_TEMPLATE_BYTES:
            return False
    except (PararnnError, OSError):
        return False
    if not isinstance(config, dict) or not isinstance(tokenizer, dict):
        return False
    neox = config.get("tokenizer_class") in _NEOX_CLASSES
    known = {
        *("tokenizer_class", "clean_up_tokenization_spaces", "model_max_length", "backend", "is_local"),
        *("local_files_only", "name_or_path", "special_tokens_map_file"),
        *("chat_template", "added_tokens_decoder", *_TOKENS_OF_USE),
        *(_NEOX_SETTINGS if neox else ()),
    }
    added = _by_id(tokenizer.get("added_tokens"))
    if config.keys() - known or added is None or config.get("added_tokens_decoder", added) != added:
        return False
    special = [token["content"] for token in added.values() if token.get("special") is True]
    uses = _tokens_of_use(config)
    told = _TOKENS_OF_USE & config.keys()
    if neox and config.get("pad_token") is None:  # as gpt-neox-20b has it: there is none
        told -= {"pad_token"}
    return (
        (_is_neox(config, tokenizer) if neox else _is_as_it_stands(config))
        and config.get("backend", "tokenizers") == "tokenizers"
        and isinstance(config.get("chat_template"), str | None)
        and uses.keys() >= told
        and all(token in special for token in uses.values())
        and (named is None or (isinstance(named, dict) and _names_no_other(named, uses, neox)))
        and tokenizer.get("truncation") is None
        and tokenizer.get("padding") is None
    )


def _is_as_it_stands(config: dict[str, Any]) -> bool:
    cleans = config.get("clean_up_tokenization_spaces", False)
    return config.get("tokenizer_class") in _PLAIN_CLASSES and cleans is False


def _is_neox(config: dict[str, Any], tokenizer: dict[str, Any]) -> bool:
    """Whether tokenizer.json has what the class has of its own: normalizer, pre-tokenizer, decoder.

    Spaces are never cleaned up of BPE, whatever the configuration says.
    """
    parts: list[Any] = [
        tokenizer.get(name) for name in ("model", "pre_tokenizer", "decoder", "post_processor")
    ]
    if parts[-1] is None:
        parts[-1] = {"type": "ByteLevel"}
    if not all(isinstance(part, dict) for part in parts):
        return False
    model, before, decoder, after = parts
    others = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk")
    return (
        tokenizer.get("normalizer") == {"type": "NFC"}
        and before.get("type") == decoder.get("type") == "ByteLevel"
        and not before.get("add_prefix_space")
        and before.get("use_regex", True) is True
        and model.get("type") == "BPE"
        and not any(model.get(name) for name in (*others, "byte_fallback", "ignore_merges"))
        and (after.get("type") == "ByteLevel" or after.get("special_tokens") == {})
        and not any(config.get(name) for name in ("add_prefix_space", "add_bos_token", "add_eos_token"))
        and config.get("errors", "replace") == "replace"
    )


def _names_no_other(named: dict[str, Any], uses: dict[str, str], neox: bool) -> bool:
    """Whether special_tokens_map.json says of tokens what is known; of this class it may say less."""
    texts = _texts(named)
    return texts == uses or (neox and all(uses.get(name) == text for name, text in texts.items()))


def plain_tokenizer_parts(folder: Path) -> tuple[dict[str, str], str | None]:
    """Of a plain tokenizer its tokens by what they are for, as "eos_token", and its chat template or None."""
    config = read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    return _tokens_of_use(config), template


def _tokens_of_use(config: dict[str, Any]) -> dict[str, str]:
    of_class = _NEOX_TOKENS if config.get("tokenizer_class") in _NEOX_CLASSES else {}
    return {
        name: token
        for name, token in {**of_class, **config}.items()
        if name in _TOKENS_OF_USE and isinstance(token, str)
    }


def _texts(tokens: dict[str, Any]) -> dict[str, Any]:
    """The texts of tokens, which are texts or objects that have one."""
    return {
        name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()
    }


def _by_id(added: Any) -> dict[str, dict[str, Any]] | None:
    """A tokenizer.json's added tokens, as tokenizer_config.json lists them; None if they are not such."""
    if not isinstance(added, list):
        return {} if added is None else None
    tokens = [token for token in added if isinstance(token, dict) and isinstance(token.get("content"), str)]
    if len(tokens) < len(added):
        return None
    return {str(token.get("id")): {k: v for k, v in token.items() if k != "id"} for token in tokens}


def _not_regular(path: Path) -> PararnnError:
    return PararnnError(
        f"{path} cannot be read: not a regular file (a folder, a pipe or a device); put a copy of the "
        "file there"
    )


def json_entries(text: bytes) -> int:
    """At most so many values stand in a JSON text: each but the first follows one of these characters."""
    return sum(text.count(mark) for mark in (b",", b"[", b"{", b":"))


def disk_bytes(path: Path) -> int:
    """Size of a file, or of all files below a folder; 0 where there is none."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
