"""Whether the Swift package reads a tokenizer.json: the rules of swift/ParaRNN/BPETokenizer.swift.

Whether ICU reads a file's regular expressions is not looked at.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import VOCABULARY_FILES

from ..readers.forms import read_json_object

Json = dict[str, Any]

_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def why_unreadable(folder: Path) -> str | None:
    """Why Swift cannot read the tokenizer in a model folder; None if it can, or if there is none."""
    if not any((folder / name).exists() for name in VOCABULARY_FILES):
        return None
    try:
        file = read_json_object(folder / "tokenizer.json")
    except PararnnError as error:
        return str(error)
    return "it has no tokenizer.json" if file is None else problem(file)


def problem(file: Json) -> str | None:
    """Why the content of a tokenizer.json is not read; None if it is."""
    return next(_problems(file), None)


def _problems(file: Json) -> Iterator[str]:
    model = file.get("model")
    if not isinstance(model, dict):
        yield "it is not a tokenizer.json"
        return
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        yield "its model is not BPE"
        return
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        yield "its BPE marks the inside or the end of words, which is not supported"
    decoders = list(_parts(file.get("decoder")))
    byte_level = [decoder.get("type") for decoder in decoders] == ["ByteLevel"]
    if byte_level and model.get("byte_fallback"):
        yield "its BPE is both byte-level and with byte fallback"
    if not byte_level:
        yield from _decoder_problems(decoders)
    if byte_level and model.get("unk_token") is not None and not _has_every_byte(model["vocab"]):
        yield "it has an unknown token for the bytes that its vocabulary lacks, which is not supported"
    for part in _parts(file.get("normalizer")):
        if not _is_normalizer(part):
            yield f"its normalizer is {_kind(part)}, which is not supported"
    for token in file.get("added_tokens") or []:
        if token.get("single_word"):
            yield f"its added token {token.get('content')} is only for single words, which is not supported"
    cuts = list(_parts(file.get("pre_tokenizer")))
    if any(_kind(cut) == ("Metaspace" if byte_level else "ByteLevel") for cut in cuts):
        yield "its decoder does not undo its pre-tokenizer"
    for cut in cuts:
        yield from _cut_problems(cut)
    for part in _parts(file.get("post_processor")):
        if _kind(part) not in ("ByteLevel", "TemplateProcessing", "RobertaProcessing"):
            yield f"its post-processor is {_kind(part)}, which is not supported"


def _parts(part: Any) -> Iterator[Json]:
    """A normalizer, pre-tokenizer, post-processor or decoder; of a sequence each."""
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for name in _SEQUENCES:
        for inner in part.get(name) or []:
            yield from _parts(inner)


def _kind(part: Json) -> str:
    return str(part.get("type", "unknown"))


def _text_pattern(part: Json) -> Any:
    pattern = part.get("pattern")
    return pattern.get("String") if isinstance(pattern, dict) else None


def _is_normalizer(part: Json) -> bool:
    return _kind(part) in _FORMS | {"Prepend"} or (_kind(part) == "Replace" and bool(_text_pattern(part)))


def _decoder_problems(decoders: list[Json]) -> Iterator[str]:
    for part in decoders or [{}]:
        known = _kind(part) in ("Fuse", "ByteFallback", "Strip", "Metaspace")
        if not known and not (_kind(part) == "Replace" and _text_pattern(part)):
            yield f"its decoder is {_kind(part)}, which is not supported"


def _cut_problems(cut: Json) -> Iterator[str]:
    if _kind(cut) not in ("ByteLevel", "Digits", "Split", "Metaspace"):
        yield f"its pre-tokenizer is {_kind(cut)}, which is not supported"
    if _kind(cut) == "Split":
        how = cut.get("behavior"), bool(cut.get("invert"))
        if how not in {
            ("Isolated", False), ("Isolated", True), ("MergedWithPrevious", False), ("Removed", True)
        }:  # fmt: skip
            yield "it splits texts in a way that is not supported"


def _has_every_byte(vocabulary: Json) -> bool:
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [256 + i for i in range(256 - len(prints))]
    return all(chr(code) in vocabulary for code in prints + others)
