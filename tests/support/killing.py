"""Work that is killed at random moments, each time in a process of its own that is forked for it.

MLX may have been imported in that process, and not used: a fork would be without its threads.
"""

import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable


def killed(
    work: Callable[[], object], check: Callable[[bool], None], times: int = 50, seed: int = 0
) -> Counter[str]:
    """How often `work` was killed, and how often it ended before; `check` is called after each time.

    Args:
        work: is done once without a kill, to see how long it takes.
        check: given whether it has ended; raises where something is not as it should be.
        times: so many kills.
    """
    took = finished(work)
    chance, counts = random.Random(seed), Counter[str]()
    while counts["killed"] < times:
        child, begin = _forked(work), time.monotonic()
        code = _ended_within(chance.uniform(0, took), child)
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = _wait(child)
        if code == 0:  # on a machine with other work it takes long at one time and not at another
            took = 1.2 * (time.monotonic() - begin)
        assert code in (0, -signal.SIGKILL), code
        counts["killed" if code else "ended"] += 1
        check(code == 0)
        assert counts["ended"] < 20 * times
    return counts


def finished(work: Callable[[], object]) -> float:
    """Seconds that `work` takes in a process of its own."""
    begin = time.monotonic()
    assert _wait(_forked(work)) == 0
    return time.monotonic() - begin


def _forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def _ended_within(seconds: float, child: int) -> int | None:
    """The exit code of a child that ends by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
