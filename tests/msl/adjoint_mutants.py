"""Kernels of the gradient, broken on purpose: the part of mutants.py for adjoint.metal."""

from .mutant import BARRIER, Mutant, without_barrier

ADJOINT, INPUTS = "adjoint.metal", "dual_inputs.h"
SCAN_BARRIER = f"    {BARRIER}\n\n    // Each thread scans"
CARRY_BARRIER = f"    {BARRIER}\n    for (int s = 0; s < SLOTS; ++s) {{\n      carry[s]"
FORWARDS, BACKWARDS = "      if (keep[i]) {\n        float x", "      if (keep[i]) {\n        lambda["
D_STATES = "      if (i < steps && (t + 1) % interval == 0) {\n        for (int s = 0; s < SLOTS; ++s) {\n"
FIRST_CHUNK = "    if (chunk == 0) {\n      for (int s = 0; s < SLOTS; ++s) {\n        shared_carry"

# name, old, new, seen by[, cell]
_TABLE = [
    # barriers, divergence, memory
    ("no barrier before the scan", SCAN_BARRIER, without_barrier(SCAN_BARRIER), "semantics"),
    ("no barrier before the carry is read", CARRY_BARRIER, without_barrier(CARRY_BARRIER), "semantics"),
    (
        "barrier of the simdgroup only",
        SCAN_BARRIER,
        without_barrier(SCAN_BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "semantics",
    ),
    (
        "barrier for chunks with steps only",
        SCAN_BARRIER,
        without_barrier(SCAN_BARRIER, f"if (steps > 0) {BARRIER}"),
        "semantics",
    ),
    (
        "idle threads return early",
        "  float w[PARAMS];",
        "  if (!writes) return;\n  float w[PARAMS];",
        "semantics",
    ),
    ("channels past the last are read", "writes ? channel : D - 1", "channel", "semantics"),
    ("channels past the last are written", "if (i < steps && writes) {", "if (i < steps) {", "semantics"),
    ("steps past the last are written", "if (i < steps && writes) {", "if (writes) {", "semantics"),
    ("the last step is left out", "T - begin));", "T - 1 - begin));", "semantics"),
    (
        "the mask is read past its end",
        "keep[i] && mask[size_t(b) * T + (i < steps ? begin + i : 0)]",
        "mask[size_t(b) * T + begin + i] && keep[i]",
        "semantics",
    ),
    (
        "a boundary is read for chunks without steps",
        "} else if (steps > 0) {",
        "} else {",
        "semantics",
    ),
    ("over 32 KB", "shared_carry[SLOTS * CW]", "shared_carry[SLOTS * CW + 8000]", "semantics"),
    (
        "sums of all chunks in one place",
        "(size_t(b) * CHUNKS + chunk) * PARAMS",
        "(size_t(b) * CHUNKS + 0) * PARAMS",
        "semantics",
    ),
    # strides, layouts, offsets of 32 bits, types
    (
        "u by the strides of a copy",
        "(d / W) * u_strides[1] + (d % W) * u_strides[4]",
        "d",
        "semantics convergence",
    ),
    (
        "d_hidden by the strides of a copy",
        "b * d_hidden_strides[0] + d * d_hidden_strides[2]",
        "size_t(b) * T * D + d",
        "semantics convergence",
    ),
    (
        "d_u with the rows outermost",
        "(size_t(d / W) * B + b) * T + t",
        "(size_t(b) * (D / W) + d / W) * T + t",
        "convergence",
    ),
    ("u by 32 bits", "const int64_t base", "const int base", "language"),
    ("d_hidden by 32 bits", "const int64_t hidden_base", "const int hidden_base", "language"),
    ("boundaries by 32 bits", "boundaries[((size_t(b)", "boundaries[((b", "language"),
    ("d_u by 32 bits", "d_u[(((size_t(d / W)", "d_u[(((d / W", "language"),
    ("d_params by 32 bits", "d_params[((size_t(b)", "d_params[((b", "language"),
    ("d_initial by 32 bits", "d_initial[(size_t(b)", "d_initial[(b", "language"),
    ("d_last by 32 bits", "d_last[(size_t(b)", "d_last[(b", "language"),
    ("no cast to u's dtype", "static_cast<InT>(gates[g])", "gates[g]", "compile language"),
    # the bias
    (
        "no bias forwards",
        "g * gate_stride]) + shift[g];\n        }\n        Cell::step",
        "g * gate_stride]);\n        }\n        Cell::step",
        "convergence",
    ),
    (
        "no bias backwards",
        "g * gate_stride]) + shift[g];\n          x[g]",
        "g * gate_stride]);\n          x[g]",
        "convergence",
    ),
    ("bias of another head", "bias[(size_t(d / W) * GATES", "bias[(size_t(0) * GATES", "convergence"),
    (
        "sums of the bias of the last step alone",
        "shift_sums[g] += gates[g]",
        "shift_sums[g] = gates[g]",
        "convergence",
    ),
    (
        "sums of the bias by channels, then gates",
        "(size_t(d / W) * GATES + g) * W + d % W] = shift",
        "(size_t(d / W) * W + d % W) * GATES + g] = shift",
        "convergence",
    ),
    ("d_bias by 32 bits", "d_bias[((size_t(b)", "d_bias[((b", "language"),
    # time
    (
        "tiles from the first to the last",
        "for (int t0 = (T - 1) / TILE * TILE; t0 >= 0; t0 -= TILE) {",
        "for (int t0 = 0; t0 < T; t0 += TILE) {",
        "convergence",
    ),
    ("a last tile that is not full is left out", "t0 = (T - 1)", "t0 = (T - TILE)", "semantics"),
    ("steps forwards", "int i = C - 1; i >= 0; --i", "int i = 0; i < C; ++i", "convergence"),
    ("a boundary too far", "+ begin / C - 1)", "+ begin / C)", "semantics convergence"),
    ("every tile starts from the initial state", "if (begin == 0) {", "if (chunk == 0) {", "convergence"),
    ("masked steps change the state", FORWARDS, FORWARDS.replace("keep[i]", "i < steps"), "convergence"),
    ("masked steps have gradients", BACKWARDS, BACKWARDS.replace("keep[i]", "i < steps"), "convergence"),
    (
        "d_last is left out",
        "carry[s] = d_last[(size_t(b) * SLOTS + s) * D + d]",
        "carry[s] = 0.0f",
        "convergence",
    ),
    ("d_last of another row", "d_last[(size_t(b) * SLOTS", "d_last[(size_t(0) * SLOTS", "convergence"),
    ("nothing is carried", "carry[s] = shared_carry[s * CW + column];", "", "convergence"),
    (
        "the last chunk's lambda is carried",
        FIRST_CHUNK,
        FIRST_CHUNK.replace("chunk == 0", "chunk == CHUNKS - 1"),
        "convergence",
    ),
    # the scan
    (
        "the scan from the first",
        "int c = CHUNKS - 1; c > chunk; --c",
        "int c = chunk + 1; c < CHUNKS; ++c",
        "convergence",
    ),
    ("the scan without the last chunk", "int c = CHUNKS - 1;", "int c = CHUNKS - 2;", "convergence"),
    ("the scan with the own chunk", "c > chunk; --c", "c >= chunk; --c", "convergence"),
    (
        "the scan forgets what chunks add",
        "earlier[j] = shared_own[j * CELLS + from]",
        "earlier[j] = 0.0f",
        "convergence",
    ),
    ("the scan forgets the Jacobian", "+ from] * lambda[s]", "+ from] * 0.0f", "convergence"),
    (
        "the Jacobian is not transposed",
        "= state[s].d[j];  // transposed",
        "= state[j].d[s];",
        "convergence",
        "lstm",
    ),
    ("the Jacobian is not reset", "state[s].d[s] = 1.0f;", "state[s].d[s] = 0.0f;", "convergence"),
    (
        "d_hidden is left out of the scan",
        "state[Cell::OUTPUT].d[j] * arriving",
        "0.0f * arriving",
        "convergence",
    ),
    (
        "d_hidden of another slot, in the scan",
        "state[Cell::OUTPUT].d[j]",
        "state[0].d[j]",
        "convergence",
        "lstm",
    ),
    (
        "d_states are left out of the scan",
        "own[j] += state[s].d[j] * arriving",
        "own[j] += 0.0f * arriving",
        "convergence",
    ),
    # the steps
    ("d_hidden of another slot", "lambda[Cell::OUTPUT] +=", "lambda[0] +=", "convergence", "lstm"),
    (
        "d_states one step late",
        D_STATES + "          lambda",
        D_STATES.replace("(t + 1)", "t") + "          lambda",
        "semantics convergence",
    ),
    ("lambda of another slot", "lambda[s] * now[s].d[k]", "lambda[0] * now[s].d[k]", "convergence", "lstm"),
    (
        "lambda is not handed on",
        "lambda[s] = gradient[s];",
        "lambda[s] += 0.0f * gradient[s];",
        "convergence",
    ),
    (
        "gates get the state's gradient",
        "gates[g] = gradient[SLOTS + g]",
        "gates[g] = gradient[g]",
        "convergence",
    ),
    (
        "params have the gates' directions",
        "weights[p].d[SLOTS + GATES + p]",
        "weights[p].d[SLOTS + p]",
        "convergence",
    ),
    (
        "sums without the first chunk",
        "sums[p] += gradient",
        "if (chunk > 0) sums[p] += gradient",
        "convergence",
    ),
    ("sums of the last step alone", "sums[p] += gradient", "sums[p] = gradient", "convergence"),
]
ADJOINT_MUTANTS = [Mutant(f"adjoint: {name}", ADJOINT, old, new, *rest) for name, old, new, *rest in _TABLE]
ADJOINT_MUTANTS.append(
    Mutant(
        "inputs: slope of an activation at its value",
        INPUTS,
        "chain(x, y, A::slope(x.v, y))",
        "chain(x, y, A::slope(y, x.v))",
        "convergence",
    )
)
