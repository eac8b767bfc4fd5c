#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_w6, Uniform<6>)
}
