"""The fixed texts around the messages of a chat: the chat template, rendered once and taken apart.

A runner without Jinja puts them together again.
"""

import logging
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.generation import render
from mlx_pararnn.loading import load_tokenizer

from .swift_tokenizer import why_unreadable

Message = dict[str, str]

logger = logging.getLogger(__name__)

_SYSTEM = "Qsystemq"
_SAID = ("Qask0q", "Qreply0q", "Qask1q", "Qreply1q", "Qask2q")
_PADDING = "\n "
# What a template writes of the day on which it is rendered would be that of the export.
_CLOCK = "strftime_now"


def add_chat_format(settings: dict[str, Any], folder: Path, config: dict[str, Any]) -> None:
    """Note how chats are written, and the token that ends an answer, for runners that render no templates."""
    settings["chat_format"] = None
    try:
        tokenizer = load_tokenizer(folder, config)
    except PararnnError:  # no tokenizer
        return
    if reason := why_unreadable(folder):
        logger.warning("the Swift package cannot read this tokenizer: %s; an app must bring its own", reason)
    found = settings["chat_format"] = chat_format(tokenizer)
    if found is None:
        if template := tokenizer.chat_template:
            clocked = _CLOCK in str(template)
            logger.warning(
                "the chat template %s: an app must say how chats are written (ChatFormat in docs/swift.md)",
                "writes the date" if clocked else "is not made of fixed texts around messages",
            )
        return
    end = end_of_answer(tokenizer, found)
    if end is None:
        logger.warning(
            "the chat template ends answers with plain text: an app must stop there itself (stop in "
            "docs/swift.md)"
        )
    elif end < settings["vocab_size"] and end not in settings["eos_token_id"]:
        settings["eos_token_id"] = [*settings["eos_token_id"], end]


def chat_format(tokenizer: TokenizerWrapper) -> dict[str, Any] | None:
    """What stands around messages by the chat template of `tokenizer`.

    Returns:
        `beginning`, before the first question where there is no system prompt; `before_system` and
        `after_system`, up to the first question, both None if the template takes no system prompt;
        `after_user`, up to where the model answers; `before_answer`, which stands between that and an
        earlier answer; `after_answer`, up to the next question; `trimmed`, the roles whose messages lose the
        white space around them. None if there is no template, or if it is not made of such texts: checked on
        three turns, with and without a system prompt.
    """
    if not tokenizer.chat_template or _CLOCK in str(tokenizer.chat_template):
        return None
    pieces = _pieces(tokenizer, _messages(3))
    if pieces is None or not pieces[2] or not pieces[1].startswith(pieces[-1]):
        return None
    system: list[Any] = _pieces(tokenizer, _messages(3, _SYSTEM)) or [None, None]
    found: dict[str, Any] = {
        "beginning": pieces[0],
        "before_system": system[0],
        "after_system": system[1],
        "after_user": pieces[-1],
        "before_answer": pieces[1][len(pieces[-1]) :],
        "after_answer": pieces[2],
        "trimmed": _trimmed(tokenizer),
    }
    if not _holds(tokenizer, found, None):
        return None
    if system[0] is not None and not _holds(tokenizer, found, _SYSTEM):
        found |= {"before_system": None, "after_system": None}
    return found


def written(found: dict[str, Any], messages: list[Message]) -> str:
    """The text of `messages`, the last of which is a question, as a runner puts it together."""
    text = "" if messages[0]["role"] == "system" else str(found["beginning"])
    for message in messages:
        role, said = message["role"], message["content"]
        said = said.strip() if role in found["trimmed"] else said
        if role == "system":
            text += found["before_system"] + said + found["after_system"]
        elif role == "user":
            text += said + found["after_user"]
        else:
            text += found["before_answer"] + said + found["after_answer"]
    return text


def end_of_answer(tokenizer: TokenizerWrapper, found: dict[str, Any]) -> int | None:
    """The special token by which `chat_format` ends an answer; None if it is ended by plain text."""
    tokens = tokenizer.encode(found["after_answer"], add_special_tokens=False)
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


def _messages(turns: int, system: str | None = None, padding: str = "") -> list[Message]:
    said = [padding + text + padding for text in _SAID[: 2 * turns - 1]]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [{"role": "system", "content": padding + system + padding}, *messages] if system else messages


def _rendered(tokenizer: TokenizerWrapper, messages: list[Message]) -> str | None:
    try:
        return str(render(tokenizer, messages, tokenize=False))
    except PararnnError:
        return None


def _pieces(tokenizer: TokenizerWrapper, messages: list[Message]) -> list[str] | None:
    """The texts before, between and after the messages; None if one of those is missing."""
    text = _rendered(tokenizer, messages) or ""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def _trimmed(tokenizer: TokenizerWrapper) -> list[str]:
    """The roles whose messages come without the white space that was put around them."""
    texts = {"system": _SYSTEM, "user": _SAID[0], "assistant": _SAID[1]}
    with_system = _rendered(tokenizer, _messages(3, _SYSTEM, _PADDING)) or ""
    without = _rendered(tokenizer, _messages(3, padding=_PADDING)) or ""
    return [
        role
        for role, text in texts.items()
        if (shown := with_system if role == "system" else without) and _PADDING + text + _PADDING not in shown
    ]


def _holds(tokenizer: TokenizerWrapper, found: dict[str, Any], system: str | None) -> bool:
    """Whether the texts give what the template renders."""
    cases = [_messages(turns, system, padding) for turns in (1, 2, 3) for padding in ("", _PADDING)]
    return all(written(found, messages) == _rendered(tokenizer, messages) for messages in cases)
