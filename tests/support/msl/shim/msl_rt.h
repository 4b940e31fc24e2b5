// What a compiled kernel asks of the runtime. One fiber plays one GPU thread; 32 of them are a simdgroup.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Where a thread stands. Filled by the runtime, read by the generated entry point.
struct MslPosition {
  uint32_t thread_in_grid[3], thread_in_threadgroup[3], threadgroup_in_grid[3];
  uint32_t threads_per_threadgroup[3], threadgroups_per_grid[3], threads_per_grid[3];
  uint32_t thread_index, lane, simdgroup, simdgroups;
};

namespace msl_rt {

// Threadgroup memory. `where` is one address per declaration, `element` the size of an array's element.
void* threadgroup_memory(const void* where, size_t bytes, size_t element, const char* name);

// Where the thread that runs stands.
const MslPosition& here();

enum Fence { FENCE_NONE = 0, FENCE_DEVICE = 1, FENCE_THREADGROUP = 2 };
void threadgroup_barrier(int fence, int line);
void simdgroup_barrier(int fence, int line);

// A simd operation: leave `value` for the others, wait for all 32 lanes; gives one's own lane. With `uniform`,
// every lane must bring the same `operand`.
int meet(uint64_t value, int64_t operand, bool uniform, const char* operation, int line);
// What lane `lane` brought to the meeting that has just ended.
uint64_t brought(int lane, const char* operation, int line);
bool lane_exists(int lane);

}  // namespace msl_rt

// The harness turns `threadgroup T name[..];` into this.
#define MSL_THREADGROUP(T, name, dimensions)                                              \
  static const char name##_declared_ = 0;                                                 \
  typedef T name##_type_ dimensions;                                                      \
  name##_type_& name = *static_cast<name##_type_*>(                                       \
      msl_rt::threadgroup_memory(&name##_declared_, sizeof(name##_type_), sizeof(T), #name))
