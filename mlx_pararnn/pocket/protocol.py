"""The tokens by which a model uses tools, and the order in which they may stand.

A turn is a sequence of tokens. Text is UTF-8, one token a byte; all else is a special token.

    <|user|> MESSAGE <|end|>            from the user
    BYTES                               a thought
    <|read1|> TOKEN                     a command, and the one token that it makes the loop feed
    <|right1|> <|left1|> <|last1|>      commands that move a pointer; nothing is fed
    <|call|> JSON <|result|>            a function is called: {"name": ..., "arguments": {...}}
    RESULT <|end|>                      fed by the loop
    <|answer|> TEXT <|end|>             what the user sees; the turn ends here

Commands, thoughts and calls come in any order and number before the answer. Commands may also stand inside
the JSON of a call and inside the answer. An answer without text means the text of the last result.

The turn without commands and what they read is the memory that pointers move over (`pointer`). The scheme of
pointers is that of arXiv 2510.14826. A model folder declares the protocol by having these tokens in its
tokenizer.json.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..errors import PararnnError
from ..files.model_files import read_json
from ..text.detokenizer import BYTES
from .pointer import POINTERS

MARKS = ("user", "end", "answer", "call", "result", "edge")
ACTIONS = ("read", "right", "left", "last")


class Command(NamedTuple):
    """What a command token does: one of ACTIONS, to a pointer (1 to POINTERS)."""

    action: str
    pointer: int

    @property
    def name(self) -> str:
        """Its token, as in tokenizer.json."""
        return f"<|{self.action}{self.pointer}|>"


COMMANDS = tuple(Command(action, k + 1) for k in range(POINTERS) for action in ACTIONS)
# In the order in which their ids follow those of the bytes.
SPECIAL_TOKENS = (*(f"<|{mark}|>" for mark in MARKS), *(command.name for command in COMMANDS))
NAMES = {*BYTES, *SPECIAL_TOKENS}


class Segment(NamedTuple):
    """A part of a turn.

    Attributes:
        kind: "message", "thought", "command", "observation", "call", "result" or "answer".
        tokens: its token ids, marks included.
    """

    kind: str
    tokens: list[int]


# Whether the model makes the tokens of a segment, or they are fed to it.
FED = ("message", "observation", "result")


@dataclass(frozen=True)
class Protocol:
    """The token ids of one tokenizer.

    Attributes:
        byte_ids: the token of each of the 256 bytes.
        user, end, answer, call, result, edge: the marks.
        commands: what each command token does.
    """

    byte_ids: tuple[int, ...]
    user: int
    end: int
    answer: int
    call: int
    result: int
    edge: int
    commands: dict[int, Command]

    @cached_property
    def command_ids(self) -> dict[Command, int]:
        """The token of each command."""
        return {command: token for token, command in self.commands.items()}

    @cached_property
    def bytes_of(self) -> dict[int, int]:
        """The byte that each byte token stands for."""
        return {token: byte for byte, token in enumerate(self.byte_ids)}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text: bytes only, whatever the text looks like; it cannot hold special tokens.

        Raises:
            PararnnError: the text holds bytes that were no UTF-8 (lone surrogates).
        """
        try:
            return [self.byte_ids[byte] for byte in text.encode()]
        except UnicodeEncodeError:
            raise PararnnError("the text is not UTF-8; convert it first, for instance with iconv") from None

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the byte tokens among `tokens`; what is no UTF-8 becomes U+FFFD."""
        return bytes(self.bytes_of[token] for token in tokens if token in self.bytes_of).decode(
            errors="replace"
        )

    def render_message(self, message: str) -> list[int]:
        """The start of a turn, after which the model goes on; also the memory at that time.

        Blanks and line breaks around the message are left out, and are one space each inside of it.
        """
        return [self.user, *self.encode(" ".join(message.split()) or message), self.end]

    def render_call(self, name: str, arguments: dict[str, Any]) -> list[int]:
        """A call as a model makes it: JSON without spaces, characters beyond ASCII as they are."""
        return [self.call, *self.encode(call_text(name, arguments)), self.result]

    def render_result(self, text: str) -> list[int]:
        """What the loop feeds after a call."""
        return [*self.encode(text), self.end]

    def render_answer(self, text: str) -> list[int]:
        """An answer without commands inside, which ends the turn."""
        return [self.answer, *self.encode(text), self.end]

    def split(self, tokens: Sequence[int]) -> list[Segment]:
        """A turn, whole or not, in its segments; they join to `tokens`.

        A call or an answer with commands inside is several segments.

        Raises:
            PararnnError: the tokens are not in the order of the protocol; the sentence says where.
        """
        segments: list[Segment] = []
        state = "start"
        for position, token in enumerate(tokens):
            kind, following = self._read(state, token)
            if kind is None:
                name = self.name(token)
                raise PararnnError(f"token {position} is {name}, which cannot stand here ({state})")
            last = segments[-1] if segments else None
            if last is not None and last.kind == kind and kind not in ("command", "observation"):
                last.tokens.append(token)
            else:
                segments.append(Segment(kind, [token]))
            state = following
        return segments

    def loss_mask(self, tokens: Sequence[int]) -> list[bool]:
        """Of each token of a turn, whether the model makes it: the others get no loss in training."""
        return [segment.kind not in FED for segment in self.split(tokens) for _ in range(len(segment.tokens))]

    def name(self, token: int) -> str:
        """A token in words, for messages and logs."""
        if token in self.bytes_of:
            return repr(bytes([self.bytes_of[token]]))[1:]
        marks = {getattr(self, mark): f"<|{mark}|>" for mark in MARKS}
        return marks.get(token) or (self.commands[token].name if token in self.commands else f"token {token}")

    def _read(self, state: str, token: int) -> tuple[str | None, str]:
        """The kind of segment that a token belongs to, None where it cannot stand, and the state after it."""
        is_byte = token in self.bytes_of
        if state.startswith("observation in "):
            return "observation", state.removeprefix("observation in ")
        if token in self.commands and state in ("thought", "call", "answer"):
            reads = self.commands[token].action == "read"
            return "command", f"observation in {state}" if reads else state
        if is_byte and state in ("message", "thought", "call", "result", "answer"):
            return state, state
        return self._marks.get((state, token), (None, state))

    @cached_property
    def _marks(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Where each mark may stand: state and token, to its kind of segment and the state after it."""
        return {
            ("start", self.user): ("message", "message"),
            ("message", self.end): ("message", "thought"),
            ("thought", self.call): ("call", "call"),
            ("call", self.result): ("call", "result"),
            ("result", self.end): ("result", "thought"),
            ("thought", self.answer): ("answer", "answer"),
            ("answer", self.end): ("answer", "end of the turn"),
        }


