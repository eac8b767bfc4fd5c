#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_w3, Uniform<3>)
}
