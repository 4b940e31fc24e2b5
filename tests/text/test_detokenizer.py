"""Tokens to text, one at a time: for every kind of tokenizer prompt and answer are the decoded whole."""

import codecs
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_pararnn.text.detokenizer import BYTES, Detokenizer, StopMatcher, Tokens

WORDS = ["Hello", "world", "x", "größe", "日本", " ", "  ", "🙂", ".", "'s", "\n", "\x00"]
MARK = "\u2581"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level():
    """GPT-NeoX's kind; its pieces cut characters in two."""
    characters = {byte: character for character, byte in BYTES.items()}
    pieces = {"".join(characters[b] for b in word.encode()) for word in [*WORDS, " world", " 日", "é"]}
    cut = {
        "".join(characters[b] for b in piece) for piece in (b"a\xe6\x97", b"\xa5\xe6", b"\x9c\xac", b"\xf0")
    }
    names = [*characters.values(), *sorted((pieces | cut) - set(characters.values()))]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|a b|>", "▁"])
    return tokenizer


def sentencepiece(strip=True):
    names = [*BYTE_TOKENS, MARK, *(MARK + word for word in WORDS[:5]), *WORDS[:5], MARK * 3, "."]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="."))
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    return tokenizer


def metaspace(scheme="always"):
    names = [MARK, *(MARK + word for word in WORDS[:5]), *WORDS[:5], "."]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="."))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def word_piece(cleanup=False):
    names = ["Hello", "world", "##s", "##ing", "x", ".", "'", "s", "n't", "do", "not"]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="."))
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return tokenizer


def suffixes():
    """GPT-1's kind: a word's last piece says so."""
    names = ["Hello</w>", "wor", "ld</w>", "x</w>", "</w>", "größe</w>", "."]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="."))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


KINDS = {
    "byte level": byte_level(),
    "SentencePiece": sentencepiece(),
    "SentencePiece, space kept": sentencepiece(strip=False),
    "Metaspace": metaspace(),
    "Metaspace, no first space": metaspace("never"),
    "WordPiece": word_piece(),
    "WordPiece, cleaned up": word_piece(cleanup=True),
    "suffixes": suffixes(),
    "none": Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token=" ")),
}
OF_BYTES = ["byte level", "SentencePiece", "SentencePiece, space kept"]
TOKENIZERS = {
    name: PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    for name, tokenizer in KINDS.items()
}


def token_bytes(tokenizer, token):
    return Tokens(tokenizer).bytes_in_text(token)


def stream(tokenizer, tokens, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    pieces = []
    for token in tokens:
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    pieces.append(detokenizer.last_segment)
    assert detokenizer.text == "".join(pieces)
    return pieces


@st.composite
def texts(draw, tokenizer):
    """Token ids; byte tokens make whole characters, because decoders replace all that join a broken one."""
    plain = [n for n in range(len(tokenizer)) if not tokenizer.convert_ids_to_tokens(n).startswith("<0x")]
    parts = [st.sampled_from(plain).map(lambda n: [n])]
    if "<0x00>" in tokenizer.get_vocab():
        characters = st.text(min_size=1, max_size=3).filter(lambda text: text.isprintable())
        parts.append(
            characters.map(lambda t: tokenizer.convert_tokens_to_ids([BYTE_TOKENS[b] for b in t.encode()]))
        )
    return list(itertools.chain(*draw(st.lists(st.one_of(parts), min_size=1, max_size=20))))


def test_a_space_as_a_byte_at_the_beginning():
    for kind in ("SentencePiece", "SentencePiece, space kept"):
        tokenizer = TOKENIZERS[kind]
        space = tokenizer.convert_tokens_to_ids("<0x20>")
        for answer in ([space], [space, space], [space, *tokenizer.convert_tokens_to_ids(["Hello"])]):
            assert "".join(stream(tokenizer, answer)) == tokenizer.decode(answer), kind


@pytest.mark.sampled("large", by=lambda kind: [kind.split(",")[0]])
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_prompt_and_answer_are_the_decoded_whole(kind, data):
    tokenizer = TOKENIZERS[kind]
    prompt, answer = data.draw(texts(tokenizer)), data.draw(texts(tokenizer))
    whole, said = tokenizer.decode(prompt + answer), tokenizer.decode(prompt)
    text = "".join(stream(tokenizer, answer, prompt))
    if whole.startswith(said):
        assert said + text == whole
    else:  # the prompt ends within a character, which the answer completes
        assert kind == "byte level"
        assert whole == said.rstrip("\ufffd") + text or whole.endswith(text)
    assert "".join(stream(tokenizer, answer)) == tokenizer.decode(answer)


def byte_tokens(kind, data):
    names = sorted(BYTES, key=BYTES.__getitem__) if kind == "byte level" else BYTE_TOKENS
    return TOKENIZERS[kind].convert_tokens_to_ids([names[byte] for byte in data])


def ends_within_a_character(data):
    return codecs.getincrementaldecoder("utf-8")().decode(data) != data.decode(errors="replace")


@pytest.mark.parametrize("kind", OF_BYTES)
@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1, max_size=5).filter(str.isprintable))
def test_a_prompt_that_ends_within_a_character(kind, text):
    """The answer's text begins with that character, whole."""
    tokenizer, data = TOKENIZERS[kind], text.encode()
    tokens = byte_tokens(kind, data)
    for cut in range(1, len(tokens)):
        before = cut
        while ends_within_a_character(data[:before]):
            before -= 1
        whole, said = tokenizer.decode(tokens), tokenizer.decode(tokens[:before])
        assert said + "".join(stream(tokenizer, tokens[cut:], tokens[:cut])) == whole


