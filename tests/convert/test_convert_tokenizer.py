"""The tokenizer files of a model folder: made, copied or fetched, and checked against the vocabulary."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlx_pararnn.cli.app import app
from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files
from tests.support.converting import config
from tests.support.pt_writer import write_pt
from tests.support.small_models import apple_gru, tokenizer_json


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return write_pt(folder / "model.pt", apple_gru(vocab=256))


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"README.md", "config.json", "model.safetensors"}


def test_without_files_beside_the_checkpoint_the_error_says_what_to_pass(refused, source):
    message = refused(source, "--force")
    assert "no tokenizer files beside the checkpoint" in message
    for choice in ("--tokenizer", "folder", "Hugging Face name", "bytes", "none"):
        assert choice in message


def test_files_beside_the_checkpoint_are_copied_and_python_is_not(accepted, source):
    beside = source.parent
    content = {
        "tokenizer.json": tokenizer_json(250, {"</s>": 255, "<s>": 254}),
        "tokenizer_config.json": '{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}',
        "chat_template.jinja": "{{ messages }}",
        "tokenization_custom.py": "print('no')",
        "optimizer.bin": "x",
    }
    for name, text in content.items():
        (beside / name).write_text(text)
    folder = accepted(source, "--force")
    assert names(folder) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert (folder / "tokenizer.json").read_text() == content["tokenizer.json"]
    assert {"eos_token_id": 255, "bos_token_id": 254}.items() <= config(folder).items()
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": 255,
        "bos_token_id": 254,
    }


def test_end_ids_come_from_config_then_generation_config_then_tokenizer(accepted, source):
    beside = source.parent
    (beside / "tokenizer.json").write_text(tokenizer_json(10, {"</s>": 3}))
    (beside / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert config(accepted(source, "--force"))["eos_token_id"] == 3
    (beside / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.5}')
    folder = accepted(source, "--force")
    assert config(folder)["eos_token_id"] == [5, 6]
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5
    (beside / "config.json").write_text('{"eos_token_id": 7}')
    assert config(accepted(source, "--force"))["eos_token_id"] == 7


def test_a_folder_given_by_name(accepted, refused, source, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert "no tokenizer files there" in refused(source, "--tokenizer", other)
    (other / "vocab.json").write_text('{"a": 0, "b": 1}')
    (other / "merges.txt").write_text("")
    folder = accepted(source, "--tokenizer", other)
    assert names(folder) == {"vocab.json", "merges.txt"}
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert "not a file" in refused(source, "--tokenizer", other / "vocab.json")
    assert "no such folder" in refused(source, "--tokenizer", "./absent/folder/here")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": tokenizer_json(257)},
        {"tokenizer.json": tokenizer_json(10, {"<x>": 256})},
        {"tokenizer.json": json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]] * 257}})},
        {"vocab.json": json.dumps({f"t{i}": i for i in range(257)}), "merges.txt": ""},
        {"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"<x>": 256}'},
    ],
)
def test_a_tokenizer_with_more_tokens_than_the_model(files, refused, source):
    for name, text in files.items():
        (source.parent / name).write_text(text)
    message = refused(source, "--force")
    assert "more tokens than the model" in message
    if "Unigram" not in str(files):
        assert "largest id 256, the model's vocabulary is 256" in message


def test_a_tokenizer_file_that_is_broken(refused, source):
    for text in ("{", "[]", ""):
        (source.parent / "tokenizer.json").write_text(text)
        assert "tokenizer.json" in refused(source, "--force")


def test_a_link_out_of_the_folder_is_not_followed(refused, source, tmp_path):
    (tmp_path / "secret").write_text(tokenizer_json(3))
    (source.parent / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert "is a link out of its folder" in refused(source, "--force")


def test_a_pipe_is_not_a_tokenizer(refused, source):
    os.mkfifo(source.parent / "tokenizer.json")
    assert "no tokenizer files" in refused(source, "--force")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache that holds one repository, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / "models--someone--tok"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "blobs/abc").write_text(tokenizer_json(9))
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hugging_face_repository_from_the_cache(accepted, source, hub):
    folder = accepted(source, "--tokenizer", "someone/tok")
    assert (folder / "tokenizer.json").read_text() == tokenizer_json(9)
    assert not (folder / "tokenizer.json").is_symlink()


def test_a_checkpoint_inside_a_hugging_face_cache(accepted, hub):
    (hub.parent.parent / "blobs/def").write_bytes(write_pt(hub / "x.pt", apple_gru()).read_bytes())
    (hub / "x.pt").unlink()
    (hub / "model.pt").symlink_to("../../blobs/def")
    assert names(accepted(hub, "--force")) == {"tokenizer.json"}


def test_a_repository_that_cannot_be_reached(refused, source, hub):
    message = refused(source, "--tokenizer", "someone/else")
    assert message.startswith("someone/else: not a folder here, and Hugging Face could not be reached")


def test_none_writes_no_tokenizer(accepted, source):
    (source.parent / "tokenizer.json").write_text(tokenizer_json(9))
    assert names(accepted(source, "--tokenizer", "none")) == set()


def test_bytes_needs_256_tokens(refused, tmp_path):
    small = write_pt(tmp_path / "m.pt", apple_gru(vocab=255))
    assert "needs a vocabulary of at least 256, the model's is 255" in refused(small, "--tokenizer", "bytes")


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    for name, text in byte_tokenizer_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@settings(deadline=None)
@given(text=st.text())
def test_byte_ids_are_utf_8(byte_folder, text):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(byte_folder / "tokenizer.json"))
    ids = list(text.encode())
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text


def test_transformers_and_mlx_lm_load_the_byte_tokenizer(accepted, source):
    transformers = pytest.importorskip("transformers")
    from mlx_lm.tokenizer_utils import load

    folder = accepted(source, "--tokenizer", "bytes")
    text = "\x00 héllo  wörld\n\t👋🏽 <|x|> don't  " + "".join(map(chr, range(1, 0x300)))
    ids = list(text.encode())
    for tokenizer in (transformers.AutoTokenizer.from_pretrained(folder), load(folder)):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert len(tokenizer.get_vocab()) == 256
    detokenizer = load(folder).detokenizer
    detokenizer.reset()
    pieces = []
    for token in ids:
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert "".join([*pieces, detokenizer.last_segment]) == text


def test_an_empty_vocabulary_entry_does_no_harm(accepted, source):
    (source.parent / "tokenizer.json").write_text(
        '{"model": {"vocab": {"a": "x", "b": null}}, "added_tokens": [3]}'
    )
    assert np.isfinite(config(accepted(source, "--force"))["vocab_size"])


@pytest.mark.parametrize("where", ["tokenization_custom.Custom", "someone/else--tokenization.Custom"])
def test_python_that_a_tokenizer_names_is_left_out(where, accepted, source):
    from mlx_pararnn.loading import load_tokenizer

    for name, text in byte_tokenizer_files().items():
        (source.parent / name).write_text(text)
    settings = json.loads((source.parent / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [where, None]}, "tokenizer_class": "Custom"}
    (source.parent / "tokenizer_config.json").write_text(json.dumps(settings))
    (source.parent / "tokenization_custom.py").write_text("raise SystemExit('ran')")
    folder = accepted(source, "--force")
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert not list(folder.glob("*.py"))
    assert load_tokenizer(folder, {}).encode("hé") == list("hé".encode())


def test_a_tokenizer_of_python_alone_is_refused(refused, source):
    (source.parent / "vocab.json").write_text('{"a": 0}')
    (source.parent / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["t.Custom", null]}, "tokenizer_class": "Custom"}'
    )
    assert "the tokenizer is Python code (Custom), which is never run" in refused(source, "--force")


def test_end_ids_that_stand_in_special_tokens_map_alone(accepted, source):
    (source.parent / "tokenizer.json").write_text(tokenizer_json(10, {"</s>": 3, "<s>": 4}))
    (source.parent / "tokenizer_config.json").write_text('{"eos_token": null}')
    (source.parent / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}'
    )
    assert {"eos_token_id": 3, "bos_token_id": 4}.items() <= config(accepted(source, "--force")).items()


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_end_ids_of_a_sentencepiece_model(name, accepted, refused, tmp_path):
    import sentencepiece

    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 5
    with open(tmp_path / name, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=60, eos_id=5, bos_id=-1,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    source = write_pt(tmp_path / "model.pt", apple_gru(vocab=256))
    fields = config(accepted(source, "--force"))
    assert fields["eos_token_id"] == 5
    assert "bos_token_id" not in fields
    small = write_pt(tmp_path / "model.pt", apple_gru(vocab=20))
    assert "more tokens than the model" in refused(small, "--force")
    (tmp_path / name).write_bytes(b"no model")
    assert "not a SentencePiece model" in refused(source, "--force")


@pytest.mark.parametrize(("word", "meant"), [("byte", "bytes"), ("Bytes", "bytes"), ("non", "none")])
def test_a_misspelt_choice_is_answered(word, meant, refused, source):
    assert f"did you mean {meant}?" in refused(source, "--tokenizer", word)


def test_a_tokenizer_added_later(accepted, source, tmp_path):
    folder = accepted(source, "--tokenizer", "none")
    before = config(folder)
    assert names(folder) == set()
    files = tmp_path / "files"
    files.mkdir()
    (files / "tokenizer.json").write_text(tokenizer_json(250, {"</s>": 255}))
    (files / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')

    def add(*arguments):
        return CliRunner().invoke(app, ["add-tokenizer", str(folder), *map(str, arguments)])

    refused = {
        "byte": "did you mean bytes?",
        str(tmp_path): "no tokenizer files there",
        "none": "is no tokenizer to add",
    }
    for choice, message in refused.items():
        result = add(choice)
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr
    assert (names(folder), config(folder)) == (set(), before)

    assert add(files).exit_code == 0
    assert names(folder) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert config(folder) == before | {"eos_token_id": 255}

    again = add("bytes")
    assert again.exit_code == 1
    assert "--force replaces it" in again.stderr
    (folder / "special_tokens_map.json").write_text("{}")  # the old tokenizer's
    assert add("bytes", "--force").exit_code == 0
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(
        byte_tokenizer_files()["tokenizer.json"]
    )
    assert "special_tokens_map.json" not in names(folder)
    assert list(folder.glob(".tokenizer*")) == []


def test_a_tokenizer_is_added_to_a_model_only(source, tmp_path):
    result = CliRunner().invoke(app, ["add-tokenizer", str(source.parent), "bytes"])
    assert result.exit_code == 1
    assert "not a model folder" in result.stderr
