// The scheduler of the CPU device (see simt_machine.hpp), compiled once per library, never instrumented: sanitizers watch the kernels, and
// this file tells them about fibers (SIMT_ASAN, SIMT_TSAN).
#include "simt_machine.hpp"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

// ------------------------------------------------------------------------------------------------------------------ sanitizers

#if defined(SIMT_ASAN)
extern "C" {
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
}
#else
static void __asan_poison_memory_region(const volatile void*, size_t) {}
static void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif

#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned flags);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
// Two teams of fibers take turns, each with shared memory of its own and unknown to the other: so a block is in no order with its neighbours but
// the one that the kernel makes. A team per block would be ten times slower.
static constexpr int TEAMS = 2;
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static constexpr int TEAMS = 1;
#endif

namespace simt {

thread_local Thread* self;
thread_local Block* here;

Options& options() {
  static Options o;
  return o;
}

// ------------------------------------------------------------------------------------------------------------------ fibers

#if defined(SIMT_UCONTEXT)
struct Context {
  ucontext_t u;
};
static void swap(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
static void prepare(Context& c, char* bottom, size_t size, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = bottom;
  c.u.uc_stack.ss_size = size;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
}
#else
// Swaps the registers that a function must preserve; swapcontext would also make a system call for the signal mask, 20 times slower.
struct Context {
  void* sp;
};
extern "C" void simt_swap(void** from, void* to);
__asm__(
    ".text\n.hidden simt_swap\n.globl simt_swap\n.type simt_swap, @function\nsimt_swap:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n.size simt_swap, .-simt_swap\n");
static void swap(Context& from, Context& to) { simt_swap(&from.sp, to.sp); }
static void prepare(Context& c, char* bottom, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(bottom) + size) & ~uintptr_t{15});
  // At its entry a function finds the stack pointer at 16n + 8, as after a call.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
  c.sp = top;
}
#endif

struct Fiber : Thread {
  Context regs;
  char* stack;       // above its guard page
  size_t stack_size;
  void* fake = nullptr;       // ASan's state of the stack
  void* tsan = nullptr;
  int ignoring = 0;
};

// ------------------------------------------------------------------------------------------------------------------ a launch

struct Launch {
  const char* kernel;
  Site site;
  dim3 grid, block;
  size_t dynamic;
  void (*body)(const void*);
  const void* data;
  Options options;
  size_t page;
  std::atomic<bool> failed{false};
  std::mutex mutex{};
  std::string message{};
  Stats stats{};
  char order{};  // TSan's object for the ends of all blocks
};

// NaN in every type of float, for whoever reads what nobody has written. No access of any thread, so TSan must not see it as one.
static void poison(char* p, size_t bytes) {
#if defined(SIMT_TSAN)
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  memset(p, 0xff, bytes);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#else
  memset(p, 0xff, bytes);
#endif
}

struct Array {
  const void* tag;
  size_t offset, bytes;
};

static constexpr size_t REDZONE = 256;  // between arrays in shared memory

// The fibers of one block, which run one block after another.
struct Team {
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  char* arena = nullptr;        // shared memory
  // TSan's objects: from block to block, barriers and __syncwarp by turns
  char order, phases[2];
  std::vector<char> warp_phases;
};

struct Worker : Block {
  Launch& launch;
  int threads, warps;
  Team teams[TEAMS];
  Team* team = nullptr;
  std::vector<uint32_t> ready;  // per warp
  std::mt19937 random;
  size_t stride = 0;            // from stack to stack
  char* arena = nullptr;        // of the team at work
  size_t used = 0;              // bytes of shared memory of this block
  std::vector<Array> arrays;
  Context main;
  void *main_tsan = nullptr, *main_fake = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;

  explicit Worker(Launch& l, int number);
  ~Worker() { release(); }
  size_t room() const { return launch.options.max_shared + 64 * REDZONE; }  // bytes mapped for shared memory
  void allocate(Team& t);
  void release();
  void run(Fiber& f);
  bool run_block(unsigned index);
  bool pass();
  bool settle();
};

static thread_local Worker* worker;
static std::string last_error;
static Stats last_stats;

static std::string where(const Site& s) { return std::string(s.file) + ":" + std::to_string(s.line); }

