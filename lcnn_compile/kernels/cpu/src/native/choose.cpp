// Which instruction sets this processor and operating system run.
#include <cstdlib>
#include <cstring>

#include "kernel_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// One line for each set that was compiled, the slowest first: LCNN_SET(name, its features).
#define LCNN_SET(name, needs) extern "C" const lcnn::KernelTable lcnn_kernels_##name;
#include "sets.inc"
#undef LCNN_SET

namespace lcnn {

namespace {

enum : unsigned {
  NOTHING = 0, AVX2_FMA = 1, AVX_VNNI = 2, AVX512 = 4, AVX512_VNNI = 8, AVX512_VBMI2 = 16, AVX512_BF16 = 32, AMX = 64
};

#if defined(__x86_64__)
unsigned long long enabled_states() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

unsigned features() {
  unsigned a, b, c, d, found = NOTHING;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const auto bit = [](unsigned word, int i) { return (word >> i & 1) != 0; };
  const bool fma = bit(c, 12), saved = bit(c, 27);
  const unsigned long long states = saved ? enabled_states() : 0;
  unsigned a7, b7, c7, d7, a71 = 0, b71, c71, d71;
  if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return found;
  if (a7) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
  if ((states & 6) == 6 && fma && bit(b7, 5)) found |= AVX2_FMA | (bit(a71, 4) ? unsigned(AVX_VNNI) : 0u);
  const bool wide = (states & 0xe6) == 0xe6 && (found & AVX2_FMA) && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);
  if (wide) {
    found |= AVX512 | (bit(c7, 11) ? unsigned(AVX512_VNNI) : 0u) | (bit(c7, 1) && bit(c7, 6) ? unsigned(AVX512_VBMI2) : 0u) | (bit(a71, 5) ? unsigned(AVX512_BF16) : 0u);
    if ((states & 0x60000) == 0x60000 && bit(d7, 24) && bit(d7, 22)) found |= AMX;
  }
  return found;
}
#else
unsigned features() { return NOTHING; }
#endif

struct Set {
  const char* name;
  unsigned needs;
  const KernelTable* kernels;
};

const Set SETS[] = {
#define LCNN_SET(name, needs) {#name, needs, &lcnn_kernels_##name},
#include "sets.inc"
#undef LCNN_SET
};

}  // namespace

const KernelTable* kernels_named(const char* name) {
  const unsigned has = features();
  for (const Set& set : SETS)
    if ((set.needs & ~has) == 0 && std::strcmp(name, set.name) == 0) return set.kernels;
  return nullptr;
}

const KernelTable* choose_kernels(const char** name) {
  const unsigned has = features();
  const char* const asked = std::getenv("LCNN_CPU_ISA");
  if (asked) {
    *name = asked;
    return kernels_named(asked);
  }
  const Set* best = nullptr;
  for (const Set& set : SETS)
    if ((set.needs & ~has) == 0) best = &set;
  *name = best ? best->name : "";
  return best ? best->kernels : nullptr;
}

}  // namespace lcnn
