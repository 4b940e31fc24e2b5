"""Kernels broken on purpose, and the check of battery.py that has to see each."""

from .adjoint_mutants import ADJOINT, ADJOINT_MUTANTS, INPUTS
from .mutant import BARRIER, Mutant, without_barrier

__all__ = ["ADJOINT", "CONV", "DECODE", "INPUTS", "MUTANTS", "NEWTON", "NORM", "STRAIGHT", "Mutant"]

SCAN_BARRIER = f"      {BARRIER}\n\n      // Each thread scans"
MOVED_BARRIER = f"      {BARRIER}\n      iterations += 1;"
CARRY_BARRIER = f"    {BARRIER}\n    for (int s = 0; s < SLOTS; ++s) {{\n      carry[s]"
TILE_BARRIER = f"    {BARRIER}  // before the next tile"
GRU, LSTM, NLRU, SLSTM = (f"cells/{cell}.h" for cell in ("gru", "lstm", "nlru", "slstm"))
NEWTON, STRAIGHT, DUAL, ACTIVATIONS = "recurrence.metal", "sequential.metal", "dual.h", "activations.h"
FROM_RING = "        x[g] = float(ring[i * Cell::GATES + g]) + shift[g];"
INTO_RING = "        ring[i * Cell::GATES + g] = next[g * gate_stride];"
STEPS_LOOP = "#pragma unroll 1\n      for (int i = 0; i < steps; ++i) {"
RESET = "int iterations = 0;\n    for (int s = 0; s < SLOTS; ++s) {\n      growth[s] = 1.0f;\n    }"
ENDS = "rounds = still == 0 ? iterations : rounds;"
CONV, DECODE, NORM = "conv.metal", "decode.metal", "norm.metal"
MEAN_BARRIER = f"  {BARRIER}\n  float mean = 0.0f;"
SQUARES_BARRIER = f"  {BARRIER}\n  float mean_square = 0.0f;"

