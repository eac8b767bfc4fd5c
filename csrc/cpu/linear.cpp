// The driver of the linear kernels: scratch, passes over at most MAX_ROWS rows, and the split into chunks for the threads.
#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "driver.h"
#include "parallel.h"
#include "targets.h"

namespace mxq {
namespace {

// Memory of one calling thread, kept between calls because malloc and page faults would cost more than a small layer.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* get(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_t(round_up(floats * 4, 4096))));
      if (!data_) throw std::bad_alloc();
      size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};
thread_local Scratch scratch;

// Multiply-adds below which a thread more costs as much as it brings (waking one takes a few microseconds).
constexpr int64_t WORK_PER_THREAD = 100000;


}  // namespace

bool uses_gemm(int64_t m) { return m > GEMV_ROWS; }

void linear(const uint8_t* blob, const void* x, int64_t ldx, int type, int64_t m, void* y, const void* bias, int bias_type, int threads) {
  const Header& h = header(blob);
  const Target& target = current_target();
  const bool gemm = uses_gemm(m);
  const int64_t block = gemm ? target.gemm_block : target.gemv_block;
  const int64_t size = type == F32 ? 4 : 2;

  const int64_t pass = ceil_div(m, ceil_div(m, MAX_ROWS));  // nearly equal passes: a last one of a few rows would cost a whole one
  const int64_t work = int64_t(h.n) * h.k * std::min<int64_t>(pass, 1 << 20);
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, work / WORK_PER_THREAD)));
  const int64_t per_worker = gemm ? round_up(target.gemm_scratch(pass), 16) : 0;
  const int64_t slots = round_up(pass * int64_t(h.slot_floats), 16), sums = round_up(pass * int64_t(h.slot_sums), 16);
  float* memory = scratch.get(slots + sums + per_worker * threads);

  // gemv chunks: small enough to balance threads, large enough for a stream of memory; one chunk per band when alone.
  const int64_t step = gemm ? target.gemm_tiles : threads == 1 ? int64_t(h.tiles) : std::max<int64_t>(1, std::min<int64_t>(8, h.tiles / (4 * threads)));
  int64_t chunks = 0;
  const Band* bands = at<Band>(blob, h.off_bands);
  for (uint32_t i = 0; i < h.bands; i++) chunks += ceil_div(tiles(bands[i].r1 - bands[i].r0), std::max<int64_t>(step, 1));

  for (int64_t m0 = 0; m0 < m; m0 += pass) {
    Job job{blob, static_cast<const char*>(x) + m0 * ldx * size, ldx, type, static_cast<char*>(y) + m0 * h.n * size, bias, bias_type,
            std::min(pass, m - m0), 0, gemm, memory, memory + slots};
    job.blocks = ceil_div(job.m, block);
    if (job.blocks == 1 || threads == 1) {
      for (int64_t b = 0; b < job.blocks; b++) target.prepare(job, b);
    } else {
      parallel_for(job.blocks, threads, [&](int64_t b, int) { target.prepare(job, b); });
    }
    parallel_for(chunks, threads, [&](int64_t i, int worker) {
      const Band* band = bands;
      for (; i >= ceil_div(tiles(band->r1 - band->r0), step); band++) i -= ceil_div(tiles(band->r1 - band->r0), step);
      const int64_t end = band->first_tile + tiles(band->r1 - band->r0), tile0 = band->first_tile + i * step;
      (gemm ? target.gemm : target.gemv)(job, tile0, std::min(tile0 + step, end), memory + slots + sums + per_worker * worker);
    });
  }
}

}  // namespace mxq
