#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_lut2, Table<2, false>)
}
