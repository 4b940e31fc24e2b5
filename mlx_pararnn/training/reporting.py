"""What a run tells: its log, the plot of its losses, and what goes to other tools' dashboards."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks

from ..errors import PararnnError
from ..files.whole_file import whole_file, write_whole
from ..tools import plot

LOG, PLOT = "log.jsonl", "loss.png"
REPORTERS = ("wandb", "swanlab", "tensorboard")


class Log:
    """JSON Lines in `folder`, one a report of losses or samples; what came after step `last` is removed."""

    def __init__(self, folder: Path, last: int) -> None:
        self.path = folder / LOG
        kept = [line for line in read_log(folder) if line["step"] <= last]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.path, text.encode())

    def __call__(self, line: dict[str, Any]) -> None:
        """Report one line of the log."""
        if "checkpoint" in line:  # a resumed run's log is that of one that was never stopped
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, but for one that was cut off as it was written."""
    path = folder / LOG
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw_losses(folder: Path) -> Path | None:
    """Write the plot of a run's losses; None where matplotlib is not installed or nothing was logged."""
    log = read_log(folder)
    lines = {
        name: [(line["step"], line[field]) for line in log if field in line]
        for name, field in (("training", "loss"), ("held out", "valid_loss"))
    }
    lines = {name: points for name, points in lines.items() if points}
    if find_spec("matplotlib") is None or not lines:
        return None
    panel = plot.Panel("Loss", "step", "nats a token", lines, scaled=True)
    with whole_file(folder / PLOT) as partial:
        plot.draw([panel], partial)
    return folder / PLOT


def check_reporters(names: Sequence[str]) -> None:
    """Raise PararnnError if one is unknown, or its package is not installed."""
    for name in names:
        if name not in REPORTERS:
            raise PararnnError(f"--report-to {name}: choose from {', '.join(REPORTERS)}")
        package = "tensorboardX" if name == "tensorboard" else name
        if find_spec(package) is None:
            raise PararnnError(f"--report-to {name} needs a package that is missing: pip install {package}")


class Reporters:
    """Passes losses on to dashboards: MLX-LM's reporters, and TensorBoard, which is not among them.

    Raises:
        PararnnError: one is unknown, or its package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, project: str, config: dict[str, Any]) -> None:
        check_reporters(names)
        others = ",".join(name for name in names if name != "tensorboard")
        self._callbacks: list[TrainingCallback] = []
        if others:
            self._callbacks.append(get_reporting_callbacks(others, project, str(folder), cast(Any, config)))
        if "tensorboard" in names:
            self._callbacks.append(_TensorBoard(folder / "tensorboard"))

    def __call__(self, line: dict[str, Any]) -> None:
        """Report one line of the log."""
        numbers = {name: value for name, value in line.items() if name != "step"}
        for callback in self._callbacks:
            if "loss" in line:
                numbers = {**numbers, "train_loss": numbers["loss"]}
                callback.on_train_loss_report({"iteration": line["step"], **numbers})
            elif "valid_loss" in line:
                callback.on_val_loss_report(
                    {"iteration": line["step"], "val_loss": line["valid_loss"], "val_time": line["seconds"]}
                )

    def close(self) -> None:
        """Have written what was reported; nothing may be reported after it."""
        for callback in self._callbacks:
            if isinstance(callback, _TensorBoard):
                callback.close()


class _TensorBoard(TrainingCallback):  # type: ignore[misc]
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._write(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self._write(val_info)

    def _write(self, info: dict[str, Any]) -> None:
        for name, value in info.items():
            if name != "iteration":
                self._writer.add_scalar(name, value, info["iteration"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()  # its thread writes late, and would end unfinished with the process