static void park() {
  Fiber& f = static_cast<Fiber&>(*self);
  Worker& w = *worker;
  w.stats.switches++;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&f.fake, w.main_stack, w.main_stack_size);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(w.main_tsan, 1);
#endif
  swap(f.regs, w.main);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(f.fake, &w.main_stack, &w.main_stack_size);
#endif
}

static void entry() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &worker->main_stack, &worker->main_stack_size);
#endif
  for (;;) {
    Launch& l = worker->launch;
    __tsan_acquire(&worker->team->order);
    l.body(l.data);
    self->state = RETURNED;
    __tsan_release(&worker->team->order);
    __tsan_release(&l.order);
    park();
  }
}

void Worker::run(Fiber& f) {
  self = &f;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&main_fake, f.stack, f.stack_size);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(f.tsan, 1);
#endif
  swap(main, f.regs);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
  self = nullptr;
}

void fail(Site site, const char* format, ...) {
  char text[2048];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  {
    Worker& w = *worker;
    const auto triple = [](const auto& v) { return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")"; };
    std::lock_guard<std::mutex> lock(w.launch.mutex);
    if (!w.launch.failed.exchange(true))
      w.launch.message = where(site) + ": " + text + " [kernel " + w.launch.kernel + ", block " + triple(w.index) + ", thread " + triple(self->index) + "]";
  }
  while (static_cast<Fiber&>(*self).ignoring) ignore_end();
  self->state = RETURNED;
  for (;;) park();  // the scheduler sees the failure and does not come back
}

Worker::Worker(Launch& l, int number) : launch(l), random(static_cast<unsigned>(l.options.seed * 1000 + number)) {
  stats = {};
  grid = l.grid;
  block = l.block;
  threads = static_cast<int>(block.x * block.y * block.z);
  warps = (threads + 31) / 32;
  ready.resize(warps);
  stride = (l.options.stack + l.page - 1) / l.page * l.page + l.page;
#if defined(SIMT_TSAN)
  main_tsan = __tsan_get_current_fiber();
#endif
}

void Worker::allocate(Team& t) {
  // Mapped, not allocated: to TSan, free() is a write of all of it.
  const auto map = [](size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      fprintf(stderr, "simt: no memory for %zu bytes\n", bytes);
      abort();
    }
    __asan_unpoison_memory_region(p, bytes);  // what an abandoned launch left at this address
    return static_cast<char*>(p);
  };
  t.stacks = map(stride * threads);
  t.arena = map(room());
  t.fibers.resize(threads);
  t.warp_phases.resize(2 * warps);
  for (int i = 0; i < threads; i++) {
    Fiber& f = t.fibers[i];
    mprotect(t.stacks + stride * i, launch.page, PROT_NONE);  // a stack that overflows must not run into the next
    f.stack = t.stacks + stride * i + launch.page;
    f.stack_size = stride - launch.page;
    f.number = i;
    f.lane = i & 31;
    f.warp = i >> 5;
    const unsigned n = static_cast<unsigned>(i);
    f.index = {n % block.x, n / block.x % block.y, n / (block.x * block.y)};
#if defined(SIMT_TSAN)
    f.tsan = __tsan_create_fiber(0);
#endif
    prepare(f.regs, f.stack, f.stack_size, entry);
  }
}

void Worker::release() {
  for (Team& t : teams) {
    if (!t.stacks) continue;
#if defined(SIMT_TSAN)
    for (Fiber& f : t.fibers) __tsan_destroy_fiber(f.tsan);
#endif
    __asan_unpoison_memory_region(t.arena, room());
    munmap(t.arena, room());
    munmap(t.stacks, stride * threads);
    t.stacks = nullptr;
  }
}

// ------------------------------------------------------------------------------------------------------------------ the schedule

