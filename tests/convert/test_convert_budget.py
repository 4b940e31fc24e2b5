"""Small files that describe a great deal are refused by a sentence, in bounded memory and processor time."""

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from mlx_pararnn.convert.readers.pickles import load_pickle
from tests.support.pt_writer import write_archive, write_pt
from tests.support.small_models import apple_gru

ROOT = Path(__file__).parents[2]
READ = (
    "import sys; from mlx_pararnn.errors import PararnnError\n"
    "from mlx_pararnn.convert.readers.forms import find_weights, read_weights\n"
    "from pathlib import Path\n"
    "try: read_weights(find_weights(Path(sys.argv[1])))\n"
    "except PararnnError as error: print(error); sys.exit(7)\n"
)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


def refusal(path: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", READ, path], cwd=ROOT, preexec_fn=limited, capture_output=True, text=True
    )
    assert result.returncode == 7, result.stderr[-500:]
    assert str(path) in result.stdout
    return result.stdout


def test_keys_that_collide(tmp_path):
    prime = (1 << 61) - 1
    keys = b"".join(b"\x8a\x0a" + (i * prime).to_bytes(10, "little") + b"N" for i in range(1, 100_000))
    message = refusal(write_archive(tmp_path / "m.pt", b"\x80\x02}(" + keys + b"u.", {}))
    assert "integers of more than 64 bits as keys" in message


def test_memo_slots_that_collide(tmp_path):
    prime = (1 << 61) - 1
    code = b"N" + b"".join(b"p%d\n" % (i * prime) for i in range(1, 60_000))
    assert "damaged" in refusal(write_archive(tmp_path / "m.pt", b"\x80\x02" + code + b".", {}))


def test_a_long_key_used_again_and_again(tmp_path):
    """If its parts were looked at, 20,000 times 20,000 of them; and a key of keys."""
    long = b"(" + b"K\x01" * 20_000 + b"tq\x01"
    deep = b"0" + b"".join(b"(" + b"h\x01" * 8 + b"tq\x010" for _ in range(5))
    for key in (long + b"0", long + deep):
        code = b"\x80\x02}" + key + b"h\x01Ns" * 20_000 + b"."
        message = refusal(write_archive(tmp_path / "m.pt", code, {}))
        assert "no state dict inside" in message


def test_a_long_name_used_again_and_again(tmp_path):
    name = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
    code = b"\x80\x04" + name + b"q\x010" + b"h\x01h\x01\x930" * 100_000 + b"N."
    assert "more objects than a checkpoint has" in refusal(write_archive(tmp_path / "m.pt", code, {}))


@pytest.mark.large
def test_the_pickle_of_a_run_on_many_devices_is_read():
    """More instructions than a small file may have, at the five bytes each that a number takes."""
    numbers = load_pickle(b"\x80\x02](" + b"J\x00\x00\x00\x01" * 1_600_000 + b"e.", "x")
    assert len(numbers) == 1_600_000


@pytest.mark.large
def test_empty_sets(tmp_path):
    code = b"\x80\x04(" + b"\x8f" * 5_000_000 + b"l."
    assert "more objects than a checkpoint has" in refusal(write_archive(tmp_path / "m.pt", code, {}))


@pytest.mark.large
def test_one_long_list_used_again_and_again(tmp_path):
    code = b"\x80\x02](" + b"K\x01" * 100_000 + b"eq\x000c__builtin__\nset\nq\x010"
    code += b"h\x01h\x00\x85R0" * 10_000 + b"N."
    assert "more objects than a checkpoint has" in refusal(write_archive(tmp_path / "m.pt", code, {}))


def test_a_safetensors_header_of_many_entries(tmp_path):
    for count in (6_000_000, 45_000_000):
        raw = b'{"a":[' + b"1," * count + b"1]}"
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
        assert "damaged" in refusal(tmp_path / "m.safetensors")


@pytest.mark.large
@pytest.mark.parametrize("form", ["m.pt", "m.safetensors"])
def test_more_names_than_a_checkpoint_has(form, tmp_path):
    path = tmp_path / form
    if form == "m.pt":
        write_pt(path, {"w": np.zeros(1, np.float32)} | {f"a{i}": 0 for i in range(200_000)})
    else:
        places = [{"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(200_001)]
        raw = json.dumps({f"a{i}": place for i, place in enumerate(places)}).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(200_001))
    assert "it names 200,001 tensors, more than any checkpoint" in refusal(path)


@pytest.mark.parametrize("count", [400_000, pytest.param(2_000_000, marks=pytest.mark.large)])
def test_a_zip_directory_of_many_records(count, tmp_path):
    entry = struct.Struct("<4s4B4HL2L5H2L")
    names = (b"%07d" % i for i in range(count))
    directory = b"".join(
        entry.pack(b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
        for name in names
    )
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), 30)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 30 + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    (tmp_path / "m.pt").write_bytes(b"PK\3\4" + bytes(26) + directory + end64 + locator + end)
    assert "more records than a checkpoint has" in refusal(tmp_path / "m.pt")


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, 1 << 40])
def test_an_offset_outside_the_file(offset, tmp_path):
    source = write_pt(tmp_path / "m.pt", apple_gru())
    raw = bytearray(source.read_bytes())
    at = raw.index(b"PK\1\2")
    name = struct.unpack_from("<H", raw, at + 28)[0]
    struct.pack_into("<H", raw, at + 30, 12)
    struct.pack_into("<L", raw, at + 42, 2**32 - 1)
    raw[at + 46 + name : at + 46 + name] = struct.pack("<HHQ", 1, 8, offset)
    end = raw.rindex(b"PK\5\6")
    struct.pack_into("<L", raw, end + 12, struct.unpack_from("<L", raw, end + 12)[0] + 12)
    source.write_bytes(raw)
    assert "damaged" in refusal(source)


@pytest.mark.large
def test_a_distributed_metadata_whose_tensors_share_their_chunks(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch (pip install 'mlx-pararnn[parity]')")
    import pickle

    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "dcp"
    dcp.save({"w": torch.zeros(4)}, checkpoint_id=folder, no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["w"]
    entry.chunks = entry.chunks * 5_000
    metadata.state_dict_metadata = {f"w{i}": entry for i in range(5_000)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    result = subprocess.run(
        [sys.executable, "-c", READ, folder], cwd=ROOT, preexec_fn=limited, capture_output=True, text=True
    )
    assert result.returncode == 7, result.stderr[-500:]
    assert ".metadata is damaged" in result.stdout


@pytest.mark.large
def test_a_hundred_thousand_small_objects_are_no_obstacle(tmp_path):
    content = {"model": apple_gru(), "history": [{"step": i, "loss": 0.5} for i in range(100_000)]}
    assert open_checkpoint(write_pt(tmp_path / "m.pt", content)).tensors
    header, position = {}, 0
    for i in range(100_000):
        header[f"blocks.{i}.weight"] = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [position, position + 4],
        }
        position += 4
    raw = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + np.zeros(100_000, "<f4").tobytes())
    assert len(open_checkpoint(path).tensors) == 100_000