MUTANTS = [
    # barriers and divergence
    Mutant("no barrier before the scan", NEWTON, SCAN_BARRIER, without_barrier(SCAN_BARRIER), "semantics"),
    Mutant("no barrier after the scan", NEWTON, MOVED_BARRIER, without_barrier(MOVED_BARRIER), "semantics"),
    Mutant(
        "no barrier before the carry is read",
        NEWTON,
        CARRY_BARRIER,
        without_barrier(CARRY_BARRIER),
        "semantics",
    ),
    Mutant(
        "no barrier before the next tile", NEWTON, TILE_BARRIER, without_barrier(TILE_BARRIER), "semantics"
    ),
    Mutant(
        "barrier without flags",
        NEWTON,
        SCAN_BARRIER,
        without_barrier(SCAN_BARRIER, "threadgroup_barrier(mem_flags::mem_none);"),
        "semantics",
    ),
    Mutant(
        "barrier of the simdgroup only",
        NEWTON,
        SCAN_BARRIER,
        without_barrier(SCAN_BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "semantics",
    ),
    Mutant(
        "barrier for chunks with steps only",
        NEWTON,
        SCAN_BARRIER,
        without_barrier(SCAN_BARRIER, f"if (steps > 0) {BARRIER}"),
        "semantics",
    ),
    Mutant(
        "early exit by each thread",
        NEWTON,
        ENDS,
        ENDS.replace("still == 0", "!moved"),
        "semantics",
    ),
    Mutant(
        "early exit by the simdgroup",
        NEWTON,
        ENDS,
        ENDS.replace("still == 0", "!any_moved"),
        "semantics",
    ),
    Mutant(
        "number of rounds by the thread", NEWTON, "min(limit, filled - 1)", "min(limit, chunk)", "semantics"
    ),
    Mutant(
        "idle threads return early",
        NEWTON,
        "  float w[Cell::PARAMS];",
        "  if (!writes) return;\n  float w[Cell::PARAMS];",
        "semantics",
    ),
    Mutant(
        "the vote is taken by some lanes",
        NEWTON,
        "simd_any(moved && steps > 0)",
        "steps > 0 && simd_any(moved)",
        "semantics",
    ),
    Mutant(
        "chunks without steps vote",
        NEWTON,
        "simd_any(moved && steps > 0)",
        "simd_any(moved)",
        "bookkeeping",
    ),
    Mutant("all lanes write the flag", NEWTON, "if (lane == 0) {", "if (lane >= 0) {", "semantics"),
    # memory
    Mutant("channels past the last are read", NEWTON, "writes ? channel : D - 1", "channel", "semantics"),
    Mutant(
        "channels past the last are written",
        NEWTON,
        "writes && (iterations == rounds",
        "(iterations == rounds",
        "semantics",
    ),
    Mutant(
        "steps past the last are written",
        NEWTON,
        STEPS_LOOP,
        STEPS_LOOP.replace("< steps", "< C"),
        "semantics",
    ),
    Mutant(
        "steps past the last are read",
        NEWTON,
        "next += i + 1 < steps ? step_stride",
        "next += i < steps ? step_stride",
        "semantics",
    ),
    Mutant(
        "the mask is read past its end",
        NEWTON,
        "i < steps; ++i) {\n      kept",
        "i < C; ++i) {\n      kept",
        "semantics",
    ),
    Mutant("the last step is not written", NEWTON, "T - begin));", "T - 1 - begin));", "semantics"),
    Mutant(
        "threadgroup array too short",
        NEWTON,
        "shared_end[SLOTS * CHUNKS * CW]",
        "shared_end[SLOTS * CHUNKS * CW - 1]",
        "semantics",
    ),
    Mutant("over 32 KB", NEWTON, "shared_carry[SLOTS * CW]", "shared_carry[SLOTS * CW + 7700]", "semantics"),
    Mutant(
        "the carry is never written",
        NEWTON,
        "if (chunk == filled - 1) {",
        "if (chunk == filled) {",
        "semantics",
    ),
    Mutant(
        "the flag of a simdgroup is not written",
        NEWTON,
        "shared_moved[group] =",
        "shared_moved[0] =",
        "semantics",
    ),
    Mutant("start is read one chunk too far", NEWTON, "from + CW]", "from + 2 * CW]", "semantics iterates"),
    Mutant(
        "output stored in another layout",
        NEWTON,
        "hidden[(size_t(b) * T + first) * D + d]",
        "hidden[(size_t(b) * D + d) * T + first]",
        "semantics convergence",
    ),
    Mutant(
        "params by another stride",
        NEWTON,
        "params[size_t(p) * D + d]",
        "params[size_t(d) * Cell::PARAMS + p]",
        "convergence",
    ),
    Mutant(
        "u by the strides of a copy",
        NEWTON,
        "(d / W) * u_strides[1] + (d % W) * u_strides[4]",
        "d",
        "semantics convergence",
    ),
    Mutant(
        "gate and time strides swapped",
        NEWTON,
        "gate_stride = u_strides[3]",
        "gate_stride = u_strides[2]",
        "semantics convergence",
    ),
    Mutant(
        "states stored one step late",
        NEWTON,
        "int until = interval - begin % interval;",
        "int until = interval - begin % interval + 1;",
        "semantics convergence",
    ),
    # offsets of 32 bits
    Mutant(
        "hidden by 32 bits",
        NEWTON,
        "hidden[(size_t(b) * T + first) * D + d]",
        "hidden[(b * T + first) * D + d]",
        "language",
    ),
    Mutant(
        "hidden widened too late",
        NEWTON,
        "hidden[(size_t(b) * T + first)",
        "hidden[size_t(b * T + first)",
        "language",
    ),
    Mutant("last by 32 bits", NEWTON, "last[(size_t(b) * SLOTS", "last[(b * SLOTS", "language"),
    Mutant("states by 32 bits", NEWTON, "size_t row = size_t(b) * (T", "int row = b * (T", "language"),
    Mutant("gap by 32 bits", NEWTON, "gap[(size_t(b) * CHUNKS", "gap[(b * CHUNKS", "language"),
    Mutant(
        "iterations by 32 bits", NEWTON, "iterations_made[size_t(b) * D", "iterations_made[b * D", "language"
    ),
    Mutant("initial by 32 bits", NEWTON, "initial[(size_t(b)", "initial[(b", "language"),
    Mutant("params by 32 bits", NEWTON, "params[size_t(p)", "params[p", "language"),
    Mutant("the mask by 32 bits", NEWTON, "mask[size_t(b) * T", "mask[b * T", "language"),
    Mutant("u by 32 bits", NEWTON, "const int64_t base", "const int base", "language"),
    # types
    Mutant(
        "no cast to the output's dtype",
        NEWTON,
        "static_cast<OutT>(keep ? state[Cell::OUTPUT].v : 0.0f)",
        "(keep ? state[Cell::OUTPUT].v : 0.0f)",
        "compile language",
    ),
    Mutant("mixed types in min", NEWTON, "min(C, T - begin)", "min(C, uint(T - begin))", "compile language"),
    Mutant("a double literal", NEWTON, "max(1.0f, fabs", "max(1.0, fabs", "language compile"),
    Mutant("pointer without an address space", GRU, "const thread float* w", "const float* w", "language"),
    Mutant(
        "u as a device pointer",
        NEWTON,
        "  const int lane =",
        "  const thread float* us = u;\n  const int lane =",
        "language compile",
    ),
    # the algorithm
    Mutant("the state is not carried", NEWTON, "chunk == 0 ? carry[s] : 0.0f", "0.0f", "convergence"),
    Mutant(
        "the carry is the first chunk's",
        NEWTON,
        "if (chunk == filled - 1) {",
        "if (chunk == 0) {",
        "convergence",
    ),
    Mutant(
        "a chunk more than hold steps, where they fill whole ones",
        NEWTON,
        "(T - t0 + C - 1) / C",
        "(T - t0 + C) / C",
        "bookkeeping",
    ),
    Mutant(
        "the initial state of another row",
        NEWTON,
        "initial[(size_t(b) * SLOTS",
        "initial[(size_t(0) * SLOTS",
        "convergence",
    ),
    Mutant(
        "masked steps change the state",
        NEWTON,
        "        if (keep) {\n          Cell::step(state, x",
        "        if (keep || i >= 0) {\n          Cell::step(state, x",
        "convergence",
    ),
    Mutant(
        "masked steps are not zero",
        NEWTON,
        "keep ? state[Cell::OUTPUT].v : 0.0f",
        "state[Cell::OUTPUT].v",
        "convergence",
    ),
    Mutant(
        "the scan stops one chunk early",
        NEWTON,
        "c < chunk; ++c",
        "c < chunk - 1; ++c",
        "convergence iterates wild",
    ),
    Mutant(
        "the scan starts one chunk late",
        NEWTON,
        "for (int c = 0; c < chunk",
        "for (int c = 1; c < chunk",
        "iterates convergence bookkeeping",
    ),
    Mutant("the scan forgets the Jacobian", NEWTON, "end + correction : end", "end : end", "iterates"),
    Mutant(
        "the scan's delta has the wrong sign",
        NEWTON,
        "corrected[s] - shared_start",
        "-corrected[s] + shared_start",
        "iterates",
    ),
    Mutant("the Jacobian is not reset", NEWTON, "state[s].d[s] = 1.0f;", "state[s].d[s] = 0.0f;", "iterates"),
    Mutant(
        "the Jacobian is transposed",
        NEWTON,
        "shared_jacobian[(s * SLOTS + j) * CELLS + cell] = state[s].d[j]",
        "shared_jacobian[(s * SLOTS + j) * CELLS + cell] = state[j].d[s]",
        "iterates",
        "lstm",
    ),
    Mutant(
        "the guess takes the chunk's own first step",
        NEWTON,
        "u[base + (begin - 1)",
        "u[base + begin",
        "iterates",
    ),
    Mutant("no guess", NEWTON, "Cell::step(start, before, w);", "", "iterates"),
    Mutant(
        "one iteration too few", NEWTON, "min(limit, filled - 1)", "min(limit - 1, filled - 1)", "iterates"
    ),
    Mutant(
        "iterations are not counted", NEWTON, "iterations += 1;", "iterations += 2;", "iterates convergence"
    ),
    Mutant(
        "stops when one simdgroup has settled",
        NEWTON,
        "still += shared_moved[g]",
        "still = shared_moved[0]",
        "convergence iterates wild",
    ),
    Mutant(
        "settled at once",
        NEWTON,
        "moved = moved || !settled",
        "moved = moved && !settled",
        "convergence iterates",
    ),
    Mutant("never settled", NEWTON, ENDS, ENDS.replace("still == 0", "still < 0"), "bookkeeping"),
    Mutant(
        "what is not finite is kept",
        NEWTON,
        "isfinite(correction) ? end + correction : end",
        "end + correction",
        "wild",
    ),
    Mutant(
        "one round short of the guarantee",
        NEWTON,
        "min(int(max_iters[0]), CHUNKS - 1)",
        "min(int(max_iters[0]), CHUNKS - 3)",
        "wild",
    ),
    Mutant(
        "growth of differences is ignored",
        NEWTON,
        "fabs(corrected[s] - start[s]) * (ROUNDED ? max(growth[s], reach[s]) : growth[s])",
        "fabs(corrected[s] - start[s])",
        "chaotic",
    ),
    Mutant(
        "growth by a chunk's own Jacobian is ignored",
        NEWTON,
        "growth[s] = max(growth[s], grown);",
        "growth[s] = max(growth[s], grown < 0.0f ? grown : factor[s]);",
        "chaotic",
        "lstm",
    ),
    Mutant(
        "growth before the chunk is ignored",
        NEWTON,
        "factor[s] = max(1.0f, grown[s]);",
        "factor[s] = 1.0f;",
        "chaotic",
        "lstm",
    ),
    Mutant(
        "NaN counts as not settled",
        NEWTON,
        "(isnan(corrected[s]) && isnan(start[s]))",
        "false",
        "bookkeeping contained",
    ),
    Mutant(
        "in 16 bits, guesses that have settled are taken to be written",
        NEWTON,
        "ROUNDED && iterations > 1",
        "ROUNDED && iterations > 0",
        "semantics",
    ),
    Mutant(
        "in 32 bits, what was written stands",
        NEWTON,
        "sizeof(OutT) == 2 && STATES == 0",
        "true",
        "chaotic promised",
    ),
    Mutant("with states, what was written stands", NEWTON, "== 2 && STATES == 0", "== 2", "promised"),
    Mutant(
        "in 16 bits, differences that grow on the way to an output are ignored",
        NEWTON,
        "ROUNDED ? max(growth[s], reach[s]) : growth[s]",
        "growth[s]",
        "promised",
    ),
    Mutant(
        "in 16 bits, the carry is not corrected",
        NEWTON,
        "change[s] = corrected[s] - start[s];",
        "",
        "promised",
    ),
    Mutant("no bias", NEWTON, "x[g] = float(ahead[g]) + shift[g];", "x[g] = float(ahead[g]);", "convergence"),
    Mutant("a guess without bias", NEWTON, "g * gate_stride]) + shift[g];", "g * gate_stride]);", "iterates"),
    Mutant(
        "bias of another head",
        NEWTON,
        "bias[(size_t(d / W) * GATES + g) * W + d % W]",
        "bias[(size_t(0) * GATES + g) * W + d % W]",
        "convergence",
    ),
    Mutant("bias by 32 bits", NEWTON, "bias[(size_t(d / W) * GATES", "bias[(d / W * GATES", "language"),
    Mutant(
        "the gates of the step before",
        NEWTON,
        "next += i + 1 < steps ? step_stride : 0;",
        "next += i > 0 && i + 1 < steps ? step_stride : 0;",
        "convergence",
    ),
    Mutant("growth reset each tile", NEWTON, "int iterations = 0;", RESET, "chaotic"),
    # cells and dual numbers
    Mutant(
        "GRU: z and 1 - z swapped", GRU, "z * n + (1.0f - z) * h", "(1.0f - z) * n + z * h", "convergence"
    ),
    Mutant("GRU: reset gate left out", GRU, "w[2] * (h * r)", "w[2] * h", "convergence"),
    Mutant("LSTM: output gate sees the old c", LSTM, "w[4] * c)", "w[4] * state[0])", "convergence", "lstm"),
    Mutant(
        "LSTM: slots swapped", LSTM, "const S h = state[1];", "const S h = state[0];", "convergence", "lstm"
    ),
    Mutant(
        "NLRU: w with the wrong sign",
        NLRU,
        "u[1] + w[0] * state[0]",
        "u[1] - w[0] * state[0]",
        "convergence",
        "nlru",
    ),
    Mutant(
        "sLSTM: no stabiliser", SLSTM, "apply<Exp>(forget - m)", "apply<Exp>(forget)", "convergence", "slstm"
    ),
    Mutant("dual: product rule half", DUAL, "a.d[i] * b.v + a.v * b.d[i]", "a.d[i] * b.v", "iterates"),
    Mutant("dual: difference with a plus", DUAL, "a.d[i] - b.d[i];", "a.d[i] + b.d[i];", "iterates", "slstm"),
    Mutant(
        "dual: 1 - x with the slope of x - 1",
        DUAL,
        "chain(b, sum(a, -b.v), -1.0f)",
        "chain(b, sum(a, -b.v), 1.0f)",
        "iterates",
    ),
    Mutant(
        "dual: quotient rule without the square",
        DUAL,
        "(a.d[i] - r.v * b.d[i]) / b.v",
        "(a.d[i] - r.v * b.d[i])",
        "iterates",
        "slstm",
    ),
    Mutant(
        "slope of sigmoid at x",
        ACTIVATIONS,
        "float, float y) { return y * (1.0f - y); }",
        "float y, float) { return y * (1.0f - y); }",
        "iterates",
    ),
    Mutant(
        "slope of tanh without the square",
        ACTIVATIONS,
        "return 1.0f - y * y; }",
        "return 1.0f - y; }",
        "iterates",
    ),
    # the straight kernel
    Mutant(
        "straight: no guard of the last channel",
        STRAIGHT,
        "  if (d >= D) {\n    return;\n  }\n",
        "",
        "semantics",
    ),
    Mutant("straight: one step too many", STRAIGHT, "if (t0 + i >= T) {", "if (t0 + i > T) {", "semantics"),
    Mutant(
        "straight: one step too few", STRAIGHT, "if (t0 + i >= T) {", "if (t0 + i + 1 >= T) {", "semantics"
    ),
    Mutant(
        "straight: the ring is not refilled",
        STRAIGHT,
        f"{INTO_RING}\n      }}\n#if MASKED\n      const",
        "      }\n#if MASKED\n      const",
        "convergence",
    ),
    Mutant(
        "straight: the ring is refilled before it is read",
        STRAIGHT,
        f"{FROM_RING}\n{INTO_RING}",
        f"{INTO_RING}\n{FROM_RING}",
        "convergence",
    ),
    Mutant(
        "straight: the mask of RING steps later",
        STRAIGHT,
        "const bool keep = kept[i];\n      kept[i] = mask[size_t(b) * T + read];",
        "kept[i] = mask[size_t(b) * T + read];\n      const bool keep = kept[i];",
        "convergence",
    ),
    Mutant(
        "straight: read past the last step",
        STRAIGHT,
        "      next += read < T - 1 ? step_stride : 0;\n      read",
        "      next += read < T ? step_stride : 0;\n      read",
        "semantics",
    ),
    Mutant(
        "straight: read past the last step at once",
        STRAIGHT,
        "    next += read < T - 1 ? step_stride : 0;\n    read",
        "    next += step_stride;\n    read",
        "semantics",
    ),
    Mutant("straight: no bias", STRAIGHT, " + shift[g];\n        ring", ";\n        ring", "convergence"),
    Mutant(
        "straight: bias by channels, then gates",
        STRAIGHT,
        "bias[(size_t(d / W) * Cell::GATES + g) * W + d % W]",
        "bias[(size_t(d / W) * W + d % W) * Cell::GATES + g]",
        "convergence",
    ),
    Mutant("straight: states not counted anew", STRAIGHT, "until = interval;\n      }", "}", "semantics"),
    Mutant(
        "straight: last state not written",
        STRAIGHT,
        "s < Cell::SLOTS; ++s) {\n    last[",
        "s < Cell::SLOTS - 1; ++s) {\n    last[",
        "semantics",
    ),
    Mutant(
        "straight: masked steps change the state",
        STRAIGHT,
        "      if (keep) {",
        "      if (keep || t0 >= 0) {",
        "convergence",
    ),
    Mutant(
        "straight: heads by the stride of channels",
        STRAIGHT,
        "(d / W) * u_strides[1] + (d % W) * u_strides[4]",
        "d",
        "semantics convergence",
    ),
    Mutant(
        "straight: hidden by 32 bits",
        STRAIGHT,
        "hidden[size_t(b) * T",
        "hidden[b * T",
        "language",
    ),
    Mutant("straight: last by 32 bits", STRAIGHT, "    last[(size_t(b)", "    last[(b", "language"),
    Mutant(
        "straight: states by 32 bits",
        STRAIGHT,
        "size_t kept_states = size_t(b)",
        "int kept_states = b",
        "language",
    ),
    Mutant("straight: u by 32 bits", STRAIGHT, "const int64_t base", "const int base", "language"),
    # the convolution and decoding
    Mutant(
        "conv: no guard of the last channel", CONV, "  if (d >= D) {\n    return;\n  }\n", "", "semantics"
    ),
    Mutant("conv: steps past the last", CONV, "min(begin + STEPS, T)", "begin + STEPS", "semantics"),
    Mutant(
        "conv: the window by one",
        CONV,
        "(t + K - 1) * window_strides[1]",
        "(t + K - 2) * window_strides[1]",
        "semantics convergence",
    ),
    Mutant(
        "conv: the window by the strides of a copy",
        CONV,
        "b * window_strides[0] + d * window_strides[2]",
        "int64_t(b) * (K - 1) * D + d",
        "semantics convergence",
    ),
    Mutant(
        "conv: x by the strides of a copy",
        CONV,
        "b * x_strides[0] + d * x_strides[2]",
        "size_t(b) * T * D + d",
        "semantics convergence",
    ),
    Mutant(
        "conv: every run of steps starts after the window",
        CONV,
        "const int t = begin + k - (K - 1);",
        "const int t = k - (K - 1);",
        "convergence",
    ),
    Mutant("conv: taps are not moved", CONV, "tap[k] = tap[k + 1];", "tap[k] = tap[k];", "convergence"),
    Mutant(
        "conv: taps the other way round",
        CONV,
        "k * weight_strides[1]",
        "(K - 1 - k) * weight_strides[1]",
        "convergence",
    ),
    Mutant("conv: no bias", CONV, "float(bias[d * bias_strides[0]])", "0.0f", "convergence"),
    Mutant("conv: no SiLU", CONV, "pararnn::Silu::value(sum)", "sum", "convergence"),
    Mutant(
        "conv: every run of steps writes the window", CONV, "if (end == T) {", "if (end <= T) {", "semantics"
    ),
    Mutant("conv: the window is not written", CONV, "if (end == T) {", "if (end > T) {", "semantics"),
    Mutant(
        "conv: the window holds what comes after it",
        CONV,
        "static_cast<OutT>(tap[k]);",
        "static_cast<OutT>(tap[k + 1]);",
        "semantics convergence",
    ),
    Mutant("conv: no cast", CONV, "static_cast<OutT>(tap[k])", "tap[k]", "compile language"),
    # the residual sum and its norm
    Mutant("norm: no barrier", NORM, SQUARES_BARRIER, without_barrier(SQUARES_BARRIER), "semantics"),
    Mutant(
        "norm: no barrier before the mean", NORM, MEAN_BARRIER, without_barrier(MEAN_BARRIER), "semantics"
    ),
    Mutant(
        "norm: barrier of the simdgroup only",
        NORM,
        SQUARES_BARRIER,
        without_barrier(SQUARES_BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "semantics",
    ),
    Mutant(
        "norm: one simdgroup too few",
        NORM,
        "g < threads / 32; ++g) {\n    mean_square",
        "g < threads / 32 - 1; ++g) {\n    mean_square",
        "convergence",
    ),
    Mutant(
        "norm: idle threads return early",
        NORM,
        "  float squares = 0.0f;\n",
        "  float squares = 0.0f;\n  if (first >= D) return;\n",
        "semantics",
    ),
    Mutant(
        "norm: one lane's squares", NORM, "squares = simd_sum(squares);", "simd_sum(squares);", "convergence"
    ),
    Mutant("norm: one lane's sum", NORM, "sum = simd_sum(sum);", "simd_sum(sum);", "convergence"),
    Mutant(
        "norm: x by the strides of a copy",
        NORM,
        "b * x_strides[0] + t * x_strides[1]",
        "row",
        "semantics convergence",
    ),
    Mutant(
        "norm: what is added by the strides of x",
        NORM,
        "b * added_strides[0] + t * added_strides[1]",
        "row",
        "semantics convergence",
    ),
    Mutant("norm: rows of one step", NORM, "size_t(b) * x_shape[1] + t", "size_t(b)", "semantics"),
    Mutant("norm: no scale", NORM, "kept * float(scale[0])", "kept", "convergence"),
    Mutant(
        "norm: both are scaled",
        NORM,
        "float(added[added_row + d * added_strides[2]]) + kept",
        "(float(added[added_row + d * added_strides[2]]) + kept / 0.7f) * 0.7f",
        "convergence",
    ),
    Mutant(
        "norm: the mean is not taken off",
        NORM,
        "float(total[row + d]) - mean;\n    squares",
        "float(total[row + d]);\n    squares",
        "convergence",
    ),
    Mutant("norm: sum for the mean", NORM, "mean = mean / float(D);", "", "convergence"),
    Mutant(
        "norm: mean over the threads",
        NORM,
        "mean_square / float(D)",
        "mean_square / float(threads)",
        "convergence",
    ),
    Mutant("norm: no epsilon", NORM, " + eps[0]", "", "convergence"),
    Mutant("norm: no weight", NORM, " * float(weight[d * weight_strides[0]])", "", "convergence"),
    Mutant("norm: no bias", NORM, "float(bias[d * bias_strides[0]])", "0.0f", "convergence"),
    Mutant("norm: no cast", NORM, "static_cast<OutT>(away * factor", "(away * factor", "compile language"),
    Mutant("decode: no barrier", DECODE, BARRIER, "", "semantics"),
    Mutant(
        "decode: barrier of the simdgroup only",
        DECODE,
        BARRIER,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "semantics",
    ),
    Mutant(
        "decode: idle threads return early",
        DECODE,
        "  const int W = int(u_shape[4]);",
        "  const int W = int(u_shape[4]);\n  if (first >= int(u_shape[1]) * W) return;",
        "semantics",
    ),
    Mutant(
        "decode: all lanes write the sum",
        DECODE,
        "thread_index_in_simdgroup == 0",
        "thread_index_in_simdgroup >= 0",
        "semantics",
    ),
    Mutant(
        "decode: one lane's squares",
        DECODE,
        "squares = simd_sum(squares);",
        "simd_sum(squares);",
        "convergence",
    ),
    Mutant(
        "decode: one simdgroup too few", DECODE, "g < threads / 32;", "g < threads / 32 - 1;", "convergence"
    ),
    Mutant("decode: one simdgroup too many", DECODE, "g < threads / 32;", "g <= threads / 32;", "semantics"),
    Mutant(
        "decode: mean over the threads", DECODE, "total / float(D)", "total / float(threads)", "convergence"
    ),
    Mutant("decode: no epsilon", DECODE, " + eps[0]", "", "convergence"),
    Mutant(
        "decode: squares of another slot",
        DECODE,
        "state[Cell::OUTPUT].v * state[Cell::OUTPUT].v",
        "state[0].v * state[0].v",
        "convergence",
        "lstm",
    ),
    Mutant(
        "decode: output of another slot",
        DECODE,
        "+ Cell::OUTPUT) * D + d]",
        "+ 0) * D + d]",
        "convergence",
        "lstm",
    ),
    Mutant(
        "decode: gate of another row",
        DECODE,
        "gate[b * gate_strides[0]",
        "gate[0 * gate_strides[0]",
        "convergence",
    ),
    Mutant(
        "decode: sigmoid for SiLU", DECODE, "pararnn::Silu::value", "pararnn::Sigmoid::value", "convergence"
    ),
    Mutant("decode: no weight", DECODE, " * float(weight[d * weight_strides[0]])", "", "convergence"),
    Mutant(
        "decode: bias of another head",
        DECODE,
        "head * bias_strides[0] + (int64_t(g)",
        "(int64_t(g)",
        "convergence",
    ),
    Mutant(
        "decode: bias by channels, then gates",
        DECODE,
        "(int64_t(g) * W + column) * bias_strides[1]",
        "(int64_t(column) * Cell::GATES + g) * bias_strides[1]",
        "convergence",
    ),
    Mutant(
        "decode: heads by the stride of channels",
        DECODE,
        "head * u_strides[1] + column * u_strides[4]",
        "d * u_strides[4]",
        "semantics convergence",
    ),
    Mutant(
        "decode: state of another row",
        DECODE,
        "initial[b * initial_strides[0]",
        "initial[0 * initial_strides[0]",
        "convergence",
    ),
    Mutant(
        "decode: params by the strides of a copy",
        DECODE,
        "p * params_strides[0] + d * params_strides[1]",
        "int64_t(p) * D + d",
        "semantics convergence",
    ),
    Mutant(
        "decode: threads of one threadgroup alone",
        DECODE,
        "threads_per_threadgroup.x * threadgroups_per_grid.x",
        "threads_per_threadgroup.x",
        "semantics",
    ),
    Mutant("decode: a double literal", DECODE, "1.0f / metal", "1.0 / metal", "language compile"),
]
MUTANTS += [
    # axes whose neighbours are not side by side
    Mutant(f"{name} by a stride of 1", file, f"{axis} * {name.split()[-1]}_strides[{n}]", axis, "convergence")
    for name, file, axis, n in (
        ("u", NEWTON, "(d % W)", 4),
        ("straight: u", STRAIGHT, "(d % W)", 4),
        ("conv: x", CONV, "d", 2),
        ("conv: window", CONV, "d", 2),
        ("conv: bias", CONV, "d", 0),
        ("decode: gate", DECODE, "d", 2),
        ("decode: weight", DECODE, "d", 0),
        ("decode: params", DECODE, "d", 1),
        ("decode: initial", DECODE, "d", 2),
        ("decode: u", DECODE, "column", 4),
        ("norm: x", NORM, "d", 2),
        ("norm: added", NORM, "d", 2),
        ("norm: weight", NORM, "d", 0),
        ("norm: bias", NORM, "d", 0),
        ("adjoint: u", ADJOINT, "(d % W)", 4),
        ("adjoint: d_hidden", ADJOINT, "d", 2),
    )
]
MUTANTS += [
    # rows of a batch
    Mutant("the mask of the first row", NEWTON, "mask[size_t(b) * T + begin", "mask[begin", "convergence"),
    Mutant("states of the first row", NEWTON, "size_t(b) * (T / interval)", "size_t(0)", "semantics"),
    Mutant(
        "straight: the mask of the first row",
        STRAIGHT,
        "    kept[i] = mask[size_t(b) * T + read];\n#endif\n    next",
        "    kept[i] = mask[read];\n#endif\n    next",
        "convergence",
    ),
    Mutant(
        "adjoint: the mask of the first row", ADJOINT, "mask[size_t(b) * T + (i", "mask[(i", "convergence"
    ),
    Mutant(
        "adjoint: the last state's gradient of the first row",
        ADJOINT,
        "d_last[(size_t(b) * SLOTS",
        "d_last[(size_t(0) * SLOTS",
        "convergence",
    ),
    # places in time
    Mutant("the mask backwards", NEWTON, "kept >> i & 1u", "kept >> (C - 1 - i) & 1u", "convergence"),
    Mutant(
        "adjoint: a boundary for a part of a chunk",
        ADJOINT,
        "size_t(b) * (T / C) +",
        "size_t(b) * ((T + C - 1) / C) +",
        "semantics",
    ),
    Mutant(
        "adjoint: masked steps give to their chunk's start",
        ADJOINT,
        "      if (keep[i]) {\n        float x",
        "      if (i < steps) {\n        float x",
        "convergence",
    ),
    Mutant(
        "in 16 bits, the carry is corrected the wrong way",
        NEWTON,
        "state[s].v + correction : state[s].v",
        "state[s].v - correction : state[s].v",
        "promised",
    ),
]
MUTANTS += ADJOINT_MUTANTS
