"""The tokenizer of a model that is trained from scratch: bytes, a BPE trained here, or one from elsewhere."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..convert.writers.byte_tokenizer import byte_tokenizer_files
from ..convert.writers.tokenizer import prepare_tokenizer
from ..errors import PararnnError

END = "<|endoftext|>"
_SMALLEST = 257  # the bytes and the end of a text
_NO_LIMIT = 2**31  # a new model's vocabulary is as large as the tokenizer's


def write_tokenizer(choice: str, texts: Iterable[str], folder: Path) -> None:
    """Write the tokenizer's files into `folder`.

    Args:
        choice: "bytes"; "bpe:N", a byte-level BPE of at most N tokens trained on `texts`; or a folder or
            Hugging Face name that has one.

    Raises:
        PararnnError: there is none such.
    """
    kind, _, size = choice.partition(":")
    if choice == "bytes":
        files = byte_tokenizer_files()
    elif kind == "bpe":
        if not size.isdecimal() or int(size) < _SMALLEST:
            raise PararnnError(
                f"--tokenizer {choice}: give the size of the vocabulary, at least {_SMALLEST}, as in bpe:4096"
            )
        files = _bpe_files(int(size), texts)
    else:
        prepare_tokenizer(choice, folder, _NO_LIMIT, {}).write(folder)
        return
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _bpe_files(size: int, texts: Iterable[str]) -> dict[str, str]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
