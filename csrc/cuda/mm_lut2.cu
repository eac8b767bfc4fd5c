#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_lut2, Table<2, false>)
}
