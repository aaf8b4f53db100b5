// Lookup convolution of bytes: sums are integers, and what follows them is rounded after every operation, so that every
// instruction set, number of threads and batch gives the same bytes. Compiled without fused multiply-adds.
#include "int8.h"

#include <cmath>
#include <memory>

#include "int8_map.h"
#include "int8_stages.h"
#include "int8_values.h"
#include "run.h"

namespace lcnn {

void run_bytes(const BytePlan& plan, const uint8_t* x, const void* residual, void* y) {
  run(ByteCall{plan, x, residual, y}, int(plan.plan.g.threads));
}

void pool_bytes(const Pool& pool, int64_t threads, const uint8_t* x, uint8_t* y) {
  in_parts(pool.planes, pool.height * pool.width, threads, [&](int64_t first, int64_t end) { pool_planes(pool, first, end, x, y); });
}

void round_to_bytes(const float* x, int64_t count, float factor, int32_t zero, int64_t threads, uint8_t* y) {
  in_parts(count, 1, threads, [&](int64_t first, int64_t end) { round_part(x + first, end - first, factor, zero, y + first); });
}

void widen_bytes(const uint8_t* x, int64_t count, float scale, int32_t zero, int64_t threads, float* y) {
  in_parts(count, 1, threads, [&](int64_t first, int64_t end) { widen_part(x + first, end - first, scale, zero, y + first); });
}

void map_bytes(const ByteMap& map, int64_t threads, const float* const* x, float* y) { map_with(map.map, ByteEnds{map}, threads, x, y); }

void mean_bytes(const ByteMean& m, int64_t threads, const float* x, float* y) { mean(m, threads, x, y); }

}  // namespace lcnn

// Everything the caller passes has been validated in Python; what may fail here is memory, answered by null or 1.
extern "C" {

// `sizes`: groups, k, m, kh, kw, filter groups, filters in each, whether D is the identity, middle, zero of x. Integers come as floats.
void* lcnn_bytes_new(const int64_t* sizes, const lcnn::ByteFinish* finish, const float* dictionary, const float* coefficients, const int32_t* indices,
                     const int32_t* positions, const int32_t* offsets, const int32_t* filters, const int32_t* starts, const float* row_factors,
                     const int32_t* bias, const float* filter_factors) try {
  auto made = std::make_unique<lcnn::ByteWeight>();
  lcnn::Weight& w = made->w;
  w.groups = sizes[0], w.k = sizes[1], w.m = sizes[2], w.kh = sizes[3], w.kw = sizes[4];
  made->identity = sizes[7], made->middle = int(sizes[8]), made->x_zero = int(sizes[9]);
  made->finish = *finish;
  if (!made->identity) {
    lcnn::pack_dictionary(w, dictionary);
    made->starts.assign(starts, starts + w.groups * w.k);
    made->row_factors.assign(row_factors, row_factors + w.groups * w.k);
  }
  lcnn::pack_lookups(w, sizes[5], sizes[6], coefficients, indices, positions, offsets, filters);
  for (const int32_t filter : w.filters) {
    made->bias.push_back(bias[filter]);
    made->filter_factors.push_back(filter_factors[filter]);
  }
  made->pack_quads();
  return made.release();
} catch (const std::exception&) {
  return nullptr;
}

void lcnn_bytes_free(void* weight) { delete static_cast<lcnn::ByteWeight*>(weight); }

void* lcnn_bytes_plan_new(const void* weight, const lcnn::Geometry* geometry) try {
  return new lcnn::BytePlan(*static_cast<const lcnn::ByteWeight*>(weight), *geometry);
} catch (const std::exception&) {
  return nullptr;
}

void lcnn_bytes_plan_free(void* plan) { delete static_cast<lcnn::BytePlan*>(plan); }

int lcnn_bytes_run(const void* plan, const uint8_t* x, const void* residual, void* y) try {
  lcnn::run_bytes(*static_cast<const lcnn::BytePlan*>(plan), x, residual, y);
  return 0;
} catch (const std::exception&) {
  return 1;
}
}
