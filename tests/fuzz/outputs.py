"""Targets of what a model says: marks and calls of tools, tokens as text, grammars that answers keep."""

import contextlib
import json
import random
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import mlx.core as mx
import mlx_lm.tool_parsers
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.chat.server.choices import MessageParser, Part
from mlx_pararnn.chat.server.schema import check_schema
from mlx_pararnn.pocket.answers import assistant_functions
from mlx_pararnn.pocket.assistant import Assistant
from mlx_pararnn.pocket.protocol import Command, find_protocol
from mlx_pararnn.text.detokenizer import BYTE_TOKEN, BYTES, Detokenizer, StopMatcher
from mlx_pararnn.text.grammars import GrammarProcessor, Grammars
from tests.fuzz.inputs import JSON_WORDS, small_model
from tests.fuzz.target import Target


def calls(_: Path) -> Target:
    """What a model says: marks of the protocol in any order, and calls of functions."""
    tokenizer = mlx_pararnn.load()[1]
    protocol = find_protocol(tokenizer)
    assert protocol is not None
    functions = assistant_functions(Assistant())
    called = protocol.render_call("add", {"a": 1})
    turns = [
        protocol.render_message("add 1 and 2"),
        [
            *protocol.render_message("add 1"),
            *called,
            *protocol.render_result("3"),
            *protocol.render_answer("3"),
        ],
        [*called[:9], protocol.command_ids[Command("read", 1)], *called[9:]],
    ]
    seeds = [
        *(bytes(t if t < 256 else t - 256 + 0xF5 for t in turn) for turn in turns),
        b'{"name": "x", "arguments": {}}',
        *(json.dumps({"name": f.name, "arguments": {"text": "1", "n": 1}}).encode() for f in functions),
    ]

    def run(data: bytes) -> None:
        # Bytes that stand in no UTF-8 are the special tokens.
        tokens = [byte if byte < 0xF5 else byte - 0xF5 + 256 for byte in data]
        with contextlib.suppress(PararnnError):
            parts = protocol.split(tokens)
            assert [token for part in parts for token in part.tokens] == tokens
        protocol.decode(tokens)
        try:
            call = json.loads(data)
            name, arguments = str(call["name"]), json.dumps(call["arguments"])
        except (ValueError, TypeError, LookupError, RecursionError):
            name, arguments = next(iter(functions)).name, data.decode(errors="replace")
        assert isinstance(functions.call(name, arguments).text, str)

    marks = tuple(bytes([byte]) for byte in range(0xF5, 0x100))
    return Target(run, seeds, (*JSON_WORDS, *marks))


def detokenizer(_: Path) -> Target:
    """Tokens to text, and stop strings in it: pieces are the whole."""
    alphabet = sorted(BYTES, key=BYTES.__getitem__)
    vocabulary = {character: n for n, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)

    def run(data: bytes) -> None:
        tokens, stop = list(data), data[-3:].decode(errors="replace") or "x"
        streaming = Detokenizer(tokenizer)
        matcher, text = StopMatcher([stop]), ""
        for token in tokens:
            streaming.add_token(token)
            text += matcher.add(streaming.last_segment) if matcher.found is None else ""
        streaming.finalize()
        whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert streaming.text == whole, (streaming.text, whole)
        text += matcher.add(streaming.last_segment) if matcher.found is None else ""
        text += matcher.flush() if matcher.found is None else ""
        assert text == whole.partition(stop)[0], (text, whole, stop)

    return Target(run, ["Größe \U0001f600 x".encode(), b"\xf0\x9f\x98", b"aab aab aaab"])


# A call as each of MLX-LM's parsers reads it, without the marks around it.
CALLS = {
    "function_gemma": "call:f{a:<escape>x<escape>,n:1}",
    "gemma4": 'call:f{a:<|"|>x<|"|>,n:1,o:{p:[true]}}',
    "glm47": "f<arg_key>a</arg_key><arg_value>x</arg_value><arg_key>n</arg_key><arg_value>1</arg_value>",
    "json_tools": '{"name": "f", "arguments": {"a": "x", "n": 1, "o": {"p": [true]}}}',
    "kimi_k2": '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": "x"}<|tool_call_end|>',
    "kimi_k3": '<|open|>call tool="f" index="1"<|sep|><|open|>argument key="a" type="string"<|sep|>x'
    "<|close|>argument<|sep|><|close|>call<|sep|>",
    "laguna": "f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>",
    "longcat": "f<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>x</longcat_arg_value>",
    "minicpm5": '"f"><param name="a">x</param><param name="n">1</param>',
    "minimax_m2": '<invoke name="f"><parameter name="a">x</parameter></invoke>',
    "mistral": 'f[ARGS]{"a": "x", "n": 1}',
    "muse_spark": '<atem:invoke name="f"><atem:parameter name="a">x</atem:parameter></atem:invoke>',
    "pythonic": "[f(a='x', n=1), g(o={'p': [true]})]",
    "qwen3_coder": "<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=n>1</parameter>\n</function>",
}


