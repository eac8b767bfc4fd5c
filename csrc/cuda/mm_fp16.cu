#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_fp16, Half)
}
