#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_w5, Uniform<5>)
}
