// Weights of several formats; see mv_mixed.cu.
#include "mm.cuh"

namespace mxq::cuda {
int mm_mixed(const Params& p, void* stream) {
  return launch_mm<mm_tiles(0, true), Uniform<1>, Uniform<2>, Uniform<3>, Uniform<4>, Uniform<5>, Uniform<6>, Uniform<8>, Table<2, false>, Table<3, false>,
                   Table<4, false>, Table<4, true>, Half>(p, stream);
}
}
