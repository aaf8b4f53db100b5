// Lookup convolution on CPU in float32: y = act(conv(x, P·D) + bias + residual), each output written once.
//
// Work proceeds in bands of output rows. The dictionary stage forms S = D * x for a band in a scratch that stays in L2;
// the lookup stage then reads S at one base offset per tap. Padding belongs to S: x is never padded. S is split by the
// phases of the stride, so that a tap is a contiguous vector for any stride. Within a phase, pixels are numbered over rows
// of `pitch`, so that small images fill vectors too. Every sum has a fixed order, whatever the bands and threads are.
#include <memory>

#include "gradients.h"
#include "program.h"

// Everything the caller passes has been validated in Python; what may fail here is memory, answered by null or 1.
extern "C" {

// Whether a matrix unit multiplies pairs of bfloat16. Vectors of pairs are no faster than float32: on Sapphire Rapids and its
// successors, one port multiplies them and two multiply floats, and pairing taps takes instructions too.
int lcnn_multiplies_pairs() { return lcnn::has_matrix_unit(); }

// `sizes`: groups, k, m, kh, kw, filter groups, filters in each, and 1 to round to bfloat16, 2 where the coefficients last.
void* lcnn_weight_new(const int64_t* sizes, const float* dictionary, const float* coefficients, const int32_t* indices,
                      const int32_t* positions, const int32_t* offsets, const int32_t* filters) try {
  auto w = std::make_unique<lcnn::Weight>();
  w->groups = sizes[0], w->k = sizes[1], w->m = sizes[2], w->kh = sizes[3], w->kw = sizes[4];
  lcnn::pack_dictionary(*w, dictionary);
  const bool rounded = sizes[7] == 1, lasting = sizes[7] == 2;
  lcnn::pack_lookups(*w, sizes[5], sizes[6], coefficients, indices, positions, offsets, filters, lasting);
  if (rounded) w->round();
  return w.release();
} catch (const std::exception&) {
  return nullptr;
}

void lcnn_weight_free(void* weight) { delete static_cast<lcnn::Weight*>(weight); }

// `pool`: null, or what is done with the output before it is written.
void* lcnn_plan_new(const void* weight, const lcnn::Geometry* geometry, const lcnn::Pool* pool) try {
  return new lcnn::Plan(*static_cast<const lcnn::Weight*>(weight), *geometry, pool);
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

int lcnn_gradients(const lcnn::GradientProblem* problem, const lcnn::GradientTensors* tensors) try {
  lcnn::Gradients(*problem, *tensors).run();
  return 0;
} catch (const std::exception&) {
  return 1;
}

void* lcnn_program_new(const lcnn::Step* steps, int64_t count, const lcnn::Place* places, int64_t values, int64_t arena,
                       int64_t threads) try {
  return new lcnn::Program{{steps, steps + count}, {places, places + values}, arena, threads};
} catch (const std::exception&) {
  return nullptr;
}

void lcnn_program_free(void* program) { delete static_cast<lcnn::Program*>(program); }

// `tensors`: the caller's inputs and outputs, in the order that the places of the program name.
// `seconds`: null, or one sum for each step to which its time is added.
int lcnn_program_run(const void* program, void* const* tensors, double* seconds) try {
  static_cast<const lcnn::Program*>(program)->run(tensors, seconds);
  return 0;
} catch (const std::exception&) {
  return 1;
}
}
