"""The CPU's recurrence, elementwise work and threads in C++ alone, as the compilers' sanitizers see them."""

import os
import shutil
import subprocess

import numpy as np
import pytest

from mlx_pararnn import PararnnError, get_cell
from mlx_pararnn.cache import held_arrays
from mlx_pararnn.compute import cpu, cpu_build, cpu_token, texts
from tests.support.random_models import TOKENS, by_token, make, quantize
from tests.support.token_replay import recorded, replay_text

pytestmark = pytest.mark.usefixtures("cpu_backend")

SANITIZERS = ["-fsanitize=address,undefined", "-fsanitize=thread"]


def compiled(text, folder, *flags):
    program, source = folder / "main", folder / "main.cpp"
    source.write_text(text)
    command = [cpu_build.compiler(), "-std=c++17", "-O0", "-g0", *flags, "-pthread", "-o", program, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and any("sanitize" in flag for flag in flags):
        pytest.skip(f"this compiler has no {' '.join(flags)}")
    assert done.returncode == 0, done.stderr
    return program


def run(program, *arguments):
    # without randomized addresses: some kernels place them where the sanitizer keeps its own
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    variables = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [*still, program, *arguments], capture_output=True, text=True, env=variables, timeout=120
    )


def runs_clean(program, *arguments):
    done = run(program, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


NUMBERS = """
#include <cstdio>
#include <cstdlib>
uint32_t seed = 1;
float some() { return float((seed = seed * 1664525u + 1013904223u) >> 8) / float(1 << 23) - 1.0f; }
template <typename T>
std::vector<T> many(int64_t count) {
  std::vector<T> x(count);
  for (auto& one : x) pararnn::store(&one, pararnn::Vec(some()), 1);
  return x;
}
"""

# Strides as a projection of several heads leaves them; the same bits from one thread and from three.
RECURRENCE = """
template <typename T, typename Run>
int recurrences(const Run& run) {
  using namespace pararnn;
  const int64_t shapes[][5] = {
      {1, 1, 1, 1, 0}, {2, 3, 13, 7, 5}, {3, 1, 9, WIDTH + 3, 2}, {1, 2, TILE + 1, 3 * WIDTH + 1, 8}};
  for (const auto& shape : shapes) {
    const int64_t B = shape[0], heads = shape[1], steps = shape[2], W = shape[3], every = shape[4];
    const int64_t D = heads * W, row = Cell::GATES * W;
    const auto u = many<T>(B * steps * Cell::GATES * D);
    const auto params = many<float>(Cell::PARAMS * D), initial = many<float>(B * Cell::SLOTS * D);
    std::vector<uint8_t> mask(B * steps);
    for (auto& one : mask) one = some() < 0.5f;
    std::vector<T> first;
    for (const int threads : {1, 3}) {
      std::vector<T> hidden(B * steps * D);
      std::vector<float> last(initial.size());
      std::vector<float> states(every ? B * (steps / every) * Cell::SLOTS * D : 0);
      const Call call{u.data(), params.data(), initial.data(), B > 1 ? mask.data() : nullptr,
                      hidden.data(), last.data(), every ? states.data() : nullptr,
                      {heads * steps * row, steps * row, row, W}, B, heads, steps, W, every, threads};
      if (run(&call)) return 1;
      if (threads == 1) first = hidden;
      if (memcmp(first.data(), hidden.data(), sizeof(T) * hidden.size())) return 2;
      for (const float x : last) {
        if (!(x == x)) return 3;
      }
    }
  }
  return 0;
}
int main() {
  return recurrences<float>(pararnn_float32) + 10 * recurrences<pararnn::Float16>(pararnn_float16) +
         20 * recurrences<pararnn::Bfloat16>(pararnn_bfloat16);
}
"""

# Rows that are further apart than they are wide, and end where the memory ends.
ELEMENTWISE = """
template <typename T>
struct Functions {
  typedef int Function(const void* const*, void*, const int64_t*, const float*, int);
  Function *swiglu, *rms_norm, *gated_norm, *conv_silu, *product;
};
template <typename T>
int all(const Functions<T>& f) {
  const float eps = 1e-3f;
  for (const int64_t width : {1, 7, 16, 35}) {
    for (const int64_t rows : {1, 3, 37}) {
      const int64_t apart = width + 5, length = (rows - 1) * apart + width;
      const auto x = many<T>(length), gate = many<T>(length);
      const auto weight = many<float>(width), bias = many<float>(width);
      std::vector<T> first;
      for (const int threads : {1, 3}) {
        std::vector<T> together;
        const auto call = [&](auto* function, std::vector<const void*> in, std::vector<int64_t> size,
                              int64_t count) {
          std::vector<T> y(count);
          if (function(in.data(), y.data(), size.data(), &eps, threads)) exit(9);
          together.insert(together.end(), y.begin(), y.end());
        };
        call(f.swiglu, {gate.data(), x.data()}, {rows, width, apart, apart}, rows * width);
        call(f.rms_norm, {x.data(), weight.data()}, {rows, width, apart}, rows * width);
        call(f.gated_norm, {x.data(), gate.data(), weight.data()}, {rows, width, apart, apart}, rows * width);
        for (const int64_t taps : {2, 4}) {
          std::vector<T> window(2 * (taps - 1) * width), in(2 * rows * width);
          std::vector<float> kernel(taps * width, 0.5f);
          call(f.conv_silu, {in.data(), window.data(), kernel.data(), bias.data()},
               {2, rows, width, taps, rows * width, width}, 2 * rows * width);
        }
        std::vector<T> dense(rows * width), matrix(203 * width);
        call(f.product, {dense.data(), matrix.data()}, {rows, width, 203}, rows * 203);
        if (threads == 1) first = together;
        if (memcmp(first.data(), together.data(), sizeof(T) * first.size())) return 1;
      }
    }
  }
  return 0;
}
int main() {
#define ALL(dtype, T)                                                                        \\
  all<T>({swiglu_##dtype, rms_norm_##dtype, gated_norm_##dtype, conv_silu_##dtype, product_##dtype})
  return ALL(float32, float) + ALL(float16, pararnn::Float16) + ALL(bfloat16, pararnn::Bfloat16);
}
"""


@pytest.mark.toolchain
@pytest.mark.parametrize("flag", SANITIZERS)
@pytest.mark.parametrize("name", ["gru", "slstm"])
def test_the_recurrence(name, flag, tmp_path):
    text = texts.cpu_recurrence_text(get_cell(name))
    runs_clean(compiled(text + NUMBERS + RECURRENCE, tmp_path, flag))


@pytest.mark.toolchain
@pytest.mark.parametrize("flag", SANITIZERS)
def test_elementwise_work(flag, tmp_path):
    runs_clean(compiled(texts.cpu_elementwise_text() + NUMBERS + ELEMENTWISE, tmp_path, flag))


PACKED_PRODUCTS = """
template <typename T>
int all(const void* (*of)(int64_t, int64_t)) {
  using namespace pararnn;
  for (const int64_t bits : {3, 4, 8}) {
    for (const int64_t group : {32, 64, 128}) {
      const auto& form = *static_cast<const PackedProduct<T>*>(of(bits, group));
      for (const int64_t width : {group, 3 * group, 5 * group, 17 * group}) {
        for (const int64_t B : {1, 5}) {
          const int64_t rows = 7, stride = form.arranged_size(width);
          const auto x = many<float>(B * width);
          const auto scales = many<T>(rows * width / group), biases = many<T>(rows * width / group);
          const std::vector<uint32_t> words(rows * width / 32 * bits, 0xfffefdfcu);
          std::vector<float> arranged(B * stride), y(B * rows);
          for (int64_t b = 0; b < B; ++b) form.arrange(&x[b * width], width, &arranged[b * stride]);
          const Matrix matrix{words.data(), scales.data(), biases.data(), bits, group};
          form.product_rows(matrix, 0, arranged.data(), stride, width, B, y.data(), rows, 0, rows);
          for (const float one : y) {
            if (!(one - one == 0.0f)) return 1;
          }
        }
      }
    }
  }
  return 0;
}
int main() {
  return all<float>(packed_float32) + all<pararnn::Float16>(packed_float16) +
         all<pararnn::Bfloat16>(packed_bfloat16);
}
"""


@pytest.mark.toolchain
@pytest.mark.parametrize("processor", ["-DANY", "-march=native"])
def test_packed_products(processor, tmp_path):
    """By floats, and where this processor has bytes multiplied by bytes."""
    text = texts.cpu_packed_text(tuple((bits, group) for bits in (3, 4, 8) for group in (32, 64, 128)))
    runs_clean(compiled(text + NUMBERS + PACKED_PRODUCTS, tmp_path, SANITIZERS[0], processor))


@pytest.mark.toolchain
@pytest.mark.parametrize("processor", ["-DANY", "-march=native"])
@pytest.mark.parametrize(
    "which", ["scales = many<T>(rows * width / group", "biases = many<T>(rows * width / group"]
)
def test_what_is_read_beyond_an_array_is_seen(which, processor, tmp_path):
    """Of a part of a vector too, which an instruction may load that a compiler does not watch."""
    text = texts.cpu_packed_text(tuple((bits, group) for bits in (3, 4, 8) for group in (32, 64, 128)))
    assert PACKED_PRODUCTS.count(which) == 1
    short = PACKED_PRODUCTS.replace(which, f"{which} - 1")
    done = run(compiled(text + NUMBERS + short, tmp_path, SANITIZERS[0], processor))
    assert "heap-buffer-overflow" in done.stderr


# Every allocation of the whole is refused once: `refused` counts down to it.
REFUSING = """
#include <cstdlib>
std::atomic<int64_t> refused{-1};
void* operator new(size_t size) {
  if (refused >= 0 && refused-- == 0) throw std::bad_alloc();
  return malloc(size);
}
void* operator new(size_t size, std::align_val_t) {
  if (refused >= 0 && refused-- == 0) throw std::bad_alloc();
  return aligned_alloc(64, (size + 63) / 64 * 64);
}
void operator delete(void* place) noexcept { free(place); }
void operator delete(void* place, size_t) noexcept { free(place); }
void operator delete(void* place, std::align_val_t) noexcept { free(place); }
void operator delete(void* place, size_t, std::align_val_t) noexcept { free(place); }
"""

THREADS = """
int main() {
  using namespace pararnn;
  for (int threads = 1; threads < 5; ++threads) {
    for (int failing = 0; failing < 7; ++failing) {  // the last: none
      std::atomic<int> done{0};
      const int status = status_of([&] {
        in_parallel(6, threads, [&](int64_t item) {
          if (item == failing) throw std::bad_alloc();
          ++done;
        });
      });
      if (status != (failing < 6) || done > 6 - (failing < 6)) return 1;
    }
    for (int failing = 0; failing <= threads; ++failing) {
      for (int at = 0; at < 3; ++at) {  // before the first meeting, between them, after the last
        std::atomic<int> ended{0};
        const int status = status_of([&] {
          together(threads, [&](int member, int, const auto& meet) {
            for (int k = 0; k < 3; ++k) {
              if (member == failing && k == at) throw std::bad_alloc();
              if (k < 2) meet();
            }
            ++ended;
          });
        });
        if (status != (failing < threads) || (status && at < 2 && ended > 0)) return 2;
      }
    }
    for (int n = 0; n < 12; ++n) {  // no memory to start a thread: the others do its part
      std::atomic<int> sum{0};
      refused = n;
      const int status = status_of([&] { in_parallel(50, threads, [&](int64_t) { ++sum; }); });
      refused = n;
      const int other = status_of([&] {
        together(threads, [&](int member, int members, const auto& meet) {
          meet();
          for (int i = member; i < 50; i += members) ++sum;
        });
      });
      refused = -1;
      if (status || other || sum != 100) return 3;
    }
  }
  return 0;
}
"""


@pytest.mark.sampled("toolchain", by=lambda flag: [flag] if not flag else [])
@pytest.mark.parametrize("flag", ["", *SANITIZERS])
def test_threads_without_memory(flag, tmp_path):
    """What one throws comes back when all have ended; a thread that cannot start is done without."""
    text = texts.metal_text("cpu.h") + REFUSING + THREADS
    runs_clean(compiled(text, tmp_path, *filter(None, [flag])))


TOKEN_WITHOUT = """
int decode_or_not(const pararnn::Token* token) {
  int failed = 0, status = 1;
  for (int n = 0; n < 100; ++n) {
    refused = n;
    failed += status = DECODE(token);
    refused = -1;
  }
  return status || failed < 3;  // the last: with all that it asked for; without a thread alone it does
}
"""


@pytest.mark.toolchain
@pytest.mark.parametrize("flag", SANITIZERS)
def test_a_token_without_memory(flag, monkeypatch, tmp_path):
    """Whichever allocation is refused, in whichever thread, the call returns."""
    made = make("gru", hidden_size=64, intermediate_size=32)
    quantize(made, 32, 4)
    text, _, replay = replay_text(made, "float32").partition("\n#include <cstdio>")
    inside = REFUSING + TOKEN_WITHOUT.replace("DECODE", "decode_float32")
    replay = "\n#include <cstdio>" + replay.replace("decode_float32(&token)", "decode_or_not(&token)")
    program = compiled(text + inside + replay, tmp_path, flag)
    recorded(made, TOKENS, monkeypatch, tmp_path / "in", threads=3)
    runs_clean(program, tmp_path / "in", tmp_path / "out")


def test_too_little_memory_is_told_in_a_sentence(monkeypatch):
    made = make()
    cache = made.make_cache(2)
    by_token(made, TOKENS[:, :1], cache)
    before = [np.array(array) for array in held_arrays(cache)]
    library = cpu_token._library(made.layers[0].mixer.cell.cell, "float32")

    class Refusing:
        def __getattr__(self, name):
            return (lambda _: 1) if name.startswith("decode") else getattr(library, name)

    monkeypatch.setattr(cpu_token, "_library", lambda *_: Refusing())
    monkeypatch.setattr(cpu, "dense_addresses", lambda _, arrays: [cpu.address(a) for a in arrays])
    with pytest.raises(PararnnError, match=r"too little memory .* smaller batch"):
        by_token(made, TOKENS[:, 1:2], cache)
    assert all(np.array_equal(a, b) for a, b in zip(before, held_arrays(cache), strict=True))
