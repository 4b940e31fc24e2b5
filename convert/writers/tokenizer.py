"""The tokenizer files of a model folder: found, checked against the vocabulary, copied or made."""

import json
import shutil
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.hub import download, is_hub_name
from mlx_pararnn.files.model_files import TOKENIZER_FILES, VOCABULARY_FILES

from ..readers.forms import read_json_object
from ..readers.links import check_link
from ..readers.wording import shown
from .byte_tokenizer import BYTE_COUNT, byte_tokenizer_files

_GENERATION = "generation_config.json"
_SETTINGS = "tokenizer_config.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
_CHOICES = "pass --tokenizer with a folder, a Hugging Face name, bytes (byte-level models) or none (ids only)"


@dataclass
class TokenizerFiles:
    """What goes into the model folder: files to copy, texts to write, and token ids for config.json."""

    copies: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    token_ids: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Copy or write them all into `folder`."""
        for name, path in self.copies.items():
            shutil.copyfile(path, folder / name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def prepare_tokenizer(
    choice: str | Path | None, beside: Path, vocab_size: int, given_ids: dict[str, Any]
) -> TokenizerFiles:
    """The files that `choice` stands for; None means those in `beside`, the checkpoint's folder.

    `given_ids` (from --config) go before the end and start ids that the source's own files name.

    Raises:
        PararnnError: there is no tokenizer, it cannot be had, or it does not fit `vocab_size`.
    """
    match choice:
        case None:
            files = _from_folder(beside)
            if not _has_vocabulary(files):
                raise PararnnError(f"{beside}: no tokenizer files beside the checkpoint; {_CHOICES}")
        case "none":
            files = TokenizerFiles()
        case "bytes":
            if vocab_size < BYTE_COUNT:
                raise PararnnError(
                    f"--tokenizer bytes needs a vocabulary of at least {BYTE_COUNT}, the model's is "
                    f"{vocab_size}"
                )
            files = TokenizerFiles(texts=byte_tokenizer_files())
        case _:
            folder = _folder_of(choice)
            files = _from_folder(folder)
            if not _has_vocabulary(files):
                raise PararnnError(f"{choice}: no tokenizer files there ({', '.join(VOCABULARY_FILES)})")
    own_generation = beside / _GENERATION
    if own_generation.is_file():
        check_link(own_generation, beside)
        files.copies[_GENERATION] = own_generation
    _check_size(files.copies, vocab_size, choice or beside)
    files.token_ids = _token_ids(files.copies, beside, given_ids, vocab_size)
    if files.token_ids and _GENERATION not in files.copies:
        files.texts[_GENERATION] = _json_text(files.token_ids)
    _leave_out_python(files)
    return files


def is_token_ids(value: Any) -> bool:
    """A token id or a list of them."""
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(type(token) is int and token >= 0 for token in ids)


def _from_folder(folder: Path) -> TokenizerFiles:
    copies = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    for path in copies.values():
        check_link(path, folder)
    return TokenizerFiles(copies=copies)


def _leave_out_python(files: TokenizerFiles) -> None:
    """Take auto_map out of the tokenizer's settings: the Python that it names is neither copied nor run."""
    path = files.copies.get(_SETTINGS)
    settings = (read_json_object(path) or {}) if path else {}
    if path is None or "auto_map" not in settings:
        return
    del settings["auto_map"]
    if "tokenizer.json" not in files.copies:
        import transformers

        name = settings.get("tokenizer_class")
        if not isinstance(name, str) or not hasattr(transformers, name):
            raise PararnnError(
                f"{path}: the tokenizer is Python code ({shown(str(name))}), which is never run; pass "
                "--tokenizer with a folder that has its tokenizer.json"
            )
    del files.copies[_SETTINGS]
    files.texts[_SETTINGS] = _json_text(settings)


def _has_vocabulary(files: TokenizerFiles) -> bool:
    return any(name in files.copies for name in VOCABULARY_FILES)


