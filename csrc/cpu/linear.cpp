// The driver of the linear kernels: scratch, passes over at most MAX_ROWS rows, and the split into chunks for the threads.
#include "linear_split.h"

#include "driver.h"
#include "parallel.h"
#include "scratch.h"
#include "targets.h"

namespace mxq {
namespace {

thread_local Scratch scratch;

// Asks for the first codes and scales of a weight, so that they come while x is being prepared: a small layer is half over before a stream runs.
void fetch_first(const uint8_t* blob) {
  constexpr uint64_t FIRST = 16384;
  const Header& h = header(blob);
  const Band* band = at<Band>(blob, h.off_bands);
  for (uint32_t i = 0; h.bands && i < band->pieces; i++) {
    const Piece& p = at<Piece>(blob, h.off_pieces)[band->first_piece + i];
    const uint64_t bytes = std::min<uint64_t>(FIRST, uint64_t(column_lanes(p.format) ? band->r1 - band->r0 : tiles(band->r1 - band->r0)) * p.code_step);
    for (uint64_t at = 0; at < bytes; at += 64) __builtin_prefetch(blob + p.codes + at);
    for (uint64_t at = 0; at < p.scale_step; at += 64) __builtin_prefetch(blob + p.scales + at);
  }
}

}  // namespace

bool uses_gemm(const uint8_t* blob, int64_t m, bool a8) { return uses_gemm(current_target(), blob, m, a8); }

void linear(const uint8_t* blob, const void* x, int64_t ldx, int type, int64_t m, void* y, const void* bias, int bias_type, bool a8, int threads) {
  const Header& h = header(blob);
  const Target& target = current_target();
  a8 = a8 && h.slots8;  // a weight of fp16 alone is none of the integer kernels' business
  const Blocking& blocking = a8 ? target.a8 : target.a16;
  const int64_t size = type == F32 ? 4 : 2;
  const int64_t pass = ceil_div(m, ceil_div(m, MAX_ROWS));  // nearly equal passes: a last one of a few rows would cost a whole one
  threads = useful_threads(int64_t(h.n) * h.k * pass, threads);

  Job job{};
  job.blob = blob, job.ldx = ldx, job.type = type, job.bias = bias, job.bias_type = bias_type, job.m = pass, job.gemm = uses_gemm(target, blob, m, a8), job.a8 = a8;
  const InputSizes inputs(h, pass, a8, target.signs_apart);
  const int64_t per_worker = aligned(target.scratch_floats(job));
  float* const memory = scratch.get(inputs.total() + per_worker * threads);
  inputs.place(job, memory);
  float* const workers = memory + inputs.total();

  // One chunk per band when alone.
  const int64_t step = job.gemm ? blocking.gemm_tiles : threads == 1 ? int64_t(h.tiles) : gemv_step(h, h.tiles, threads), chunks = count_chunks(blob, step);

  if (!job.gemm) fetch_first(blob);
  for (int64_t m0 = 0; m0 < m; m0 += pass) {
    job.x = static_cast<const char*>(x) + m0 * ldx * size, job.y = static_cast<char*>(y) + m0 * h.n * size;
    job.m = std::min(pass, m - m0);
    job.blocks = ceil_div(job.m, job.gemm ? blocking.gemm_block : blocking.gemv_block);
    if (job.blocks == 1 || threads == 1) {
      for (int64_t b = 0; b < job.blocks; b++) target.prepare(job, b);
    } else {
      parallel_for(job.blocks, threads, [&](int64_t b, int) { target.prepare(job, b); });
    }
    parallel_for(chunks, threads, [&](int64_t i, int worker) {
      const TileRange r = chunk_tiles(blob, step, i);
      (job.gemm ? target.gemm : target.gemv)(job, r.begin, r.end, workers + per_worker * worker);
    });
  }
}

}  // namespace mxq
