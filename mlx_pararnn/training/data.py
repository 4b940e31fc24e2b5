"""Texts and examples become token ids, and token ids become batches.

What a JSON Lines file may hold, and which of an example's tokens count, is MLX-LM's: {"text"},
{"prompt", "completion"}, {"messages"}.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import create_dataset

from ..errors import PararnnError, one_line
from ..files.model_files import open_regular
from .batches import Batch
from .data_paths import check_data

# Characters of a text that are given to the tokenizer at once.
_PIECE = 1 << 20
# Padded examples come in few lengths: each is compiled by itself on a GPU.
_LENGTHS = 8
# From so many texts on, whole texts are held out; of fewer, the end of all of them.
_MANY_TEXTS = 20


@dataclass
class Documents:
    """Tokenized data.

    Attributes:
        tokens: of each text or example.
        begins: of each, the place of the first token that counts as a target: after an example's prompt.
        examples: they have prompts; False for texts.
    """

    tokens: list[np.ndarray]
    begins: list[int]
    examples: bool

    @property
    def digest(self) -> str:
        """The same for the same tokens in the same order."""
        summary = hashlib.blake2b(digest_size=16)
        for tokens, begin in zip(self.tokens, self.begins, strict=True):
            summary.update(f"{len(tokens)} {begin} ".encode() + tokens.astype("<u4").tobytes())
        return summary.hexdigest()

    def subset(self, indices: Iterable[int]) -> "Documents":
        """These documents alone, in this order."""
        chosen = list(indices)
        return Documents([self.tokens[i] for i in chosen], [self.begins[i] for i in chosen], self.examples)


def read_documents(
    path: Path, tokenizer: TokenizerWrapper, vocab_size: int, *, what: str = "DATA"
) -> Documents:
    """The texts and examples of a text file, a folder of them, or a JSON Lines file.

    Raises:
        PararnnError: there is nothing to learn from, or something that cannot be read.
    """
    if path.suffix == ".jsonl" and path.is_file():
        documents = _from_json_lines(path, tokenizer)
    else:
        texts = list(read_texts(path, what))
        tokens = [_encoded(text, tokenizer) for text in texts]
        documents = Documents(tokens, [0] * len(tokens), examples=False)
    largest = max((int(t.max()) for t in documents.tokens if len(t)), default=-1)
    if largest >= vocab_size:
        raise PararnnError(
            f"{path}: the tokenizer gives token {largest}, and the model's vocabulary has {vocab_size}; "
            "give the tokenizer that belongs to the model"
        )
    if not sum(map(len, documents.tokens)):
        raise PararnnError(f"{path}: {what} is empty; give a file with text in it")
    return documents


def read_texts(path: Path, what: str = "DATA") -> Iterator[str]:
    """The texts of a file, of all files of a folder, or of a JSON Lines file's texts, without a tokenizer.

    Raises:
        PararnnError: nothing is there, or it is not UTF-8.
    """
    check_data(path, what)
    if path.is_file() and path.suffix == ".jsonl":
        for row in _rows(path):
            yield from _strings(row)
        return
    files = [path] if not path.is_dir() else _files(path)
    if not files:
        raise PararnnError(
            f"{path}: no files in this folder; {what} is a text file, a folder of them or .jsonl"
        )
    for file in files:
        text = _utf8(file)
        if text:
            yield text


def training_file(path: Path) -> Path:
    """DATA as the trainer reads it: of a folder in MLX-LM's form, its train.jsonl."""
    file = path / "train.jsonl"
    return file if file.is_file() else path


def validation_file(path: Path) -> Path | None:
    """The valid.jsonl of a folder in MLX-LM's form; None where there is none."""
    file = path / "valid.jsonl"
    return file if file.is_file() and (path / "train.jsonl").is_file() else None


def split(documents: Documents, share: float, seed: int) -> tuple[Documents, Documents]:
    """What is learned from, and a share that is held out: whole documents, or the end of a few texts.

    Raises:
        PararnnError: one of the two would be empty.
    """
    if documents.examples or len(documents.tokens) >= _MANY_TEXTS:
        count = len(documents.tokens)
        held = round(share * count)
        if not 0 < held < count:
            raise PararnnError(_no_held_out(f"{count} examples", share))
        order = np.random.default_rng([seed, 1]).permutation(count)
        return documents.subset(sorted(order[held:])), documents.subset(sorted(order[:held]))
    tokens = np.concatenate(documents.tokens)
    held = round(share * len(tokens))
    if not 1 < held < len(tokens) - 1:
        raise PararnnError(_no_held_out(f"{len(tokens)} tokens", share))
    bounds = np.cumsum([len(t) for t in documents.tokens])[:-1]
    learned = [part for part in np.split(tokens[:-held], bounds[bounds < len(tokens) - held]) if len(part)]
    return Documents(learned, [0] * len(learned), False), Documents([tokens[-held:]], [0], False)


