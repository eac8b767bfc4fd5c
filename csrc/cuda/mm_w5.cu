#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_w5, Uniform<5>)
}
