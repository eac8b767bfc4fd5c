#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_lut3, Table<3, false>)
}