class Stream:
    """Batches of documents that follow each other without end, cut into pieces of T tokens.

    Carried: the tokens are laid out in as many rows as a batch has, and batch after batch reads on in each
    row, with the state that the row had. Reset: pieces come in any order and start from the initial state.
    Each time that all were read, documents, pieces and the place of the cuts are shuffled anew.

    Raises:
        PararnnError: the documents are shorter than one batch.
    """

    def __init__(self, documents: Documents, rows: int, length: int, *, carried: bool, seed: int) -> None:
        self.documents, self.rows, self.length = documents, rows, length
        self.carried, self.seed = carried, seed
        total = sum(map(len, documents.tokens))
        self.batches = (total - 1) // (rows * length)
        if self.batches < 1:
            raise PararnnError(
                f"the data has {total} tokens, fewer than one batch of {rows} x {length} + 1; give more "
                "text, or a smaller batch size or length"
            )

    def starting_at(self, batch: int) -> Iterator[Batch]:
        """The batches from number `batch` on, without end."""
        epoch, within = divmod(batch, self.batches)
        while True:
            yield from self._epoch(epoch, within)
            epoch, within = epoch + 1, 0

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)

    def _epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        random = np.random.default_rng([self.seed, 2, epoch])
        tokens, counts = _joined(self.documents, random.permutation(len(self.documents.tokens)))
        pieces = self.batches * self.rows
        spare = len(tokens) - 1 - pieces * self.length
        cut = int(random.integers(spare + 1))
        order = np.arange(pieces).reshape(self.rows, self.batches).T  # a batch's pieces stand side by side
        if not self.carried:
            order = random.permutation(pieces).reshape(self.batches, self.rows)
        window = np.arange(self.length + 1)
        for number in range(first, self.batches):
            places = cut + self.length * order[number][:, None] + window
            mask = None if counts is None else counts[places[:, 1:]]
            yield Batch(tokens[places], mask, fresh=not self.carried or number == 0)


class Rows:
    """Batches of examples, one in a row, padded on the right to one of few lengths.

    Examples of similar length stand together. Each time that all were read they are shuffled anew.

    Raises:
        PararnnError: there are fewer than a batch's.
    """

    def __init__(self, documents: Documents, rows: int, length: int, *, seed: int) -> None:
        self.documents, self.rows, self.length, self.seed = documents, rows, length, seed
        self.batches = len(documents.tokens) // rows
        self.cut = sum(len(tokens) > length + 1 for tokens in documents.tokens)
        if self.batches < 1:
            raise PararnnError(
                f"the data has {len(documents.tokens)} examples, fewer than the {rows} of a batch; give "
                "more, or a smaller batch size"
            )

    def starting_at(self, batch: int) -> Iterator[Batch]:
        """The batches from number `batch` on, without end."""
        epoch, within = divmod(batch, self.batches)
        while True:
            random = np.random.default_rng([self.seed, 2, epoch])
            chosen = random.permutation(len(self.documents.tokens))[: self.batches * self.rows]
            lengths = np.array([len(self.documents.tokens[i]) for i in chosen])
            groups = chosen[np.argsort(lengths, kind="stable")].reshape(self.batches, self.rows)
            for group in groups[random.permutation(self.batches)][within:]:
                yield _padded(self.documents, group, self.length)
            epoch, within = epoch + 1, 0

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)


