// Threads of the Metal-in-C++ runtime: fibers, simdgroups, barriers, the order lanes run in, and the launch.
//
// A fiber runs until it reaches a simd operation, a barrier or its end. The scheduler brings all lanes of a
// simdgroup to the same place before any goes on, and all simdgroups to the same threadgroup barrier. Lanes in
// different places are an error. (Metal allows simd operations in divergent flow; we do not, on purpose.)
#include "msl_internal.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <sys/time.h>
#include <vector>
#include <xmmintrin.h>

namespace msl_rt {

enum Wait { RUNNING, MEETING, SIMDGROUP_BARRIER, THREADGROUP_BARRIER, ENDED };

Fiber* current = nullptr;
uint32_t position[3];

static std::vector<Fiber> fibers;
static uint32_t threads;
static void* scheduler_stack_pointer;
static bool failed;
static volatile sig_atomic_t timed_out;
static char message[2048];
static void* message_pc;
static int message_line;

extern "C" void msl_switch(void** save, void* to);
asm(R"(.text
.globl msl_switch
.type msl_switch, @function
msl_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size msl_switch, .-msl_switch
)");

static void to_scheduler() {
  Fiber* self = current;
  current = nullptr;
  msl_switch(&self->stack_pointer, scheduler_stack_pointer);
}

void fail_at(void* pc, int line, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  int n = snprintf(message, sizeof message, "%s", text);
  if (current) {
    snprintf(message + n, sizeof message - n, " [threadgroup (%u, %u, %u), simdgroup %u, lane %u]", position[0],
             position[1], position[2], current->simdgroup, current->lane);
  }
  message_pc = pc;
  message_line = line;
  failed = true;
  if (current) to_scheduler();  // never resumed
  __builtin_trap();             // the scheduler itself uses scheduler_fail
}

static void scheduler_fail(int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  snprintf(message + n, sizeof message - n, " [threadgroup (%u, %u, %u)]", position[0], position[1], position[2]);
  message_pc = nullptr;
  message_line = line;
  failed = true;
}

// ---- what a kernel calls

static void wait(int state, const char* what, int line) {
  current->state = state;
  current->what = what;
  current->line = line;
  to_scheduler();
}

void threadgroup_barrier(int fence, int line) {
  current->fence = fence;
  wait(THREADGROUP_BARRIER, "threadgroup_barrier", line);
}

void simdgroup_barrier(int fence, int line) {
  current->fence = fence;
  wait(SIMDGROUP_BARRIER, "simdgroup_barrier", line);
}

static Fiber* lane_fiber(int lane) {
  const uint32_t index = current->simdgroup * LANES + uint32_t(lane);
  return lane >= 0 && lane < int(LANES) && index < threads ? &fibers[index] : nullptr;
}

int meet(uint64_t value, int64_t operand, bool uniform, const char* operation, int line) {
  Fiber* self = current;
  self->value[self->meetings & 1] = value;  // two slots: a lane can be one meeting ahead, never two
  self->operand = operand;
  wait(MEETING, operation, line);
  if (uniform) {
    for (int lane = 0; lane < int(LANES); ++lane) {
      Fiber* other = lane_fiber(lane);
      if (other && other->meetings == self->meetings && other->operand != self->operand) {
        fail_at(nullptr, line, "%s: its second operand differs between lanes", operation);
      }
    }
  }
  self->meetings++;
  return int(self->lane);
}

uint64_t brought(int lane, const char* operation, int line) {
  Fiber* other = lane_fiber(lane);
  if (!other) fail_at(nullptr, line, "%s: reads lane %d, which does not exist", operation, lane);
  return other->value[(current->meetings - 1) & 1];
}

const MslPosition& here() { return *current->where; }

bool lane_exists(int lane) { return lane_fiber(lane) != nullptr; }

// ---- running a threadgroup

typedef void (*Entry)(void** buffers, const MslPosition* position);
static Entry entry;
static void** arguments_of_kernel;
static size_t argument_count;
constexpr size_t MAX_BUFFERS = 31;  // Metal's limit, too
static uint32_t grid[3], group[3], groups[3];

static void fiber_main() {
  Fiber* self = current;
  MslPosition p;
  const uint32_t i = self->index;
  const uint32_t at[3] = {i % group[0], i / group[0] % group[1], i / (group[0] * group[1])};
  for (int k = 0; k < 3; ++k) {
    p.thread_in_grid[k] = position[k] * group[k] + at[k];
    p.thread_in_threadgroup[k] = at[k];
    p.threadgroup_in_grid[k] = position[k];
    p.threads_per_threadgroup[k] = group[k];
    p.threadgroups_per_grid[k] = groups[k];
    p.threads_per_grid[k] = grid[k];
  }
  p.thread_index = i;
  p.lane = self->lane;
  p.simdgroup = self->simdgroup;
  p.simdgroups = (threads + LANES - 1) / LANES;
  self->where = &p;
  void* buffers[MAX_BUFFERS];  // on this stack, where the memory checks let a thread read
  memcpy(buffers, arguments_of_kernel, sizeof(void*) * argument_count);
  entry(buffers, &p);
  self->state = ENDED;
  self->what = "the end of the kernel";
  self->line = 0;
  to_scheduler();
  __builtin_trap();
}

static void prepare(Fiber& f) {
  void** top = reinterpret_cast<void**>((uintptr_t(f.stack) + STACK_BYTES) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
  f.state = RUNNING;
  f.meetings = 0;
}

static uint64_t random_state;
static uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 16) % n;
}

