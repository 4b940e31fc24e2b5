"""Core ML packages, their saved operations executed by Core AI's runtime: Apple's arithmetic beside ours.

It shows that the program is the model; what Core ML makes of it on a processor, a Mac shows.
"""

import json
from itertools import product

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools has no wheel for this Python and machine")
pytest.importorskip("coreai", reason="coreai-core is not installed, or has no wheel for this Python")

from safetensors.numpy import load_file

from tests.support.coreml.exports import (
    BUNDLED_MODELS,
    GOLDEN,
    QUANTIZED,
    TRAINED,
    bundled,
    difference,
    golden,
    held_out,
    prefilled,
    reference_logits,
    some_ids,
)
from tests.support.coreml.translated import Translated, runner

EXACT = 2e-5  # float32 against float32
TIMES = 8  # what `verify` allows a processor: so many times MLX's own float16
FORMS = {
    "graph": ("--state", "graph"),
    "io": ("--state", "io"),
    "io float32": ("--state", "io", "--recurrence", "float32"),
    "ane": ("--layout", "ane"),
}


def check(folder, model, ids, tmp_path):
    """`ids` by decode and by prefill, then decode, in float32 and as saved."""
    expected = reference_logits(model, ids)
    yardstick = float(load_file(folder / "reference.safetensors")["yardstick"])
    for exact, bound in ((True, EXACT), (False, TIMES * yardstick)):
        scratch = tmp_path / str(exact)
        scratch.mkdir()
        with Translated(folder / "model.mlpackage", scratch, exact) as translated:
            reader = runner(folder, translated)
            ours = reader.decode(ids)
            assert difference(ours, expected) < bound
            if exact:
                assert (ours.argmax(-1) == expected.argmax(-1)).all()
            if chunk := reader.info["chunk"]:
                reader.reset()
                read, places = prefilled(reader, ids, chunk)
                assert difference(read, expected[places]) < bound


@pytest.mark.large
@pytest.mark.parametrize("form", ["graph", "io", "ane"])
@pytest.mark.parametrize(("source", "folder", "prefix"), GOLDEN, ids=lambda value: value.split("/")[-1])
def test_golden_models(exports, tmp_path, source, folder, prefix, form):
    model = exports.source(source)
    out = exports(model, "--chunk", 8, *FORMS[form])
    ids = np.array(golden(folder)[f"{prefix}input_ids"])[0][:30]
    check(out, exports.model(model), ids, tmp_path)


@pytest.mark.large
@pytest.mark.parametrize("form", FORMS)
def test_trained_model(exports, tmp_path, form):
    source = exports.source(TRAINED)
    out = exports(source, "--chunk", 16, *FORMS[form])
    check(out, exports.model(source), held_out(40), tmp_path)


@pytest.mark.large
@pytest.mark.parametrize("form", ["graph", "io"])
@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_models(exports, tmp_path, name, form):
    source, ids = bundled(name)
    check(exports(source, "--chunk", 8, *FORMS[form]), exports.model(source), ids[:20], tmp_path)


@pytest.mark.large
@pytest.mark.parametrize(("how", "form"), [*product(QUANTIZED, ("graph", "ane"))])
def test_quantized(exports, tmp_path, how, form):
    """Against the logits of the weights as they are stored."""
    source = exports.small(hidden_size=32, num_heads=2, intermediate_size=64, tie_word_embeddings=True)
    out = exports(source, "--chunk", 8, *QUANTIZED[how], *FORMS[form])
    reference = load_file(out / "reference.safetensors")
    with Translated(out / "model.mlpackage", tmp_path, exact=True) as translated:
        read, places = prefilled(runner(out, translated), reference["tokens"], 8)
    assert json.loads((out / "pararnn.json").read_text())["weights"] == how
    assert difference(read, reference["logits"][np.array(places) - 7]) < EXACT


@pytest.mark.large
def test_another_number_is_noticed(exports, tmp_path):
    """A norm's weight doubled in the saved program."""
    source = exports.small(num_heads=3)
    out = exports(source, "--chunk", 8)
    ids = some_ids(50, 12)
    with Translated(out / "model.mlpackage", tmp_path, exact=True) as translated:
        before = runner(out, translated).decode(ids)
    changed = Translated(out / "model.mlpackage", tmp_path / "changed", exact=True)
    (tmp_path / "changed").mkdir()
    constants = changed.package.constants
    changed.package.constants = lambda name: {
        k: v * 2 if isinstance(v, np.ndarray) and v.shape == (12,) else v for k, v in constants(name).items()
    }
    with changed as translated:
        assert difference(runner(out, translated).decode(ids), before) > 0.01
