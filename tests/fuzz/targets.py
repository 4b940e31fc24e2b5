"""What is fuzzed: files of models, requests, what is typed; outputs, pictures and states have the others."""

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

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
from mlx_pararnn.convert.inspection import inspect
from mlx_pararnn.convert.readers.forms import read_weights
from mlx_pararnn.convert.readers.pickles import load_pickle
from mlx_pararnn.loading import load_model, load_states, load_tokenizer
from mlx_pararnn.process.watchdog import Watchdog
from mlx_pararnn.training.data import read_documents
from tests.fuzz.inputs import (
    JINJA_WORDS,
    JSON_WORDS,
    PICKLE_WORDS,
    TEMPLATE,
    TEMPLATES,
    ZIP_WORDS,
    content_in,
    header_in,
    header_in_named,
    pickle_in,
    pickles,
    small_model,
    torch_files,
)
from tests.fuzz.outputs import calls, detokenizer, pieces, schemas, tool_calls
from tests.fuzz.pictures import image_bodies, image_model_folder, picture
from tests.fuzz.states import saved_prompts, state
from tests.fuzz.target import Target, forget_first_weights, named, put
from tests.support.golden import DATA
from tests.support.small_models import torch_lm

SMALL = 1 << 20  # bytes of tensors that are read


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
    """config.json, into a model, and as `inspect` shows it."""
    small_model(folder)

    def run(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        with contextlib.suppress(PararnnError):
            json.dumps(asdict(inspect(folder)))
        with contextlib.suppress(PararnnError):
            load_model(folder)
        forget_first_weights()

    pocket = Path(mlx_pararnn.__file__).parent / "pocket-model" / "config.json"
    small = json.loads((folder / "config.json").read_text())
    seeds = [{**small, "cell": cell} for cell in ("gru", "lstm", "slstm", "nlru")]
    seeds.append({**small, "quantization": {"group_size": 16, "bits": 4}, "activations": {"state": "tanh"}})
    return Target(run, [pocket.read_bytes(), *(json.dumps(seed).encode() for seed in seeds)], JSON_WORDS)


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


def tokenizer_files(folder: Path) -> Target:
    """What stands beside tokenizer.json, and the vocabularies of older tokenizers."""
    words = {"[UNK]": 0, "a": 1, "b": 2, "ab": 3}
    beside = small_model(folder / "beside")
    about = (beside / "tokenizer_config.json").read_bytes()
    kept = {
        "beside/tokenizer_config.json": about,
        "beside/special_tokens_map.json": b'{"eos_token": {"content": "b", "lstrip": true}}',
        "beside/added_tokens.json": b'{"x": 300}',
        "beside/generation_config.json": b'{"eos_token_id": [0, 1], "bos_token_id": 1}',
        "beside/chat_template.jinja": TEMPLATE.encode(),
        "pairs/tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer", "eos_token": "b"}',
        "pairs/vocab.json": json.dumps(words).encode(),
        "pairs/merges.txt": b"#version: 0.2\na b\n",
        "lines/tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}',
        "lines/vocab.txt": "\n".join(words).encode(),
    }
    for name in ("pairs", "lines"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes((beside / "config.json").read_bytes())
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    for name in ("beside", "pairs", "lines"):
        load_tokenizer(folder / name, {"eos_token_id": 0})

    def run(data: bytes) -> None:
        if not (name := put(folder, list(kept), data)):
            return
        try:
            with contextlib.suppress(PararnnError):
                inspect((folder / name).parent)
            with contextlib.suppress(PararnnError):
                load_tokenizer((folder / name).parent, {"eos_token_id": 0})
        finally:
            (folder / name).write_bytes(kept[name])

    seeds = [named(name, content) for name, content in kept.items()]
    return Target(run, seeds, JSON_WORDS, inside=content_in)


def weights(folder: Path) -> Target:
    """A model's weights, initial states and adapters, as MLX reads them."""
    small_model(folder)
    model = load_model(folder)[0]
    states = {f"layers.{n}": mx.zeros((1, 16)) for n in range(len(model.layers))}
    mx.save_safetensors(str(folder / "states"), states)
    lora = {"model.layers.0.mixer.out_proj.lora_a": mx.zeros((16, 2)),
            "model.layers.0.mixer.out_proj.lora_b": mx.zeros((2, 16))}  # fmt: skip
    mx.save_safetensors(str(folder / "adapters"), lora)
    how = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["mixer.out_proj"]}
    config = json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": how}).encode()
    seeds = {
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
        "states.safetensors": (folder / "states.safetensors").read_bytes(),
        "adapters.safetensors": (folder / "adapters.safetensors").read_bytes(),
        "adapter_config.json": config,
    }
    (folder / "adapter_config.json").write_bytes(config)
    load_model(folder, adapter_path=folder)

    def run(data: bytes) -> None:
        name = put(folder, list(seeds), data)
        try:
            with contextlib.suppress(PararnnError):
                if name == "model.safetensors":
                    inspect(folder)
                    load_model(folder)
                elif name == "states.safetensors":
                    load_states(model, folder / name)
                else:
                    load_model(folder, adapter_path=folder)
        finally:
            if name:
                (folder / name).write_bytes(seeds[name])
            forget_first_weights()

    inputs = [named(name, content) for name, content in seeds.items()]
    return Target(run, inputs, JSON_WORDS, inside=header_in_named)


