// A CUDA device in a CPU process, for tests: what csrc/cuda/simt.hpp includes when g++ compiles a kernel. docs/cuda-testing.md is its manual.
//
// A CUDA thread is a fiber. A block runs its fibers on one OS thread; barriers, shuffles and other operations of a warp park a fiber until the
// others have come. This file has what kernels use; simt_machine.cpp has the scheduler.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

// ------------------------------------------------------------------------------------------------------------------ vector types

#define SIMT_VECTOR2(T, name, bytes) \
  struct alignas(bytes) name { T x, y; }; \
  static inline name make_##name(T x, T y) { return {x, y}; }
#define SIMT_VECTOR4(T, name, bytes) \
  struct alignas(bytes) name { T x, y, z, w; }; \
  static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR2(int, int2, 8)
SIMT_VECTOR2(unsigned, uint2, 8)
SIMT_VECTOR2(float, float2, 8)
SIMT_VECTOR2(unsigned short, ushort2, 4)
SIMT_VECTOR4(int, int4, 16)
SIMT_VECTOR4(unsigned, uint4, 16)
SIMT_VECTOR4(float, float4, 16)
SIMT_VECTOR4(unsigned short, ushort4, 8)
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// ------------------------------------------------------------------------------------------------------------------ the machine

// A place in the kernel's source. `number` tells two on one line apart where the preprocessor can.
struct Site {
  const char* file;
  int line, number;
};
#define MXQ_SITE_HERE (simt::Site{__FILE__, __LINE__, __COUNTER__})

struct Options {
  int seed = 0;           // order of the threads: 0, 1 lock step up and down; 2, 3 one warp as far as it gets, up and down; 4.. random
  int lazy = 1;           // cp.async lands at the last legal moment; 0: at once
  int workers = 1;        // OS threads that share the blocks
  int strict = 1;         // a thread that has returned must not be missing in a later barrier
  int max_shared = 232448;  // bytes of shared memory that one block can have (227 KiB, the most of any device)
  int record = 0;         // launches are written down for another executor, not run
  int stack = 65536;      // bytes of a fiber's stack
};

struct Stats {
  uint64_t blocks, switches, barriers, collectives, mma, ldmatrix_phases, ldmatrix_conflicts, cp_async;  // in the order of COUNTERS in library.py
};

struct Copy {
  void* to;
  const void* from;
  int bytes, take;
  int group = 0;
};

enum State { READY, IN_WARP, IN_BLOCK, RETURNED };

struct Thread {
  uint3 index;
  int number, lane, warp;
  State state;
  // what a parked thread waits for
  unsigned mask;
  const char* what;
  Site site;
  const void* in;
  void* out;
  int vote;
  // cp.async: the queue, how many of it have landed, the group that is open
  std::vector<Copy> copies;
  size_t landed;
  int group;
  unsigned phase, warp_phase;
  // the order of atomics
  bool fenced;
  const void* seen[4];
  unsigned seen_at;
  void* context;
};

// What threads of a block share.
struct Block {
  dim3 grid, block;
  uint3 index;
  Stats stats;
};

extern thread_local Thread* self;
extern thread_local Block* here;
Options& options();

// Ends the launch: the message, with kernel, block and thread, is what the caller of the library gets to see.
[[noreturn]] void fail(Site, const char* format, ...) __attribute__((format(printf, 2, 3)));

void barrier(Site, const char* what, int vote, int* count);
// True for the last lane to come, which then computes for all and calls finish(); all others return after that.
bool meet(unsigned mask, const char* what, Site, const void* in, void* out);
void finish(unsigned mask);
Thread& lane_of_warp(int lane);
void sync_warp(unsigned mask, Site);
void* shared_array(const void* tag, size_t bytes, const char* name, Site);
void* dynamic_shared();
void check_shared(const void* p, size_t bytes, size_t align, const char* what, Site);
void check_global(const void* p, size_t align, const char* what, Site);
// The queue of cp.async; here since the same memory serves one block after another, which sanitizers must not see.
void push_copy(const Copy&);
void commit_group();
bool pop_copy(int young, Copy&);  // the oldest of a group that the wait for all but `young` groups asks for
void fence();
void before_atomic(const void* p);
void after_atomic(const void* p);
void ignore_begin();
void ignore_end();
void count(uint64_t Stats::* counter);  // not inlined: the threads of a block share the counters, and sanitizers must not see that
void count_conflicts(const uintptr_t* rows, int n);
// An argument of a launch as its bytes.
struct Argument {
  const void* data;
  size_t bytes;
};
int launch_blocks(const char* kernel, Site, dim3 grid, dim3 block, size_t bytes, void (*body)(const void*), const void* data, const void* function,
                  const Argument* args, size_t count);