// Lets threads run, each to its next parking place, in the order of the seed. False when none can.
bool Worker::pass() {
  bool any = false;
  const int seed = launch.options.seed;
  const auto run_lane = [&](int warp, int lane) {
    ready[warp] &= ~(1u << lane);
    run(team->fibers[warp * 32 + lane]);
    return !launch.failed.load(std::memory_order_relaxed);
  };
  if (seed >= 4) {
    for (;;) {
      int busy = 0;
      for (int w = 0; w < warps; w++) busy += ready[w] != 0;
      if (!busy) return any;
      int pick = static_cast<int>(random() % busy), warp = 0;
      while (!ready[warp] || pick--) warp++;
      // one to eight lanes of that warp: a random order at every granularity
      for (int n = 1 + static_cast<int>(random() % 8); n && ready[warp]; n--) {
        int skip = static_cast<int>(random() % __builtin_popcount(ready[warp]));
        uint32_t bits = ready[warp];
        while (skip--) bits &= bits - 1;
        if (!run_lane(warp, __builtin_ctz(bits))) return false;
        any = true;
      }
    }
  }
  for (int i = 0; i < warps; i++) {
    const int warp = seed & 1 ? warps - 1 - i : i;
    do {
      for (uint32_t turn = ready[warp]; turn;) {
        const int lane = seed & 1 ? 31 - __builtin_clz(turn) : __builtin_ctz(turn);
        turn &= ~(1u << lane);
        if (!run_lane(warp, lane)) return false;
        any = true;
      }
    } while (seed >= 2 && ready[warp]);
  }
  return any;
}

static std::string name_threads(const std::vector<Fiber>& fibers, State state, int warp = -1) {
  std::string out;
  int from = -1;
  const int n = static_cast<int>(fibers.size());
  for (int i = 0; i <= n; i++) {
    const bool in = i < n && fibers[i].state == state && (warp < 0 || fibers[i].warp == warp);
    if (in && from < 0) from = i;
    if (!in && from >= 0) {
      out += (out.empty() ? "" : ", ") + std::to_string(from) + (i - 1 > from ? "-" + std::to_string(i - 1) : "");
      from = -1;
    }
  }
  return out;
}

// Nothing can run: the block has ended, or all wait at one barrier, which then opens; anything else is an error of the kernel.
bool Worker::settle() {
  std::vector<Fiber>& fibers = team->fibers;
  Fiber *at_barrier = nullptr, *in_warp = nullptr;
  int waiting = 0;
  for (Fiber& f : fibers) {
    if (f.state == IN_WARP && !in_warp) in_warp = &f;
    if (f.state != IN_BLOCK) continue;
    waiting++;
    if (!at_barrier) at_barrier = &f;
  }
  const auto error = [&](const Site& site, const std::string& text) {
    std::lock_guard<std::mutex> lock(launch.mutex);
    if (!launch.failed.exchange(true))
      launch.message = where(site) + ": " + text + " [kernel " + launch.kernel + ", block (" + std::to_string(index.x) + ", " +
                       std::to_string(index.y) + ", " + std::to_string(index.z) + ")]";
    return false;
  };
  if (in_warp) {
    char mask[16];
    snprintf(mask, sizeof mask, "0x%08x", in_warp->mask);
    std::string text = std::string(in_warp->what) + " with mask " + mask + " waits for ever in warp " + std::to_string(in_warp->warp) + ":";
    for (int lane = 0; lane < 32; lane++) {
      if (!(in_warp->mask >> lane & 1)) continue;
      const int i = in_warp->warp * 32 + lane;
      if (i >= threads) {
        text += " lane " + std::to_string(lane) + " does not exist;";
        continue;
      }
      const Fiber& f = fibers[i];
      if (f.state == RETURNED) text += " lane " + std::to_string(lane) + " has returned;";
      else if (f.state == IN_BLOCK) text += " lane " + std::to_string(lane) + " waits in " + f.what + " at " + where(f.site) + ";";
      else if (f.mask != in_warp->mask || f.site.line != in_warp->site.line || f.site.file != in_warp->site.file) {
        snprintf(mask, sizeof mask, "0x%08x", f.mask);
        text += " lane " + std::to_string(lane) + " waits in " + f.what + " with mask " + mask + " at " + where(f.site) + ";";
      }
      if (text.size() > 600) {
        text += " ...";
        break;
      }
    }
    return error(in_warp->site, text);
  }
  if (!waiting) return true;
  int votes = 0;
  for (Fiber& f : fibers) {
    if (f.state == RETURNED && launch.options.strict)
      return error(at_barrier->site, std::string(at_barrier->what) + ": threads " + name_threads(fibers, IN_BLOCK) + " wait, but threads " +
                                         name_threads(fibers, RETURNED) + " have returned from the kernel");
    if (f.state != IN_BLOCK) continue;
    if (f.site.line != at_barrier->site.line || f.site.file != at_barrier->site.file || f.site.number != at_barrier->site.number)
      return error(at_barrier->site, std::string("divergent barrier: thread ") + std::to_string(at_barrier->number) + " waits in " +
                                         at_barrier->what + " here, thread " + std::to_string(f.number) + " in " + f.what + " at " + where(f.site));
    votes += f.vote;
  }
  for (Fiber& f : fibers) {
    if (f.state != IN_BLOCK) continue;
    f.state = READY;
    f.vote = votes;
    ready[f.warp] |= 1u << f.lane;
  }
  stats.barriers++;
  return true;
}

