#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_lut4, Table<4, false>)
}