def tool_calls(_: Path) -> Target:
    """Calls of tools in the texts of models, which MLX-LM's parsers read: whole and in pieces the same."""
    words = {word: n for n, word in enumerate(["?", "<think>", "</think>"])}
    inner = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="?")))
    kinds = ("string", "integer", "number", "boolean", "array", "object")
    properties = {name: {"type": kind} for name, kind in zip("anbcdo", kinds, strict=True)}
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": function}]
    names = sorted(CALLS.keys() & {module.name for module in iter_modules(mlx_lm.tool_parsers.__path__)})
    tokenizers, seeds, marks = [], [], {b"<think>", b"</think>"}
    for n, name in enumerate(names):
        module = import_module(f"mlx_lm.tool_parsers.{name}")
        start, end = module.tool_call_start, module.tool_call_end
        tokenizers.append(
            TokenizerWrapper(
                inner, tool_parser=module.parse_tool_call, tool_call_start=start, tool_call_end=end
            )
        )
        text = f"<think>y</think>z{start}{CALLS[name]}{end}"
        part = said(MessageParser(tokenizers[n], tools, False), [text])
        assert part.calls, f"{name}: no call is found in {text}"
        seeds.append(bytes([n]) + text.encode())
        marks |= {mark.encode() for mark in (start, end) if mark}

    def run(data: bytes) -> None:
        tokenizer = tokenizers[data[0] % len(tokenizers) if data else 0]
        text, chance = data[1:].decode(errors="replace"), random.Random(data)
        whole = said(MessageParser(tokenizer, tools, False), [text])
        assert all(type(call["id"]) is type(call["function"]["name"]) is str for call in whole.calls)
        # As a response is written.
        json.dumps(whole.delta(), ensure_ascii=False, allow_nan=False).encode()
        for call in whole.calls:
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        cuts = sorted(chance.randrange(len(text) + 1) for _ in range(4))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        part = said(MessageParser(tokenizer, tools, False), pieces)
        told = [(part.content, part.reasoning, [call["function"] for call in part.calls])
                for part in (whole, part)]  # fmt: skip
        assert told[0] == told[1], (told, pieces)

    return Target(run, seeds, (*JSON_WORDS, *sorted(marks), b"'", b"<", b">", b"</", b"(", b")", b"="))


def said(parser: MessageParser, pieces: list[str]) -> Part:
    """All that a parser tells of a text."""
    parts = [*map(parser.add, pieces), parser.add("", last=True)]
    content, reasoning = ("".join(getattr(part, kind) for part in parts) for kind in ("content", "reasoning"))
    return Part(content, reasoning, [call for part in parts for call in part.calls])


