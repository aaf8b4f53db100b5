// The functions of lcnn.h.
#include "lcnn.h"

#include <memory>
#include <new>
#include <string>

#include "model.h"

#define LCNN_PUBLIC extern "C" __attribute__((visibility("default")))

struct lcnn_model {
  lcnn::Model model;
  lcnn_model(const char* path, int threads, const lcnn::KernelTable& kernels) : model(path, threads, kernels) {}
};

namespace {

thread_local std::string last_error;

lcnn_status failed(lcnn_status status, const std::string& why) {
  try {
    last_error = why;
  } catch (const std::bad_alloc&) {
    last_error.clear();
  }
  return status;
}

// What a function's body throws, as a status.
template <class Body>
lcnn_status guarded(Body body) {
  try {
    return body();
  } catch (const lcnn::BadFile& error) {
    return failed(LCNN_BAD_FILE, error.what());
  } catch (const std::bad_alloc&) {
    return failed(LCNN_NO_MEMORY, "no memory");
  } catch (const std::length_error&) {
    return failed(LCNN_NO_MEMORY, "no memory");
  } catch (const std::exception& error) {
    return failed(LCNN_BAD_FILE, error.what());
  }
}

lcnn_status describe(const lcnn_model* model, const std::vector<lcnn::Port>& ports, int index, lcnn_tensor* tensor) {
  if (!tensor || index < 0 || size_t(index) >= ports.size()) return failed(LCNN_BAD_ARGUMENT, "there is no such input or output");
  const lcnn::Port& port = ports[size_t(index)];
  tensor->name = port.name.c_str();
  tensor->rank = int(port.sizes.size()) + 1;
  tensor->sizes[0] = model->model.dynamic() ? -1 : model->model.batch();
  for (size_t d = 0; d < port.sizes.size(); ++d) tensor->sizes[d + 1] = port.sizes[d];
  tensor->elements = port.elements;
  return LCNN_OK;
}

lcnn_status check_run(const lcnn_model* model, int64_t batch, const float* const* inputs, float* const* outputs) {
  if (!model || !inputs || !outputs) return failed(LCNN_BAD_ARGUMENT, "the model, the inputs or the outputs are null");
  const lcnn::Model& m = model->model;
  if (batch < 0 || batch > lcnn::MOST || (!m.dynamic() && batch != m.batch()))
    return failed(LCNN_BAD_ARGUMENT, "the batch is " + std::to_string(batch) + "; the model takes " + (m.dynamic() ? std::string("any from 0 on") : std::to_string(m.batch())));
  for (size_t i = 0; i < m.inputs().size(); ++i)
    if (!inputs[i] && batch) return failed(LCNN_BAD_ARGUMENT, "the input " + m.inputs()[i].name + " is null");
  for (size_t i = 0; i < m.outputs().size(); ++i)
    if (!outputs[i] && batch) return failed(LCNN_BAD_ARGUMENT, "the output " + m.outputs()[i].name + " is null");
  return LCNN_OK;
}

}  // namespace

LCNN_PUBLIC lcnn_status lcnn_open(const char* path, int threads, lcnn_model** model) {
  if (model) *model = nullptr;
  if (!path || !model || threads < 1 || threads > 4096)
    return failed(LCNN_BAD_ARGUMENT, "a path, 1 to 4096 threads and a place for the model are required");
  return guarded([&] {
    const char* name;
    const lcnn::KernelTable* const kernels = lcnn::choose_kernels(&name);
    if (!kernels) return failed(LCNN_BAD_ARGUMENT, "LCNN_CPU_ISA is " + std::string(name) + ", which is not in this library, or not in this processor");
    try {
      *model = new lcnn_model(path, threads, *kernels);
    } catch (const lcnn::BadFile& error) {
      return failed(LCNN_BAD_FILE, std::string(path) + ": " + error.what());
    }
    return LCNN_OK;
  });
}

LCNN_PUBLIC void lcnn_close(lcnn_model* model) { delete model; }

LCNN_PUBLIC int lcnn_input_count(const lcnn_model* model) { return model ? int(model->model.inputs().size()) : 0; }
LCNN_PUBLIC int lcnn_output_count(const lcnn_model* model) { return model ? int(model->model.outputs().size()) : 0; }

LCNN_PUBLIC lcnn_status lcnn_input(const lcnn_model* model, int index, lcnn_tensor* tensor) {
  return model ? describe(model, model->model.inputs(), index, tensor) : failed(LCNN_BAD_ARGUMENT, "the model is null");
}
LCNN_PUBLIC lcnn_status lcnn_output(const lcnn_model* model, int index, lcnn_tensor* tensor) {
  return model ? describe(model, model->model.outputs(), index, tensor) : failed(LCNN_BAD_ARGUMENT, "the model is null");
}
LCNN_PUBLIC int64_t lcnn_example_batch(const lcnn_model* model) { return model ? model->model.batch() : 0; }

LCNN_PUBLIC lcnn_status lcnn_run(const lcnn_model* model, int64_t batch, const float* const* inputs, float* const* outputs) {
  return guarded([&] {
    const lcnn_status status = check_run(model, batch, inputs, outputs);
    if (status == LCNN_OK) model->model.run(batch, inputs, outputs, nullptr);
    return status;
  });
}

LCNN_PUBLIC lcnn_status lcnn_profile(const lcnn_model* model, int64_t batch, const float* const* inputs, float* const* outputs,
                                     int calls, lcnn_time* times, size_t* count) {
  return guarded([&] {
    const lcnn_status status = check_run(model, batch, inputs, outputs);
    if (status != LCNN_OK) return status;
    if (calls < 1 || !count || (!times && *count)) return failed(LCNN_BAD_ARGUMENT, "calls from 1 on, and room for times, are required");
    const std::vector<lcnn::CallForm>& steps = model->model.calls();
    std::vector<double> seconds(steps.size(), 0.0);
    model->model.run(batch, inputs, outputs, nullptr);
    for (int i = 0; i < calls; ++i) model->model.run(batch, inputs, outputs, seconds.data());
    for (size_t i = 0; i < std::min(*count, steps.size()); ++i)
      times[i] = {lcnn::kind_name(steps[i].kind), steps[i].y, seconds[i] / calls};
    *count = steps.size();
    return LCNN_OK;
  });
}

LCNN_PUBLIC const char* lcnn_error(void) { return last_error.c_str(); }

LCNN_PUBLIC const char* lcnn_instruction_set(void) {
  const char* name;
  return lcnn::choose_kernels(&name) ? name : "";
}

LCNN_PUBLIC const char* lcnn_version(void) { return LCNN_VERSION; }

// For the exporter, so that the sum is computed in one place.
LCNN_PUBLIC uint64_t lcnn_checksum(const void* data, size_t bytes) { return lcnn::checksum(static_cast<const uint8_t*>(data), bytes); }

// For lcnn_compile in Python, whose operators call the same kernels: a table of one set, null where it cannot run here.
LCNN_PUBLIC const void* lcnn_kernels(const char* name) { return lcnn::kernels_named(name); }
