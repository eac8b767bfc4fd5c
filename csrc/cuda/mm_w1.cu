#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_w1, Uniform<1>)
}