def pieces(_: Path) -> Target:
    """Tokens to text, of tokenizers whose tokens are pieces of words, and bytes where there is none."""
    mark, texts = "\u2581", ("a", "Hello", "größe", "\U0001f600", "\ufffd", "\x00", "\n", ".", "'", "n't")
    names = [
        *(f"<0x{byte:02X}>" for byte in range(256)),
        mark,
        mark * 3,
        *(mark + text for text in texts),
        *texts,
    ]
    vocabulary = {name: n for n, name in enumerate(names)}
    replaced = [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()]
    kinds = [
        decoders.Sequence([*replaced, decoders.Strip(" ", 1, 0)]),
        decoders.Sequence(replaced),
        decoders.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.WordPiece(cleanup=False),
    ]
    tokenizers = []
    for kind in kinds:
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
        inner.decoder = kind
        tokenizers.append(PreTrainedTokenizerFast(tokenizer_object=inner))

    def run(data: bytes) -> None:
        tokenizer = tokenizers[data[0] % len(kinds) if data else 0]
        tokens = [int.from_bytes(data[at : at + 2]) % len(names) for at in range(2, len(data) - 1, 2)]
        cut = min(data[1], len(tokens)) if tokens else 0  # what the prompt has of them
        before, after = tokens[:cut], tokens[cut:]
        streaming = Detokenizer(tokenizer, before)
        text = ""
        for token in after:
            streaming.add_token(token)
            text += streaming.last_segment
        streaming.finalize()
        text += streaming.last_segment
        assert text == streaming.text
        if all(map(is_text, [*runs_of_bytes(before), *runs_of_bytes(tokens)])):
            prompt = str(tokenizer.decode(before, clean_up_tokenization_spaces=False))
            whole = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
            assert prompt + text == whole, (prompt, text, whole)

    def runs_of_bytes(tokens: list[int]) -> list[bytes]:
        runs = [b""]
        for token in tokens:
            match = BYTE_TOKEN.fullmatch(names[token])
            if match:
                runs[-1] += bytes([int(match[1], 16)])
            elif runs[-1]:
                runs.append(b"")
        return runs

    texts_of_bytes = [[f"<0x{byte:02X}>" for byte in text.encode()] for text in ("größe", " \U0001f600")]
    lines = [[mark + "Hello", mark, ".", "a"], [*texts_of_bytes[0], "a"], [*texts_of_bytes[1], mark + "a"]]
    seeds = [
        bytes([kind, cut]) + b"".join(vocabulary[name].to_bytes(2) for name in line)
        for kind in range(len(kinds))
        for cut in (0, 1)
        for line in lines
    ]
    return Target(run, seeds, tuple(vocabulary[name].to_bytes(2) for name in names))


def is_text(some_bytes: bytes) -> bool:
    """Whether bytes are whole characters."""
    try:
        some_bytes.decode()
    except UnicodeDecodeError:
        return False
    return True


def schemas(folder: Path) -> Target:
    """JSON schemas of requests and tools, made into grammars, and a few tokens that keep to them."""
    _, tokenizer = mlx_pararnn.load(small_model(folder))
    grammars = Grammars(tokenizer, 256)

    def follow(grammar: str, chance: random.Random) -> None:
        keep, tokens = GrammarProcessor(grammars.compile(grammar), 0), mx.array([], mx.int32)
        for _ in range(8):
            allowed = keep(tokens, mx.zeros((1, 256)))
            if keep.finished:
                return
            choices = np.flatnonzero(np.array(allowed[0]) == 0).tolist()
            tokens = mx.concatenate([tokens, mx.array([chance.choice(choices)], mx.int32)])

    def run(data: bytes) -> None:
        try:
            schema = json.loads(data)
            check_schema(schema, "schema")
        except (ValueError, RecursionError):
            return
        function = {"name": "f", "parameters": schema}
        for make in (
            grammars.json,
            lambda schema: grammars.calls([function, {"name": "g"}], "<tool_call>", "</tool_call>", True),
            grammars.call_arguments,
        ):
            with contextlib.suppress(PararnnError):
                follow(make(schema), random.Random(data))

    text = {"type": "string", "minLength": 1, "maxLength": 4, "pattern": "^[a-z]+$"}
    seeds = [
        {"type": "object", "properties": {"a": text, "b": {"type": "integer", "minimum": 1, "maximum": 99}},
         "required": ["a"]},
        {"type": "array", "items": {"enum": ["x", 1, None]}, "minItems": 1, "maxItems": 3},
        {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}},
         "$ref": "#/$defs/n"},
        {"anyOf": [{"type": "number", "multipleOf": 0.5}, {"const": {"a": [1]}}, {"type": "boolean"}]},
        {"allOf": [{"type": "object", "properties": {"a": text}}, {"required": ["a"]}]},
        {"type": "string", "format": "date-time"},
        {"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
    ]  # fmt: skip
    words = (*JSON_WORDS, b'{"$ref": "#"}', b'"(a{1000}){1000}"', b'"^(a+)+$"', b'"[^"', b'"\\\\p{L}"',
             b"999999999", b'"pattern":', b'"format":', b'"minItems":', b'"minLength":', b'"oneOf":',
             b'"not":')  # fmt: skip
    return Target(run, [json.dumps(seed).encode() for seed in seeds], words)
