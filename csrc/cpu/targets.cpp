#include "targets.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mxq {
namespace {

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avx512 = false, vnni = false;

  Cpu() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool fma = c & bit_FMA, f16c = c & bit_F16C, avx = c & bit_AVX;
    // The CPU having the registers is not enough: XCR0 tells which of them the operating system saves on a task switch.
    unsigned xcr0, high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = avx && fma && f16c && (b & bit_AVX2) && (xcr0 & 6) == 6;
    const unsigned need = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    avx512 = avx2 && (b & need) == need && (xcr0 & 0xe6) == 0xe6;
    vnni = avx512 && (c & bit_AVX512VNNI);
  }
};
#endif

const std::vector<const Target*>& usable() {
  static const std::vector<const Target*> list = [] {
    std::vector<const Target*> out{&target_scalar};
#if defined(__x86_64__)
    const Cpu cpu;
    if (cpu.avx2) out.push_back(&target_avx2);
    if (cpu.avx512) out.push_back(&target_avx512);
    if (cpu.vnni) out.push_back(&target_avx512vnni);
#endif
    return out;
  }();
  return list;
}

std::atomic<const Target*> chosen{nullptr};

}  // namespace

std::vector<std::string> usable_targets() {
  std::vector<std::string> out;
  for (const Target* t : usable()) out.push_back(t->name);
  return out;
}

void set_target(const std::string& name) {
  std::string list;
  for (const Target* t : usable()) {
    if (name == t->name) return chosen.store(t);
    list += list.empty() ? t->name : std::string(", ") + t->name;
  }
  throw std::invalid_argument(list);
}

const Target& current_target() {
  const Target* t = chosen.load(std::memory_order_relaxed);
  return t ? *t : *usable().back();
}

}  // namespace mxq
