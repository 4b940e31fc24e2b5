"""What is fuzzed: of each target a function of bytes that raises on a finding only, and first inputs."""

import contextlib
import io
import json
import math
import os
import pickle as pickles
import shutil
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import jinja2
import numpy as np
from mlx_lm.utils import save_config, save_model
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import mlx_pararnn
from mlx_pararnn import Model, PararnnError
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
from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files
from mlx_pararnn.detokenizer import BYTES, Detokenizer, StopMatcher
from mlx_pararnn.loading import load_model, load_tokenizer
from mlx_pararnn.model_config import ModelArgs
from mlx_pararnn.pocket.answers import assistant_functions
from mlx_pararnn.pocket.protocol import Command, find_protocol
from mlx_pararnn.training.data import read_documents
from mlx_pararnn.watchdog import Watchdog
from tests.fuzz.changes import Inside
from tests.support.golden import DATA
from tests.support.pt_writer import Call, Made, Named, View, write_pt
from tests.support.small_models import apple_gru, torch_lm

SMALL = 1 << 20  # bytes of tensors that are read
PLAIN = {
    **{"a": [1, 2.5, None, True, "x", b"y", (1, (2,)), {3}, 1 << 40], "b": OrderedDict(c=-1)},
    **{"d": Namespace(lr=0.1), ("e", 2): defaultdict(list, f=[]), "g": Path("h")},
}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] | trim }}~{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}{% set a = namespace(b=1) %}{{ a.b + 1 }}"
)

# In the ways of templates in use.
TEMPLATES = (
    """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m['content'] + '[/INST]' }}
{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}""",
    """{%- macro say(m) -%}<|{{ m.role }}|>{{ m['content'] | trim }}{%- endmacro -%}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}{{ say(m) }}
{% if not loop.last %}{{ strftime_now('%d %b %Y') }}{% else %}{% break %}{% endif %}{% endfor %}
{% if x is defined and x is mapping %}{{ raise_exception('no') }}{% endif %}""",
)


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
    seeds = [_pickle_in(file)[0] for file in _torch_files(folder)]
    seeds.append((DATA / "lm" / "two_ranks" / "dcp" / ".metadata").read_bytes())
    # Small ones more often: they take a twentieth of the time, and a change in them meets more of its kind.
    seeds += 4 * [_pickle_in(write_pt(folder / "x.pt", part).read_bytes())[0] for part in _parts()]
    seeds += 4 * [pickles.dumps(PLAIN, protocol) for protocol in range(6)]
    seeds.append(pickles.dumps([frozenset({1}), bytearray(b"x")], 5))

    def run(data: bytes) -> None:
        with contextlib.suppress(PararnnError):
            load_pickle(data, "x")

    return Target(run, seeds, PICKLE_WORDS)


def torch_file(folder: Path) -> Target:
    """Files of torch.save: a zip archive with a pickle in it."""
    return Target(
        _reading(folder, "m.pt"), _torch_files(folder), (*ZIP_WORDS, *PICKLE_WORDS), inside=_pickle_in
    )


def safetensors(folder: Path) -> Target:
    """Files of safetensors."""
    file = folder / "m.safetensors"
    save_file(torch_lm(vocab=3), file, {"lm_head.weight": "embed.weight"})
    model = _small_model(folder / "model") / "model.safetensors"
    published = DATA / "pararnn_torch" / "babylm_paranlru" / "model.safetensors"
    seeds = [path.read_bytes() for path in (file, model, published)]
    return Target(_reading(folder, file.name), seeds, JSON_WORDS, inside=_header_in)


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
    _small_model(folder)

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
    chat = Chat(*mlx_pararnn.load(_small_model(folder / "model")))
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

    return Target(run, seeds, JSON_WORDS, inside=_header_in)


