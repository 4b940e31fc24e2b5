"""What is fuzzed: of each target a function of bytes that raises on a finding only, and first inputs."""

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.chat.server.messages import read_messages
from mlx_pararnn.chat.server.prompts import Prompts
from mlx_pararnn.chat.server.responses import StoredResponses, read_responses
from mlx_pararnn.chat.server.schema import (
    ChatRequest,
    CompletionRequest,
    Refused,
    TokenizeRequest,
    read_request,
)
from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli import chat_commands
from mlx_pararnn.cli.sampling import LIKELIEST
from mlx_pararnn.cli.tool_lines import ToolLines
from mlx_pararnn.convert.readers.forms import read_weights
from mlx_pararnn.convert.readers.pickles import load_pickle
from mlx_pararnn.loading import load_model, load_tokenizer
from mlx_pararnn.pocket.answers import assistant_functions
from mlx_pararnn.pocket.protocol import Command, find_protocol
from mlx_pararnn.process.watchdog import Watchdog
from mlx_pararnn.text.detokenizer import BYTES, Detokenizer, StopMatcher
from mlx_pararnn.training.data import read_documents
from tests.fuzz.changes import Inside
from tests.fuzz.inputs import (
    JINJA_WORDS,
    JSON_WORDS,
    PICKLE_WORDS,
    TEMPLATE,
    TEMPLATES,
    ZIP_WORDS,
    header_in,
    pickle_in,
    pickles,
    small_model,
    torch_files,
)
from tests.support.golden import DATA
from tests.support.small_models import torch_lm

SMALL = 1 << 20  # bytes of tensors that are read


class Target(NamedTuple):
    """Of one kind of input.

    Attributes:
        run: takes bytes, and raises on a finding only.
        seeds: inputs to begin with.
        words: what changes put in.
        processes: whether it may start processes.
        inside: what takes the header out of a container, for changes that leave the rest whole.
    """

    run: Callable[[bytes], None]
    seeds: list[bytes]
    words: tuple[bytes, ...] = ()
    processes: bool = False
    inside: Inside | None = None


def pickle(folder: Path) -> Target:
    """The reader of pickles."""

    def run(data: bytes) -> None:
        with contextlib.suppress(PararnnError):
            load_pickle(data, "x")

    return Target(run, pickles(folder), PICKLE_WORDS)


def torch_file(folder: Path) -> Target:
    """Files of torch.save: a zip archive with a pickle in it."""
    return Target(
        _reading(folder, "m.pt"), torch_files(folder), (*ZIP_WORDS, *PICKLE_WORDS), inside=pickle_in
    )


def safetensors(folder: Path) -> Target:
    """Files of safetensors."""
    file = folder / "m.safetensors"
    save_file(torch_lm(vocab=3), file, {"lm_head.weight": "embed.weight"})
    model = small_model(folder / "model") / "model.safetensors"
    published = DATA / "pararnn_torch" / "babylm_paranlru" / "model.safetensors"
    seeds = [path.read_bytes() for path in (file, model, published)]
    return Target(_reading(folder, file.name), seeds, JSON_WORDS, inside=header_in)


def index(folder: Path) -> Target:
    """The index of weights in several files."""
    tensors = torch_lm(vocab=3)
    names = sorted(tensors)
    parts = {1: names[::2], 2: names[1::2]}
    for n, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / f"model-{n}-of-2.safetensors")
    weight_map = {name: f"model-{n}-of-2.safetensors" for n, part in parts.items() for name in part}
    seed = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    words = (*JSON_WORDS, b'"../x.safetensors"', b'"model-1-of-2.safetensors"', b'"/dev/zero"')
    return Target(_reading(folder, "model.safetensors.index.json"), [seed], words)


def distributed(folder: Path) -> Target:
    """The .metadata of torch.distributed.checkpoint."""
    shutil.copytree(DATA / "lm" / "two_ranks" / "dcp", folder, dirs_exist_ok=True)
    return Target(_reading(folder, ".metadata"), [(folder / ".metadata").read_bytes()], PICKLE_WORDS)


