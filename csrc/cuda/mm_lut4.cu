#include "mm.cuh"

namespace mxq::cuda {
MXQ_MM(mm_lut4, Table<4, false>)
}
