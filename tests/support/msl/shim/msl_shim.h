// The part of Metal's language and library that the kernels use, in C++17 for g++. Stricter than Metal where
// that is safer: no implicit narrowing to half, min and max of mixed types do not compile, simd operations and
// barriers must be reached by all lanes. Address spaces are not modelled; clang checks those (language.py).
#pragma once
#include "msl_math.h"
#include "msl_simd.h"
#include "msl_types.h"

using namespace metal;

#define METAL_FUNC inline
#define device
#define threadgroup
#define constant
#define thread
#define kernel