// combine(Lanes) sees in(lane) and out(lane) of every lane of the mask at once.
template <class I, class O>
struct Lanes {
  unsigned mask;
  bool has(int lane) const { return mask >> lane & 1; }
  const I& in(int lane) const { return *static_cast<const I*>(lane_of_warp(lane).in); }
  O& out(int lane) const { return *static_cast<O*>(lane_of_warp(lane).out); }
};

template <class I, class O, class F>
inline void collective(unsigned mask, const char* what, Site site, const I& in, O& out, F&& combine) {
  count(&Stats::collectives);
  if (!meet(mask, what, site, &in, &out)) return;
  ignore_begin();  // lanes read each other's arguments here: that is the operation itself, not a race
  combine(Lanes<I, O>{mask});
  ignore_end();
  finish(mask);
}

// ------------------------------------------------------------------------------------------------------------------ shuffles, votes

template <class T>
struct Offer {
  T value;
  int source;
};

template <class T>
inline T shuffle(const char* what, unsigned mask, T value, int source, Site site) {
  T out{};
  collective(mask, what, site, Offer<T>{value, source}, out, [&](auto lanes) {
    for (int i = 0; i < 32; i++) {
      if (!lanes.has(i)) continue;
      const int from = lanes.in(i).source;
      if (!lanes.has(from)) fail(site, "%s: lane %d reads lane %d, which is not in the mask 0x%08x", what, i, from, mask);
      lanes.out(i) = lanes.in(from).value;
    }
  });
  return out;
}

inline unsigned vote(const char* what, unsigned mask, bool flag, Site site) {
  unsigned out = 0;
  collective(mask, what, site, flag, out, [&](auto lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++) all |= lanes.has(i) && lanes.in(i) ? 1u << i : 0;
    for (int i = 0; i < 32; i++) if (lanes.has(i)) lanes.out(i) = all;
  });
  return out;
}

// ------------------------------------------------------------------------------------------------------------------ launch

template <class... P, class... A>
inline int launch(const char* name, Site site, void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes, void* /*stream*/, const A&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(static_cast<P>(args)...)};
  const auto body = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.args);
  };
  return std::apply([&](const P&... p) {
    const Argument list[] = {{&p, sizeof(P)}..., {nullptr, 0}};
    return launch_blocks(name, site, grid, block, bytes, body, &call, reinterpret_cast<const void*>(kernel), list, sizeof...(P));
  }, call.args);
}

}  // namespace simt

// ------------------------------------------------------------------------------------------------------------------ CUDA's language

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ SIMT_shared_memory_is_declared_by_MXQ_SHARED_or_MXQ_DYN_SMEM
#define threadIdx (simt::self->index)
#define blockIdx (simt::here->index)
#define blockDim (simt::here->block)
#define gridDim (simt::here->grid)
static constexpr int warpSize = 32;

#define SIMT_SITE const char* file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE (simt::Site{file, line, 0})

#define __syncthreads() simt::barrier(MXQ_SITE_HERE, "__syncthreads", 0, nullptr)
#define __syncthreads_count(flag) simt::sync_count(MXQ_SITE_HERE, flag)
#define __syncthreads_or(flag) (simt::sync_count(MXQ_SITE_HERE, flag) != 0)
#define __syncthreads_and(flag) (simt::sync_count(MXQ_SITE_HERE, !(flag)) == 0)
namespace simt {
inline int sync_count(Site site, int flag) {
  int count = 0;
  barrier(site, "__syncthreads_count", flag != 0, &count);
  return count;
}
}  // namespace simt
static inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { simt::sync_warp(mask, SIMT_HERE); }

