"""Completing a text that is being typed: at each keystroke what plain reading of the whole text gives."""

import math
import random
import re

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import mlx_pararnn
from mlx_pararnn import Completer, Model, ModelArgs, PararnnError, completion
from mlx_pararnn.cache import RecurrentCache
from mlx_pararnn.loading import load_tokenizer
from mlx_pararnn.text.byte_vocabulary import ByteVocabulary
from mlx_pararnn.training.tokenizers import write_tokenizer
from tests.support.demo import DEMO

TEXT = 'def turn(self):\n    return self.turned\n\n\nfor é in "été ü":\n    print(é, 東, "😀")\n' * 9
SIZE = 330  # of the vocabulary: 256 bytes, the end, and what is common in TEXT


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    write_tokenizer(f"bpe:{SIZE}", [TEXT], folder)
    return load_tokenizer(folder, {})


@pytest.fixture(scope="module")
def model():
    return small()


def small(seed=0, **more):
    mx.random.seed(seed)
    made = Model(ModelArgs(32, 2, SIZE, 48, cell="gru", num_heads=2, **more))
    made.model.embed_tokens.weight *= 60  # surer than at random, so that no tokens are as likely as others
    mx.eval(made.parameters())
    return made


@pytest.fixture
def all_spellings(monkeypatch):
    """Every way to spell the end of a text is followed, so that probabilities are exact."""
    monkeypatch.setattr(completion, "HEALED", 4)  # there are not too many
    monkeypatch.setattr(completion, "EXPANSIONS", 10**6)
    monkeypatch.setattr(completion, "NEGLIGIBLE", 0)


def plainly(model, tokenizer, prefix, max_tokens):
    """The bytes of the tokens that follow and their probabilities, by reading all anew for every token."""
    backend = tokenizer.backend_tokenizer
    names = ByteVocabulary(tokenizer, SIZE).bytes
    tokens = [tokenizer.eos_token_id, *backend.encode(prefix).ids]
    words = backend.pre_tokenizer.pre_tokenize_str(prefix)
    last = len(backend.encode(prefix[: words[-1][1][0]]).ids) if words else len(tokens)
    base = max(last + 1, len(tokens) - completion.HEALED) if words else last
    rest = b"".join(names[token] for token in tokens[base:])

    def after(path):
        return np.array(mx.softmax(model(mx.array([[*tokens[:base], *path]]))[0, -1])).astype(float)

    def spellings(path, rest, probability):
        probabilities = after(path)
        for token, name in enumerate(names):
            if name and name.startswith(rest):
                yield probability * probabilities[token], [*path, token], name[len(rest) :]
            elif name and rest.startswith(name):
                yield from spellings([*path, token], rest[len(name) :], probability * probabilities[token])

    found = list(spellings([], rest, 1.0)) if rest else [(1.0, [], b"")]
    best, path, written = max(found)
    yield written, best / sum(mass for mass, *_ in found)
    for _ in range(max_tokens):
        probabilities = after(path)
        token = int(probabilities.argmax())
        if not names[token]:
            return
        yield names[token], probabilities[token]
        path = [*path, token]


def beginning(tokens, min_probability):
    """The text of the first tokens that are likely enough: whole characters, no blanks at the line's end."""
    written, whole = b"", 1.0
    for name, probability in tokens:
        whole *= probability
        if whole < min_probability:
            break
        written += name
    try:
        text = written.decode()
    except UnicodeDecodeError as error:
        text = written[: error.start].decode()
    return re.split("[\r\n]", text)[0].rstrip(" \t")


def typing(seed, count):
    """The texts before a cursor: somebody types, takes back, jumps, pastes, changes what stands before."""
    chance = random.Random(seed)
    text, place = TEXT[:40], 0
    for _ in range(count):
        yield text[:place]
        action = chance.random()
        if action < 0.5:
            typed = chance.choice(["t", "u", " ", "\n", "    ", "é", "東", " retu", "(", "1", TEXT[7:30]])
            text, place = text[:place] + typed + text[place:], place + len(typed)
        elif action < 0.75:
            back = min(place, chance.choice([1, 1, 1, 4]))
            text, place = text[: place - back] + text[place:], place - back
        elif action < 0.85:
            place = chance.randrange(len(text) + 1)
        elif action < 0.92:
            place = min(place + 1, len(text))
        elif place > 9:  # another's edit, before the cursor
            text, place = text[: place - 9] + "turn" + text[place - 9 :], place + 4


