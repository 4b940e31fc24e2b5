"""README.md of a model that was trained here."""

from .. import __version__
from ..model_config import ModelArgs
from .settings import Plan
from .trainer import Trainer

_HEAD = """---
library_name: mlx
tags:
- mlx
- mlx-pararnn
- pararnn
- rnn
pipeline_tag: text-generation
---

# ParaRNN {cell}, {millions:.1f}M parameters

A ParaRNN language model for [MLX](https://github.com/ml-explore/mlx), trained by mlx-pararnn {version}.

| | |
|---|---|
"""


def training_card(plan: Plan, args: ModelArgs, parameters: int, trainer: Trainer, tokens: int) -> str:
    """The card as Markdown; it names the data by its last name alone."""
    settings = plan.settings
    begin = "new weights" if plan.init is None else f"`{plan.init.rstrip('/').rpartition('/')[2]}`"
    rows = {
        "Began with": begin,
        "Learned": plan.tune,
        "Data": f"`{plan.data.name.replace('`', '')}`, {tokens:,} tokens",
        "Read": f"{trainer.tokens:,} tokens in {trainer.step:,} of {settings.steps:,} steps",
        "Training loss": "" if trainer.loss is None else f"{trainer.loss:.4f} nats a token",
        "Held-out loss": "" if trainer.valid_loss is None else f"{trainer.valid_loss:.4f} nats a token",
        "Cell": args.cell,
        "Parameters": f"{parameters:,}",
        "Hidden size": args.hidden_size,
        "Layers": args.num_hidden_layers,
        "Vocabulary": args.vocab_size,
        "Heads": args.num_heads,
        "Sequence length": f"{settings.length}, states {settings.states}",
        "Learning rate": f"{settings.learning_rate:g}, {settings.schedule}, warm-up {settings.warmup} steps",
        "Precision": settings.precision,
        "Moving average": "none" if settings.ema is None else f"{settings.ema:g}",
    }
    card = _HEAD.format(cell=args.cell.upper(), millions=parameters / 1e6, version=__version__)
    card += "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value != "")
    return card + '\n```sh\nmlx-pararnn generate PATH_OF_THIS_FOLDER -p "Once upon a time"\n```\n'
