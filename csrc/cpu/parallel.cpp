#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace mxq {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How often an idle worker looks for a new job before it sleeps: some 20 to 50 us, the gap between two layers of a model.
constexpr int SPINS = 2000;

// The items that one worker has not begun: first in the upper half, end in the lower one.
struct alignas(64) Share {
  std::atomic<uint64_t> range{0};

  void set(uint64_t first, uint64_t end) { range.store(first << 32 | end, std::memory_order_relaxed); }
  uint32_t left() const {
    const uint64_t r = range.load(std::memory_order_relaxed);
    return uint32_t(r) - uint32_t(r >> 32);
  }
  // Takes the first item (its owner does, to go through memory in order) or the last one; -1 if there is none.
  int64_t take(bool first) {
    uint64_t r = range.load(std::memory_order_relaxed);
    do {
      if (uint32_t(r >> 32) == uint32_t(r)) return -1;
    } while (!range.compare_exchange_weak(r, first ? r + (uint64_t(1) << 32) : r - 1, std::memory_order_relaxed));
    return first ? int64_t(r >> 32) : int64_t(uint32_t(r)) - 1;
  }
};

struct Pool {
  std::mutex busy;  // held by the thread whose job is running

  // The job. A worker may read it only while it is counted in `joined`, and the caller does not return before that count is 0 again.
  void (*fn)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  int limit = 0;               // workers that may join
  std::deque<Share> shares;    // of the caller and of each of them

  // Bit 31 is set while a job is open; below it, the number of workers that joined. One word, so that joining and closing exclude each other.
  static constexpr uint32_t OPEN = 1u << 31;
  std::atomic<uint32_t> state{0};
  std::atomic<uint32_t> serial{0};  // of the job

  std::mutex sleep;
  std::condition_variable wake;
  int sleepers = 0;  // under `sleep`
  int workers = 0;   // started so far; under `busy`

  // One's own share first, in order; then the last items of whoever has most left, also of those who never came.
  void work(int worker) {
    for (int64_t i; (i = shares[size_t(worker)].take(true)) >= 0;) fn(context, i, worker);
    for (;;) {
      Share* most = nullptr;
      uint32_t left = 0;
      for (int w = 0; w <= limit; w++)
        if (const uint32_t l = shares[size_t(w)].left(); l > left) most = &shares[size_t(w)], left = l;
      if (!most) return;
      if (const int64_t i = most->take(false); i >= 0) fn(context, i, worker);
    }
  }

  void run_worker(int worker) {
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (serial.load(std::memory_order_acquire) == seen) {
        if (++spins < SPINS) {
          relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep);
        sleepers++;
        wake.wait(lock, [&] { return serial.load(std::memory_order_acquire) != seen; });
        sleepers--;
      }
      seen = serial.load(std::memory_order_acquire);
      uint32_t s = state.load(std::memory_order_acquire);
      bool in = false;
      while ((s & OPEN) && !(in = state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel))) {
      }
      if (!in) continue;
      if (worker <= limit) work(worker);
      state.fetch_sub(1, std::memory_order_release);
    }
  }

  void run(int64_t n, int threads, void (*f)(void*, int64_t, int), void* c) {
    try {
      for (; workers < threads - 1; workers++) std::thread([this, w = workers + 1] { run_worker(w); }).detach();
    } catch (const std::system_error&) {
      // The system refuses more threads: those that run share the work, and the caller always takes part.
    }
    fn = f, context = c, limit = threads - 1;
    while (shares.size() < size_t(threads)) shares.emplace_back();
    for (int64_t w = 0; w < threads; w++) shares[size_t(w)].set(uint64_t(n * w / threads), uint64_t(n * (w + 1) / threads));
    state.store(OPEN, std::memory_order_release);
    bool asleep;
    {
      std::lock_guard<std::mutex> lock(sleep);
      serial.fetch_add(1, std::memory_order_release);
      asleep = sleepers > 0;
    }
    if (asleep) wake.notify_all();
    work(0);
    state.fetch_and(~OPEN, std::memory_order_acq_rel);  // who has not come by now is not needed
    for (int spins = 0; state.load(std::memory_order_acquire); spins++) spins < SPINS ? relax() : (void)sched_yield();
  }
};

// Never destroyed: at exit its threads may still sleep in it. In a forked child the threads do not exist, hence a new pool.
Pool* pool = nullptr;
std::once_flag once;

}  // namespace

void parallel_for(int64_t items, int threads, void (*fn)(void*, int64_t, int), void* context) {
  if (threads > items) threads = static_cast<int>(items);
  if (threads > 1) {
    std::call_once(once, [] {
      pool = new Pool;
      pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    });
    std::unique_lock<std::mutex> lock(pool->busy, std::try_to_lock);
    if (lock.owns_lock()) return pool->run(items, threads, fn, context);
  }
  for (int64_t i = 0; i < items; i++) fn(context, i, 0);
}

}  // namespace mxq
