// Lookup convolutions of bytes, as programs call them.
#pragma once

#include <cstdint>

namespace lcnn {

struct BytePlan;

// y: bytes or floats, as the layer says; `residual` may be null.
void run_bytes(const BytePlan& plan, const uint8_t* x, const uint8_t* residual, void* y);

}  // namespace lcnn
