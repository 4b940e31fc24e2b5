// Shared by the two halves of the runtime: msl_rt.cpp (threads) and msl_memory.cpp (what they touch).
#pragma once
#include "msl_rt.h"

namespace msl_rt {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr uint32_t LANES = 32;
constexpr size_t THREADGROUP_LIMIT = 32768;

struct Fiber {
  void* stack_pointer;
  char* stack;
  int state;         // a Wait of msl_rt.cpp
  const char* what;  // the operation waited in, with its line and fences
  int line;
  int fence;
  uint64_t value[2];  // for simd operations, by the parity of `meetings`
  int64_t operand;
  uint32_t meetings;
  uint32_t index, lane, simdgroup;
  const MslPosition* where;
};

extern Fiber* current;           // null while the scheduler runs
extern uint32_t position[3];     // the threadgroup that runs

// Ends the launch with a message; `pc` (0: none) is later turned into a line of the kernel.
[[noreturn]] void fail_at(void* pc, int line, const char* format, ...) __attribute__((format(printf, 3, 4)));

// A buffer of the launch.
struct Buffer {
  void* data;       // what the kernel gets
  void* low;        // the bytes it may touch: low <= address < low + bytes
  uint64_t bytes;
  uint64_t element;
  int output;
  const char* name;
};

void memory_begin_launch(const Buffer* buffers, int count, bool checked);
void memory_begin_threadgroup();
void memory_barrier(int fence);                      // of a whole threadgroup
void memory_simdgroup_barrier(uint32_t g, int fence);
size_t threadgroup_bytes();
// First output element nobody wrote: its buffer, or -1.
int first_unwritten(const char* const* allowed, int allowed_count, uint64_t* element, uint64_t* count);

}  // namespace msl_rt
