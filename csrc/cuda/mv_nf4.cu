#include "mv.cuh"

namespace mxq::cuda {
MXQ_MV(mv_nf4, Table<4, true>)
}
