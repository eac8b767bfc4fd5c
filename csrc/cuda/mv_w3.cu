#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_w3, Uniform<3>)
}