def config(folder: Path) -> Target:
    """config.json, into a model."""
    small_model(folder)

    def run(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        with contextlib.suppress(PararnnError):
            load_model(folder)

    pocket = Path(mlx_pararnn.__file__).parent / "pocket-model" / "config.json"
    small = json.loads((folder / "config.json").read_text())
    seeds = [{**small, "cell": cell} for cell in ("gru", "lstm", "slstm", "nlru")]
    seeds.append({**small, "quantization": {"group_size": 16, "bits": 4}, "activations": {"state": "tanh"}})
    return Target(run, [pocket.read_bytes(), *(json.dumps(seed).encode() for seed in seeds)], JSON_WORDS)


def state(folder: Path) -> Target:
    """Saved conversations."""
    chat = Chat(*mlx_pararnn.load(small_model(folder / "model")))
    seeds = []
    for text in ("", "ab", "c"):
        if text:
            list(chat.respond(text, max_tokens=2))
        seeds.append(chat.save(folder / "x").read_bytes())
    before = chat.tokens, chat.messages

    def run(data: bytes) -> None:
        (folder / "x.safetensors").write_bytes(data)
        try:
            chat.branch().load(folder / "x")
        except PararnnError:
            assert (chat.tokens, chat.messages) == before

    return Target(run, seeds, JSON_WORDS, inside=header_in)


def tokenizer(folder: Path) -> Target:
    """tokenizer.json."""
    small_model(folder)

    def run(data: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(data)
        with contextlib.suppress(PararnnError):
            load_tokenizer(folder, {"eos_token_id": 0})

    seeds = [(folder / "tokenizer.json").read_bytes(), (DATA / "tools" / "tokenizer.json").read_bytes()]
    return Target(run, seeds, JSON_WORDS)


def template(folder: Path) -> Target:
    """Chat templates."""
    _, tokenizer = mlx_pararnn.load(small_model(folder))
    said = [{"role": "user", "content": "x"}]

    def run(data: bytes) -> None:
        with contextlib.suppress(PararnnError, jinja2.TemplateError):
            tokenizer.apply_chat_template(
                said, chat_template=data.decode(errors="replace"), add_generation_prompt=True
            )

    return Target(run, [TEMPLATE.encode(), *map(str.encode, TEMPLATES)], JINJA_WORDS, processes=True)


def calls(_: Path) -> Target:
    """What a model says: marks of the protocol in any order, and calls of functions."""
    _, tokenizer = mlx_pararnn.load()
    protocol = find_protocol(tokenizer)
    assert protocol is not None
    functions = assistant_functions()
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


def commands(folder: Path) -> Target:
    """Lines that are typed in `chat`."""
    chat = Chat(*mlx_pararnn.load(small_model(folder)))
    # Loads the CPU backend's library, which is no input's doing.
    list(chat.respond("a", max_tokens=1))
    chat.reset()
    # A process for each message would take longer than the rest.
    chat_commands.watched = lambda: contextlib.nullcontext(Watchdog(None))
    lines = [b"/help", b"/undo", b"/regenerate", b"/branch a", b"/goto a", b"/reset", b"/set temp 0.5", b"/x",
             b"/system be kind", b"/stats", b"/set", b"/set top-p nan"]  # fmt: skip

    def run(data: bytes) -> None:
        session = chat_commands.Session(chat.branch(), LIKELIEST, 1, None, ToolLines(False), plain=True)
        for line in data.decode(errors="surrogateescape").splitlines()[:4]:
            command, _, argument = line.partition(" ")
            if command in ("/save", "/load"):  # they go where they are told
                continue
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.suppress(PararnnError),
            ):
                if command.startswith("/"):
                    session.run(command, argument.strip())
                else:
                    session.stream(session.chat.respond, line)

    several = [b"ab\n/undo\n/undo", b"a\n/branch x\n/goto x\n/regenerate", b"/system x\nab\n/stats\n/reset"]
    return Target(run, [*lines, *several], (*lines, b"\n"), processes=True)


def bodies(folder: Path) -> Target:
    """Bodies of requests to the server."""
    model, tokenizer = mlx_pararnn.load(small_model(folder))
    prompts = Prompts(model, tokenizer)
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "tool", "content": "y", "tool_call_id": "1"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    shared = {"model": "m", "max_tokens": 3, "temperature": 0.5, "top_p": 1, "stream": False, "seed": 1}
    seeds = [
        {**shared, "prompt": ["a", "b"], "logprobs": 5, "stop": ["x"], "n": 1, "logit_bias": {"1": 2}},
        {**shared, "prompt": [[1, 2], [3]], "response_format": {"type": "json_object"}},
        {**shared, "messages": [message], "tools": [tool], "tool_choice": "auto", "top_logprobs": 2},
        {"messages": [message, {"role": "assistant", "tool_calls": [call]}, answer]},
        {"input": [message], "instructions": "x", "text": {"format": {"type": "text"}}},
        {**shared, "system": "s", "messages": [message], "stop_sequences": ["x"], "tools": [{"name": "f"}]},
        {"content": "x", "add_special": True},
    ]  # fmt: skip

    def chat(body: Any) -> None:
        prompts.of_chat(read_request(ChatRequest, body))

    def completion(body: Any) -> None:
        for prompt in read_request(CompletionRequest, body).prompt:
            prompts.of_text(prompt)

    kinds: list[Callable[[Any], Any]] = [
        chat,
        completion,
        read_messages,
        lambda body: read_responses(body, StoredResponses()),
        lambda body: read_request(TokenizeRequest, body),
    ]

    def run(data: bytes) -> None:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            return  # what the server answers before it reads one
        for kind in kinds:
            # A template may fail as it likes; where prompts are made, that is a refusal.
            with contextlib.suppress(PararnnError, Refused, jinja2.TemplateError):
                kind(body)

    return Target(run, [json.dumps(seed).encode() for seed in seeds], JSON_WORDS, processes=True)


def training(folder: Path) -> Target:
    """Files of texts and examples."""
    _, tokenizer = mlx_pararnn.load(small_model(folder / "model"))
    rows = [
        {"text": "abc"},
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]

    def run(data: bytes) -> None:
        for name in ("data.jsonl", "data.txt"):
            (folder / name).write_bytes(data)
            with contextlib.suppress(PararnnError):
                read_documents(folder / name, tokenizer, 256)

    return Target(run, [json.dumps(row).encode() for row in rows], JSON_WORDS, processes=True)


TARGETS: dict[str, Callable[[Path], Target]] = {
    make.__name__.replace("_", "-"): make
    for make in (pickle, torch_file, safetensors, index, distributed, config, state, tokenizer, template,
                 calls, detokenizer, commands, bodies, training)
}  # fmt: skip


def _reading(folder: Path, name: str) -> Callable[[bytes], None]:
    """Weights from a file of that name, and what they say they hold."""
    file = folder / name

    def run(data: bytes) -> None:
        file.write_bytes(data)
        before = set(os.listdir(folder))
        with contextlib.suppress(PararnnError):
            left = SMALL
            for tensor in read_weights(file).tensors.values():
                left -= 8 * math.prod(tensor.shape)
                if left > 0:
                    tensor.read()
        assert set(os.listdir(folder)) == before

    return run
