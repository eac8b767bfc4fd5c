#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_w2, Uniform<2>)
}
