"""docs/upstream/pararnn.py, the file for MLX-LM, stands alone: run where this package cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlx_pararnn

mx = pytest.importorskip("mlx.core")

FILE = Path(__file__).parents[1] / "docs" / "upstream" / "pararnn.py"
MODELS = {
    "gru": "trained/paragru/final.pt",
    "lstm": "lm/paralstm_s96/state_dict.pt",
    "slstm": "pararnn_torch/paraslstm_causal_lm_1",
}

# What MLX-LM does with a model of its own: load, prompt in pieces, a padded batch, quantize, generate.
PROGRAM = """
import importlib.util, json, sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlx_pararnn":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
import mlx.core as mx
import mlx_lm.models

spec = importlib.util.spec_from_file_location("mlx_lm.models.pararnn", sys.argv[1])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
from mlx_lm import utils
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

for job in json.loads(sys.argv[2]):
    model, config = utils.load_model(__import__("pathlib").Path(job["model"]))
    assert type(model).__module__ == "mlx_lm.models.pararnn"
    ids = mx.load(job["ids"])["ids"]
    found = {"whole": model(ids)}
    cache = make_prompt_cache(model)
    cuts = [0, 5, 6, ids.shape[1]]
    parts = [model(ids[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
    found["pieces"] = mx.concatenate(parts, axis=1)
    prompt = ids[0, :9]
    found["greedy"] = mx.array([token for token, _ in generate_step(prompt, model, max_tokens=12)])
    prompts = [ids[0, :9].tolist(), ids[1, :4].tolist()]
    batch = BatchGenerator(model, max_tokens=12)
    uids = batch.insert(prompts)
    rows = {uid: [] for uid in uids}
    while responses := batch.next_generated():
        for r in responses:
            rows[r.uid].append(r.token)
    found["batch"] = mx.array([rows[uid] for uid in uids])
    mx.save_safetensors(job["out"], found)
assert not any(name.partition(".")[0] == "mlx_pararnn" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def runs(converted, tmp_path_factory):
    """For each model, our class and what the file alone computed, in another process."""
    folder = tmp_path_factory.mktemp("upstream")
    jobs = {}
    for name, source in MODELS.items():
        for kind, options in (("float", {}), ("quantized", {"quantize": True, "q_group_size": 32})):
            model = converted(source, **options)
            vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
            ids = np.random.default_rng(0).integers(0, vocabulary, (2, 24), np.int32)
            path = folder / f"{name}-{kind}"
            save_file({"ids": ids}, f"{path}-ids.safetensors")
            jobs[name, kind] = {
                "model": str(model), "ids": f"{path}-ids.safetensors", "out": f"{path}-out.safetensors",
            }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, FILE, json.dumps(list(jobs.values()))],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {
        key: (
            mlx_pararnn.load_model(job["model"])[0],
            mx.array(load_file(job["ids"])["ids"]),
            load_file(job["out"]),
        )
        for key, job in jobs.items()
    }


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_and_tokens(name, kind, runs):
    model, ids, found = runs[name, kind]
    ours = np.array(model(ids))
    assert np.abs(found["whole"] - ours).max() < 5e-5
    assert np.abs(found["pieces"] - ours).max() < 5e-5
    for row, length in ((0, 9), (1, 4)):
        cache = model.make_cache()
        logits = model(ids[row : row + 1, :length], cache=cache)
        for token in found["batch"][row]:
            assert_greedy(int(token), np.array(logits[0, -1]))
            logits = model(mx.array([[int(token)]]), cache=cache)
    assert (found["greedy"] == found["batch"][0]).all()


def assert_greedy(token, logits):
    """The best token, or one that rounding cannot tell from it."""
    assert logits[token] > logits.max() - 1e-3
