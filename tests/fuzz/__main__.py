"""python -m tests.fuzz TARGET: tries changed inputs; `all` takes every target in turn.

A finding is kept as a file in the working folder, and --input tries it again; in tests/fuzz/found it is among
the first inputs from then on. Changes are drawn from a seed; with --atheris they are guided by coverage
(pip install "mlx-pararnn[fuzz]", Python 3.11 to 3.13), which is one target at a time.
"""

import argparse
import atexit
import hashlib
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from .changes import changed

FOUND = Path(__file__).with_name("found")
SECONDS = 5  # of the processor that one input may take
WAITING = 60  # that it may take by the clock, on a machine with other work
TICKS = 4  # that those are counted in: to a process that was stopped meanwhile but one comes late
MEMORY = 1 << 30  # bytes that all of them together may add
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of Python's own that no input may cause.
FORBIDDEN = {
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "pty.spawn", "pickle.find_class"),
    *("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"),
    *("shutil.rmtree", "socket.connect", "socket.bind"),
}
# A process that renders templates is started, and ended where it takes long.
OF_PROCESSES = {"subprocess.Popen", "os.kill"}


class Finding(BaseException):
    """What no reader may catch as an error of the input's."""


class Watch:
    """Raises where an input makes the process do what it may not."""

    def __init__(self, folder: Path, target: Any, last: Path) -> None:
        self.folder, self.target, self.active = str(folder.resolve()), target, False
        self.ticks, self.memory = 0, _peak()
        # What native code hangs or fails in is there afterwards.
        self.last = last
        self._file = os.open(last, os.O_WRONLY | os.O_CREAT, 0o600)
        sys.addaudithook(self._see)
        signal.signal(signal.SIGPROF, self._too_long)
        signal.signal(signal.SIGALRM, self._tick)

    def run(self, data: bytes) -> None:
        os.pwrite(self._file, data, 0)
        os.ftruncate(self._file, len(data))
        self._limit(SECONDS, WAITING)
        self.active = True
        try:
            self.target.run(data)
        finally:
            self.active = False
            self._limit(0, 0)
        if (peak := _peak()) - self.memory > MEMORY:
            self.memory = peak  # so that the next input is not blamed for it
            raise Finding("more than 1 GB of memory")

    def _limit(self, seconds: int, waiting: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        self.ticks = 0
        signal.setitimer(signal.ITIMER_REAL, waiting / TICKS, waiting / TICKS)
        # Native code keeps Python's handlers waiting: this one has none, and ends the process.
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            name, _, flags = arguments
            if flags & WRITING and isinstance(name, str | bytes):
                path = os.path.realpath(os.fsdecode(name))
                if not path.startswith((self.folder + os.sep, "/dev/null")):
                    raise Finding(f"{path} is opened for writing")
        elif event == "os.remove" and self.target.deletes:
            parent, name = os.path.split(os.path.abspath(os.fsdecode(arguments[0])))
            if not os.path.join(os.path.realpath(parent), name).startswith(self.folder + os.sep):
                raise Finding(f"{arguments[0]} is deleted")
        elif event in FORBIDDEN or (event in OF_PROCESSES and not self.target.processes):
            raise Finding(f"{event} {arguments!r:.200}")

    def _tick(self, number: int, frame: FrameType | None) -> None:
        self.ticks += 1
        if self.ticks >= TICKS:
            self._too_long(number, frame)

    def _too_long(self, number: int, frame: FrameType | None) -> None:
        if self.active:  # else the input had ended when the signal came
            raise Finding("takes too long")


class Findings:
    """One file of each kind: inputs that end in the same line of code are of one kind."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.kinds: set[tuple[str, ...]] = set()

    def add(self, error: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "mlx_pararnn" in f.filename), frames[-1])
        kind = (type(error).__name__, place.filename, str(place.lineno))
        if kind in self.kinds:
            return
        self.kinds.add(kind)
        path = Path(f"{self.target}-{hashlib.sha256(data).hexdigest()[:12]}")
        path.write_bytes(data)
        said = f"{type(error).__name__}: {error!s:.300} ({Path(place.filename).name}:{place.lineno})"
        print(f"{self.target}: {path}: {said}", file=sys.stderr, flush=True)


def fuzz(name: str, runs: int, seconds: float, seed: int = 0) -> tuple[int, int]:
    """How many inputs were tried and how many kinds of findings there were, each written to a file."""
    from .targets import TARGETS

    last = Path(tempfile.gettempdir()) / f"fuzz-{name}-{os.getpid()}"
    findings = Findings(name)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        target = TARGETS[name](Path(work))
        watch = Watch(Path(work), target, last)
        rng = random.Random(f"{name} {seed}")
        first = [*target.seeds, *(path.read_bytes() for path in sorted(FOUND.glob(f"{name}-*")))]
        begun, done = time.monotonic(), 0
        while done < len(first) or (done < runs and time.monotonic() - begun < seconds):
            data = (
                first[done] if done < len(first) else changed(target.seeds, target.words, rng, target.inside)
            )
            try:
                watch.run(data)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                findings.add(error, data)
            done += 1
    last.unlink()
    return done, len(findings.kinds)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def _by_coverage(name: str, runs: int, seconds: float, seed: int, corpus: Path | None) -> None:
    """Ends the process; what reaches new lines stays in the folder `corpus`, for a later run."""
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        sys.exit('--atheris needs atheris (Python 3.11 to 3.13): pip install "mlx-pararnn[fuzz]"')

    with atheris.instrument_imports(include=["mlx_pararnn", "mlx_lm.tool_parsers"]):
        from .targets import TARGETS
    work = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    (work / "target").mkdir()
    target = TARGETS[name](work / "target")
    corpus = corpus or work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in [*target.seeds, *(path.read_bytes() for path in FOUND.glob(f"{name}-*"))]:
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)  # as libFuzzer names them
    watch = Watch(work / "target", target, work / "last")
    findings = Findings(name)

    def one(data: bytes) -> None:
        try:
            watch.run(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            findings.add(error, data)

    def mutated(data: bytes, longest: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, longest))
        inside = target.inside
        try:
            return changed([data], target.words, rng, inside)[:longest]
        except Exception:  # it is no container any more
            return changed([data], target.words, rng)[:longest]

    # libFuzzer's own limit ends the process: for memory that native code takes and does not come back from.
    memory = (_peak() + 2 * MEMORY) >> 20
    longest = max(4096, 2 * max(map(len, target.seeds)))
    options = [f"-runs={runs}", f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", f"-timeout={WAITING}"]
    atheris.Setup(
        [sys.argv[0], *options, f"-max_len={longest}", f"-rss_limit_mb={memory}", str(corpus)],
        one,
        custom_mutator=mutated,
        enable_python_coverage=True,
    )
    atheris.Fuzz()


def main() -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--list", action="store_true", help="list the targets")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3600, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=Path, help="try this file alone")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--corpus", type=Path, help="with --atheris: the folder of inputs that it keeps")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # nothing that is watched imports for the first time and writes
    logging.disable()  # else each input's warnings are told
    if args.atheris and args.targets:
        _by_coverage(args.targets[0], args.runs, args.seconds, args.seed, args.corpus)
        return 0
    from .targets import TARGETS

    chosen = list(TARGETS) if args.targets == ["all"] else args.targets
    if args.list or not chosen or not set(chosen) <= TARGETS.keys():
        print("\n".join(TARGETS))
        return 0 if args.list else 2
    if args.input is not None:
        with tempfile.TemporaryDirectory() as work:
            target = TARGETS[chosen[0]](Path(work))
            watch = Watch(Path(work), target, Path(work).with_suffix(".last"))
            watch.run(args.input.read_bytes())
            watch.last.unlink()
        return 0
    total = 0
    for name in chosen:
        begun, used = time.monotonic(), time.process_time()
        done, found = fuzz(name, args.runs, args.seconds, args.seed)
        took = f"{time.monotonic() - begun:.0f} s ({time.process_time() - used:.0f} s of the processor)"
        print(f"{name}: {done:,} runs in {took}, {found or 'no'} kinds of findings", flush=True)
        total += found
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
