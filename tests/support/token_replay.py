"""The one call of a token, recorded in a file and replayed by a C++ program without Python."""

import mlx.core as mx
import numpy as np

from mlx_pararnn.compute import cpu_token, texts
from tests.support.random_models import TOKENS, by_token, cell_of, numbers

# The recorded call of one token, again and without Python: what the compilers' sanitizers look at.
# File: how often; of struct Token the numbers; of each struct the fields in their order, an array with its
# size before it, -1 for none, -2 for a number.
REPLAY = """
#include <cstdio>
#include <cstdlib>
#include <sys/types.h>
FILE* in;
int64_t number() {
  int64_t n;
  if (fread(&n, 8, 1, in) != 1) exit(2);
  return n;
}
struct Part {
  int64_t size = number();
  void* data = size == -2 ? reinterpret_cast<void*>(number()) : size < 0 ? nullptr : malloc(size);
  Part() {
    if (size > 0 && fread(data, 1, size, in) != size_t(size)) exit(3);
  }
  void write(FILE* out) const {
    if (size > 0) fwrite(data, 1, size, out);
  }
};
int replay(char** argv) {
  in = fopen(argv[0], "rb");
  const int64_t times = number();
  pararnn::Token token{};
  for (int64_t* to : {&token.depth, &token.B, &token.heads, &token.W, &token.taps, &token.wide,
                      &token.vocab}) {
    *to = number();
  }
  token.mlp_residual = int(number()), token.threads = int(number());
  token.eps = float(number()) * 1e-9f;
  constexpr int FIELDS = sizeof(pararnn::Layer) / sizeof(void*);
  std::vector<std::vector<Part>> parts(token.depth);
  std::vector<pararnn::Layer> layers(token.depth);
  for (int64_t i = 0; i < token.depth; ++i) {
    for (int k = 0; k < FIELDS; ++k) {
      parts[i].emplace_back();
      memcpy(reinterpret_cast<char*>(&layers[i]) + k * sizeof(void*), &parts[i][k].data, sizeof(void*));
    }
  }
  constexpr int FIRST = offsetof(pararnn::Token, norm) / sizeof(void*);
  constexpr int LAST = offsetof(pararnn::Token, depth) / sizeof(void*);
  std::vector<Part> whole;
  for (int k = FIRST; k < LAST; ++k) {
    whole.emplace_back();
    memcpy(reinterpret_cast<char*>(&token) + k * sizeof(void*), &whole.back().data, sizeof(void*));
  }
  token.layers = layers.data(), token.packed = PACKED;
  for (int64_t n = 0; n < times; ++n) {
    if (DECODE(&token)) exit(4);
  }
  FILE* out = fopen(argv[1], "wb");
  whole[offsetof(pararnn::Token, y) / sizeof(void*) - FIRST].write(out);
  whole[offsetof(pararnn::Token, logits) / sizeof(void*) - FIRST].write(out);
  for (const auto& layer : parts) layer[FIELDS - 2].write(out), layer[FIELDS - 1].write(out);
  return fclose(in) + fclose(out);
}
int main(int count, char** argv) {
  int failed = 0;
  for (int i = 1; i < count; i += 2) failed += replay(argv + i);
  return failed;
}
"""


def replay_text(made, dtype):
    head = made.model.embed_tokens if made.args.tie_word_embeddings else made.lm_head
    weights = made.model.token_weights(head)._replace(embedding={})
    text = texts.cpu_token_text(cell_of(made)) + texts.packed_products(cpu_token.formats_of(weights))
    return text + REPLAY.replace("DECODE", f"decode_{dtype}").replace("PACKED", f"packed_{dtype}")


