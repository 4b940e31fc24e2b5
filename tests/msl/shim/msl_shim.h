// The part of Metal's language and library that the kernels use, in C++17 for g++. Stricter than Metal where
// that is safer: no implicit narrowing to half, min and max of mixed types do not compile, simd operations and
// barriers must be reached by all lanes. Address spaces are not modelled; clang checks those (language.py).
#pragma once
#include "msl_math.h"
#include "msl_simd.h"
#include "msl_types.h"

using namespace metal;

// The harness turns `threadgroup T name[..];` into this.
#define MSL_THREADGROUP(T, name, dimensions)                                              \
  static const char name##_declared_ = 0;                                                 \
  typedef T name##_type_ dimensions;                                                      \
  name##_type_& name = *static_cast<name##_type_*>(                                       \
      msl_rt::threadgroup_memory(&name##_declared_, sizeof(name##_type_), sizeof(T), #name))

#define METAL_FUNC inline
#define device
#define threadgroup
#define constant
#define thread
#define kernel
