// What stands before a kernel when its .metal file is opened or compiled as it is (`xcrun metal -c`): the headers,
// and one choice of cell, dtypes, sizes and options. For a call of MLX compute/texts.py and MLX itself write these.

#pragma once

#include <metal_stdlib>

using namespace metal;

#include "dual.h"
#include "activations.h"
#include "cells/gru.h"

using Cell = pararnn::GRU<pararnn::Sigmoid, pararnn::Sigmoid, pararnn::Tanh>;

// The cell on numbers with a tangent for each input, which adjoint.metal takes.
namespace pararnn {
enum { INPUTS = 7 };
}
namespace tangents {
using Real = pararnn::Dual<pararnn::INPUTS>;
}
#include "dual_inputs.h"
#define float Real
#define pararnn tangents
#include "cells/gru.h"
#undef float
#undef pararnn
using TangentCell = tangents::GRU<pararnn::Sigmoid, pararnn::Sigmoid, pararnn::Tanh>;

using InT = float;
using OutT = float;

// recurrence.metal, adjoint.metal
constant constexpr int CW = 32;
constant constexpr int C = 16;
constant constexpr int S = 8;
// sequential.metal
constant constexpr int RING = 6;
// conv.metal
constant constexpr int K = 4;
constant constexpr int STEPS = 16;

// Options: a kernel must not name an argument that it does not have.
#define MASKED 1
#define STATES 1
#define INFO 1
#define GATED 1
#define CENTERED 1
#define SCALED 1
