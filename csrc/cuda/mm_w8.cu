#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_w8, Uniform<8>)
}
