#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_w4, Uniform<4>)
}
