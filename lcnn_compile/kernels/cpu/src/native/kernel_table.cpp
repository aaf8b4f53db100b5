// The table of one instruction set, LCNN_KERNELS: the one name of it that others see.
#include "kernel_table.h"

extern "C" {

void* lcnn_weight_new(const int64_t*, const float*, const float*, const int32_t*, const int32_t*, const int32_t*, const int32_t*);
void lcnn_weight_free(void*);
void* lcnn_plan_new(const void*, const lcnn::Geometry*, const lcnn::Pool*);
void lcnn_plan_free(void*);
void* lcnn_bytes_new(const int64_t*, const lcnn::ByteFinish*, const float*, const float*, const int32_t*, const int32_t*, const int32_t*,
                     const int32_t*, const int32_t*, const float*, const int32_t*, const float*);
void lcnn_bytes_free(void*);
void* lcnn_bytes_plan_new(const void*, const lcnn::Geometry*);
void lcnn_bytes_plan_free(void*);
void* lcnn_program_new(const lcnn::Step*, int64_t, const lcnn::Place*, int64_t, int64_t, int64_t);
void lcnn_program_free(void*);
int lcnn_program_run(const void*, void* const*, double*);
int lcnn_multiplies_pairs();
int lcnn_run(const void*, const float*, const float*, const float*, float*);
int lcnn_bytes_run(const void*, const uint8_t*, const void*, void*);
int lcnn_gradients(const lcnn::GradientProblem*, const lcnn::GradientTensors*);

extern const lcnn::KernelTable LCNN_KERNELS;
const lcnn::KernelTable LCNN_KERNELS = {lcnn_weight_new,   lcnn_weight_free,  lcnn_plan_new,       lcnn_plan_free,
                                    lcnn_bytes_new,    lcnn_bytes_free,   lcnn_bytes_plan_new, lcnn_bytes_plan_free,
                                    lcnn_program_new,  lcnn_program_free, lcnn_program_run,    lcnn_multiplies_pairs,
                                        lcnn_run,          lcnn_bytes_run,    lcnn_gradients};
}
