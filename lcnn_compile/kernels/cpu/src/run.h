// One lookup convolution by all threads, and the memory that calls keep.
#pragma once

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bfloat16_stages.h"

namespace lcnn {

constexpr int64_t HUGE_PAGE = 2 << 20;

// Memory that grows when more is asked for, on huge pages where the system has them: taps jump between planes.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(at_); }

  float* at_least(int64_t floats) {
    if (floats > size_) {
      release();
      void* fresh = nullptr;
      const size_t bytes = size_t(round_up(int64_t(sizeof(float)) * floats, HUGE_PAGE));
      if (posix_memalign(&fresh, HUGE_PAGE, bytes)) throw std::bad_alloc();
#if defined(__linux__)
      madvise(fresh, bytes, MADV_HUGEPAGE);
#endif
      at_ = static_cast<float*>(fresh);
      size_ = floats;
    }
    return at_;
  }
  void give_back_above(int64_t floats) {
    if (size_ > floats) release();
  }

 private:
  void release() {
    std::free(at_);
    at_ = nullptr;
    size_ = 0;
  }
  float* at_ = nullptr;
  int64_t size_ = 0;
};

// The calling thread's scratch, kept between calls.
inline float* run_scratch(int64_t floats) {
  thread_local Memory memory;
  return memory.at_least(floats);
}

template <class Any = Call>
inline void run(const Any& call, int threads) {
  const Plan& p = call.p;
  const int64_t items = p.g.batch * p.bands;
  const int64_t s_size = round_up(p.scratch(), 1024), row = p.pool ? p.pool->row_floats() : 0;
  const int64_t packed_size = round_up(std::max(p.packed(), row), 1024) + 64;
  float* const shared = run_scratch(threads * (s_size + packed_size));
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

}  // namespace lcnn
