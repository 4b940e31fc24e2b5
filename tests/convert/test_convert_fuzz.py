"""Whatever happens to a file's bytes: it converts, or one PararnnError says why not; nothing else."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mlx_pararnn.convert.readers.pickles import load_pickle
from mlx_pararnn.convert.to_mlx import convert_to_mlx
from mlx_pararnn.errors import PararnnError
from tests.support.pt_writer import write_pt
from tests.support.small_models import apple_gru, torch_lm

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_pt(folder / "m.pt", {"model": apple_gru(vocab=3), "cfg": {"lr": 0.1}, "step": 2})
    save_file(torch_lm(vocab=3), folder / "m.safetensors", {"lm_head.weight": "embed.weight"})
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


def survives(content: bytes, suffix: str, work: Path) -> None:
    (work / f"m{suffix}").write_bytes(content)
    with suppress(PararnnError):
        convert_to_mlx(work / f"m{suffix}", work / "out", tokenizer="none", force=True, allow_nonfinite=True)
    assert {path.name for path in work.iterdir()} <= {"m.pt", "m.safetensors", "out"}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@FUZZ
@given(st.data())
def test_truncation(suffix, originals, tmp_path, data):
    content = originals[suffix]
    survives(content[: data.draw(st.integers(0, len(content)))], suffix, tmp_path)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@FUZZ
@given(st.data())
def test_changed_bytes(suffix, originals, tmp_path, data):
    content = bytearray(originals[suffix])
    # Half of the changes fall into the last or first thousand bytes, where the directories and headers stand.
    place = st.one_of(
        st.integers(0, len(content) - 1),
        st.integers(0, 999),
        st.integers(len(content) - 999, len(content) - 1),
    )
    for position, byte in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=4)):
        content[position] = byte
    survives(bytes(content), suffix, tmp_path)


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
@settings(FUZZ, max_examples=100)
@given(st.data())
def test_changed_bytes_of_a_distributed_checkpoint(name, tmp_path, data):
    folder = tmp_path / "dcp"
    original = Path(__file__).parents[1] / "data/lm/two_ranks/dcp"
    shutil.copytree(original, folder, dirs_exist_ok=True)
    content = bytearray((original / name).read_bytes())
    changes = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for position, byte in data.draw(st.lists(changes, min_size=1, max_size=4)):
        content[position] = byte
    (folder / name).write_bytes(bytes(content[: data.draw(st.sampled_from([len(content), 5000]))]))
    with suppress(PararnnError):
        convert_to_mlx(folder, tmp_path / "out", tokenizer="none", force=True, allow_nonfinite=True)
    assert {path.name for path in tmp_path.iterdir()} <= {"dcp", "out"}


@FUZZ
@given(st.binary(max_size=60))
def test_any_bytes_as_a_pickle(content):
    with suppress(PararnnError):
        load_pickle(b"\x80\x04" + content, "x")


OPCODES = (
    b"(.012FGIJKLMNQRTUVX]abcdeghijlopqrstu})\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x93\x94\x95"
)


ALLOWED = (
    "torch\nSize",
    "torch\nFloatStorage",
    "collections\nOrderedDict",
    "torch._utils\n_rebuild_tensor_v2",
    "torch._utils\n_rebuild_wrapper_subclass",
    "torch._tensor\n_rebuild_from_type_v2",
    "torch.distributed.checkpoint.metadata\nMetadata",
)
INSTRUCTIONS = [
    *(bytes([byte]) for byte in OPCODES),
    *(f"c{name}\n".encode() for name in ALLOWED),
    *(b"K\x01", b"q\x00", b"h\x00", b"X\x01\x00\x00\x00a"),
]


@FUZZ
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=30))
def test_any_instructions_as_a_pickle(code):
    with suppress(PararnnError):
        load_pickle(b"\x80\x04" + b"".join(code) + b".", "x")
