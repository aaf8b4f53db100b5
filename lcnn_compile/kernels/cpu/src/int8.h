// Steps of bytes, as programs call them.
#pragma once

#include <cstdint>

namespace lcnn {

struct BytePlan;
struct ByteMap;
struct ByteMean;
struct Pool;

// A lookup convolution. y and the residual, which may be null, are bytes or floats, as the layer says.
void run_bytes(const BytePlan& plan, const uint8_t* x, const void* residual, void* y);

// The maximum over windows.
void pool_bytes(const Pool& pool, int64_t threads, const uint8_t* x, uint8_t* y);

// x times `factor`, rounded to the nearest, plus `zero`, saturated; NaN becomes `zero`.
void round_to_bytes(const float* x, int64_t count, float factor, int32_t zero, int64_t threads, uint8_t* y);

// (x - zero) * scale
void widen_bytes(const uint8_t* x, int64_t count, float scale, int32_t zero, int64_t threads, float* y);

// Element by element, bytes or floats in and out; `x`: the values that operands without constants read, in order.
void map_bytes(const ByteMap& map, int64_t threads, const float* const* x, float* y);

// Means over windows, bytes or floats in and out.
void mean_bytes(const ByteMean& mean, int64_t threads, const float* x, float* y);

}  // namespace lcnn
