"""From files to batches: which tokens there are, which count, in which order, and what is refused."""

import itertools
import json
import os

import numpy as np
import pytest

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.loading import load_tokenizer
from mlx_pararnn.training import data
from mlx_pararnn.training.data import Documents, HeldOut, Rows, Stream
from mlx_pararnn.training.tokenizers import write_tokenizer
from tests.support.training_runs import TEXT

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer("bytes", (), folder)
    return load_tokenizer(folder, {})


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    write_tokenizer("bpe:300", [TEXT], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder, {})


def documents(*lengths, examples=False):
    numbers = itertools.count()
    tokens = [np.array([next(numbers) for _ in range(n)], np.uint32) for n in lengths]
    return Documents(tokens, [0] * len(lengths), examples)


def lines(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_text_files_and_folders(tokenizer, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/one.txt").write_text("hé\n")
    (tmp_path / "a.md").write_text("x")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty").write_text("")
    (tmp_path / "c.txt").write_text("line\n" * 300_000)  # more than is encoded at once
    read = data.read_documents(tmp_path, tokenizer, 256)
    assert [bytes(t.astype(np.uint8)).decode() for t in read.tokens] == ["x", "line\n" * 300_000, "hé\n"]
    assert not read.examples
    one = data.read_documents(tmp_path / "a.md", tokenizer, 256)
    assert (len(one.tokens), one.digest == read.digest) == (1, False)


def test_a_tokenizer_trained_here(tmp_path):
    write_tokenizer("bpe:400", [TEXT], tmp_path)
    tokenizer = load_tokenizer(tmp_path, {})
    (tmp_path / "t.txt").write_text("Ünïcode, again: import os\n")
    (tokens,) = data.read_documents(tmp_path / "t.txt", tokenizer, 400).tokens
    assert tokens[-1] == tokenizer.eos_token_id
    assert len(tokens) < len("Ünïcode, again: import os\n".encode())
    assert tokenizer.decode(tokens[:-1].tolist()) == "Ünïcode, again: import os\n"
    assert max(tokenizer.get_vocab().values()) == 399


def counted(read, number, tokenizer):
    tokens, begin = read.tokens[number], read.begins[number]
    return tokenizer.decode(tokens[:begin].tolist()), tokenizer.decode(tokens[begin:].tolist())


def test_mlx_lm_formats(tokenizer, chat_tokenizer, tmp_path):
    pair = lines(tmp_path / "p.jsonl", {"prompt": "ask ", "completion": "say"}, "\n")
    assert counted(data.read_documents(pair, tokenizer, 256), 0, tokenizer) == ("ask ", "say")
    read = data.read_documents(pair, chat_tokenizer, 300)
    assert counted(read, 0, chat_tokenizer) == ("<user>ask <assistant>", "say")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\u2028"}]
    chat = lines(tmp_path / "c.jsonl", json.dumps({"messages": messages, "x": 1}, ensure_ascii=False))
    read = data.read_documents(chat, chat_tokenizer, 300)
    assert counted(read, 0, chat_tokenizer) == ("<user>a<assistant>", "b\u2028")
    assert read.examples
    text = lines(tmp_path / "t.jsonl", {"text": "one"}, {"text": ""}, {"text": "two"})
    read = data.read_documents(text, tokenizer, 256)
    assert [bytes(t.astype(np.uint8)) for t in read.tokens] == [b"one", b"two"]
    assert (read.begins, read.examples) == ([0, 0], False)
    ended = data.read_documents(text, chat_tokenizer, 300)
    assert ended.tokens[0][-1] == chat_tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "DATA is empty"),
        (b"caf\xe9", "not UTF-8 text .byte 3"),
        ("folder", "no files in this folder"),
        (None, "no such file or folder"),
    ],
)
def test_texts_that_cannot_be_read(content, words, tokenizer, tmp_path):
    path = tmp_path / "data"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(PararnnError, match=words):
        data.read_documents(path, tokenizer, 256)


@pytest.mark.parametrize("name", ["data", "data.jsonl"])
def test_a_pipe_and_a_device_are_no_data(name, tokenizer, tmp_path):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(PararnnError, match="not a regular file"):
        data.read_documents(path, tokenizer, 256)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(PararnnError, match="not a regular file"):
        data.read_documents(path, tokenizer, 256)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "the file is empty"),
        (['{"text": "a"'], "line 1: not valid JSON"),
        ([{"text": "a"}, {"question": "b", "answer": "c"}], "line 2: has answer, question"),
        ([{"text": 3}], "line 1: has text"),
        (["[1]"], "line 1: has list"),
        (["{}"], "line 1: has no fields"),
        ([{"prompt": "a", "completion": None}], "line 1: has completion, prompt"),
        ([{"messages": []}], "line 1: has messages"),
        ([{"messages": [{"role": "user"}]}], "line 1: has messages"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], 'line 2: has "prompt", and the first'),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no chat template"),
        ([{"text": ""}], "DATA is empty"),
    ],
)
def test_json_lines_that_cannot_be_read(rows, words, tokenizer, tmp_path):
    with pytest.raises(PararnnError, match=words):
        data.read_documents(lines(tmp_path / "data.jsonl", *rows), tokenizer, 256)