bool Worker::run_block(unsigned n) {
  team = &teams[stats.blocks % TEAMS];
  if (!team->stacks) allocate(*team);
  arena = team->arena;
  index = {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
  stats.blocks++;
  arrays.clear();
  used = (launch.dynamic + 15) / 16 * 16;
  __asan_unpoison_memory_region(arena, room());
  poison(arena, used);
  __asan_poison_memory_region(arena + launch.dynamic, room() - launch.dynamic);
  for (Fiber& f : team->fibers) {
    f.state = READY;
    f.group = 0;
    f.phase = f.warp_phase = 0;
    f.copies.clear();
    f.landed = 0;
    f.fenced = false;
    f.seen_at = 0;
    memset(f.seen, 0, sizeof f.seen);
    ready[f.warp] |= 1u << f.lane;
  }
  for (;;) {
    while (pass()) {}
    if (launch.failed.load(std::memory_order_relaxed) || !settle()) return false;
    uint32_t any = 0;
    for (uint32_t bits : ready) any |= bits;
    if (!any) return true;
  }
}

// ------------------------------------------------------------------------------------------------------------------ what kernels call

void barrier(Site site, const char* what, int vote, int* count) {
  Fiber& f = static_cast<Fiber&>(*self);
  f.state = IN_BLOCK;
  f.site = site;
  f.what = what;
  f.vote = vote;
  f.fenced = false;
  char* order = &worker->team->phases[f.phase++ & 1];
  __tsan_release(order);
  park();
  __tsan_acquire(order);
  if (count) *count = f.vote;
}

Thread& lane_of_warp(int lane) { return worker->team->fibers[self->warp * 32 + lane]; }

bool meet(unsigned mask, const char* what, Site site, const void* in, void* out) {
  Fiber& f = static_cast<Fiber&>(*self);
  if (!(mask >> f.lane & 1)) fail(site, "%s: lane %d is not in its own mask 0x%08x", what, f.lane, mask);
  f.state = IN_WARP;
  f.mask = mask;
  f.what = what;
  f.site = site;
  f.in = in;
  f.out = out;
  bool all = true;
  for (int lane = 0; lane < 32 && all; lane++) {
    if (!(mask >> lane & 1)) continue;
    const int i = f.warp * 32 + lane;
    if (i >= worker->threads) {
      all = false;
      break;
    }
    const Fiber& o = worker->team->fibers[i];
    all = o.state == IN_WARP && o.mask == mask && o.site.line == site.line && o.site.file == site.file && o.site.number == site.number && o.what == what;
  }
  if (!all) park();
  return all;
}

void finish(unsigned mask) {
  Worker& w = *worker;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) w.team->fibers[self->warp * 32 + lane].state = READY;
  w.ready[self->warp] |= mask & ~(1u << self->lane);  // the caller runs on
}

void sync_warp(unsigned mask, Site site) {
  Worker& w = *worker;
  char* order = &w.team->warp_phases[2 * self->warp + (self->warp_phase++ & 1)];
  __tsan_release(order);
  w.stats.collectives++;
  if (meet(mask, "__syncwarp", site, nullptr, nullptr)) finish(mask);
  __tsan_acquire(order);
}

void* dynamic_shared() { return worker->arena; }

