"""What the Swift tests compare with is what MLX-LM and Hugging Face's tokenizers compute today.

The Swift package itself is built and tested by swift/linux/test.sh.
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

SWIFT = Path(__file__).parents[1] / "swift"


def script(name):
    spec = spec_from_file_location(name, SWIFT / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name):
    return json.loads((SWIFT / "ParaRNNTests" / "Data" / name).read_text(encoding="ascii"))


def test_probabilities_are_mlx_lms():
    ours, now = committed("sampling.json"), script("make_vectors").sampling_cases()
    assert len(ours) == len(now)
    for a, b in zip(ours, now, strict=True):
        assert {k: a[k] for k in ("options", "logits", "recent")} == {
            k: b[k] for k in ("options", "logits", "recent")
        }
        np.testing.assert_allclose(a["probabilities"], b["probabilities"], rtol=0, atol=1e-6)


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the characters are those of Python 3.11's Unicode"
)
def test_tokens_are_hugging_faces():
    assert committed("tokenizers.json") == script("make_vectors").tokenizer_cases()


def test_docs_have_swift_samples():
    samples = script("doc_samples").samples()
    for name in ("ParaRNNModel(contentsOf", "model.generate(", "chat.respond(", "chat.save()"):
        assert name in samples
    assert "AutoTokenizer" not in samples
