"""Compiles a kernel's Metal text as C++ for this machine, with a call before every load and store.

g++ -fsanitize=thread puts the calls in; the functions called are shim/msl_memory.cpp's, not the sanitizer's.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .wrap import ATTRIBUTES, METAL_TYPES, Input, Wrapped

SHIM = Path(__file__).parent / "shim"

COMMON = ["-std=c++17", "-fPIC", "-g1", "-w", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions"]
# What is not initialised is a pattern (large and negative), not the zero it often happens to be.
COMMON += ["-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern"]
CHECKED = ["-O1", "-fsanitize=thread", "-fno-aggressive-loop-optimizations", "-fno-sanitize-recover=all"]
CHECKED += ["--param=tsan-instrument-func-entry-exit=0"]
CHECKED += [
    "-fsanitize=signed-integer-overflow,integer-divide-by-zero,shift,bounds-strict,float-cast-overflow,return"
]
UNCHECKED = ["-O2"]
CONTRACTION = ["-ffp-contract=fast", "-mfma"]
MATH = {
    "ieee": [],
    # what Metal's tables allow: 4 ulps on exp and the like (denormals are flushed at launch), and contraction
    # where the text does not turn it off (g++ does not know the pragma)
    "metal": ["-DMSL_LOOSE_MATH=4"],
    # the same, and multiplications fused with additions wherever g++ sees them, as CUDA's compiler does
    "fused": ["-DMSL_LOOSE_MATH=4", *CONTRACTION, "-DFUSES=1"],
    # the same, but within an expression only: Metal's safe mode, by a compiler that does not know the pragma
    "expressions": ["-DMSL_LOOSE_MATH=4", "-ffp-contract=on", "-mfma"],
    "fast": ["-DMSL_FAST_MATH"],
}
CLANG = {"expressions"}  # compiled by clang: g++ fuses across statements or not at all
LINKER = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []  # in a quarter of the time
NO_CONTRACTION = "#pragma METAL fp contract(off)\n"

POSITION = {  # an attribute, from MslPosition
    "thread_position_in_grid": "thread_in_grid",
    "thread_position_in_threadgroup": "thread_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_in_grid",
    "threads_per_threadgroup": "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup": "threads_per_threadgroup",
    "threadgroups_per_grid": "threadgroups_per_grid",
    "threads_per_grid": "threads_per_grid",
    "thread_index_in_threadgroup": "thread_index",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
    "dispatch_simdgroups_per_threadgroup": "simdgroups",
}
CONSTANT = {"threads_per_simdgroup": "32u", "thread_execution_width": "32u"}

THREADGROUP_ARRAY = re.compile(
    r"\bthreadgroup\s+([A-Za-z_][\w: ]*?)\s+([A-Za-z_]\w*)\s*((?:\[[^\]]*\])*)\s*;"
)
THREADS = re.compile(r"\[\[max_total_threads_per_threadgroup\((\d+)\)\]\]\n")
MARK = re.compile(
    r"\[\[(?:kernel|buffer\(\d+\)|max_total_threads_per_threadgroup\(\d+\)|" + "|".join(ATTRIBUTES) + r")\]\]"
)
ENTRY = "msl_entry"


class CompileError(Exception):
    """g++ rejects the kernel."""


@cache
def missing() -> str:
    """Why kernels cannot be compiled here, or "" if they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the harness runs on Linux on x86-64 only"
    if not shutil.which("g++"):
        return "no g++ (apt-get install g++)"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return "" if int(version.split(".")[0]) >= 12 else f"g++ 12 or newer needed, not {version.strip()}"


@cache
def clang() -> str:
    """The newest clang of at least 19, or ""."""
    for name in ("clang-21", "clang-20", "clang-19", "clang"):
        path = shutil.which(name)
        if path:
            version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout
            if int(version.split(".")[0] or 0) >= 19 and "Apple" not in _about(path):
                return path
    return ""


