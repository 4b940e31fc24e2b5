"""Calls of metal/cpu_gradients.cpp, recorded in files and replayed by a C++ program without Python."""

import mlx.core as mx
import numpy as np

from mlx_pararnn.compute import cpu, cpu_gradients, texts
from tests.support.msl.instances import DTYPES

NAMES = (
    *("swiglu_gradient", "rms_norm_gradient", "gated_norm_gradient"),
    *("conv_silu_gradient", "cross_entropy", "cross_entropy_gradient"),
)

# What the compilers' sanitizers look at. File: the function's place in TABLE, then sizes, inputs and outputs,
# each with its count (of arrays: bytes) before it. Every array has its own memory, of its size and no more.
REPLAY = """
#include <cstdio>
#include <cstdlib>
typedef int Function(const void* const*, void* const*, const int64_t*, const float*, int);
Function* const TABLE[] = {%s};
FILE* in;
int64_t number() {
  int64_t n;
  if (fread(&n, 8, 1, in) != 1) exit(2);
  return n;
}
int replay(char** argv) {
  in = fopen(argv[0], "rb");
  Function* const function = TABLE[number()];
  std::vector<int64_t> sizes(number()), lengths;
  for (auto& size : sizes) size = number();
  std::vector<void*> inputs(number());
  for (auto& input : inputs) {
    const int64_t length = number();
    input = malloc(length);
    if (fread(input, 1, length, in) != size_t(length)) exit(3);
  }
  std::vector<void*> outputs(number());
  for (auto& output : outputs) {
    lengths.push_back(number());
    output = malloc(lengths.back());
  }
  const float eps = 1e-3f;
  for (int turn = 0; turn < 3; ++turn) function(inputs.data(), outputs.data(), sizes.data(), &eps, 1 + turn);
  FILE* out = fopen(argv[1], "wb");
  for (size_t k = 0; k < outputs.size(); ++k) fwrite(outputs[k], 1, lengths[k], out);
  return fclose(in) + fclose(out);
}
int main(int count, char** argv) {
  int failed = 0;
  for (int i = 1; i < count; i += 2) failed += replay(argv + i);
  return failed;
}
"""


def replay_text():
    table = [f"{name}_{dtype}" for name in NAMES for dtype in DTYPES]
    return texts.cpu_gradients_text() + REPLAY % ", ".join(table)


class Recorder:
    """Stands for `cpu_gradients._call`; of every call meanwhile `calls` holds (file, what it gave)."""

    def __init__(self, folder):
        self.folder, self.calls, self.real = folder, [], cpu_gradients._call

    def __call__(self, name, arrays, outputs, sizes, number=0.0):
        place = NAMES.index(name) * len(DTYPES) + [*DTYPES.values()].index(arrays[0].dtype)
        parts = [np.array([place, len(sizes), *sizes, len(arrays)], np.int64).tobytes()]
        mx.eval(arrays)
        for array in arrays:
            assert memoryview(array).c_contiguous  # so that its bytes are all there is to read
            parts += [np.int64(array.nbytes).tobytes(), cpu.view(array).tobytes()]
        parts.append(np.array([len(outputs), *(array.nbytes for array in outputs)], np.int64).tobytes())
        file = self.folder / f"call{len(self.calls)}"
        file.write_bytes(b"".join(parts))
        given = self.real(name, arrays, outputs, sizes, number)
        self.calls.append((file, given))
        return given


def replayed(file, outputs):
    """What a replay wrote into `file`, as arrays like `outputs`."""
    data, found = file.read_bytes(), []
    for output in outputs:
        bits = np.frombuffer(data[: output.nbytes], cpu.view(output).dtype).reshape(output.shape)
        found.append(mx.array(bits).view(output.dtype))
        data = data[output.nbytes :]
    assert not data
    return found
