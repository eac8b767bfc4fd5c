#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_fp16, Half)
}
