// A small persistent thread pool. No OpenMP: a second runtime beside torch's would compete with it for the cores.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace mxq {

// How many of `threads` are worth waking (a few microseconds each) for so many multiply-adds.
static inline int useful_threads(int64_t work, int threads) {
  constexpr int64_t WORK_PER_THREAD = 100000;
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, work / WORK_PER_THREAD)));
}

// Calls fn(context, item, worker) for each item in 0 .. items-1, on at most `threads` threads, the caller among them (worker 0).
// worker < threads. Each worker has a share of neighbouring items and takes them in ascending order, so that it goes through memory as one
// stream; who is done early takes items from the end of another share, so that a thread that lost its core holds up one item. fn must not throw.
// Safe from several threads (a call that finds the pool busy runs on its caller alone) and after fork (the child gets a pool of its own).
void parallel_for(int64_t items, int threads, void (*fn)(void* context, int64_t item, int worker), void* context);

template <class F>
void parallel_for(int64_t items, int threads, F&& f) {
  parallel_for(items, threads, [](void* c, int64_t item, int worker) { (*static_cast<F*>(c))(item, worker); }, &f);
}

}  // namespace mxq