// As PTX defines shfl: `lane` falls back to itself when the source lies outside of its segment.
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const int lane = simt::self->lane, start = lane & ~(width - 1);
  return simt::shuffle("__shfl_sync", mask, value, start | (source & (width - 1)), SIMT_HERE);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_SITE) {
  const int lane = simt::self->lane, source = lane ^ bits;
  return simt::shuffle("__shfl_xor_sync", mask, value, source <= (lane | (width - 1)) ? source : lane, SIMT_HERE);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = simt::self->lane, source = lane - static_cast<int>(delta);
  return simt::shuffle("__shfl_up_sync", mask, value, source >= (lane & ~(width - 1)) ? source : lane, SIMT_HERE);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = simt::self->lane, source = lane + static_cast<int>(delta);
  return simt::shuffle("__shfl_down_sync", mask, value, source <= (lane | (width - 1)) ? source : lane, SIMT_HERE);
}
static inline unsigned __ballot_sync(unsigned mask, int flag, SIMT_SITE) { return simt::vote("__ballot_sync", mask, flag != 0, SIMT_HERE); }
static inline int __any_sync(unsigned mask, int flag, SIMT_SITE) { return simt::vote("__any_sync", mask, flag != 0, SIMT_HERE) != 0; }
static inline int __all_sync(unsigned mask, int flag, SIMT_SITE) { return simt::vote("__all_sync", mask, flag == 0, SIMT_HERE) == 0; }

// Atomics order nothing but themselves: what is written before them is seen by others only by way of __threadfence on both sides.
namespace simt {
template <class T, class F>
inline T atomic(T* p, F&& change) {
  using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  before_atomic(p);
  U* word = reinterpret_cast<U*>(p);
  U seen = __atomic_load_n(word, __ATOMIC_RELAXED), next;
  T old;
  do {
    memcpy(&old, &seen, sizeof(T));
    const T now = change(old);
    memcpy(&next, &now, sizeof(T));
  } while (!__atomic_compare_exchange_n(word, &seen, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  after_atomic(p);
  return old;
}
}  // namespace simt
template <class T>
static inline T atomicAdd(T* p, std::common_type_t<T> value) { return simt::atomic(p, [&](T old) { return static_cast<T>(old + value); }); }
template <class T>
static inline T atomicExch(T* p, std::common_type_t<T> value) { return simt::atomic(p, [&](T) { return value; }); }
template <class T>
static inline T atomicOr(T* p, std::common_type_t<T> value) { return simt::atomic(p, [&](T old) { return old | value; }); }
template <class T>
static inline T atomicMax(T* p, std::common_type_t<T> value) { return simt::atomic(p, [&](T old) { return old < value ? value : old; }); }
template <class T>
static inline T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return simt::atomic(p, [&](T old) { return old == expected ? value : old; });
}
// Wraps to 0 behind `last`: a ticket that resets itself.
static inline unsigned atomicInc(unsigned* p, unsigned last) { return simt::atomic(p, [&](unsigned old) { return old >= last ? 0 : old + 1; }); }
static inline void __threadfence() { simt::fence(); }
static inline void __threadfence_block() { simt::fence(); }

// Intrinsics. Approximate ones (__expf, rsqrtf ...) are exact to float here: compare with a tolerance.
template <class T>
static inline T __ldg(const T* p, SIMT_SITE) {
  simt::check_global(p, alignof(T), "__ldg", SIMT_HERE);
  return *p;
}
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
static inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fdividef(float a, float b) { return a / b; }
#define __expf(a) expf(a)  // the C library has functions of these names
#define __logf(a) logf(a)
static inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
static inline int __popc(unsigned u) { return __builtin_popcount(u); }
static inline int __clz(int u) { return u ? __builtin_clz(static_cast<unsigned>(u)) : 32; }
static inline int __ffs(int u) { return __builtin_ffs(u); }
static inline unsigned __brev(unsigned u) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (u >> i & 1) << (31 - i);
  return r;
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31));
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) << (shift & 31) >> 32);
}
// Saturating, NaN to 0, as cvt does; C++ leaves both open.
static inline int __float2int_rn(float f) {
  if (f != f) return 0;
  const float r = nearbyintf(f);
  return r >= 0x1p31f ? INT32_MAX : r < -0x1p31f ? INT32_MIN : static_cast<int>(r);
}
static inline unsigned __float2uint_rn(float f) {
  const float r = nearbyintf(f);
  return !(r > 0) ? 0 : r >= 0x1p32f ? UINT32_MAX : static_cast<unsigned>(r);
}
static inline float __int2float_rn(int i) { return static_cast<float>(i); }
static inline float __uint2float_rn(unsigned i) { return static_cast<float>(i); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
template <class T>
static inline T min(T a, T b) { return a < b ? a : b; }
template <class T>
static inline T max(T a, T b) { return a < b ? b : a; }
static inline float min(float a, float b) { return fminf(a, b); }  // of a number and a NaN: the number
static inline float max(float a, float b) { return fmaxf(a, b); }
