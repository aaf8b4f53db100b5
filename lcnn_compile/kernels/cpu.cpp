// Lookup convolution on CPU in float32: y = act(conv(x, P·D) + bias + residual), each output written once.
//
// Work proceeds in bands of output rows. The dictionary stage forms S = D * x for a band in a scratch that stays in L2;
// the lookup stage then reads S at one base offset per tap. Padding belongs to S: x is never padded. S is split by the
// phases of the stride, so that a tap is a contiguous vector for any stride. Within a phase, pixels are numbered over rows
// of `pitch`, so that small images fill vectors too. Every sum has a fixed order, whatever the bands and threads are.
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu_stages.h"

namespace lcnn {
namespace {

constexpr int64_t HUGE_PAGE = 2 << 20;

// Memory that the calling thread keeps between calls, on huge pages where the system has them: taps jump between planes.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* at) const { std::free(at); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    void* fresh = nullptr;
    const size_t bytes = size_t(round_up(int64_t(sizeof(float)) * floats, HUGE_PAGE));
    if (posix_memalign(&fresh, HUGE_PAGE, bytes)) throw std::bad_alloc();
#if defined(__linux__)
    madvise(fresh, bytes, MADV_HUGEPAGE);
#endif
    memory.reset(static_cast<float*>(fresh));
    size = floats;
  }
  return memory.get();
}

void run(const Call& call, int threads) {
  const Plan& p = call.p;
  const int64_t items = p.g.batch * p.bands;
  const int64_t s_size = round_up(p.scratch(), 1024), packed_size = round_up(p.packed(), 1024) + 64;
  float* const shared = scratch(threads * (s_size + packed_size));
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int64_t rank = omp_get_thread_num(), size = omp_get_num_threads();
#else
    const int64_t rank = 0, size = 1;
#endif
    float* const packed = shared + threads * s_size + rank * packed_size;
    if (p.cooperate) {
      const Team team{rank, size};
      for (int64_t i = 0; i < items; ++i) {
        if (i > 0) team.wait();
        call.band(i / p.bands, i % p.bands, shared, packed, team);
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items; ++i) call.band(i / p.bands, i % p.bands, shared + rank * s_size, packed, {0, 1});
    }
  }
}

}  // namespace
}  // namespace lcnn

// Everything the caller passes has been validated in Python; what may fail here is memory, answered by null or 1.
extern "C" {

void* lcnn_weight_new(const int64_t* sizes, const float* dictionary, const float* coefficients, const int32_t* indices,
                      const int32_t* positions, const int32_t* offsets, const int32_t* filters) try {
  auto w = std::make_unique<lcnn::Weight>();
  w->groups = sizes[0], w->k = sizes[1], w->m = sizes[2], w->kh = sizes[3], w->kw = sizes[4];
  lcnn::pack_dictionary(*w, dictionary);
  lcnn::pack_lookups(*w, sizes[5], sizes[6], coefficients, indices, positions, offsets, filters);
  return w.release();
} catch (const std::exception&) {
  return nullptr;
}

void lcnn_weight_free(void* weight) { delete static_cast<lcnn::Weight*>(weight); }

void* lcnn_plan_new(const void* weight, const lcnn::Geometry* geometry) try {
  return new lcnn::Plan(*static_cast<const lcnn::Weight*>(weight), *geometry);
} catch (const std::exception&) {
  return nullptr;
}

void lcnn_plan_free(void* plan) { delete static_cast<lcnn::Plan*>(plan); }

int lcnn_run(const void* plan, const float* x, const float* bias, const float* residual, float* y) try {
  const auto& p = *static_cast<const lcnn::Plan*>(plan);
  lcnn::run({p, x, bias, residual, y}, int(p.g.threads));
  return 0;
} catch (const std::exception&) {
  return 1;
}
}