// order 0: forward; 1: backward; others: shuffled anew each time, by the seed.
static void arrange(std::vector<uint32_t>& items, unsigned order) {
  for (uint32_t i = 0; i < items.size(); ++i) items[i] = order == 1 ? uint32_t(items.size()) - 1 - i : i;
  if (order < 2) return;
  for (uint32_t i = uint32_t(items.size()); i > 1; --i) std::swap(items[i - 1], items[random_below(i)]);
}

// Runs one simdgroup to its next threadgroup barrier or its end.
static bool run_simdgroup(uint32_t g, unsigned order) {
  const uint32_t first = g * LANES, count = threads - first < LANES ? threads - first : LANES;
  static std::vector<uint32_t> lanes;
  lanes.resize(count);
  while (true) {
    arrange(lanes, order);
    for (uint32_t lane : lanes) {
      Fiber& f = fibers[first + lane];
      current = &f;
      f.state = RUNNING;
      msl_switch(&scheduler_stack_pointer, f.stack_pointer);
      current = nullptr;
      if (failed) return false;
    }
    if (timed_out) {
      scheduler_fail(0, "the kernel did not end in the time given");
      return false;
    }
    Fiber& a = fibers[first];
    for (uint32_t lane = 1; lane < count; ++lane) {
      Fiber& b = fibers[first + lane];
      if (a.state != b.state || a.line != b.line || strcmp(a.what, b.what)) {
        scheduler_fail(a.line ? a.line : b.line,
                       "divergence within simdgroup %u: lane 0 is at %s (line %d), lane %u at %s (line %d)", g, a.what,
                       a.line, lane, b.what, b.line);
        return false;
      }
      if ((a.state == SIMDGROUP_BARRIER || a.state == THREADGROUP_BARRIER) && a.fence != b.fence) {
        scheduler_fail(a.line, "mem_flags differ between lanes of a barrier");
        return false;
      }
    }
    if (a.state == SIMDGROUP_BARRIER) memory_simdgroup_barrier(g, a.fence);
    if (a.state == THREADGROUP_BARRIER || a.state == ENDED) return true;
  }
}

static bool run_threadgroup(unsigned order) {
  for (uint32_t i = 0; i < threads; ++i) prepare(fibers[i]);
  std::vector<uint32_t> simdgroups((threads + LANES - 1) / LANES);
  while (true) {
    arrange(simdgroups, order);
    for (uint32_t g : simdgroups) {
      if (!run_simdgroup(g, order)) return false;
    }
    Fiber& a = fibers[0];
    for (uint32_t g = 1; g < simdgroups.size(); ++g) {
      Fiber& b = fibers[g * LANES];
      if (a.state != b.state || a.line != b.line || (a.state != ENDED && a.fence != b.fence)) {
        scheduler_fail(a.line ? a.line : b.line,
                       "divergence between simdgroups: 0 is at %s (line %d), %u at %s (line %d)", a.what, a.line, g,
                       b.what, b.line);
        return false;
      }
    }
    if (a.state == ENDED) return true;
    memory_barrier(a.fence);
  }
}

// ---- signals: a hang or a wild access becomes a message

static char signal_stack[64 * 1024];

static void on_alarm(int) {
  timed_out = 1;
  if (current) fail_at(nullptr, 0, "the kernel did not end in the time given");
}

static void on_fault(int signal, siginfo_t* info, void*) {
  if (current) fail_at(nullptr, 0, "signal %d (%s) at address %p", signal, strsignal(signal), info->si_addr);
  struct sigaction plain = {};
  plain.sa_handler = SIG_DFL;
  sigaction(signal, &plain, nullptr);
}

