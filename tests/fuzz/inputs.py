"""What targets begin with: files as PyTorch and the product write them, small ones, and words to put in."""

import io
import pickle
import zlib
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import mlx.core as mx
import numpy as np
from mlx_lm.utils import save_config, save_model

from mlx_pararnn import Model
from mlx_pararnn.convert.writers.byte_tokenizer import byte_tokenizer_files
from mlx_pararnn.model_config import ModelArgs
from tests.support.golden import DATA
from tests.support.pt_writer import Call, Made, Named, View, write_pt
from tests.support.small_models import apple_gru

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


def pickles(folder: Path) -> list[bytes]:
    """Of the files, and small ones more often: they take a twentieth of the time and show as much."""
    seeds = [pickle_in(file)[0] for file in torch_files(folder)]
    seeds.append((DATA / "lm" / "two_ranks" / "dcp" / ".metadata").read_bytes())
    seeds += 4 * [pickle_in(write_pt(folder / "x.pt", part).read_bytes())[0] for part in _parts()]
    seeds += 4 * [pickle.dumps(PLAIN, protocol) for protocol in range(6)]
    seeds.append(pickle.dumps([frozenset({1}), bytearray(b"x")], 5))
    return seeds


def small_model(folder: Path) -> Path:
    """A folder of the product's own making."""
    folder.mkdir(exist_ok=True)
    args = ModelArgs(
        hidden_size=16, num_hidden_layers=1, num_heads=2, vocab_size=256, intermediate_size=16, norm_eps=1e-6
    )
    mx.random.seed(0)
    save_model(folder, Model(args))
    save_config({**vars(args), "eos_token_id": 0, "bos_token_id": 1}, folder / "config.json")
    for name, text in byte_tokenizer_files().items():
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


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


def torch_files(folder: Path) -> list[bytes]:
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


def pickle_in(content: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Of a file of torch.save: its pickle, and the file with another one."""
    with ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    place = next(name for name in records if name.endswith("/data.pkl"))

    def put_back(changed: bytes) -> bytes:
        file = io.BytesIO()
        with ZipFile(file, "w") as archive:
            for name, record in (records | {place: changed}).items():
                archive.writestr(name, record)
        return file.getvalue()

    return records[place], put_back


def header_in(content: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Of a file of safetensors: its header, and the file with another one."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], lambda header: len(header).to_bytes(8, "little") + header + content[end:]


def content_in(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Of a file of a folder, whose name stands in a line before it: its content."""
    name, _, content = data.partition(b"\n")
    return content, lambda changed: name + b"\n" + changed


def header_in_named(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The same, but of a file of safetensors its header."""
    content, named = content_in(data)
    if content[8:9] != b"{":
        return content, named
    header, whole = header_in(content)
    return header, lambda changed: named(whole(changed))


def checked_chunks(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """An image file; where it is a PNG, each part's checksum is right again after a change."""

    def mended(changed: bytes) -> bytes:
        if changed[:4] != b"\x89PNG":
            return changed
        out, at = bytearray(changed), 8
        while at + 12 <= len(out):
            end = at + 8 + int.from_bytes(out[at : at + 4], "big")
            if end + 4 > len(out):
                break
            out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
            at = end + 4
        return bytes(out)

    return data, mended


def _checkpoints() -> list[Any]:
    return [
        {"model": apple_gru(vocab=3), "cfg": {"lr": 0.1, "names": ["a"]}, "step": 2},
        {
            "state": Call("collections", "OrderedDict", ()),
            "kind": Named("torch", "float32"),
            "t": (1, 2.5, None),
        },
    ]
