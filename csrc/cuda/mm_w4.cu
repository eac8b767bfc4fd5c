#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_w4, Uniform<4>)
}
