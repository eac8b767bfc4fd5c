// The last step of a launch whose columns were split over blocks: partial sums in the order of the splits, then the end of the row. A launch of its own
// rather than a ticket that the last block draws: there is no state that an aborted launch could leave behind.
#include "launch.h"
#include "numbers.cuh"
#include "simt.hpp"

namespace mxq::cuda {
namespace {

// grid: (rows of all parts / 256, m)
__global__ void __launch_bounds__(256) reduce(const __grid_constant__ Params p, int rows) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int64_t all = int64_t(p.ctas) * rows, i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const int m = int(blockIdx.y);
  if (i >= all) return;
  const PartView& part = p.part[find_part(p, unsigned(i / rows))];
  float sum = 0.0f;
  for (int s = 0; s < p.splits; s++) sum += p.partial[(int64_t(s) * p.m + m) * all + i];  // not __ldg: it may still be written when this kernel begins
  finish(p, part, m, unsigned(i - int64_t(part.first_cta) * rows), sum);
}

}  // namespace

int launch_reduce(const Params& p, int rows, bool early, void* stream) {
  return MXQ_LAUNCH_EARLY(early, reduce, dim3(unsigned((int64_t(p.ctas) * rows + 255) / 256), unsigned(p.m)), dim3(256), 0, stream, p, rows);
}

}  // namespace mxq::cuda
