// AVX-512 with VNNI (Ice Lake 2019, Zen 4 and later): one instruction for four products of bytes.
#define MXQ_AVX512 1
#define MXQ_VNNI 1
#define MXQ_TARGET avx512vnni
#define MXQ_TARGET_TABLE target_avx512vnni
#define MXQ_TARGET_NAME "avx512vnni"

#include "target_avx512.inl"