def _folder_of(choice: str | Path) -> Path:
    folder = Path(choice)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise PararnnError(
            f"{choice}: --tokenizer takes the folder that holds the tokenizer files, not a file"
        )
    if meant := get_close_matches(str(choice), ("bytes", "none"), 1, 0.7):
        raise PararnnError(f"--tokenizer {choice}: there is no such folder; did you mean {meant[0]}?")
    if not isinstance(choice, str) or not is_hub_name(choice):
        raise PararnnError(f"{choice}: no such folder; {_CHOICES}")
    return download(choice, TOKENIZER_FILES, _CHOICES)


def _check_size(copies: dict[str, Path], vocab_size: int, where: str | Path) -> None:
    largest = max(_vocabulary(copies).values(), default=-1)
    if largest >= vocab_size:
        raise PararnnError(
            f"{where}: the tokenizer has more tokens than the model (largest id {largest}, the model's "
            f"vocabulary is {vocab_size}); pass the tokenizer that the model was trained with"
        )


def _vocabulary(copies: dict[str, Path]) -> dict[str, int]:
    """Token -> id, as the tokenizer's files say it."""
    entries: dict[str, Any] = {}
    if path := copies.get("tokenizer.json"):
        content = read_json_object(path) or {}
        model = content.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, dict):
            entries |= vocab
        elif isinstance(vocab, list):
            entries |= {
                str(item[0]): id_ for id_, item in enumerate(vocab) if isinstance(item, list) and item
            }
        added = content.get("added_tokens")
        for item in added if isinstance(added, list) else []:
            if isinstance(item, dict):
                entries[str(item.get("content"))] = item.get("id")
    else:
        if model := _sentencepiece(copies):
            entries |= {model.id_to_piece(id_): id_ for id_ in range(model.get_piece_size())}
        for name in ("vocab.json", "added_tokens.json"):
            if name in copies:
                entries |= read_json_object(copies[name]) or {}
    return {token: id_ for token, id_ in entries.items() if type(id_) is int}


def _token_ids(
    copies: dict[str, Path], beside: Path, given: dict[str, Any], vocab_size: int
) -> dict[str, Any]:
    """eos_token_id and bos_token_id: from --config, else config.json, generation settings, its tokenizer."""
    generation = read_json_object(copies[_GENERATION]) if _GENERATION in copies else None
    sources = [given, read_json_object(beside / "config.json"), generation, _named_ids(copies)]
    found: dict[str, Any] = {}
    for key in ("eos_token_id", "bos_token_id"):
        value = next((ids[key] for ids in sources if ids and is_token_ids(ids.get(key))), None)
        if value is None:
            continue
        if max(value if isinstance(value, list) else [value]) >= vocab_size:
            raise PararnnError(
                f"{beside}: {key} {shown(str(value))} is outside the model's vocabulary of {vocab_size}; "
                f'pass --config with a file that says {{"{key}": ...}}'
            )
        found[key] = value
    return found


def _named_ids(copies: dict[str, Path]) -> dict[str, Any]:
    """The ids of the tokens that the tokenizer's own files call the end and the start of a text."""
    vocabulary = _vocabulary(copies)
    found: dict[str, Any] = {}
    for key in ("eos_token", "bos_token"):
        for name in (_SETTINGS, "special_tokens_map.json"):
            token = (read_json_object(copies[name]) or {}).get(key) if name in copies else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in vocabulary:
                found.setdefault(f"{key}_id", vocabulary[token])
    if "tokenizer.json" not in copies and (model := _sentencepiece(copies)):
        for key, id_ in (("eos_token_id", model.eos_id()), ("bos_token_id", model.bos_id())):
            if id_ >= 0:
                found.setdefault(key, id_)
    return found


def _sentencepiece(copies: dict[str, Path]) -> Any:
    """The SentencePiece model among the files, or None."""
    path = next((copies[name] for name in _SENTENCEPIECE if name in copies), None)
    if path is None:
        return None
    from sentencepiece import SentencePieceProcessor  # MLX-LM brings it

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise PararnnError(f"{path}: not a SentencePiece model; pass --tokenizer with a whole one") from error


def _json_text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
