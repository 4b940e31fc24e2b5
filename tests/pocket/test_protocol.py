"""The protocol of tools: its tokenizer, turns rendered and taken apart, and text that stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_pararnn import PararnnError
from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files
from mlx_pararnn.loading import load_tokenizer
from mlx_pararnn.pocket.protocol import (
    COMMANDS,
    SPECIAL_TOKENS,
    Command,
    declares_protocol,
    find_protocol,
    tokenizer_files,
)


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return load_tokenizer(folder, {})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokenizer"), tokenizer_files())


@pytest.fixture(scope="module")
def protocol(tokenizer):
    return find_protocol(tokenizer)


def test_ids_are_the_bytes_and_then_the_special_tokens(tokenizer, protocol):
    assert protocol.byte_ids == tuple(range(256))
    assert [tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS] == list(range(256, 278))
    assert (protocol.user, protocol.end, protocol.edge) == (256, 257, 261)
    assert protocol.commands[protocol.command_ids[Command("read", 1)]] == Command("read", 1)
    assert Command("left", 4).name == "<|left4|>"
    assert tokenizer.eos_token_ids == {protocol.end}
    assert len(COMMANDS) == len(protocol.commands) == 16


@pytest.mark.parametrize("loader", ["transformers", "mlx_lm"])
def test_other_libraries_load_the_tokenizer(tmp_path, protocol, loader):
    write(tmp_path, tokenizer_files())
    if loader == "transformers":
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    else:
        from mlx_lm.tokenizer_utils import load

        tokenizer = load(tmp_path)
    assert tokenizer.encode("é 0") == [0xC3, 0xA9, 0x20, 0x30]
    assert tokenizer.decode([0xC3, 0xA9, 0x20, 0x30]) == "é 0"
    assert find_protocol(tokenizer) == protocol
    assert declares_protocol(tmp_path)


def test_a_tokenizer_without_all_tokens_speaks_no_protocol(tmp_path, tokenizer):
    assert find_protocol(write(tmp_path, byte_tokenizer_files())) is None
    assert not declares_protocol(tmp_path)
    broken = json.loads(tokenizer_files()["tokenizer.json"])
    broken["added_tokens"].pop()
    files = {**tokenizer_files(), "tokenizer.json": json.dumps(broken)}
    assert find_protocol(write(tmp_path, files)) is None
    assert not declares_protocol(tmp_path)


def test_ids_come_from_the_tokenizer_whatever_their_order(tmp_path):
    shifted = json.loads(tokenizer_files()["tokenizer.json"])
    shifted["model"]["vocab"] = {name: 255 - id for name, id in shifted["model"]["vocab"].items()}
    files = {**tokenizer_files(), "tokenizer.json": json.dumps(shifted)}
    protocol = find_protocol(write(tmp_path, files))
    ids = [255 - byte for byte in b"ab"]
    assert protocol.encode("ab") == ids
    assert protocol.decode([*ids, protocol.end]) == "ab"


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_message_that_looks_like_special_tokens_stays_bytes(tokenizer, protocol, name):
    text = f"2+2{name}{name}<|end"
    tokens = protocol.encode(text)
    assert tokens == list(text.encode())
    assert protocol.decode(tokens) == text
    # What a tokenizer makes of the same text, and why it is not used.
    assert tokenizer.convert_tokens_to_ids(name) in tokenizer.encode(text)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_come_back_and_hold_bytes_only(protocol, message, result):
    turn = [
        *protocol.render_message(message),
        *protocol.render_call("f", {"x": message}),
        *protocol.render_result(result),
        *protocol.render_answer(result),
    ]
    kinds = {segment.kind: segment.tokens for segment in protocol.split(turn)}
    assert list(kinds) == ["message", "call", "result", "answer"]
    plain = " ".join(message.split()) or message
    assert protocol.decode(kinds["message"]) == plain
    assert protocol.decode(kinds["result"]) == protocol.decode(kinds["answer"]) == result
    assert json.loads(protocol.decode(kinds["call"])) == {"name": "f", "arguments": {"x": message}}
    assert sum(token > 255 for token in turn) == 2 + 2 + 1 + 2


def test_a_turn_in_segments_and_its_loss_mask(protocol):
    read, right = (protocol.command_ids[Command(action, 1)] for action in ("read", "right"))
    turn = [
        *protocol.render_message("7"),
        read,
        protocol.user,  # what stands at the beginning of the memory
        right,
        ord("k"),
        *protocol.render_call("f", {}),
        *protocol.render_result("ok"),
        protocol.answer,
        ord("7"),
        read,
        protocol.edge,
        ord("!"),
        protocol.end,
    ]
    position = turn.index(protocol.call) + 3
    turn[position:position] = [read, ord("7"), right]  # inside the call
    segments = protocol.split(turn)
    assert [token for segment in segments for token in segment.tokens] == turn
    assert [segment.kind for segment in segments] == [
        *("message", "command", "observation", "command", "thought", "call"),
        *("command", "observation", "command", "call", "result"),
        *("answer", "command", "observation", "answer"),
    ]
    fed = [turn[n] for n, made in enumerate(protocol.loss_mask(turn)) if not made]
    assert fed == [
        *protocol.render_message("7"),
        protocol.user,
        ord("7"),
        *protocol.render_result("ok"),
        protocol.edge,
    ]


@pytest.mark.parametrize(
    ("tail", "where"),
    [
        (["answer", "answer"], "token 4 is <|answer|>"),
        (["result"], "token 3 is <|result|>"),
        (["call", "end"], "token 4 is <|end|>"),
        (["call", "read1", "edge", "answer"], "token 6 is <|answer|>"),
        (["answer", "call"], "token 4 is <|call|>"),
        (["answer", "end", "end"], "token 5 is <|end|>"),
        (["edge"], "token 3 is <|edge|>"),
        (["unknown"], "token 3 is token 999"),
    ],
)
def test_tokens_out_of_order_are_refused_and_named(tokenizer, protocol, tail, where):
    turn = protocol.render_message("1")
    turn += [999 if name == "unknown" else tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in tail]
    with pytest.raises(PararnnError, match="cannot stand here") as raised:
        protocol.split(turn)
    assert where in str(raised.value)


def test_text_that_is_no_unicode_is_refused(protocol):
    with pytest.raises(PararnnError, match="not UTF-8"):
        protocol.render_message("\udcff")
