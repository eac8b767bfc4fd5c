#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_w2, Uniform<2>)
}
