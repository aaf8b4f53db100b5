/* Many threads, one model, batches of several sizes: threads MODEL THREADS_PER_CALL. Each must get the values of single calls. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lcnn.h"

enum { THREADS = 4, CALLS = 20, MOST = 4 };

static lcnn_model* model;
static float *x, *wanted;
static lcnn_tensor input, output;

static void* work(void* given) {
  const int first = *(const int*)given;
  float* y = malloc((size_t)(MOST * output.elements) * sizeof *y);
  for (int call = 0; call < CALLS; ++call) {
    const int64_t batch = 1 + (first + call) % MOST;
    const float* inputs[] = {x};
    float* outputs[] = {y};
    if (!y || lcnn_run(model, batch, inputs, outputs) != LCNN_OK || memcmp(y, wanted, (size_t)(batch * output.elements) * sizeof *y)) {
      fprintf(stderr, "thread %d, call %d: %s\n", first, call, lcnn_error());
      exit(1);
    }
  }
  free(y);
  return NULL;
}

int main(int argc, char** argv) {
  if (argc != 3 || lcnn_open(argv[1], atoi(argv[2]), &model) != LCNN_OK) {
    fprintf(stderr, "%s\n", lcnn_error());
    return 2;
  }
  if (lcnn_input(model, 0, &input) != LCNN_OK || lcnn_output(model, 0, &output) != LCNN_OK) return 2;
  x = malloc((size_t)(MOST * input.elements) * sizeof *x);
  wanted = malloc((size_t)(MOST * output.elements) * sizeof *wanted);
  if (!x || !wanted) return 2;
  for (int64_t i = 0; i < MOST * input.elements; ++i) x[i] = (float)((i * 2654435761u) % 1000) / 500 - 1;
  for (int64_t i = 0; i < MOST; ++i) {
    const float* inputs[] = {x + i * input.elements};
    float* outputs[] = {wanted + i * output.elements};
    if (lcnn_run(model, 1, inputs, outputs) != LCNN_OK) return 2;
  }
  pthread_t threads[THREADS];
  int numbers[THREADS];
  for (int i = 0; i < THREADS; ++i) {
    numbers[i] = i;
    if (pthread_create(&threads[i], NULL, work, &numbers[i])) return 2;
  }
  for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], NULL);
  free(x);
  free(wanted);
  lcnn_close(model);
  puts("all threads agree");
  return 0;
}