def find_protocol(tokenizer: Any) -> Protocol | None:
    """The protocol by a tokenizer's ids; None if it lacks one of the protocol's tokens.

    Args:
        tokenizer: transformers' or MLX-LM's.
    """
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() >= NAMES:
        return None
    by_byte = {byte: vocabulary[character] for character, byte in BYTES.items()}
    return Protocol(
        byte_ids=tuple(by_byte[byte] for byte in range(256)),
        commands={vocabulary[command.name]: command for command in COMMANDS},
        **{mark: vocabulary[f"<|{mark}|>"] for mark in MARKS},
    )


def check_is_whole(model: Any, tokenizer: Any) -> None:
    """Raise a PararnnError for a model that uses tools and is divided among processes."""
    if model.group is not None and find_protocol(tokenizer) is not None:
        raise PararnnError("a model that uses tools runs in one process; start it without mlx.launch")


def declares_protocol(folder: Path) -> bool:
    """Whether a model folder's tokenizer.json has all of the protocol's tokens; no tokenizer is loaded."""
    try:
        tokenizer = read_json(folder / "tokenizer.json")
        tokens = {*tokenizer["model"]["vocab"], *(token["content"] for token in tokenizer["added_tokens"])}
    except (PararnnError, FileNotFoundError, KeyError, TypeError):
        return False
    return tokens >= NAMES


def tokenizer_files() -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of the protocol: ids 0 to 255 are bytes, then SPECIAL_TOKENS.

    transformers and MLX-LM load them like any others.
    """
    vocabulary = dict(sorted(BYTES.items(), key=lambda item: item[1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    # In a sequence of one: for ByteLevel alone MLX-LM takes a detokenizer that drops a first space.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])  # type: ignore[assignment]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """The JSON of a call, as models are trained to write it."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, separators=(",", ":"))
