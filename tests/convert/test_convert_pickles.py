"""A checkpoint is data: whatever its pickle says, nothing of it is run."""

import pickle
import zipfile

import numpy as np
import pytest

from mlx_pararnn.convert.readers.pickles import load_pickle
from tests.support.converting import weights
from tests.support.hostile import Touch, attacks, text
from tests.support.pt_writer import Call, Raw, View, write_archive, write_pt
from tests.support.small_models import apple_gru

RESAVE = 'torch.save(model.state_dict(), "weights.pt")'


NAMES = sorted(attacks("x"))


@pytest.mark.parametrize("name", NAMES)
def test_a_malicious_pickle_is_refused_and_not_run(name, refused, tmp_path):
    marker = tmp_path / "executed"
    code = attacks(marker)[name]
    message = refused(write_archive(tmp_path / "evil.pt", code, {}))
    assert not marker.exists()
    assert "evil.pt" in message


def test_the_attacks_of_this_test_would_work_on_pythons_own_pickle(tmp_path):
    marker = tmp_path / "executed"
    pickle.loads(attacks(marker)["os.system"])
    assert marker.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "copyreg"])
def test_the_sentence_names_the_global_and_says_how_to_resave(name, refused, tmp_path):
    message = refused(write_archive(tmp_path / "evil.pt", attacks(tmp_path / "m")[name], {}))
    expected = {"os.system": "posix.system", "copyreg": "copy_reg._reconstructor"}.get(name, name)
    assert f"names {expected}" in message
    assert RESAVE in message


def test_a_global_with_control_characters_stays_on_one_line(refused, tmp_path):
    code = b"\x80\x04" + text("evil\n\x1b[31m") + text("a\r\nb" * 200) + b"\x93."
    assert "\x1b" not in refused(write_archive(tmp_path / "evil.pt", code, {}))


def test_an_attack_in_the_old_format_is_refused_unread(refused, tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Touch(marker), 2))
    assert "old format" in refused(tmp_path / "old.pt")
    (tmp_path / "older.pt").write_bytes(pickle.dumps(Touch(marker), 0))
    assert "neither a safetensors file nor a PyTorch checkpoint" in refused(tmp_path / "older.pt")
    assert not marker.exists()


def test_shared_and_circular_parts_take_no_time():
    nest = b"]"
    for _ in range(60):
        nest += b"q\x00h\x00\x86"  # a pair of itself: 2**60 leaves to anyone who walks it
    load_pickle(b"\x80\x02" + nest + b".", "x")
    load_pickle(b"\x80\x02}" + nest + b"Ns.", "x")
    itself = load_pickle(b"\x80\x02}q\x00" + text("model") + b"h\x00s.", "x")
    assert itself["model"] is itself


def test_a_checkpoint_that_nests_itself_ends(refused, tmp_path):
    code = b"\x80\x02}q\x00(" + text("model") + b"h\x00" + text("cfg") + b"h\x00u."
    assert "no state dict inside" in refused(write_archive(tmp_path / "loop.pt", code, {}))


def test_state_of_an_ordered_dict_is_dropped(accepted, tmp_path):
    state = Raw(
        b"ccollections\nOrderedDict\n)R}"
        + text("__class__")
        + text("x")
        + b"s}"
        + text("keys")
        + b"K\x01s\x86b"
    )
    folder = accepted(write_pt(tmp_path / "m.pt", {**apple_gru(), "_metadata": state}))
    assert "model.norm.weight" in weights(folder)


