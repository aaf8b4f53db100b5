/* Runs a model once: cc example.c -o example -L. -llcnn -Wl,-rpath,. && ./example model.lcnn INPUT... OUTPUT...
 *
 * Each input is a file of float32, as many as its images have; the number of images follows from the first one. Outputs are written so too.
 */
#include <stdio.h>
#include <stdlib.h>

#include "lcnn.h"

static void describe(const char* what, const lcnn_tensor* tensor) {
  printf("%s %s: float32 [", what, tensor->name);
  if (tensor->sizes[0] < 0)
    printf("batch");
  else
    printf("%lld", (long long)tensor->sizes[0]);
  for (int d = 1; d < tensor->rank; ++d) printf(", %lld", (long long)tensor->sizes[d]);
  printf("]\n");
}

static int fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

/* All of a file of floats; their number in `count`. Null where it cannot be read. */
static float* read_floats(const char* path, long long* count) {
  FILE* file = fopen(path, "rb");
  if (!file) return NULL;
  float* values = NULL;
  if (fseek(file, 0, SEEK_END) == 0) {
    const long bytes = ftell(file);
    if (bytes >= 0 && bytes % 4 == 0 && fseek(file, 0, SEEK_SET) == 0) {
      values = malloc(bytes > 0 ? (size_t)bytes : 1);
      if (values && fread(values, 1, (size_t)bytes, file) != (size_t)bytes) {
        free(values);
        values = NULL;
      }
      *count = bytes / 4;
    }
  }
  fclose(file);
  return values;
}

int main(int argc, char** argv) {
  if (argc < 2) return fail("usage: example model.lcnn [INPUT... OUTPUT...]");
  lcnn_model* model;
  if (lcnn_open(argv[1], 1, &model) != LCNN_OK) return fail(lcnn_error());
  const int inputs = lcnn_input_count(model), outputs = lcnn_output_count(model);
  lcnn_tensor tensor;
  if (argc != 2 + inputs + outputs) {
    for (int i = 0; i < inputs; ++i)
      if (lcnn_input(model, i, &tensor) == LCNN_OK) describe("input", &tensor);
    for (int i = 0; i < outputs; ++i)
      if (lcnn_output(model, i, &tensor) == LCNN_OK) describe("output", &tensor);
    lcnn_close(model);
    return argc == 2 ? 0 : fail("a file for each of these is required");
  }
  const float** x = calloc((size_t)inputs, sizeof *x);
  float** y = calloc((size_t)outputs, sizeof *y);
  int status = x && y ? 0 : fail("no memory");
  long long batch = -1;
  for (int i = 0; i < inputs && !status; ++i) {
    long long count = 0;
    x[i] = read_floats(argv[2 + i], &count);
    if (!x[i] || lcnn_input(model, i, &tensor) != LCNN_OK) {
      fprintf(stderr, "%s cannot be read as float32\n", argv[2 + i]);
      status = 1;
      break;
    }
    if (batch < 0) batch = tensor.elements ? count / tensor.elements : 0;
    if (count != batch * tensor.elements) {
      fprintf(stderr, "%s has %lld values; %s takes %lld for each of %lld images\n", argv[2 + i], count, tensor.name, (long long)tensor.elements, batch);
      status = 1;
    }
  }
  for (int i = 0; i < outputs && !status; ++i) {
    if (lcnn_output(model, i, &tensor) == LCNN_OK) y[i] = malloc((size_t)(batch * tensor.elements + 1) * sizeof(float));
    if (!y[i]) status = fail("no memory");
  }
  if (!status && lcnn_run(model, batch, x, y) != LCNN_OK) status = fail(lcnn_error());
  for (int i = 0; i < outputs && !status; ++i) {
    if (lcnn_output(model, i, &tensor) != LCNN_OK) continue;
    const size_t count = (size_t)(batch * tensor.elements);
    FILE* file = fopen(argv[2 + inputs + i], "wb");
    const int written = file && fwrite(y[i], sizeof(float), count, file) == count;
    if ((file && fclose(file) != 0) || !written) {
      fprintf(stderr, "%s cannot be written\n", argv[2 + inputs + i]);
      status = 1;
    }
  }
  for (int i = 0; x && i < inputs; ++i) free((void*)x[i]);
  for (int i = 0; y && i < outputs; ++i) free(y[i]);
  free((void*)x);
  free((void*)y);
  lcnn_close(model);
  return status;
}
