/* liblcnn: runs convolutional networks that lcnn_compile has written to a file. Needs the C library alone.
 *
 * A model may be used by any number of threads at once: each call works in memory of its own, which is kept for the thread's next call.
 * Every function that can fail returns a status; lcnn_error() says why, for the calling thread.
 */
#ifndef LCNN_H
#define LCNN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LCNN_MOST_DIMENSIONS 8

typedef struct lcnn_model lcnn_model;

typedef enum {
  LCNN_OK = 0,
  LCNN_BAD_FILE = 1,     /* it cannot be read, is damaged, of another version, or asks for what no program may do */
  LCNN_BAD_ARGUMENT = 2, /* null, or a batch that the model does not take */
  LCNN_NO_MEMORY = 3
} lcnn_status;

/* An input or output: float32, contiguous, [batch, sizes[1], ..., sizes[rank - 1]]. */
typedef struct {
  const char* name; /* lives as long as the model */
  int rank;
  int64_t sizes[LCNN_MOST_DIMENSIONS]; /* the first is the batch: -1 where any is taken */
  int64_t elements;                    /* of one image: the product of the other sizes */
} lcnn_tensor;

/* The time that one step takes. */
typedef struct {
  const char* kind;  /* lives for ever */
  int64_t value;     /* the number of what it makes */
  double seconds;    /* mean of a call */
} lcnn_time;

/* Reads a model file. `threads`: how many work on one call; 1 where calls come from several threads. */
lcnn_status lcnn_open(const char* path, int threads, lcnn_model** model);
void lcnn_close(lcnn_model* model);

int lcnn_input_count(const lcnn_model* model);
int lcnn_output_count(const lcnn_model* model);
lcnn_status lcnn_input(const lcnn_model* model, int index, lcnn_tensor* tensor);
lcnn_status lcnn_output(const lcnn_model* model, int index, lcnn_tensor* tensor);
int64_t lcnn_example_batch(const lcnn_model* model);

/* Runs the model for `batch` images. Inputs and outputs in the model's order; outputs must not overlap anything. */
lcnn_status lcnn_run(const lcnn_model* model, int64_t batch, const float* const* inputs, float* const* outputs);

/* The same `calls` times; the time of each step. `count` holds the room in `times`, and receives the number of steps. */
lcnn_status lcnn_profile(const lcnn_model* model, int64_t batch, const float* const* inputs, float* const* outputs, int calls,
                         lcnn_time* times, size_t* count);

/* Why the calling thread's last call failed; "" if none has. */
const char* lcnn_error(void);
/* What the library computes with here, such as "avx512vbmi2"; the environment's LCNN_CPU_ISA may choose another one. */
const char* lcnn_instruction_set(void);
const char* lcnn_version(void);

#ifdef __cplusplus
}
#endif

#endif
