"""Small models, batches and data for the tests of training."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_pararnn.model import Model, ModelArgs
from mlx_pararnn.training.batches import Batch
from mlx_pararnn.training.settings import Settings
from mlx_pararnn.training.trainer import Trainer

TEXT = Path(__file__).parents[2].joinpath("docs/python.md").read_text(encoding="utf-8")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 24}


def small_model(seed: int = 0, **changes) -> Model:
    mx.random.seed(seed)
    model = Model(ModelArgs(**{**SMALL, "vocab_size": 256, **changes}))
    mx.eval(model.parameters())
    return model


class Text:
    """Endless batches of TEXT's bytes in rows that read on."""

    def __init__(self, rows: int = 4, length: int = 16, fresh: bool = False) -> None:
        self.rows, self.length, self.fresh = rows, length, fresh
        self.bytes = np.frombuffer(TEXT.encode(), np.uint8)

    def starting_at(self, batch: int):
        while True:
            begins = 700 * np.arange(self.rows)[:, None] + self.length * (batch % 50)
            tokens = self.bytes[begins + np.arange(self.length + 1)]
            yield Batch(tokens, None, fresh=self.fresh or batch % 50 == 0)
            batch += 1

    def __iter__(self):
        return self.starting_at(0)


class Recorded(Trainer):
    """One whose reports are kept in `lines`."""

    lines: list[dict]


def trainer(settings: dict | None = None, model: Model | None = None, batches=None, **options) -> Recorded:
    """One that reports every step."""
    lines: list[dict] = []
    plain = {
        "steps": 6,
        "warmup": 2,
        "report_every": 1,
        "eval_every": 0,
        "save_every": 0,
        "learning_rate": 1e-2,
    }
    chosen = Settings(**plain | (settings or {}))
    made = Recorded(model or small_model(), batches or Text(), chosen, report=lines.append, **options)
    made.lines = lines
    return made


def losses(lines: list[dict]) -> dict[int, tuple]:
    """What must be the same in every run, by step."""
    told: dict[int, tuple] = {}
    for line in lines:
        kept = tuple(
            (k, v) for k, v in line.items() if k in ("loss", "valid_loss", "sample", "gradient_norm")
        )
        told[line["step"]] = told.get(line["step"], ()) + kept
    return {step: what for step, what in told.items() if what}


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    """The same names and bits."""
    return a.keys() == b.keys() and all(bool(mx.array_equal(a[name], b[name])) for name in a)
