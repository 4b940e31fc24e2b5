"""Prints what nvcc makes of the recurrence's kernels: registers, stack, instructions, threads that fit.

    python -m tests.msl.occupancy

nvcc is not Apple's compiler: a stand-in. Bytes an instruction differ too: 16 on sm_90, fewer on Apple's GPUs.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.support.msl import cuda
from tests.support.msl.adjoint_kernel import adjoint
from tests.support.msl.instances import instance
from tests.support.msl.wrap import Input, KernelCall

REGISTERS = 65536  # of an sm_90 multiprocessor
MOST_THREADS = 2048


class Usage(NamedTuple):
    registers: int
    stack: int  # bytes a thread
    instructions: int

    def threads(self, threadgroup: int) -> int:
        """How many threads a multiprocessor holds by its registers, in whole threadgroups."""
        each = -(-self.registers // 8) * 8  # given out in eights
        return min(MOST_THREADS, REGISTERS // each) // threadgroup * threadgroup


def usage(launch: KernelCall, inputs: list[Input]) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        text, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        text.write_text(cuda.cuda_twin(launch, inputs))
        command = [
            cuda.nvcc(),
            "-cubin",
            "-Xptxas",
            "-v",
            "-arch=sm_90",
            "-std=c++20",
            "-o",
            str(made),
            str(text),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sections = subprocess.run(["readelf", "-SW", str(made)], capture_output=True, text=True, check=True)
    code = re.findall(r"\.text\.\S+\s+PROGBITS\s+\w+ \w+ (\w+)", sections.stdout)
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    stack = int(re.findall(r"(\d+) bytes stack frame", said)[0])
    return Usage(registers, stack, sum(int(size, 16) for size in code) // 16)


def main() -> None:
    print("| cell | kernel | registers | stack | instructions | threads an sm_90 multiprocessor holds |")
    print("|---|---|---|---|---|---|")
    for cell in ("gru", "lstm", "nlru", "slstm"):
        calls = [(name, instance(cell, tiling=name, shape=(2, 1, 400, 64))) for name in ("wide", "narrow")]
        calls.append(("sequential", instance(cell, tiling=None, shape=(2, 1, 400, 64))))
        rows = [(name, made.launch, made.inputs) for name, made in calls]
        gradient = adjoint(cell, 2, 400, 64)
        rows.append(("gradient, wide", gradient.launch, gradient.inputs))
        for name, launch, inputs in rows:
            used = usage(launch, inputs)
            print(
                f"| {cell} | {name} | {used.registers} | {used.stack} | {used.instructions} | "
                f"{used.threads(launch.threadgroup[0])} |"
            )


if __name__ == "__main__":
    main()
