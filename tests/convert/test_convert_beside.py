"""What training checkpoints hold beside the model is passed over, and nothing of it is made or called."""

import collections
import pickle

import numpy as np
import pytest

from tests.support.converting import weights
from tests.support.pt_writer import Call, Made, Named, Raw, View, write_pt
from tests.support.small_models import apple_gru

HOOKS = Call("collections", "OrderedDict", ())


def untyped(dtype: str, numel: int, size: int) -> Call:
    """A tensor as torch writes one whose format has no storage class; its storage is record 0."""
    storage = Raw(
        b"(X\x07\x00\x00\x00storagectorch.storage\nUntypedStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + b"J"
        + (numel * size).to_bytes(4, "little")
        + b"tQ"
    )
    arguments = (storage, 0, (numel,), (1,), False, HOOKS, Named("torch", dtype))
    return Call("torch._utils", "_rebuild_tensor_v3", arguments)


BESIDE = {
    "Counter": Call("collections", "Counter", ({3: 1},)),
    "defaultdict": Call("collections", "defaultdict", (Named("__builtin__", "list"),)),
    "complex": Call("__builtin__", "complex", (1.0, 2.0)),
    "bytes": Call("_codecs", "encode", ("abc", "latin1")),
    "the bytes of a long array": Call("_codecs", "encode", ("a" * 3_000_000, "latin1")),
    "bytearray": Call("__builtin__", "bytearray", (Call("_codecs", "encode", ("abc", "latin1")),)),
    "tuple keys": {(0, "a"): 1, (0, ("b", (1,))): 2},
    "a number format as a key": {Named("torch", "float32"): 1},
    "a set of tuples": Call("__builtin__", "set", ([(1, 2), (3, 4)],)),
    "an expanded view": View(np.ones(1, np.float32), 0, (3, 1000), (0, 0)),
    "numpy scalar": Call(
        "numpy._core.multiarray", "scalar", (Call("numpy", "dtype", ("f8", False, True)), "x")
    ),
    "datetime": Call("datetime", "datetime", (Call("_codecs", "encode", ("abc", "latin1")),)),
    "a subclass of OrderedDict": Call("training.state", "Averages", ()),
    "a class": Named("training.state", "Averages"),
    "Namespace": Made("argparse", "Namespace", {"lr": 0.1}),
    "uint16": untyped("uint16", 4, 2),
    "float8": untyped("float8_e4m3fn", 4, 1),
    "float8 of another kind": untyped("float8_e8m0fnu", 4, 1),
    "meta": Call(
        "torch._utils", "_rebuild_meta_tensor_no_storage", (Named("torch", "float32"), (2,), (1,), False)
    ),
    "sparse": Call(
        "torch._utils", "_rebuild_sparse_tensor", (Named("torch", "sparse_coo"), (1, 2, (3,), True))
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_values_beside_the_model_are_passed_over(name, accepted, tmp_path):
    content = {"model": apple_gru(), "beside": BESIDE[name]}
    assert "model.norm.weight" in weights(accepted(write_pt(tmp_path / "m.pt", content)))


def test_a_buffer_is_the_tensor_that_it_holds(accepted, tmp_path):
    model = apple_gru()
    parameter = Call("torch._utils", "_rebuild_parameter", (model["final_norm.weight"], False, HOOKS))
    buffer = Call(
        "torch._tensor",
        "_rebuild_from_type_v2",
        (
            Named("torch._utils", "_rebuild_parameter"),
            Named("torch", "Tensor"),
            (parameter.arguments[0], False, HOOKS),
            {"_is_buffer": True},
        ),
    )
    folder = accepted(write_pt(tmp_path / "m.pt", model | {"final_norm.weight": buffer}))
    assert np.array_equal(weights(folder)["model.norm.weight"], model["final_norm.weight"])


def test_a_weight_of_such_a_kind_is_refused_by_name(refused, tmp_path):
    for name, word in (("sparse", "sparse"), ("meta", "meta"), ("float8 of another kind", "float8_e8m0fnu")):
        model = apple_gru() | {"final_norm.weight": BESIDE[name]}
        message = refused(write_pt(tmp_path / "m.pt", model))
        assert f"final_norm.weight has the number format {word}" in message


def test_float8_weights_get_the_sentence_of_safetensors(refused, tmp_path):
    model = {"final_norm.weight": untyped("float8_e4m3fn", 4, 1)} | {
        name: value for name, value in apple_gru().items() if name != "final_norm.weight"
    }
    message = refused(write_pt(tmp_path / "m.pt", model))
    assert "it looks quantized (final_norm.weight holds F8_E4M3 numbers)" in message


def ordered(module, name, content, state=b"}"):
    """What pickle writes of an OrderedDict's subclass: a call with no arguments, then state and items."""
    tail = b"(" + b"".join(pickled(key) + pickled(value) for key, value in content.items()) + b"u"
    return Raw(f"c{module}\n{name}\n)R".encode() + state + b"b" + tail)


def pickled(value):
    return pickle.dumps(value, 2)[2:-1]


def test_a_subclass_of_ordered_dict_is_read_as_a_dict(accepted, refused, tmp_path):
    averages = ordered("training.state", "Averages", {"decay": 0.9, "steps": [1, 2]})
    content = {"model": apple_gru(), "averages": averages, "hidden": ordered("__main__", "Seen", {})}
    assert "model.norm.weight" in weights(accepted(write_pt(tmp_path / "m.pt", content)))
    for call, said in (
        (Call("training.state", "Averages", (1,)), "names training.state.Averages"),
        (Made("training.state", "Averages", {}), "names training.state.Averages"),
        (Call("os", "getcwd", ()), "names os.getcwd"),
        (ordered("builtins", "frozenset", {}), "names builtins.frozenset"),
    ):
        beside = {"model": apple_gru(), "beside": call}
        assert said in refused(write_pt(tmp_path / "other.pt", beside))


@pytest.mark.parametrize("name", ["os.system", "builtins.getattr", "builtins.eval", "subprocess.Popen"])
def test_what_torch_refuses_beside_the_model_stays_refused(name, refused, tmp_path):
    module, function = name.split(".")
    content = {"model": apple_gru(), "beside": Call(module, function, ("x",))}
    assert f"names {name}" in refused(write_pt(tmp_path / "m.pt", content))


class Averages(collections.OrderedDict):
    """As training code has them."""


def test_what_torch_itself_writes_beside_a_model(accepted, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch (pip install 'mlx-pararnn[parity]')")
    import argparse
    import datetime

    model = {name: torch.from_numpy(value) for name, value in apple_gru().items()}
    model["final_norm.weight"] = torch.nn.Buffer(model["final_norm.weight"])
    beside = {
        "milestones": collections.Counter([3, 5]),
        "default": collections.defaultdict(list, {"a": [1]}),
        "complex": 1 + 2j,
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "uint16": torch.zeros(3, dtype=torch.uint16),
        "float8": torch.zeros(3).to(torch.float8_e5m2),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "meta": torch.zeros(3, device="meta"),
        "quantized": [torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), torch.quint8],
        "complex tensor": torch.zeros(3, dtype=torch.complex64),
        "keys": {(0, 1): 2, (0, ("a", 1)): 3, torch.float32: 4},
        "sets": [{(1, 2)}, {torch.device("cpu")}],
        "expanded": torch.ones(1).expand(3, 1000),
        "scalar": np.float64(1.5),
        "array": np.arange(3),
        "time": datetime.datetime(2025, 1, 2),
        "span": datetime.timedelta(1),
        "args": argparse.Namespace(lr=1),
        "averages": Averages(decay=0.9),
    }
    for protocol in (2, 4, 5):
        for name, value in beside.items():
            torch.save({"model": model, "beside": value}, tmp_path / "m.pt", pickle_protocol=protocol)
            folder = accepted(tmp_path / "m.pt")
            assert "model.norm.weight" in weights(folder), name