def recorded(made, tokens, monkeypatch, file, *, times=1, threads=1):
    """Decode `tokens` (B, T), write what the last of them reads into `file`, and give what it came to."""
    args, counts = made.args, {}
    dtype = made.model.norm.weight.dtype
    parts = []

    def add(pointer, size):
        size = -1 if not pointer else size
        parts.append(
            np.int64(size).tobytes() + (cpu_token.ctypes.string_at(pointer, size) if size > 0 else b"")
        )

    def add_matrix(matrix, count):
        if matrix.bits:
            add(matrix.weight, count * matrix.bits // 8)
        else:
            add(matrix.weight, count * dtype.size)
        for pointer in (matrix.scales, matrix.biases):
            add(pointer, count // (matrix.group or 1) * dtype.size)
        parts.append(np.array([-2, matrix.bits, -2, matrix.group], np.int64).tobytes())

    def add_fields(struct, names, counts):
        wide = {"params": 4, "state": 4, "new_state": 4, "ids": 8}
        for name in names:
            value = getattr(struct, name)
            if isinstance(value, cpu_token.Matrix):
                add_matrix(value, counts[name])
            else:
                add(value, counts[name] * wide.get(name, dtype.size))

    def note(reference):
        token = reference._obj
        D, K = token.heads * token.W, token.taps
        cell = cell_of(made)
        shapes = cpu_token._shapes(cell, D, token.heads, K, token.wide)
        counts.update({name: int(np.prod(shape)) for name, shape in shapes.items()})
        counts.update(state=token.B * len(cell.slots) * D, window=token.B * (K - 1) * D)
        counts.update(new_state=counts["state"], new_window=counts["window"])
        parts.clear()
        integers = [times, token.depth, token.B, token.heads, token.W, K, token.wide, token.vocab]
        integers += [token.mlp_residual, threads, round(args.norm_eps * 1e9)]
        parts.append(np.array(integers, np.int64).tobytes())
        for i in range(token.depth):
            add_fields(token.layers[i], [name for name, *_ in cpu_token.Layer._fields_], counts)
        whole = {"norm": D, "norm_bias": D, "embedding": args.vocab_size * D, "ids": token.B}
        whole |= {"x": token.B * D, "y": token.B * D}
        whole |= {"head": token.vocab * D, "logits": token.B * token.vocab}
        add_fields(token, list(whole), whole)

    library = cpu_token._library

    class Noting:
        def __init__(self, cell, dtype):
            self.real = library(cell, dtype)

        def __getattr__(self, name):
            real = getattr(self.real, name)

            def call(reference):
                note(reference)
                return real(reference)

            return call if name.startswith("decode") else real

    cache, last = made.make_cache(tokens.shape[0]), None
    y = []
    with monkeypatch.context() as inside:
        inside.setattr(cpu_token, "_library", Noting)
        real = cpu_token.run

        def run(*arguments):
            y.append(real(*arguments))
            return y[-1]

        inside.setattr(cpu_token, "run", run)
        by_token(made, tokens, cache)
    last = y[-1]
    file.write_bytes(b"".join(parts))
    floats = [numbers(last.y).ravel(), numbers(last.logits).ravel()]
    for c in cache:
        floats += [numbers(c[0]).ravel(), *([] if c[1] is None else [numbers(c[1]).ravel()])]
    return np.concatenate(floats)


def replayed(made, file):
    """What a replay wrote into `file`, as `recorded` gives it."""
    dtype, B = made.model.norm.weight.dtype, TOKENS.shape[0]
    cell, D = cell_of(made), made.args.hidden_size
    window = (made.args.conv_kernel - 1) * D * B if made.args.mixer == "gated_conv" else 0
    data, floats = file.read_bytes(), []

    def take(count, kind):
        nonlocal data
        size = count * kind.size
        bits = np.frombuffer(data[:size], np.float32 if kind == mx.float32 else np.uint16)
        floats.append(numbers(mx.array(bits).view(kind)))
        data = data[size:]

    take(B * D, dtype)
    take(B * made.args.vocab_size, dtype)
    for _ in made.layers:
        take(B * len(cell.slots) * D, mx.float32)
        if window:
            take(window, dtype)
    assert not data
    return np.concatenate(floats)
