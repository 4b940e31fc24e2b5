"""Gives a model folder a tokenizer after it was converted."""

import os
import tempfile
from pathlib import Path

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import TOKENIZER_FILES, VOCABULARY_FILES

from .readers.forms import read_json_object
from .writers.output_folder import write_json
from .writers.tokenizer import prepare_tokenizer

_KEPT = "generation_config.json"  # the model's own, whatever its tokenizer


def add_tokenizer(folder: str | Path, choice: str | Path, *, force: bool = False) -> list[str]:
    """Put a tokenizer's files into the model folder `folder`; returns their names.

    Its end and start ids go into config.json where that names none.

    Args:
        choice: a folder with the tokenizer's files, a Hugging Face name, or "bytes".
        force: replace the tokenizer that is there.

    Raises:
        PararnnError: no model folder, a tokenizer that does not fit, or one is there already.
    """
    folder = Path(folder)
    config = read_json_object(folder / "config.json") if folder.is_dir() else None
    if config is None or config.get("model_type") != "pararnn":
        raise PararnnError(
            f"{folder}: not a model folder; mlx-pararnn convert CKPT -o OUT --tokenizer ... makes one"
        )
    if choice == "none":
        raise PararnnError("'none' is no tokenizer to add: name a folder, a Hugging Face name, or bytes")
    vocab_size = config.get("vocab_size")
    if type(vocab_size) is not int:
        raise PararnnError(f"{folder / 'config.json'}: vocab_size is {vocab_size!r}; convert again")
    present = [name for name in VOCABULARY_FILES if (folder / name).exists()]
    if present and not force:
        raise PararnnError(f"{folder} has a tokenizer ({present[0]}); --force replaces it")
    files = prepare_tokenizer(choice, folder, vocab_size, {})
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as partial:
        files.write(Path(partial))
        write_json(Path(partial) / "config.json", config | files.token_ids)
        written = sorted(path.name for path in Path(partial).iterdir())
        for name in {*TOKENIZER_FILES} - {*written, _KEPT}:
            (folder / name).unlink(missing_ok=True)
        for name in written:
            os.replace(Path(partial) / name, folder / name)
    return [name for name in written if name != "config.json"]
