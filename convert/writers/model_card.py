"""README.md of a converted model: where it came from and how it was made."""

import json
from typing import Any

from mlx_pararnn import __version__

from ..readers.checkpoint import Checkpoint
from ..readers.wording import shown

_HEAD = """---
library_name: mlx
tags:
- mlx
- mlx-pararnn
- pararnn
- rnn
{pipeline}---

# {title}

A ParaRNN {what} for [MLX](https://github.com/ml-explore/mlx),
converted from a PyTorch checkpoint by mlx-pararnn {version}.

| | |
|---|---|
"""


def model_card(
    checkpoint: Checkpoint,
    family: str,
    notes: list[str],
    config: dict[str, Any],
    parameters: int,
    dtypes: tuple[str, ...],
    options: list[str],
) -> str:
    """The card as Markdown: `notes` are sentences, `options` the command line's, as the user gave them."""
    is_model = config["model_type"] == "pararnn"
    rows = {
        "Source": f"`{shown(checkpoint.title).replace('`', '')}` ({family})",
        "Cell": config["cell"],
        "Parameters": f"{parameters:,}",
        "Weights": ", ".join(dtypes),
        "Hidden size": config["hidden_size"],
    }
    if is_model:
        rows |= {"Layers": config["num_hidden_layers"], "Vocabulary": config["vocab_size"]}
    rows["Heads"] = config["num_heads"]
    rows["Options"] = f"`{' '.join(options)}`" if options else "none"
    card = _HEAD.format(
        pipeline="pipeline_tag: text-generation\n" if is_model else "",
        title=f"ParaRNN {config['cell'].upper()}, {parameters / 1e6:.1f}M parameters",
        what="language model" if is_model else "cell",
        version=__version__,
    )
    card += "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    if notes:
        card += "\n" + "\n".join(notes) + "\n"
    if is_model:
        card += '\n```sh\nmlx-pararnn generate PATH_OF_THIS_FOLDER -p "Once upon a time"\n```\n'
    trained = (checkpoint.training_config or {}).get("model")  # the rest may hold paths and names
    if trained:
        text = json.dumps(trained, indent=2).replace("```", "'''")
        card += f"\n## The model's part of the training configuration\n\n```json\n{text}\n```\n"
    return card
