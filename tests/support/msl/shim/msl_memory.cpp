// What the threads touch: bounds, races, and memory read before it was written or never written.
//
// The kernel is compiled with -fsanitize=thread, which puts a call before every load and store; the functions
// called are the ones below and not the sanitizer's. Likewise the checks of -fsanitize=undefined.
//
// Two accesses of one address race when one is a write, they come from different threads, and no barrier with
// the right mem_flags lies between: a threadgroup barrier orders all threads of a threadgroup, a simdgroup
// barrier those of its simdgroup, nothing orders threadgroups. Epochs count the barriers passed.
#include "msl_internal.h"

#include <cstring>
#include <vector>

namespace msl_rt {

// An element's last write, and its reads since the last threadgroup barrier, as far as they can matter.
struct Shadow {
  uint32_t write_epoch, write_simd_epoch, read_epoch, read_simd_epoch;
  uint16_t writer, reader;
  uint8_t readers;  // 0 none, 1 `reader`, 2 several of one simdgroup, 3 several simdgroups
};

// Epochs of one kind of memory; both counts only grow, over all threadgroups of a launch.
struct Clock {
  uint32_t epoch, threadgroup_start;
  uint32_t simd[32];
  void advance() { ++epoch; }
};

struct Region {
  char* low;
  size_t bytes, element;
  bool output;
  const char* name;
  std::vector<Shadow> shadow;
};

constexpr size_t GAP = 256;       // between arrays of threadgroup memory, so that an overrun is seen
constexpr size_t BLOCK = 16;      // and their alignment
constexpr size_t ARENA = THREADGROUP_LIMIT + 64 * GAP;

static bool checked;
static std::vector<Region> buffers;
static std::vector<Region> arrays;             // of threadgroup memory
static std::vector<const void*> declarations;  // of `arrays`
alignas(64) static char arena[ARENA];
static uint8_t array_of_block[ARENA / BLOCK];  // index + 1
static size_t arena_end, bytes_used;
static Clock device_clock, threadgroup_clock;

void memory_begin_launch(const Buffer* list, int count, bool check) {
  checked = check;
  buffers.clear();
  for (int i = 0; i < count; ++i) {
    const Buffer& b = list[i];
    Region r = {static_cast<char*>(b.low), b.bytes, b.element, b.output != 0, b.name, {}};
    if (check && b.output) r.shadow.assign(b.bytes / b.element, Shadow{});
    buffers.push_back(std::move(r));
  }
  arrays.clear();
  declarations.clear();
  memset(array_of_block, 0, sizeof array_of_block);
  arena_end = GAP;
  bytes_used = 0;
  device_clock = threadgroup_clock = Clock{};
}

void memory_begin_threadgroup() {
  device_clock.advance();
  threadgroup_clock.advance();
  device_clock.threadgroup_start = device_clock.epoch;
  threadgroup_clock.threadgroup_start = threadgroup_clock.epoch;
  memset(arena, 0xff, arena_end);  // NaN, and -1
}

void memory_barrier(int fence) {
  if (fence & FENCE_DEVICE) device_clock.advance();
  if (fence & FENCE_THREADGROUP) threadgroup_clock.advance();
}

void memory_simdgroup_barrier(uint32_t g, int fence) {
  if (fence & FENCE_DEVICE) device_clock.simd[g]++;
  if (fence & FENCE_THREADGROUP) threadgroup_clock.simd[g]++;
}

size_t threadgroup_bytes() { return bytes_used; }

void* threadgroup_memory(const void* where, size_t bytes, size_t element, const char* name) {
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (declarations[i] == where) return arrays[i].low;
  }
  const size_t rounded = (bytes + BLOCK - 1) / BLOCK * BLOCK;
  if (bytes_used + rounded > THREADGROUP_LIMIT || arrays.size() >= 60) {
    fail_at(nullptr, 0, "threadgroup memory: `%s` of %zu bytes after %zu is over the limit of %zu", name, bytes,
            bytes_used, THREADGROUP_LIMIT);
  }
  Region r = {arena + arena_end, bytes, element, true, name, {}};
  if (checked) r.shadow.assign(bytes / element, Shadow{});
  declarations.push_back(where);
  arrays.push_back(std::move(r));
  for (size_t o = 0; o < rounded; o += BLOCK) array_of_block[(arena_end + o) / BLOCK] = uint8_t(arrays.size());
  memset(arena + arena_end, 0xff, rounded);
  bytes_used += rounded;
  arena_end += rounded + GAP;
  return arrays.back().low;
}