def check(found, tokens, least, rel):
    """That a completion is what plain reading gives."""
    assert found.text == beginning(tokens, least)
    count = next(n for n in range(len(tokens) + 1) if beginning(tokens[:n], 0) == found.text)
    assert found.probability == pytest.approx(math.prod(p for _, p in tokens[:count]), rel=rel)


@pytest.mark.parametrize("seed", range(3))
def test_each_keystroke_gives_what_plain_reading_gives(model, tokenizer, all_spellings, seed):
    completer = Completer(model, tokenizer)
    seen = set()
    for prefix in typing(seed, 25):
        tokens = list(plainly(model, tokenizer, prefix, 4))
        for least in (0, 0.05):
            found = completer.complete(prefix, max_tokens=4, min_probability=least)
            check(found, tokens, least, 1e-3)
        seen.add(found.text)
    assert len(seen) > 4


@pytest.mark.parametrize("seed", range(3))
def test_the_ways_that_are_left_out_are_hardly_likely(model, tokenizer, seed):
    completer = Completer(model, tokenizer)
    for prefix in typing(seed, 20):
        found = completer.complete(prefix, max_tokens=1, min_probability=0)
        check(found, list(plainly(model, tokenizer, prefix, 1)), 0, 0.01)


def test_the_tokens_are_those_of_the_whole_text(model, tokenizer):
    completer = Completer(model, tokenizer)
    for prefix in typing(7, 200):
        completer.complete(prefix, min_probability=1)
        assert completer.tokens == [tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(prefix).ids]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def other(**parts):
    """A byte-level tokenizer whose parts are others; merges make some tokens of TEXT's words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = parts.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_also_with_other_words_and_tokens_before_each_text(model):
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    first = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer = other(
        pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]),
        post_processor=first,
    )
    completer = Completer(model, tokenizer)
    for prefix in typing(8, 100):
        completer.complete(prefix, min_probability=1)
        assert completer.tokens == tokenizer.backend_tokenizer.encode(prefix).ids


def test_a_text_that_names_the_end_does_not_end(model, tokenizer):
    completer = Completer(model, tokenizer)
    text = "x = '<|endoftext|>'"
    for end in range(len(text) + 1):
        completer.complete(text[:end])
        assert tokenizer.eos_token_id not in completer.tokens[1:]


def test_what_a_keystroke_reads_is_bounded(model, tokenizer):
    completer = Completer(model, tokenizer)
    text = TEXT[:-20]
    assert completer.complete(text, max_tokens=1).read > len(text) / 4
    for n in range(1, 20):  # typed, and nothing suggested
        typed = TEXT[: len(text) + n]
        assert completer.complete(typed, min_probability=1).read <= 1 + completion.EXPANSIONS
    total = 0
    for n in range(60):
        total += completer.complete(typed[: len(typed) - n], min_probability=1).read
    assert total <= 60 * 6
    assert completer.complete(typed[: len(typed) - 59], min_probability=1).read == 0


def test_an_accepted_suggestion_is_not_read_again(model, tokenizer):
    completer = Completer(model, tokenizer)
    found = completer.complete(TEXT[:50], max_tokens=12, min_probability=0, max_lines=9)
    assert found.read > 12
    again = completer.complete(TEXT[:50] + found.text[:-1], max_tokens=1, min_probability=1)
    assert again.read <= completion.EXPANSIONS


class Scripted:
    """A model that is sure of the tokens of one text, wherever in it they stand."""

    args = ModelArgs(32, 1, SIZE, 48)

    def __init__(self, tokens):
        self.tokens = tokens

    def make_cache(self):
        return [RecurrentCache()]

    def __call__(self, tokens, cache):
        count = tokens.shape[1]
        following = [self.tokens[min(cache[0].offset + n + 1, len(self.tokens) - 1)] for n in range(count)]
        cache[0][0] = mx.zeros((1, 1, 1))
        cache[0].advance(count)
        return 9 * mx.eye(SIZE)[mx.array(following)][None]


def scripted(tokenizer, text):
    """A completer by a model that is sure of this text and its end."""
    end = tokenizer.eos_token_id
    return Completer(Scripted([end, *tokenizer.backend_tokenizer.encode(text).ids, end]), tokenizer)


def test_a_character_more_of_what_was_suggested_reads_hardly_anything(tokenizer):
    prefix, rest = "def turn(self):\n    retu", "rn self.turned"
    completer = scripted(tokenizer, prefix + rest + "\n")
    assert completer.complete(prefix).text == rest
    for n in range(1, len(rest)):
        found = completer.complete(prefix + rest[:n])
        assert (found.text, found.read <= 1) == (rest[n:], True)


@pytest.mark.parametrize(
    ("written", "lines", "expected"),
    [
        ("x\ny\nz\n", 1, "x"),
        ("x\ny\nz\n", 2, "x\ny"),
        ("x\r\ny\r\nz", 2, "x\r\ny"),
        ("x\ry", 1, "x"),
        ("\n\nx", 1, ""),
        ("x\ny", 9, "x\ny"),
        ("é東😀\n", 1, "é東😀"),
    ],
)
def test_it_ends_with_a_line(tokenizer, written, lines, expected):
    completer = scripted(tokenizer, "for (" + written)
    assert completer.complete("for (", max_lines=lines).text == expected


@pytest.mark.parametrize("blanks", ["\n        ", "\n\n    \t", "  ", "\r\n  \r\n "], ids=repr)
def test_blanks_come_with_what_follows_or_not_at_all(tokenizer, blanks):
    """However many tokens they are: the probability of all is that of the piece which they begin."""
    completer = scripted(tokenizer, "(" + blanks)
    assert completer.complete("(", max_lines=9).pieces == ()
    completer = scripted(tokenizer, "(" + blanks + "é")
    found = [completer.complete("(", max_tokens=count, max_lines=9) for count in range(1, 20)]
    assert {one.text for one in found} == {"", blanks + "é"}
    sure = math.exp(9) / (math.exp(9) + SIZE - 1)  # as Scripted is of each token
    together = sure ** (len(tokenizer.backend_tokenizer.encode("(" + blanks + "é").ids) - 1)
    assert found[-1].pieces == ((blanks + "é", pytest.approx(together)),)
    for least, text in [(together - 1e-6, blanks + "é"), (together + 1e-6, "")]:
        assert completer.complete("(", max_lines=9, min_probability=least).text == text


def test_no_half_character_comes(tokenizer):
    completer = scripted(tokenizer, "(😀 東\n")
    texts = [completer.complete("(", max_tokens=count).text for count in range(1, 9)]
    assert set(texts) == {"", "😀", "😀 東"}
    assert texts == sorted(texts, key=len)
    names = ByteVocabulary(tokenizer, SIZE).bytes
    broken = [names.index(some) for some in (b"(", b"a", b"\xc3", b"\xc3", b"b")]  # no UTF-8
    completer = Completer(Scripted([tokenizer.eos_token_id, *broken]), tokenizer)
    assert completer.complete("(").text == "a"


def test_probabilities_say_where_any_threshold_ends_it(model, tokenizer):
    completer = Completer(model, tokenizer)
    for prefix in typing(3, 20):
        whole = completer.complete(prefix, min_probability=0, max_lines=3)
        for least in (0.01, 0.1, 0.5):
            kept, probability = "", 1.0
            for text, likely in whole.pieces:
                probability *= likely
                if probability < least:
                    break
                kept += text
            assert completer.complete(prefix, min_probability=least, max_lines=3).text == kept


def test_a_long_text_is_read_from_its_last_tokens_on(model, tokenizer):
    text = TEXT * 3
    completer = Completer(model, tokenizer, window=100)
    found = completer.complete(text, max_tokens=1)
    assert 80 < found.read < 130
    begin = completer.begin
    for end in range(len(text) - 20, len(text)):  # taken back, and typed again
        found = completer.complete(text[:end], min_probability=0)
        assert completer.begin == begin
        plain = Completer(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
        assert found.text == plain.complete(text[begin:end], min_probability=0).text
    assert completer.complete(text + 9 * text, max_tokens=1).read < 130  # pasted
    jumped = completer.complete(text[:300], min_probability=0)  # to where nothing was read
    assert jumped == Completer(model, tokenizer, window=100).complete(text[:300], min_probability=0)


def test_learned_positions_never_run_out(tokenizer):
    completer = Completer(small(max_position_embeddings=128), tokenizer)
    text = TEXT[:330]
    reads = [completer.complete(text[:end], min_probability=0).read for end in range(len(text))]
    assert max(reads) < 128
    with pytest.raises(PararnnError, match="100 learned positions has no room"):
        Completer(small(max_position_embeddings=100), tokenizer)


def test_a_model_of_bytes_has_nothing_to_take_back():
    completer = Completer(*mlx_pararnn.load(DEMO))
    text = "import os\n\nclass Reader:\n    def read(self, name):\n        return open(name)\n" * 40
    completer.complete(text, min_probability=1)
    for n in range(1, 6):
        assert completer.complete(text + "class"[:n], min_probability=1).read <= 1
    assert completer.complete("", min_probability=0).text == ""  # it has no token that begins a text


def test_of_an_interrupt_nothing_is_left(model, tokenizer, monkeypatch):
    completer = Completer(model, tokenizer)
    expected = completer.complete(TEXT[:80], min_probability=0).text

    call = Model.__call__

    def interrupted(self, *given, **more):
        call(self, *given, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Model, "__call__", interrupted)
        for text in (TEXT[:90], TEXT[:80]):
            with pytest.raises(KeyboardInterrupt):
                completer.complete(text, min_probability=0)
    assert completer.complete(TEXT[:80], min_probability=0).text == expected


@pytest.mark.parametrize("prefix", ["x\ud800", "\udce4 = 1"])
def test_a_prefix_with_lone_surrogates_is_refused(model, tokenizer, prefix):
    completer = Completer(model, tokenizer)
    with pytest.raises(PararnnError, match="not UTF-8 text"):
        completer.complete(prefix)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"max_lines": 0}, {"min_probability": -0.1}, {"min_probability": 1.1}]
)
def test_numbers_out_of_range_are_refused(model, tokenizer, wrong):
    with pytest.raises(PararnnError, match="max_tokens and max_lines must be at least 1"):
        Completer(model, tokenizer).complete("x", **wrong)


def test_a_tokenizer_that_changes_the_text_is_refused(model):
    fallback = {"decoder": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])}
    for parts in ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, fallback):
        with pytest.raises(PararnnError, match="is not byte-level or changes what it reads"):
            Completer(model, other(**parts))
    Completer(model, other(normalizer=normalizers.NFC())).complete("e\u0301")  # is read as it stands


def test_complete_is_a_completers_text(monkeypatch):
    text = mlx_pararnn.complete("class Rea", DEMO, min_probability=0)
    with pytest.raises(TypeError, match=r"^complete\(\) got an unexpected keyword argument 'foo'"):
        mlx_pararnn.complete("class Rea", foo=1)
    completer = Completer(*mlx_pararnn.load(DEMO))
    assert text == completer.complete("class Rea", min_probability=0).text
    monkeypatch.setattr(completion, "COMPLETION", DEMO)
    assert mlx_pararnn.complete("class Rea", min_probability=0) == text


@pytest.mark.parametrize(
    "text", ["z" * 300, "東" * 200, "z" * 300 + "\n"], ids=["letters", "characters", "a line"]
)
def test_a_word_that_is_longer_than_the_window(tokenizer, text):
    completer = Completer(small(max_position_embeddings=128), tokenizer)  # a window of 64
    found = [completer.complete(text + more) for more in ("", "z", "zz", "z")]
    assert 40 <= len(completer.tokens) <= 96
    assert found[0].read <= 64 + 128
    assert all(completion.read <= 128 for completion in found[1:])