class HeldOut:
    """All of some documents, once, in their order; may be read again and again.

    A stream's targets all count, once each; the rows that it is read in are as many as are filled.
    """

    def __init__(self, documents: Documents, rows: int, length: int, *, carried: bool, packed: bool) -> None:
        self.documents, self.length, self.carried, self.packed = documents, length, carried, packed
        total = sum(map(len, documents.tokens))
        self.rows = min(rows, len(documents.tokens) if not packed else max(1, (total - 1) // length))

    def __iter__(self) -> Iterator[Batch]:
        if not self.packed:
            order = np.argsort([len(t) for t in self.documents.tokens], kind="stable")
            for first in range(0, len(order), self.rows):
                yield _padded(self.documents, order[first : first + self.rows], self.length)
            return
        tokens, counts = _joined(self.documents, range(len(self.documents.tokens)))
        targets = len(tokens) - 1
        in_row = -(-targets // self.rows)
        for first in range(0, in_row, self.length):
            steps = np.arange(first, min(first + self.length, in_row))
            places = in_row * np.arange(self.rows)[:, None] + np.append(steps, steps[-1] + 1)
            mask = places[:, 1:] <= targets
            places = np.minimum(places, targets)
            if counts is not None:
                mask &= counts[places[:, 1:]]
            yield Batch(tokens[places], mask, fresh=first == 0 or not self.carried)


def _joined(documents: Documents, order: Iterable[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """The documents one after the other, and which of their tokens count; None for all."""
    chosen = list(order)
    tokens = np.concatenate([documents.tokens[i] for i in chosen])
    if not any(documents.begins):
        return tokens, None
    counts = [np.arange(len(documents.tokens[i])) >= documents.begins[i] for i in chosen]
    return tokens, np.concatenate(counts)


def _padded(documents: Documents, indices: Sequence[int] | np.ndarray, length: int) -> Batch:
    tokens = [documents.tokens[i][: length + 1] for i in indices]
    step = -(-length // _LENGTHS)
    width = min(length, step * -(-max(1, max(map(len, tokens)) - 1) // step))
    rows = np.zeros((len(tokens), width + 1), np.int32)
    mask = np.zeros((len(tokens), width), bool)
    for row, (index, ids) in enumerate(zip(indices, tokens, strict=True)):
        rows[row, : len(ids)] = ids
        mask[row, max(0, documents.begins[index] - 1) : len(ids) - 1] = True
    return Batch(rows, mask)


def _files(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _utf8(file: Path) -> str:
    try:
        with open_regular(file) as opened:  # read again when a run is resumed: a pipe has nothing then
            return opened.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PararnnError(
            f"{file}: not UTF-8 text (byte {error.start}); convert it, for instance with iconv, or remove it"
        ) from None
    except OSError as error:
        raise PararnnError(f"{file}: cannot be read ({error.strerror})") from error


def _encoded(text: str, tokenizer: TokenizerWrapper) -> np.ndarray:
    """A text's ids, its end token at the end if the tokenizer has one."""
    pieces: list[list[int]] = []
    begin = 0
    while begin < len(text):
        end = begin + _PIECE
        end = text.rfind("\n", begin, end) + 1 or end if end < len(text) else len(text)
        pieces.append(tokenizer.encode(text[begin:end], add_special_tokens=begin == 0))
        begin = end
    if tokenizer.eos_token_id is not None:
        pieces.append([tokenizer.eos_token_id])
    return np.concatenate([np.array(piece, np.uint32) for piece in pieces])


def _from_json_lines(path: Path, tokenizer: TokenizerWrapper) -> Documents:
    rows = list(_rows(path))
    if not rows:
        raise PararnnError(f"{path}: the file is empty; give a file with text in it")
    kind = _kind(rows[0])
    if kind == "messages" and not tokenizer.has_chat_template:
        raise PararnnError(
            f"{path}: holds messages, and the tokenizer has no chat template; give one that has, or "
            "prompt and completion instead"
        )
    if kind == "prompt" and not tokenizer.has_chat_template:
        pairs = [(_ids(row["prompt"], tokenizer), _ids(row["completion"], tokenizer, False)) for row in rows]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = [np.array(prompt + completion + end, np.uint32) for prompt, completion in pairs]
        return Documents(tokens, [len(prompt) for prompt, _ in pairs], examples=True)
    data: Any = create_dataset(rows, cast(Any, tokenizer), SimpleNamespace(mask_prompt=kind != "text"))
    found: list[np.ndarray] = []
    begins: list[int] = []
    for number, row in enumerate(rows, 1):
        if kind == "text" and not row["text"]:
            continue  # MLX-LM looks at its last token
        try:
            ids, begin = data.process(row)
        except Exception as error:  # a chat template refuses what it refuses
            raise PararnnError(
                f"{path}, line {number}: the tokenizer cannot encode it ({one_line(error)})"
            ) from error
        # MLX-LM ends a text with the end token, None where the tokenizer has none
        found.append(np.array([token for token in ids if token is not None], np.uint32))
        begins.append(begin)
    return Documents(found, begins, examples=kind != "text")


def _ids(text: str, tokenizer: TokenizerWrapper, special: bool = True) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    first = ""
    for number, line in enumerate(_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PararnnError(f"{path}, line {number}: not valid JSON ({error})") from None
        kind = _kind(row)
        if kind is None:
            names = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise PararnnError(
                f"{path}, line {number}: has {names or 'no fields'}; a line is an object with the texts "
                '"text", or "prompt" and "completion", or with "messages", a list of objects with "role" and '
                '"content"'
            )
        first = first or kind
        if kind != first:
            raise PararnnError(
                f'{path}, line {number}: has "{kind}", and the first line "{first}"; a file has one format'
            )
        yield row


def _kind(row: Any) -> str | None:
    """The first field of the format that a row has; None if it has none."""
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return "prompt"
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return "messages"
    return "text" if isinstance(row.get("text"), str) else None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _strings(row: dict[str, Any]) -> Iterator[str]:
    """All texts of a row of a JSON Lines file, for training a tokenizer."""
    kind = _kind(row)
    if kind == "messages":
        yield from (m["content"] for m in row["messages"] if isinstance(m["content"], str))
    elif kind is not None:
        yield from (row[name] for name in (("prompt", "completion") if kind == "prompt" else ("text",)))


def _no_held_out(what: str, share: float) -> str:
    return (
        f"of {what} a share of {share:g} leaves nothing to hold out or nothing to learn from; give "
        "--valid FILE, another --valid-share, or 0 for no evaluation"
    )
