#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_lut3, Table<3, false>)
}
