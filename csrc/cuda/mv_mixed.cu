// Weights of several formats: the format is the same for a whole block at any time, so choosing it costs one branch per chunk.
#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_mixed, Uniform<1>, Uniform<2>, Uniform<3>, Uniform<4>, Uniform<5>, Uniform<6>, Uniform<8>,
       Table<2, false>, Table<3, false>, Table<4, false>, Table<4, true>, Half)
}