struct Signals {
  struct sigaction old[4];
  stack_t old_stack;
  itimerval old_timer;
  explicit Signals(double seconds) {
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &old_stack);
    struct sigaction fault = {}, alarm = {};
    fault.sa_sigaction = on_fault;
    fault.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    alarm.sa_handler = on_alarm;
    alarm.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &fault, &old[0]);
    sigaction(SIGBUS, &fault, &old[1]);
    sigaction(SIGFPE, &fault, &old[2]);
    sigaction(SIGALRM, &alarm, &old[3]);
    itimerval timer = {};
    timer.it_value.tv_sec = time_t(seconds);
    timer.it_value.tv_usec = suseconds_t((seconds - double(time_t(seconds))) * 1e6);
    setitimer(ITIMER_REAL, &timer, &old_timer);
  }
  ~Signals() {
    setitimer(ITIMER_REAL, &old_timer, nullptr);
    const int numbers[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGALRM};
    for (int i = 0; i < 4; ++i) sigaction(numbers[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

// A process may have some 65,000 mappings, and many kernels are loaded side by side: each gives its stacks back.
static void drop_fibers() {
  for (const Fiber& f : fibers) munmap(f.stack, STACK_BYTES);
  fibers.clear();
}

static bool make_fibers() {
  while (fibers.size() < threads) {
    Fiber f = {};
    void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    mprotect(memory, 4096, PROT_NONE);  // a stack that overflows faults
    f.stack = static_cast<char*>(memory);
    f.index = uint32_t(fibers.size());
    f.lane = f.index % LANES;
    f.simdgroup = f.index / LANES;
    fibers.push_back(f);
  }
  return true;
}

}  // namespace msl_rt

using namespace msl_rt;

struct MslLaunch {
  Entry entry;
  const Buffer* buffers;
  int buffer_count;
  const char* const* may_stay_unwritten;
  int may_stay_unwritten_count;
  uint32_t grid[3], threadgroup[3];
  unsigned order;
  int checked, flush_denormals;
  double seconds;
  // results
  char* error;  // 2048 bytes
  uint64_t error_pc;
  int error_line;
  uint64_t threadgroup_bytes;
};

extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));

// 0: ran; 1: error, with a message.
extern "C" int msl_launch(MslLaunch* launch) {
  failed = false;
  timed_out = 0;
  message_pc = nullptr;
  message_line = 0;
  message[0] = 0;
  entry = launch->entry;
  threads = 1;
  for (int k = 0; k < 3; ++k) {
    grid[k] = launch->grid[k];
    group[k] = launch->threadgroup[k];
    groups[k] = grid[k] / group[k];
    threads *= group[k];
  }
  if (launch->buffer_count > int(MAX_BUFFERS)) {
    snprintf(launch->error, 2048, "%d buffers; Metal has %zu", launch->buffer_count, MAX_BUFFERS);
    return 1;
  }
  argument_count = size_t(launch->buffer_count);
  std::vector<void*> data(launch->buffer_count);
  for (int i = 0; i < launch->buffer_count; ++i) data[i] = launch->buffers[i].data;
  arguments_of_kernel = data.data();
  if (!make_fibers()) {
    drop_fibers();
    snprintf(launch->error, 2048, "no memory for %u stacks", threads);
    return 1;
  }
  random_state = 88172645463325252ull + launch->order * 7919ull;
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(launch->flush_denormals ? saved | 0x8040 : saved);
  {
    Signals signals(launch->seconds);
    memory_begin_launch(launch->buffers, launch->buffer_count, launch->checked);
    std::vector<uint32_t> order(size_t(groups[0]) * groups[1] * groups[2]);
    arrange(order, launch->order);
    for (uint32_t index : order) {
      position[0] = index % groups[0];
      position[1] = index / groups[0] % groups[1];
      position[2] = index / (groups[0] * groups[1]);
      memory_begin_threadgroup();
      if (!run_threadgroup(launch->order)) break;
    }
  }
  _mm_setcsr(saved);
  drop_fibers();
  launch->threadgroup_bytes = threadgroup_bytes();
  uint64_t element, count;
  if (!failed && launch->checked) {
    const int i = first_unwritten(launch->may_stay_unwritten, launch->may_stay_unwritten_count, &element, &count);
    if (i >= 0) {
      snprintf(message, sizeof message, "output `%s`: %llu elements stay unwritten, the first is %llu",
               launch->buffers[i].name, static_cast<unsigned long long>(count), static_cast<unsigned long long>(element));
      failed = true;
    }
  }
  memcpy(launch->error, message, sizeof message);
  launch->error_pc = message_pc ? uint64_t(static_cast<char*>(message_pc) - __ehdr_start) : 0;
  launch->error_line = message_line;
  return failed;
}