@pytest.mark.parametrize("kind", OF_BYTES)
@settings(max_examples=100, deadline=None)
@given(runs=st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=3), data=st.data())
def test_bytes_that_are_no_text_are_replaced_as_they_come(kind, runs, data):
    """As bytes.decode replaces them; byte-fallback decoders replace all that joins them."""
    tokenizer = TOKENIZERS[kind]
    text = tokenizer.convert_tokens_to_ids("x")
    tokens = list(itertools.chain(*([*byte_tokens(kind, run), text] for run in runs)))
    expected = "".join(run.decode(errors="replace") + "x" for run in runs)
    if kind == "SentencePiece":  # which drops a space that a text begins with
        expected = expected.removeprefix(" ")
    assert "".join(stream(tokenizer, tokens)) == expected
    if kind == "byte level":
        assert tokenizer.decode(tokens) == expected
        cut = data.draw(st.integers(0, len(tokens)))
        answer, said = "".join(stream(tokenizer, tokens[cut:], tokens[:cut])), tokenizer.decode(tokens[:cut])
        assert said + answer == expected or said.removesuffix("\ufffd") + answer == expected


# Without "suffixes", whose spaces depend on both neighbours.
@pytest.mark.sampled("large", by=lambda kind: [kind.split(",")[0]])
@pytest.mark.parametrize("kind", sorted(TOKENIZERS.keys() - {"suffixes"}))
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_the_bytes_of_tokens_join_to_the_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    first, *rest = data.draw(texts(tokenizer))
    joined = tokenizer.decode([first]).encode() if kind != "byte level" else token_bytes(tokenizer, first)
    name = tokenizer.convert_ids_to_tokens(first)
    if "<0x" in name and name != "<0x20>":  # decoders may drop a space that a text begins with
        joined = token_bytes(tokenizer, first)
    joined += b"".join(token_bytes(tokenizer, token) for token in rest)
    assert joined.decode(errors="replace") == tokenizer.decode([first, *rest])


def test_the_first_space_and_byte_0_stay():
    tokenizer = TOKENIZERS["byte level"]
    tokens = tokenizer.convert_tokens_to_ids(["Ġworld", "Ā"])
    assert stream(tokenizer, tokens) == [" world", "\x00", ""]
    tokenizer = TOKENIZERS["SentencePiece"]
    hello, world = tokenizer.convert_tokens_to_ids([MARK + "Hello", MARK + "world"])
    assert stream(tokenizer, [world], [hello])[0] == " world"
    assert token_bytes(tokenizer, world) == b" world"


def test_no_part_of_a_character_is_given_and_a_broken_one_is_replaced():
    tokenizer = TOKENIZERS["byte level"]
    smile = tokenizer.convert_tokens_to_ids([{b: c for c, b in BYTES.items()}[b] for b in "🙂".encode()])
    assert stream(tokenizer, smile) == ["", "", "", "🙂", ""]
    assert stream(tokenizer, smile[:3]) == ["", "", "", "\ufffd"]
    fallback = TOKENIZERS["SentencePiece"]
    smile = fallback.convert_tokens_to_ids([BYTE_TOKENS[b] for b in "🙂".encode()])
    assert "".join(stream(fallback, [*smile[:2], fallback.convert_tokens_to_ids("x")])) == "\ufffdx"
    assert b"".join(token_bytes(fallback, token) for token in smile) == "🙂".encode()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_step_decodes_two_tokens_at_most_however_many_came_before(kind, monkeypatch):
    tokenizer = TOKENIZERS[kind]
    decoded = []
    decode = type(tokenizer).decode

    def counting(self, tokens, **options):
        decoded.append(len(tokens))
        return decode(self, tokens, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counting)
    tokens = [n % len(tokenizer) for n in range(3000)]
    detokenizer = Detokenizer(tokenizer, tokens)
    for token in tokens:
        decoded.clear()
        detokenizer.add_token(token)
        assert len(decoded) <= 2
        assert sum(decoded) <= 3


def test_ids_beyond_the_tokenizer_are_nothing():
    for kind in ("byte level", "SentencePiece"):
        assert stream(TOKENIZERS[kind], [100_000]) == ["", ""]


alphabet = st.text(alphabet="ab🙂", max_size=30)


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(alphabet, max_size=8), stop=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5)))
def test_a_text_is_cut_at_its_first_stop(pieces, stop):
    """The oracle looks at the full text: the stop string that is complete first, the longest of those."""
    text = "".join(pieces)
    ends = [(text.find(word) + len(word), -len(word)) for word in stop if word in text]
    expected = text if not ends else text[: sum(min(ends))]
    matcher = StopMatcher(stop)
    given_out = [matcher.add(piece) for piece in pieces]
    assert "".join(given_out) + matcher.flush() == expected
    assert (matcher.found is not None) == bool(ends)