def coreml(folder: Path) -> Target:
    """Core ML packages, given to `inspect` and `verify`; a stand-in runs the program."""
    import coremltools as ct

    from mlx_pararnn.convert.coreml import compute_unit, mlpackage_check
    from mlx_pararnn.convert.to_coreml import convert_to_coreml

    model = small_model(folder / "model")
    out = folder / "out"
    convert_to_coreml(model, out, chunk=2, iterations=1, tokenizer="none")
    program = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    blobs = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    spec = ct.utils.load_spec(str(out / "model.mlpackage"))

    def agreeing(text: bytes) -> bytes:
        spec.description.metadata.userDefined["pararnn"] = text.decode(errors="replace")
        return spec.SerializeToString()  # type: ignore[no-any-return]

    class Function:
        def make_state(self) -> None:
            return None

        def predict(self, inputs: dict[str, Any], state: Any = None) -> dict[str, Any]:
            return {"logits": np.zeros((1, 1, 256), np.float16)}

    def run_on(unit: str, compiled: Path, settings: dict[str, Any], tokens: Any, *_: Any) -> Any:
        return compute_unit.read(settings, dict.fromkeys(settings["functions"], Function()), tokens), {}

    mlpackage_check.can_predict = lambda: True
    mlpackage_check.compiled = contextlib.nullcontext  # type: ignore[assignment]
    mlpackage_check.present_units = lambda: ["CPU_ONLY"]
    mlpackage_check.run_on = run_on
    names = ("model.mlpackage/Manifest.json", program, blobs, "reference.safetensors")
    return _package_target(out, names, program, agreeing, mlpackage_check.verify_package)


def coreai(folder: Path) -> Target:
    """Core AI packages, given to `inspect` and `verify`; a stand-in runs the program."""
    from mlx_pararnn.convert.coreai import aimodel_check
    from mlx_pararnn.convert.to_coreai import convert_to_coreai

    model = small_model(folder / "model")
    out = folder / "out"
    convert_to_coreai(model, out, chunk=2, iterations=1, tokenizer="none")
    about = json.loads((out / "model.aimodel" / "metadata.json").read_text())

    def agreeing(text: bytes) -> bytes:
        inside = {"pararnn": text.decode(errors="replace")}
        return json.dumps(about | {"creatorDefinedMetadata": inside}).encode()

    class Runner:
        def __init__(self, package: Path, settings: dict[str, Any]) -> None:
            self.states = {s["name"]: np.zeros(s["shape"], s["dtype"]) for s in settings["states"]}

        def __enter__(self) -> "Runner":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def reset(self) -> None:
            pass

        def call(self, name: str, tokens: Any) -> Any:
            return np.zeros(256, np.float32)

    aimodel_check.Runner = Runner  # type: ignore[misc, assignment]
    names = ("model.aimodel/metadata.json", "reference.safetensors")
    return _package_target(out, names, "model.aimodel/metadata.json", agreeing, aimodel_check.verify_package)


def _package_target(
    out: Path,
    names: tuple[str, ...],
    agreed: str,
    agreeing: Callable[[bytes], bytes],
    verify: Callable[[Path], Iterable[Any]],
) -> Target:
    """One file of a package is changed; of pararnn.json, `agreed` says the same."""
    kept = {name: (out / name).read_bytes() for name in ("pararnn.json", *names)}

    def run(data: bytes) -> None:
        name = put(out, list(kept), data)
        if name == "pararnn.json":
            (out / agreed).write_bytes(agreeing((out / name).read_bytes()))
        try:
            with contextlib.suppress(PararnnError):
                json.dumps(asdict(inspect(out)))
            with contextlib.suppress(PararnnError):
                list(verify(out))
        finally:
            for changed in (name, agreed) if name == "pararnn.json" else (name,) if name else ():
                (out / changed).write_bytes(kept[changed])

    seeds = [named(name, content) for name, content in kept.items()]
    # What is said is most of what there is to read: the description three times as often as the others.
    seeds += 2 * seeds[:1]
    return Target(run, seeds, (*JSON_WORDS, b"/dev/zero", b"../"), inside=header_in_named)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "image-model" if make is image_model_folder else make.__name__.replace("_", "-"): make
    for make in (pickle, torch_file, safetensors, index, distributed, config, state, tokenizer, template,
                 calls, detokenizer, commands, bodies, training, tokenizer_files, weights, coreml, coreai,
                 picture, tool_calls, pieces, schemas, image_bodies, image_model_folder, saved_prompts)
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