void* shared_array(const void* tag, size_t bytes, const char* name, Site site) {
  Worker& w = *worker;
  for (const Array& a : w.arrays)
    if (a.tag == tag) return w.arena + a.offset;
  const size_t offset = (w.used + REDZONE + 127) / 128 * 128;
  size_t sum = w.launch.dynamic + bytes;
  for (const Array& a : w.arrays) sum += a.bytes;
  if (sum > static_cast<size_t>(w.launch.options.max_shared) || offset + bytes > w.room())
    fail(site, "shared array %s: %zu bytes of shared memory in all, the device has %d", name, sum, w.launch.options.max_shared);
  w.arrays.push_back({tag, offset, bytes});
  w.used = offset + bytes;
  __asan_unpoison_memory_region(w.arena + offset, bytes);
  poison(w.arena + offset, bytes);
  return w.arena + offset;
}

static bool inside(const char* p, size_t bytes) {
  const Worker& w = *worker;
  if (p >= w.arena && p + bytes <= w.arena + w.launch.dynamic) return true;
  for (const Array& a : w.arrays)
    if (p >= w.arena + a.offset && p + bytes <= w.arena + a.offset + a.bytes) return true;
  return false;
}

void check_shared(const void* p, size_t bytes, size_t align, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % align) fail(site, "%s: the address in shared memory is not a multiple of %zu", what, align);
  if (!inside(static_cast<const char*>(p), bytes)) fail(site, "%s: %zu bytes that are not all in the block's shared memory", what, bytes);
}

void check_global(const void* p, size_t align, const char* what, Site site) {
  const char* c = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % align) fail(site, "%s: the address in global memory is not a multiple of %zu", what, align);
  if (c >= worker->arena && c < worker->arena + worker->launch.options.max_shared) fail(site, "%s: an address in shared memory where one in global memory is wanted", what);
}

void push_copy(const Copy& c) {
  ignore_begin();
  self->copies.push_back(c);
  self->copies.back().group = self->group;
  ignore_end();
}

void commit_group() { self->group++; }

bool pop_copy(int young, Copy& out) {
  std::vector<Copy>& copies = self->copies;
  if (self->landed == copies.size() || copies[self->landed].group >= self->group - young) return false;
  out = copies[self->landed++];
  if (self->landed == copies.size()) {
    copies.clear();
    self->landed = 0;
  }
  return true;
}

// What an atomic publishes and sees, for TSan: everything before a fence that is before it, and everything that fenced atomics on the same word have
// published once a fence comes after it. A barrier ends the effect of a fence, since what it lets others write is behind the fence.
static char* cell_of(const void* p) {
  static char cells[4096];
  return &cells[reinterpret_cast<uintptr_t>(p) / 4 * 2654435761u % sizeof cells];
}

void fence() {
  self->fenced = true;
  for (const void* p : self->seen)
    if (p) __tsan_acquire(cell_of(p));
}

void before_atomic(const void* p) {
  if (self->fenced) __tsan_release(cell_of(p));
}

void after_atomic(const void* p) {
  for (const void* old : self->seen)
    if (old == p) return;
  self->seen[self->seen_at++ % 4] = p;
}

void ignore_begin() {
#if defined(SIMT_TSAN)
  static_cast<Fiber&>(*self).ignoring++;
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}

void ignore_end() {
#if defined(SIMT_TSAN)
  static_cast<Fiber&>(*self).ignoring--;
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

void count(uint64_t Stats::* counter) { here->stats.*counter += 1; }

// ldmatrix fetches eight rows of 16 bytes a phase: free of conflicts if they lie in eight different sixteenths of 128 bytes.
void count_conflicts(const uintptr_t* rows, int n) {
  int most = 1;
  for (int i = 0; i < n; i++) {
    int same = 1;
    for (int j = 0; j < i; j++) {
      if (rows[i] == rows[j]) {
        same = 0;  // the same row twice is one fetch
        break;
      }
      same += rows[i] % 128 == rows[j] % 128;
    }
    most = std::max(most, same);
  }
  here->stats.ldmatrix_phases++;
  here->stats.ldmatrix_conflicts += static_cast<uint64_t>(most - 1);
}

// ------------------------------------------------------------------------------------------------------------------ launching

static void add(Stats& sum, const Stats& s) {
  uint64_t* to = reinterpret_cast<uint64_t*>(&sum);
  const uint64_t* from = reinterpret_cast<const uint64_t*>(&s);
  for (size_t i = 0; i < sizeof(Stats) / 8; i++) to[i] += from[i];
}

static void work(Launch& l, int number) {
  Worker w(l, number);
  worker = &w;
  here = &w;
  const uint64_t blocks = static_cast<uint64_t>(l.grid.x) * l.grid.y * l.grid.z;
  for (uint64_t i = number; i < blocks && !l.failed.load(); i += l.options.workers) {
    // odd seeds also take the blocks backwards
    if (!w.run_block(static_cast<unsigned>(l.options.seed & 1 ? blocks - 1 - i : i))) break;
  }
  __tsan_acquire(&l.order);
  w.release();
  std::lock_guard<std::mutex> lock(l.mutex);
  add(l.stats, w.stats);
  worker = nullptr;
  here = nullptr;
}

// Codes of cudaError_t, so that a host function sees what it would see of CUDA.
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONFIGURATION = 9, LAUNCH_FAILURE = 719 };