// Does an access by the current thread conflict with an earlier one by `thread` at these epochs?
static bool conflicts(const Clock& clock, uint32_t thread, uint32_t epoch, uint32_t simd_epoch) {
  if (thread == current->index || epoch != clock.epoch) return false;
  return thread / LANES != current->simdgroup || simd_epoch == clock.simd[current->simdgroup];
}

static void touch(Region& r, size_t i, bool write, const Clock& clock, void* pc) {
  Shadow& s = r.shadow[i];
  // Device memory outlives a threadgroup; threadgroup memory does not.
  if (&clock == &threadgroup_clock && s.write_epoch < clock.threadgroup_start) s = Shadow{};
  const uint32_t me = current->index, simd_epoch = clock.simd[current->simdgroup];
  const bool written = s.write_epoch >= clock.threadgroup_start;
  if (!write && !written) {
    if (s.write_epoch) fail_at(pc, 0, "race: `%s`[%zu] is read, another threadgroup wrote it", r.name, i);
    fail_at(pc, 0, "`%s`[%zu] is read before anything was written there", r.name, i);
  }
  if (s.write_epoch && conflicts(clock, s.writer, s.write_epoch, s.write_simd_epoch)) {
    fail_at(pc, 0, "race: `%s`[%zu] is %s, thread %u wrote it with no barrier between", r.name, i,
            write ? "written" : "read", s.writer);
  }
  if (!write) {
    if (s.read_epoch != clock.epoch || s.readers == 0) {
      s.readers = 1;
    } else if (s.readers < 3 && s.reader / LANES != current->simdgroup) {
      s.readers = 3;
    } else if (s.readers < 3) {
      const bool same = s.readers == 1 && s.reader == me;
      s.readers = same || s.read_simd_epoch != simd_epoch ? 1 : 2;  // older reads of this simdgroup are ordered
    }
    s.reader = uint16_t(me);
    s.read_epoch = clock.epoch;
    s.read_simd_epoch = simd_epoch;
    return;
  }
  if (s.write_epoch && !written) {
    fail_at(pc, 0, "race: `%s`[%zu] is written by more than one threadgroup", r.name, i);
  }
  const bool read_now = s.readers && s.read_epoch == clock.epoch;
  const bool others = s.readers == 3 || s.reader / LANES != current->simdgroup ||
                      (s.read_simd_epoch == simd_epoch && (s.readers == 2 || s.reader != me));
  if (read_now && others) {
    fail_at(pc, 0, "race: `%s`[%zu] is written, thread %u read it with no barrier between", r.name, i, s.reader);
  }
  s.writer = uint16_t(me);
  s.write_epoch = clock.epoch;
  s.write_simd_epoch = simd_epoch;
}

static void touch_all(Region& r, size_t offset, size_t bytes, bool write, const Clock& clock, void* pc) {
  for (size_t i = offset / r.element; i <= (offset + bytes - 1) / r.element; ++i) touch(r, i, write, clock, pc);
}

extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

