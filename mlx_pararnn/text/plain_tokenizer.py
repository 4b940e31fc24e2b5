"""A tokenizer that is its tokenizer.json and no more, by the tokenizers library alone."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

from tokenizers import Tokenizer

from .pieces import PIECE, encode_in_pieces, has_bytes_alone


class PlainTokenizer:
    """What MLX-LM's wrapper and this package ask of transformers' tokenizers, with the same answers.

    Args:
        folder: a model folder of which `files.model_files.has_plain_tokenizer` is true.
        special_tokens_map: tokens by what they are for, as "eos_token".
        chat_template: Jinja's text, or None.

    Attributes:
        backend_tokenizer: the tokenizers library's.
        bos_token, eos_token: the tokens that begin and end a text, or None.
    """

    def __init__(
        self, folder: Path, special_tokens_map: dict[str, str], chat_template: str | None = None
    ) -> None:
        self.name_or_path = str(folder)
        self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.special_tokens_map = special_tokens_map
        self.bos_token = special_tokens_map.get("bos_token")
        self.eos_token = special_tokens_map.get("eos_token")
        self.chat_template = chat_template

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return None if self.bos_token is None else self.backend_tokenizer.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return None if self.eos_token is None else self.backend_tokenizer.token_to_id(self.eos_token)

    def get_vocab(self) -> dict[str, int]:
        """The id of each token."""
        return self.backend_tokenizer.get_vocab()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text's tokens.

        Where a token is a byte, a long text is read in pieces: the library takes hundreds of bytes a token.
        """
        if len(text) > PIECE and has_bytes_alone(self.backend_tokenizer):
            return [*chain.from_iterable(encode_in_pieces(self.backend_tokenizer, [text]))]
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: int | Sequence[int], clean_up_tokenization_spaces: bool = False) -> str:
        """The text of tokens; spaces are never cleaned up, which such a tokenizer does not ask for."""
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        return self.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that is given, or the tokenizer's own."""
        if chat_template is None and self.chat_template is None:
            raise ValueError("this tokenizer has no chat template")
        return chat_template or self.chat_template or ""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """By transformers, in this process; `text.chat_template` asks for it where it has to."""
        from transformers import PreTrainedTokenizerFast

        theirs = PreTrainedTokenizerFast(
            tokenizer_object=self.backend_tokenizer,
            chat_template=self.chat_template,
            **self.special_tokens_map,
        )
        return theirs.apply_chat_template(conversation, **options)

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]: ...

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """The names of tokens; None for an id without one."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(token) for token in ids]