def test_what_pytorch_users_save_beside_the_weights_is_no_obstacle(accepted, tmp_path):
    model = apple_gru()
    parameter = Call(
        "torch._utils",
        "_rebuild_parameter",
        (model["final_norm.weight"], True, Call("collections", "OrderedDict", ())),
    )
    checkpoint = {
        "model": {**model, "final_norm.weight": parameter},
        "dtype": Raw(b"ctorch\nbfloat16\n"),
        "device": Call("torch", "device", ("cuda", 0)),
        "size": Call("torch", "Size", ((1, 2),)),
        "seen": Call("__builtin__", "set", ([1, 2],)),
        "optimizer": {"state": {0: {"step": np.ones((), np.float32), "exp_avg": np.ones(9, np.float32)}}},
        "epoch": 3, "loss": float("nan"), "history": [1.0, None, True, "text", (1, 2)],
    }  # fmt: skip
    assert "model.norm.weight" in weights(accepted(write_pt(tmp_path / "m.pt", checkpoint)))


@pytest.mark.parametrize(
    "nesting",
    [("model_state_dict",), ("state_dict",), ("model",), ("module",), ("model", "state_dict", "module")],
)
def test_nesting_keys(nesting, accepted, tmp_path):
    content = apple_gru()
    for key in nesting:
        content = {key: content, "epoch": 1}
    assert "model.norm.weight" in weights(accepted(write_pt(tmp_path / "m.pt", content)))


STORAGE = np.arange(16, dtype=np.float32)
VIEWS = {
    "offset past the end": View(STORAGE, 13, (4,), (1,)),
    "stride past the end": View(STORAGE, 0, (4,), (6,)),
    "negative offset": View(STORAGE, -1, (4,), (1,)),
    "negative stride": View(STORAGE, 3, (4,), (-1,)),
    "negative size": View(STORAGE, 0, (-4,), (1,)),
    "more strides than sizes": View(STORAGE, 0, (4,), (1, 1)),
    "an element seen a billion times": View(STORAGE, 0, (1_000_000_000,), (0,)),
    "sizes whose product overflows": View(STORAGE, 0, (1 << 40, 1 << 40), (0, 0)),
    "a storage longer than its record": View(STORAGE, 0, (4,), (1,), numel=17),
    "a negative storage": View(STORAGE, 0, (4,), (1,), numel=-1),
}
VIEWS_ARE = {
    "an element seen a billion times": "final_norm.weight is an expanded view",
    "sizes whose product overflows": "final_norm.weight is an expanded view",
    "a storage longer than its record": "missing or too short",
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_tensor_outside_its_storage_is_refused(name, refused, tmp_path):
    message = refused(write_pt(tmp_path / "m.pt", apple_gru() | {"final_norm.weight": VIEWS[name]}))
    assert VIEWS_ARE.get(name, "damaged") in message


def test_slices_and_transposes_are_read_as_pytorch_sees_them(accepted, tmp_path):
    model = apple_gru()
    plain = weights(accepted(write_pt(tmp_path / "plain.pt", model)))
    backing = np.zeros((6, 8, 7), np.float32)
    backing[:, 1:5, 3] = model["blocks.1.1.w2.weight"].T
    model["blocks.1.1.w2.weight"] = View(backing, 7 + 3, (4, 6), (7, 56))
    model["final_norm.weight"] = View(
        np.concatenate([np.zeros(3, np.float32), model["final_norm.weight"]]), 3, (4,), (1,)
    )
    strided = weights(accepted(write_pt(tmp_path / "views.pt", model)))
    assert all(np.array_equal(plain[name], strided[name]) for name in plain)


def test_the_record_must_be_there_and_stored(refused, tmp_path):
    source = write_pt(tmp_path / "m.pt", apple_gru())
    with zipfile.ZipFile(source) as archive:
        content = {name.removeprefix("m/"): archive.read(name) for name in archive.namelist()}
    code = content.pop("data.pkl")
    for name in ("byteorder", "version"):
        del content[name]
    short = {**content, "data/3": content["data/3"][:-4]}
    del content["data/3"]
    assert "missing or too short" in refused(write_archive(tmp_path / "missing.pt", code, content))
    assert "missing or too short" in refused(write_archive(tmp_path / "short.pt", code, short))
    packed = write_archive(tmp_path / "packed.pt", code, short, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(packed)
    big = write_archive(tmp_path / "big.pt", code, short | {"byteorder": b"big"})
    assert "big-endian" in refused(big)
