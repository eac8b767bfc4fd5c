// AVX-512 F, BW, DQ, VL (Skylake-X 2017).
#define MXQ_AVX512 1
#define MXQ_TARGET avx512
#define MXQ_TARGET_TABLE target_avx512
#define MXQ_TARGET_NAME "avx512"

#include "target_avx512.inl"
