"""Train one part of the model, in this order: tokenizer, language, decoder; and the judge of drawings.

`python -m examples.manzano.train PART ICONS -o OUT`. The same command goes on with a run that was stopped.
`--variant` trains another language part beside the recipe's (`ablation.py`).
"""

import argparse
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType

from .ablation import VARIANTS
from .judge import train_judge
from .stages import RECIPE, Project, train_decoder, train_language_model, train_tokenizer

PARTS = {
    "tokenizer": train_tokenizer,
    "language": train_language_model,
    "decoder": train_decoder,
    "judge": train_judge,
}


def stop_on_signals(project: Project) -> None:
    """The first Ctrl-C or SIGTERM ends after the step, with a checkpoint; the second at once."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        project.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("icons", type=Path, help="the folder where npm install ran")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--variant", choices=VARIANTS, default="hybrid", help="of the language part, to compare with it"
    )
    given = parser.parse_args()
    own = {"language": list(VARIANTS), "tokenizer": ["hybrid", "separate"]}.get(given.part, ["hybrid"])
    if given.variant not in own:
        parser.error(f"{given.part} is the recipe's own for --variant {given.variant}: train it without")
    project = Project(given.out, given.icons, replace(RECIPE, variant=given.variant), given.seed)
    stop_on_signals(project)
    PARTS[given.part](project)
