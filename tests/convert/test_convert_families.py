"""Which family a checkpoint belongs to, and families that other packages bring."""

from importlib import metadata
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from mlx_pararnn.convert import families
from mlx_pararnn.convert.families.base import Canonical, Source, copied
from mlx_pararnn.convert.readers.checkpoint import open_checkpoint
from tests.support.converting import config, weights
from tests.support.pt_writer import write_pt
from tests.support.small_models import TORCH_CELLS, apple_gru, babylm, torch_lm


class OneMatrix:
    """A family in a dozen lines, as another package would write it."""

    name = "one-matrix"
    title = "single matrix"

    def detect(self, checkpoint):
        return "matrix" in checkpoint.tensors

    def map(self, checkpoint, tied):
        source = Source(checkpoint, self.name)
        matrix = source.take("matrix", source.shape("matrix", 2))
        source.finish()
        args = {"cell": "mine", "hidden_size": matrix.shape[0], "num_heads": 1}
        return Canonical(args, [copied("recurrent_weight", matrix)], model_type="pararnn_cell")


def entry_points(value: str):
    entry = EntryPoint("one-matrix", value, families.ENTRY_POINT_GROUP)
    return lambda group, name="one-matrix": [entry] if name == entry.name else []


@pytest.mark.parametrize("options", [(), ("--family", "one-matrix")])
def test_a_family_of_another_package_is_found(options, accepted, monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "entry_points", entry_points(f"{__name__}:OneMatrix"))
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    folder = accepted(write_pt(tmp_path / "m.pt", {"matrix": matrix}), *(options or ("--force",)))
    assert np.array_equal(weights(folder)["recurrent_weight"], matrix)
    assert config(folder)["cell"] == "mine"


def test_a_family_that_cannot_be_loaded_is_named(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "entry_points", entry_points("no_such_module:Family"))
    message = refused(write_pt(tmp_path / "m.pt", {"matrix": np.zeros((2, 3), np.float32)}))
    assert "the family one-matrix (no_such_module:Family) cannot be loaded" in message


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (apple_gru(), "ml-pararnn"),
        (apple_gru(lstm=True), "ml-pararnn"),
        *((torch_lm(cell), "pararnn-torch") for cell in TORCH_CELLS),
        *((babylm(cell), "babylm") for cell in TORCH_CELLS),
        ({f"rnn.{part}": np.zeros((2, 2), np.float32) for part in "ABb"}, "bare-cell"),
    ],
)
def test_detection(model, family, tmp_path):
    checkpoint = open_checkpoint(write_pt(tmp_path / "m.pt", model))
    assert families.find_family(checkpoint).name == family


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_pararnn_torch_head_without_a_config(cell, accepted, tmp_path):
    """No file says tied or not: equal weights mean tied, others a head of its own."""
    model = torch_lm(cell)
    same = write_pt(tmp_path / "same.pt", model | {"lm_head.weight": model["embed.weight"].copy()})
    other = write_pt(tmp_path / "other.pt", model | {"lm_head.weight": model["embed.weight"] + 1})
    assert config(accepted(same)) == config(accepted(other)) | {"tie_word_embeddings": True}
    assert config(accepted(other))["tie_word_embeddings"] is False


class Heedless:
    """A family that does not ask what the user says about the head."""

    name = "one-matrix"
    title = "ml-pararnn, and the head as it finds it"

    def detect(self, checkpoint):
        return False

    def map(self, checkpoint, tied):
        return families.MlPararnn().map(checkpoint, None)


def test_a_head_that_would_be_missed_is_refused(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "entry_points", entry_points(f"{__name__}:Heedless"))
    (tmp_path / "c.json").write_text('{"tie_word_embeddings": false}')
    message = refused(
        write_pt(tmp_path / "m.pt", apple_gru()), "--config", tmp_path / "c.json", "--family", "one-matrix"
    )
    assert "gives the model no lm_head.weight, and tie_word_embeddings is false" in message
