"""Losses as TensorBoard and Weights & Biases write them, by their own packages, without a network."""

import struct
from pathlib import Path

import pytest

from mlx_pararnn.training.reporting import Reporters

LINES = (
    {"step": 1, "loss": 5.5, "learning_rate": 0.25},
    {"step": 2, "loss": 4.5, "learning_rate": 0.5},
    {"step": 2, "valid_loss": 4.75, "valid_tokens": 80, "seconds": 0.5},
)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install 'mlx-pararnn[clients]'")
    report = Reporters(("tensorboard",), tmp_path, "project", {"steps": 2})
    for line in LINES:
        report(line)
    report.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    told = {
        (event.step, value.tag): value.simple_value for event in events(file) for value in event.summary.value
    }
    assert told[1, "train_loss"] == 5.5
    assert told[2, "train_loss"] == 4.5
    assert told[2, "learning_rate"] == 0.5
    assert told[2, "val_loss"] == 4.75


def events(file: Path):
    """The records of an event file: a length, its checksum, the message, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = file.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


@pytest.mark.large
def test_wandb_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'mlx-pararnn[clients]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report = Reporters(("wandb",), tmp_path, "project", {"steps": 2})
    for line in LINES:
        report(line)
    wandb.finish()
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    told = record.read_bytes()
    for part in (b"train_loss", b"5.5", b"val_loss", b"4.75", b"learning_rate"):
        assert part in told, part
