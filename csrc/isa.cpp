#include "isa.h"

#include <algorithm>
#include <atomic>

#include "portable.h"

namespace tbf {

static int detect() {
#if defined(__GNUC__) && defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if TBF_KNOWS_DOTS
    if (__builtin_cpu_supports("avx512bf16")) return 3;
#endif
    return 2;
  }
  return 1;
#else
  return 0;
#endif
}

static const int detected = detect();
static std::atomic<int> limit{-1};

int widest_isa() {
  const int most = limit.load(std::memory_order_relaxed);
  return most < 0 ? detected : std::min(most, detected);
}

void limit_isa(int isa) { limit.store(isa, std::memory_order_relaxed); }

const char* isa_name() {
  static const char* const names[] = {"baseline", "AVX2", "AVX-512", "AVX-512 BF16"};
  return names[widest_isa()];
}

}  // namespace tbf