def test_tokens_outside_the_vocabulary(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("abc")
    with pytest.raises(PararnnError, match="gives token 99, and the model's vocabulary has 99"):
        data.read_documents(tmp_path / "t.txt", tokenizer, 99)


@pytest.mark.parametrize("carried", [True, False])
def test_a_stream_shows_every_token_once_and_starts_anywhere(carried):
    stream = Stream(documents(50, 70, 1, 80), 4, 10, carried=carried, seed=3)
    assert stream.batches == 5
    batches = list(itertools.islice(stream, 12))
    for epoch in (batches[:5], batches[5:10]):
        targets = np.concatenate([batch.tokens[:, 1:].ravel() for batch in epoch])
        assert len(set(targets.tolist())) == 200
    assert not np.array_equal(batches[0].tokens, batches[5].tokens)
    for batch, later in zip(batches[7:], stream.starting_at(7), strict=False):
        assert np.array_equal(batch.tokens, later.tokens)
        assert batch.fresh is later.fresh
    again = next(iter(Stream(documents(50, 70, 1, 80), 4, 10, carried=carried, seed=3)))
    other = next(iter(Stream(documents(50, 70, 1, 80), 4, 10, carried=carried, seed=4)))
    assert np.array_equal(batches[0].tokens, again.tokens)
    assert not np.array_equal(batches[0].tokens, other.tokens)


def test_a_carried_row_reads_on():
    batches = list(itertools.islice(Stream(documents(201), 4, 10, carried=True, seed=0), 10))
    assert [batch.fresh for batch in batches] == [True, *[False] * 4] * 2
    for before, after in itertools.pairwise(batches[:5]):
        assert (before.tokens[:, -1] == after.tokens[:, 0]).all()
        assert (before.tokens[:, -1] + 1 == after.tokens[:, 1]).all()
    assert all(b.fresh for b in itertools.islice(Stream(documents(201), 4, 10, carried=False, seed=0), 10))


def test_a_stream_of_examples_counts_what_follows_the_prompts():
    examples = Documents([np.array([1, 1, 7, 7]), np.array([1, 7, 7, 7, 7])] * 9, [2, 1] * 9, True)
    for batch in itertools.islice(Stream(examples, 2, 5, carried=True, seed=0), 8):
        assert ((batch.tokens[:, 1:] == 7) == batch.mask).all()


def test_rows_are_padded_to_few_lengths():
    random = np.random.default_rng(0)
    lengths = random.integers(2, 90, 100)
    examples = Documents([np.arange(1, n + 1) for n in lengths], [1] * 100, True)
    rows = Rows(examples, 8, 64, seed=0)
    assert rows.cut == sum(n > 65 for n in lengths)
    batches = list(itertools.islice(rows, 24))
    assert {batch.tokens.shape[1] - 1 for batch in batches} <= set(range(8, 65, 8))
    for batch in batches:
        assert batch.fresh
        assert ((batch.tokens[:, 1:] > 0) == batch.mask).all()
    first = np.concatenate([batch.tokens[:, 1] for batch in batches[:12]])
    assert len(first) == 96
    assert np.array_equal(batches[5].tokens, next(rows.starting_at(5)).tokens)
    assert np.array_equal(batches[17].tokens, next(rows.starting_at(17)).tokens)


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize(("length", "rows"), [(10, 4), (7, 3), (500, 4)])
def test_every_held_out_token_counts_once(carried, length, rows):
    held_out = HeldOut(documents(41, 60), rows, length, carried=carried, packed=True)
    for _ in range(2):
        seen = np.concatenate([batch.tokens[:, 1:][batch.mask] for batch in held_out])
        assert sorted(seen.tolist()) == list(range(1, 101))
    assert [batch.fresh for batch in held_out][1:] == [not carried] * (len(list(held_out)) - 1)


def test_held_out_examples_all_count():
    held_out = HeldOut(documents(4, 9, 3, 5, 2, examples=True), 2, 16, carried=False, packed=False)
    assert sum(int(batch.mask.sum()) for batch in held_out) == 3 + 8 + 2 + 4 + 1


def test_splitting():
    few = documents(60, 40)
    learned, held = data.split(few, 0.2, 0)
    assert np.concatenate(learned.tokens).tolist() == list(range(80))
    assert np.concatenate(held.tokens).tolist() == list(range(80, 100))
    many = documents(*[5] * 40)
    learned, held = data.split(many, 0.1, 0)
    assert (len(learned.tokens), len(held.tokens)) == (36, 4)
    assert data.split(many, 0.1, 0)[1].digest == held.digest != data.split(many, 0.1, 1)[1].digest


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: data.split(documents(10), 0.01, 0), "nothing to hold out"),
        (lambda: data.split(documents(*[3] * 30), 0.001, 0), "30 examples.*--valid FILE"),
        (
            lambda: Stream(documents(20), 4, 5, carried=True, seed=0),
            "20 tokens, fewer than one batch of 4 x 5",
        ),
        (lambda: Rows(documents(3, 3, examples=True), 4, 5, seed=0), "2 examples, fewer than the 4"),
    ],
)
def test_too_little_data(build, words):
    with pytest.raises(PararnnError, match=words):
        build()
