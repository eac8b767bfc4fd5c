#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_w8, Uniform<8>)
}
