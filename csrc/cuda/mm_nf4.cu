#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_nf4, Table<4, true>)
}