// What simt_take_record hands out: for each launch the kernel's address, grid, block, bytes of shared memory, the number of arguments, and each
// with its size before it; all numbers of 64 bits.
static std::string records;

static void write_record(const void* function, dim3 grid, dim3 block, size_t bytes, const Argument* args, size_t count) {
  const auto put = [](uint64_t v) { records.append(reinterpret_cast<const char*>(&v), 8); };
  for (const uint64_t v : {static_cast<uint64_t>(reinterpret_cast<uintptr_t>(function)), uint64_t{grid.x}, uint64_t{grid.y}, uint64_t{grid.z}, uint64_t{block.x},
                           uint64_t{block.y}, uint64_t{block.z}, uint64_t{bytes}, uint64_t{count}})
    put(v);
  for (size_t i = 0; i < count; i++) {
    put(args[i].bytes);
    records.append(static_cast<const char*>(args[i].data), args[i].bytes);
  }
}

int launch_blocks(const char* kernel, Site site, dim3 grid, dim3 block, size_t bytes, void (*body)(const void*), const void* data, const void* function,
                  const Argument* args, size_t count) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (!threads || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    last_error = where(site) + ": grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ") of blocks (" +
                 std::to_string(block.x) + ", " + std::to_string(block.y) + ", " + std::to_string(block.z) + ") cannot be launched [kernel " + kernel + "]";
    return INVALID_CONFIGURATION;
  }
  if (bytes > static_cast<size_t>(options().max_shared)) {
    last_error = where(site) + ": " + std::to_string(bytes) + " bytes of dynamic shared memory, the device has " +
                 std::to_string(options().max_shared) + " [kernel " + kernel + "]";
    return INVALID_VALUE;
  }
  if (options().record) {
    write_record(function, grid, block, bytes, args, count);
    return SUCCESS;
  }
  Launch l{kernel, site, grid, block, bytes, body, data, options(), static_cast<size_t>(sysconf(_SC_PAGESIZE))};
  if (l.options.workers <= 1) {
    l.options.workers = 1;
    work(l, 0);
  } else {
    std::vector<std::thread> pool;
    for (int i = 0; i < l.options.workers; i++) pool.emplace_back([&l, i] { work(l, i); });
    for (std::thread& t : pool) t.join();
  }
  add(last_stats, l.stats);
  if (!l.failed) return SUCCESS;
  last_error = l.message;
  return LAUNCH_FAILURE;
}

}  // namespace simt

// ------------------------------------------------------------------------------------------------------------------ for the caller

extern "C" {

void simt_configure(int seed, int lazy, int workers, int strict, int max_shared, int record) {
  simt::Options& o = simt::options();
  o.seed = seed;
  o.lazy = lazy;
  o.workers = workers;
  o.strict = strict;
  o.max_shared = max_shared;
  o.record = record;
}

// The message of the last launch that failed, and forgets it.
const char* simt_take_error() {
  static std::string taken;
  taken.swap(simt::last_error);
  simt::last_error.clear();
  return taken.c_str();
}

// The launches since the last call; `size` gets the length.
const char* simt_take_record(size_t* size) {
  static std::string taken;
  taken.swap(simt::records);
  simt::records.clear();
  *size = taken.size();
  return taken.data();
}

#if defined(SIMT_GCOV)
void __gcov_dump();
void simt_dump_coverage() { __gcov_dump(); }
#endif

// Counters of all launches since the last call.
void simt_take_stats(uint64_t* out) {
  memcpy(out, &simt::last_stats, sizeof(simt::Stats));
  simt::last_stats = {};
}
}
