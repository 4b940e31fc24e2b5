"""python -m tests.fuzz TARGET: tries inputs until one is a finding; `all` takes every target in turn.

A finding is kept as a file in the working folder, and --input tries it again; in tests/fuzz/found it is among
the first inputs from then on. Changes are drawn from a seed; with --atheris they are guided by coverage
(pip install atheris), which is one target at a time.
"""

import argparse
import copy
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

FOUND = Path(__file__).with_name("found")
SECONDS = 5  # that one input may take
MEMORY = 1 << 30  # bytes that all of them together may add
VALUES = [None, True, -1, 0, 1, 2, 2**31, 2**70, 1e308, "", "x", [], {}, [1], {"a": 1}, [[[[]]]], "\ud800"]
# Events of Python's own that no input may cause.
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "pty.spawn",
    "os.remove",
    "shutil.rmtree",
}


class Finding(BaseException):
    """What no reader may catch as an error of the input's."""


class Watch:
    """Raises where an input makes the process do what it may not."""

    def __init__(self, folder: Path, processes: bool) -> None:
        self.folder, self.processes, self.active = str(folder.resolve()), processes, False
        sys.addaudithook(self._see)
        signal.signal(signal.SIGALRM, self._too_long)

    def run(self, target: Any, data: bytes) -> None:
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS if self.processes else SECONDS)
        self.active = True
        try:
            target.run(data)
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            name, mode, _ = arguments
            written = isinstance(mode, str) and set(mode) & set("wax+")
            if written and isinstance(name, str) and not name.startswith((self.folder, "/dev/null")):
                raise Finding(f"{name} is opened for writing")
        elif event in FORBIDDEN or (event == "subprocess.Popen" and not self.processes):
            raise Finding(f"{event} {arguments!r:.200}")

    def _too_long(self, number: int, frame: FrameType | None) -> None:
        raise Finding(f"more than {SECONDS} seconds")


def changed(seeds: list[bytes], words: tuple[bytes, ...], rng: random.Random) -> bytes:
    """One of the inputs with a few changes: of a JSON value, of bytes, or with a piece of another input."""
    content = rng.choice(seeds)
    if content[:1] in (b"{", b"[") and rng.random() < 0.6:
        return _changed_json(content, rng)
    data = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        # Half of the changes fall into the first or last kilobyte, where headers and directories stand.
        near = rng.choice([0, max(0, len(data) - 1000)])
        at = (
            rng.randrange(len(data) + 1)
            if rng.random() < 0.5
            else near + rng.randrange(min(len(data), 1000) + 1)
        )
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.choice([1, 2, 4, 8, 100])]
        elif kind == 2 and words:
            data[at : at + rng.choice([0, 0, 1, 4])] = rng.choice(words)
        elif kind == 3:
            begin = rng.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + rng.choice([1, 4, 16, 64])]
        elif kind == 4:
            other = rng.choice(seeds)
            begin = rng.randrange(len(other) + 1)
            data[at:] = other[begin:] if rng.random() < 0.3 else other[begin : begin + 40] + data[at:]
        else:
            data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\1\0\0\0"])
    return bytes(data if rng.random() < 0.9 else data[: rng.randrange(len(data) + 1)])


def _changed_json(content: bytes, rng: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        inside, key = rng.choice(places)
        if rng.random() < 0.2 and isinstance(inside, dict):
            del inside[key]
        else:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def fuzz(name: str, runs: int, seconds: float, seed: int = 0) -> int:
    """How many inputs were tried; raises on a finding, which it has written to a file."""
    from tests.fuzz.targets import TARGETS

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        target = TARGETS[name](Path(work))
        watch = Watch(Path(work), target.processes)
        for data in (*target.seeds, *(path.read_bytes() for path in sorted(FOUND.glob(f"{name}-*")))):
            watch.run(target, data)
        rng = random.Random(f"{name} {seed}")
        begun, memory = time.monotonic(), _peak()
        done = 0
        while done < runs and time.monotonic() - begun < seconds:
            data = changed(target.seeds, target.words, rng)
            try:
                watch.run(target, data)
                assert _peak() - memory < MEMORY, "more than 1 GB of memory"
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt):
                    print(f"{name}: {_kept(name, data)}: {type(error).__name__}: {error}", file=sys.stderr)
                raise
            done += 1
        return done


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def _kept(name: str, data: bytes) -> Path:
    path = Path(f"{name}-{hashlib.sha256(data).hexdigest()[:12]}")
    path.write_bytes(data)
    return path


def _by_coverage(name: str, runs: int, seconds: float, seed: int) -> None:
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["mlx_pararnn"]):
        from tests.fuzz.targets import TARGETS
    work = Path(tempfile.mkdtemp())
    for folder in ("work", "corpus"):
        (work / folder).mkdir()
    target = TARGETS[name](work / "work")
    for n, data in enumerate(target.seeds):
        (work / "corpus" / str(n)).write_bytes(data)
    longest = max(4096, 2 * max(map(len, target.seeds)))
    watch = Watch(work / "work", target.processes)
    options = [
        f"-runs={runs}",
        f"-max_total_time={int(seconds)}",
        f"-seed={seed + 1}",
        f"-timeout={4 * SECONDS}",
    ]
    atheris.Setup(
        [sys.argv[0], *options, f"-max_len={longest}", "-rss_limit_mb=4096", str(work / "corpus")],
        lambda data: watch.run(target, data),
        enable_python_coverage=True,
    )
    atheris.Fuzz()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--list", action="store_true", help="list the targets")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=Path, help="try this file alone")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    args = parser.parse_args()
    if args.atheris and args.target:
        _by_coverage(args.target, args.runs, args.seconds, args.seed)
        return
    from tests.fuzz.targets import TARGETS

    if args.list or args.target not in (*TARGETS, "all"):
        print("\n".join(TARGETS))
    elif args.input is not None:
        with tempfile.TemporaryDirectory() as work:
            target = TARGETS[args.target](Path(work))
            Watch(Path(work), target.processes).run(target, args.input.read_bytes())
    else:
        for name in TARGETS if args.target == "all" else [args.target]:
            begun = time.monotonic()
            done = fuzz(name, args.runs, args.seconds, args.seed)
            print(f"{name}: {done:,} runs in {time.monotonic() - begun:.0f} s, no finding", flush=True)


if __name__ == "__main__":
    main()