def _about(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def without_instantiation(text: str) -> str:
    return text.split("\ntemplate [[host_name(", 1)[0]


def to_cpp(wrapped: Wrapped, inputs: dict[str, Input]) -> str:
    """The kernel's text as C++, its lines kept, and a function that calls it with the buffers in a row."""
    text = THREADGROUP_ARRAY.sub(r"MSL_THREADGROUP(\1, \2, \3);", without_instantiation(wrapped.text))
    arguments = []
    for i, p in enumerate(wrapped.parameters):
        kind = re.sub(r"\b(device|constant)\b", "", p.declaration)
        pointer = f"static_cast<{kind.rstrip('&*')}*>(buffers[{i}])"
        arguments.append("*" + pointer if kind.endswith("&") else pointer)
    for name in wrapped.attributes:
        if name in CONSTANT:
            arguments.append(CONSTANT[name])
        elif name in POSITION and ATTRIBUTES[name] == "uint3":
            arguments.append("uint3({0}[0], {0}[1], {0}[2])".format("position->" + POSITION[name]))
        elif name in POSITION:
            arguments.append("position->" + POSITION[name])
        else:
            raise CompileError(f"the harness does not model the attribute {name}")
    call = f"{wrapped.kernel}{wrapped.template_arguments}({', '.join(arguments)})"
    entry = f'extern "C" void {ENTRY}(void** buffers, const MslPosition* position) {{ {call}; }}'
    return f'#include "msl_shim.h"\n#line 1 "kernel.metal"\n{MARK.sub("", text)}\n{entry}\n'


@cache
def cache_folder() -> Path:
    """A folder of this user's for compiled kernels, kept between runs."""
    folder = Path(tempfile.gettempdir()) / f"mlx-pararnn-msl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to someone else")
    return folder


@cache
def shim_digest() -> str:
    texts = [p.read_bytes() for p in sorted(SHIM.iterdir())]
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, check=True).stdout
    return hashlib.sha256(b"\0".join([version, *texts])).hexdigest()


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise CompileError("\n".join(errors[:5]) or done.stderr[:2000])


def publish(temporary: str, final: Path) -> None:
    """Several processes may build the same file; the last one wins, whole."""
    os.replace(temporary, final)


@cache
def runtime() -> list[Path]:
    objects = []
    for name in ("msl_rt", "msl_memory"):
        target = cache_folder() / f"{name}-{shim_digest()[:20]}.o"
        if not target.exists():
            temporary = f"{target}.{os.getpid()}"
            flags = ["-std=c++17", "-O2", "-fPIC", "-fno-exceptions"]
            run_compiler(["g++", *flags, "-c", str(SHIM / f"{name}.cpp"), "-o", temporary])
            publish(temporary, target)
        objects.append(target)
    return objects


def build(source: str, *, check: bool, math: str) -> Path:
    """The shared library of a kernel as C++, compiled at most once for a text and its flags."""
    flags = COMMON + (CHECKED if check else UNCHECKED) + MATH[math]
    if math == "metal" and NO_CONTRACTION not in source:
        flags += CONTRACTION
    key = hashlib.sha256("\0".join([shim_digest(), *flags, source]).encode()).hexdigest()[:24]
    target = cache_folder() / f"{key}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        cpp, compiled, linked = (str(Path(folder) / n) for n in ("kernel.cpp", "kernel.o", "kernel.so"))
        Path(cpp).write_text(source)
        compiler = clang() if math in CLANG else "g++"
        run_compiler([compiler, *flags, "-I", str(SHIM), "-c", cpp, "-o", compiled])
        link = ["g++", *LINKER, "-shared", "-Wl,-Bsymbolic,-z,defs", compiled]
        run_compiler([*link, *map(str, runtime()), "-o", linked])
        publish(linked, target)
    return target


def numpy_type(metal: str) -> str:
    """The NumPy dtype whose bytes a Metal type has; bfloat16 travels as uint16."""
    name = {v: k for k, v in METAL_TYPES.items()}[metal]
    return "uint16" if name == "bfloat16" else name
