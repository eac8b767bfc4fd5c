#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_w6, Uniform<6>)
}
