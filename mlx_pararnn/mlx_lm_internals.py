"""What is used of MLX-LM that it does not promise to keep: here alone, and tried by tests/test_contract.py.

The commands that `mlx-pararnn lm` runs are changed by names of their own, in cli/lm.py.
"""

from collections.abc import Callable
from typing import Any

from mlx_lm.generate import BatchGenerator, TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = [
    "BatchGenerator",
    "MessageStates",
    "calls_tools_in_json",
    "plain_tokenizer",
    "set_chat_template",
    "set_detokenizer",
]


class MessageStates:
    """Divides an answer's text into what is said ("normal"), thought ("reasoning") and called ("tool").

    Args:
        tokenizer: MLX-LM's wrapper.
        reasoning: whether the answer begins inside of a reasoning.
    """

    def __init__(self, tokenizer: Any, reasoning: bool) -> None:
        start = tokenizer.response_initial_state or ("reasoning" if reasoning else "normal")
        self._state = make_text_state_machine(tokenizer).make_state(start)

    def split(self, text: str) -> list[tuple[str, str]]:
        """The state and the text of each part of what is certain after some more text."""
        self._state, parts = TextStateMachine.split(self._state, text)
        return list(parts)

    def flush(self) -> tuple[str, str]:
        """The state and the text of what was held back, when no more text comes."""
        self._state, held, state = TextStateMachine.flush(self._state)
        return state, held


def plain_tokenizer(tokenizer: Any) -> Any:
    """The transformers tokenizer inside of MLX-LM's wrapper; any other as it is."""
    # A tokenizer of transformers has an attribute of that name too, of another kind.
    return tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer


def set_detokenizer(tokenizer: Any, detokenizer: Any) -> None:
    """Have MLX-LM's wrapper hand out copies of this detokenizer."""
    vars(tokenizer)["_detokenizer"] = detokenizer


def set_chat_template(tokenizer: Any, template: Callable[..., str]) -> None:
    """Have MLX-LM's wrapper call `template`, unless it calls one of MLX-LM's own functions already."""
    if vars(tokenizer)["_chat_template"] is None:
        vars(tokenizer)["_chat_template"] = template


def calls_tools_in_json(tokenizer: Any) -> bool:
    """Whether MLX-LM reads the model's calls of tools as JSON."""
    return str(tokenizer.tool_parser.__module__).endswith("json_tools")
