#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_w1, Uniform<1>)
}
