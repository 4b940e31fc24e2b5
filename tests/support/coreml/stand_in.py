"""In place of a Mac's Core ML, in the process that `verify` starts for a processor: the tests' interpreter.

$STAND_IN is JSON: what is to happen on which processor, "end", "hang", "refuse" or "no plan".
"""

import json
import os
import sys
import time
from pathlib import Path

from mlx_pararnn.convert.coreml import compute_unit
from mlx_pararnn.convert.coreml.require_coremltools import quiet

with quiet():
    from tests.support.coreml.interpreter import Package


class StandIn:
    """In place of a coremltools model of one function; `wrong` is added to its logits."""

    def __init__(self, package, name, wrong=0.0):
        self.function, self.wrong = Package(package).function(name), wrong

    def make_state(self):
        return self.function.new_state()

    def predict(self, inputs, state=None):
        outputs = self.function(inputs, state or {})
        return {k: v + self.wrong * (k == "logits") for k, v in outputs.items()}


def open_function(compiled, name, unit):
    what = json.loads(os.environ["STAND_IN"]).get(unit)
    if what == "end":
        os.abort()
    if what == "hang":
        time.sleep(3600)
    if what == "refuse":
        raise RuntimeError("no such model.")
    return StandIn(compiled, name)


def placed(compiled, unit):
    if json.loads(os.environ["STAND_IN"]).get(unit) == "no plan":
        raise RuntimeError("no plan")
    return {"decode": {"CPU": 5}}


if __name__ == "__main__":
    compute_unit.open_function, compute_unit.placed = open_function, placed
    compute_unit.main(Path(sys.argv[1]))