def tokenizer(folder: Path) -> Target:
    """tokenizer.json."""
    _small_model(folder)

    def run(data: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(data)
        with contextlib.suppress(PararnnError):
            load_tokenizer(folder, {"eos_token_id": 0})

    seeds = [(folder / "tokenizer.json").read_bytes(), (DATA / "tools" / "tokenizer.json").read_bytes()]
    return Target(run, seeds, JSON_WORDS)


def template(folder: Path) -> Target:
    """Chat templates."""
    _, tokenizer = mlx_pararnn.load(_small_model(folder))
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
    chat = Chat(*mlx_pararnn.load(_small_model(folder)))
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
    model, tokenizer = mlx_pararnn.load(_small_model(folder))
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
    _, tokenizer = mlx_pararnn.load(_small_model(folder / "model"))
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

NAMES = ("torch Size", "torch FloatStorage", "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
         "torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2", "os system",
         "torch.distributed.checkpoint.metadata Metadata", "builtins eval", "_codecs encode")  # fmt: skip
PICKLE_WORDS = (
    *(
        bytes([byte])
        for byte in b"(.012FGIJKLMNQRTUVX]abcdeghijlopqrstu})\x80\x81\x85\x86\x87\x88\x89\x8a\x8c"
    ),
    *(f"c{name.replace(' ', chr(10))}\n".encode() for name in NAMES),
    b"\x8a\xff" + b"\x7f" * 255,
    b"X\xff\xff\xff\x7f",
    b"K\x01",
    b"q\x00",
    b"h\x00",
)
ZIP_WORDS = (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\xff\xff\xff\xff", b"../", b"\0" * 8)
JSON_WORDS = (b"null", b"true", b"-1", b"0", b"2147483648", b"1180591620717411303424", b"1e308", b"NaN",
              b'""', b"[]", b"{}", b"[[[[]]]]", b'"\\ud800"', b"[" * 3000, b',"a":1', b"\n")  # fmt: skip
JINJA_WORDS = (b"{%", b"%}", b"{{", b"}}", b"|", b"(", b")", b"'", b"[0]", b".x", b"0", b"/", b"~", b"for ",
               b" in ", b"*9999999", b"**99", b"| center(99999999)", b"range(99999)", b"| tojson",
               b"{% endfor %}", b"{% set a.b = a.b ~ a.b %}", b"| list", b"__class__")  # fmt: skip


def _parts() -> list[Any]:
    numbers = np.arange(6, dtype=np.float32)
    mesh = Made("torch.distributed.device_mesh", "DeviceMesh", {"mesh": np.arange(1)})
    home = "torch.distributed.tensor"
    spec = Made("torch.distributed.tensor._dtensor_spec", "DTensorSpec", {"mesh": mesh})
    kind = Named(home, "DTensor")
    wrapped = (kind, Named("torch", "float32"), (6,), (1,), 0, None, "cpu", False)
    state = (None, {"_local_tensor": numbers, "_spec": spec})
    function = Named("torch._utils", "_rebuild_wrapper_subclass")
    return [
        {"w": numbers.reshape(2, 3), "t": View(numbers, 0, (3, 2), (1, 3)), "h": numbers.astype(np.float16)},
        {"d": Call("torch._tensor", "_rebuild_from_type_v2", (function, kind, wrapped, state))},
        {
            "p": Call(
                "torch._utils", "_rebuild_parameter", (numbers, True, Call("collections", "OrderedDict", ()))
            )
        },
        {
            "s": Call("torch", "Size", ([2, 3],)),
            "o": Call("mine", "State", ()),
            "v": Call("torch", "device", ("cpu",)),
        },
    ]


def _torch_files(folder: Path) -> list[bytes]:
    """As PyTorch wrote them, and of our own making."""
    made = [write_pt(folder / f"{n}.pt", value) for n, value in enumerate(_checkpoints())]
    published = DATA / "pararnn_torch"
    files = [
        *made,
        DATA / "lm" / "two_ranks" / "dtensor.pt",
        published / "babylm_paranlru" / "pytorch_model.bin",
        published / "paraslstm_causal_lm_1" / "pytorch_model.bin",
    ]
    contents = [file.read_bytes() for file in files]
    for file in made:
        file.unlink()
    return contents


def _pickle_in(content: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Of a file of torch.save: its pickle, and the file with another one."""
    with ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    place = next(name for name in records if name.endswith("/data.pkl"))

    def put_back(pickle: bytes) -> bytes:
        file = io.BytesIO()
        with ZipFile(file, "w") as archive:
            for name, record in (records | {place: pickle}).items():
                archive.writestr(name, record)
        return file.getvalue()

    return records[place], put_back


def _header_in(content: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Of a file of safetensors: its header, and the file with another one."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], lambda header: len(header).to_bytes(8, "little") + header + content[end:]


def _checkpoints() -> list[Any]:
    return [
        {"model": apple_gru(vocab=3), "cfg": {"lr": 0.1, "names": ["a"]}, "step": 2},
        {
            "state": Call("collections", "OrderedDict", ()),
            "kind": Named("torch", "float32"),
            "t": (1, 2.5, None),
        },
    ]


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


def _small_model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    args = ModelArgs(
        hidden_size=16, num_hidden_layers=1, num_heads=2, vocab_size=256, intermediate_size=16, norm_eps=1e-6
    )
    save_model(folder, Model(args))
    save_config({**vars(args), "eos_token_id": 0, "bos_token_id": 1}, folder / "config.json")
    for name, text in byte_tokenizer_files().items():
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