static void access(void* address, size_t bytes, bool write, void* pc) {
  if (!current || !checked) return;
  char* a = static_cast<char*>(address);
  if (a >= current->stack && a < current->stack + STACK_BYTES) return;
  for (Region& r : buffers) {
    if (a < r.low || a >= r.low + r.bytes) continue;
    const size_t offset = size_t(a - r.low);
    if (offset + bytes > r.bytes) break;
    if (write && !r.output) fail_at(pc, 0, "input `%s` is written, byte %zu", r.name, offset);
    if (r.output) touch_all(r, offset, bytes, write, device_clock, pc);
    return;
  }
  if (a >= arena && a < arena + ARENA) {
    const uint8_t index = array_of_block[size_t(a - arena) / BLOCK];
    Region* r = index ? &arrays[index - 1] : nullptr;
    if (!r || a + bytes > r->low + r->bytes) fail_at(pc, 0, "out of bounds in threadgroup memory");
    touch_all(*r, size_t(a - r->low), bytes, write, threadgroup_clock, pc);
    return;
  }
  if (!write && a >= __ehdr_start && a < _end) return;  // constants of the compiled kernel
  const Region* nearest = nullptr;
  size_t least = size_t(-1);
  for (const Region& r : buffers) {
    const size_t distance = a < r.low ? size_t(r.low - a) : size_t(a - r.low);
    if (distance < least) least = distance, nearest = &r;
  }
  if (!nearest) fail_at(pc, 0, "wild access");
  fail_at(pc, 0, "out of bounds: %s at byte %td, nearest is `%s` of %zu bytes", write ? "write" : "read",
          a - nearest->low, nearest->name, nearest->bytes);
}

int first_unwritten(const char* const* allowed, int allowed_count, uint64_t* element, uint64_t* count) {
  for (size_t b = 0; b < buffers.size(); ++b) {
    if (!buffers[b].output) continue;
    bool skip = false;
    for (int i = 0; i < allowed_count; ++i) skip = skip || !strcmp(allowed[i], buffers[b].name);
    if (skip) continue;
    *count = 0;
    for (size_t i = buffers[b].shadow.size(); i-- > 0;) {
      if (!buffers[b].shadow[i].write_epoch) ++*count, *element = i;
    }
    if (*count) return int(b);
  }
  return -1;
}

}  // namespace msl_rt

using msl_rt::fail_at;

extern "C" {

#define HOOKS(n)                                                                                                  \
  void __tsan_read##n(void* a) { msl_rt::access(a, n, false, __builtin_return_address(0)); }                      \
  void __tsan_write##n(void* a) { msl_rt::access(a, n, true, __builtin_return_address(0)); }                      \
  void __tsan_unaligned_read##n(void* a) { msl_rt::access(a, n, false, __builtin_return_address(0)); }            \
  void __tsan_unaligned_write##n(void* a) { msl_rt::access(a, n, true, __builtin_return_address(0)); }            \
  void __tsan_volatile_read##n(void* a) { msl_rt::access(a, n, false, __builtin_return_address(0)); }             \
  void __tsan_volatile_write##n(void* a) { msl_rt::access(a, n, true, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* a, size_t n) { msl_rt::access(a, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* a, size_t n) { msl_rt::access(a, n, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// The first member of each report's data is its place in the source.
struct Place {
  const char* file;
  uint32_t line, column;
};
#define REPORT(name, text, ...) \
  void __ubsan_handle_##name##_abort(Place* place, ##__VA_ARGS__) { fail_at(nullptr, int(place->line), text); }
REPORT(add_overflow, "integer overflow in +", void*, void*)
REPORT(sub_overflow, "integer overflow in -", void*, void*)
REPORT(mul_overflow, "integer overflow in *", void*, void*)
REPORT(negate_overflow, "integer overflow in unary -", void*)
REPORT(divrem_overflow, "integer division by zero", void*, void*)
REPORT(shift_out_of_bounds, "shift by more than the width", void*, void*)
REPORT(out_of_bounds, "index out of an array's bounds", void*)
REPORT(float_cast_overflow, "a float is converted to an integer it does not fit", void*)
void __ubsan_handle_missing_return(Place* place) { fail_at(nullptr, int(place->line), "a function ends without return"); }
}
