// The kernels for one instruction set, as the runtime calls them; each set is compiled apart, its names hidden from the others.
#pragma once

#include <cstdint>

namespace lcnn {

struct ByteFinish;
struct Geometry;
struct Place;
struct Pool;
struct Step;
struct GradientProblem;
struct GradientTensors;

struct KernelTable {
  void* (*weight_new)(const int64_t* sizes, const float* dictionary, const float* coefficients, const int32_t* indices,
                      const int32_t* positions, const int32_t* offsets, const int32_t* filters);
  void (*weight_free)(void*);
  void* (*plan_new)(const void* weight, const Geometry* geometry, const Pool* pool);
  void (*plan_free)(void*);
  void* (*bytes_new)(const int64_t* sizes, const ByteFinish* finish, const float* dictionary, const float* coefficients,
                     const int32_t* indices, const int32_t* positions, const int32_t* offsets, const int32_t* filters,
                     const int32_t* starts, const float* row_factors, const int32_t* bias, const float* filter_factors);
  void (*bytes_free)(void*);
  void* (*bytes_plan_new)(const void* weight, const Geometry* geometry);
  void (*bytes_plan_free)(void*);
  void* (*program_new)(const Step* steps, int64_t count, const Place* places, int64_t values, int64_t arena, int64_t threads);
  void (*program_free)(void*);
  int (*program_run)(const void* program, void* const* tensors, double* seconds);
  int (*multiplies_pairs)();
  int (*run)(const void* plan, const float* x, const float* bias, const float* residual, float* y);
  int (*bytes_run)(const void* plan, const uint8_t* x, const void* residual, void* y);
  int (*gradients)(const GradientProblem* problem, const GradientTensors* tensors);
};

// Those of a set of this name; null where the library has none, or the processor cannot run it.
const KernelTable* kernels_named(const char* name);

// The fastest that this processor runs, or what LCNN_CPU_ISA names; null, and what is wrong in `name`, where that is impossible.
const KernelTable* choose_kernels(const char** name);

}  // namespace lcnn
