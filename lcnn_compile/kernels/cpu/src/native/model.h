// A model: what a file says, and for each batch the calls that run it, made when it is first asked for.
#pragma once

#include <atomic>

#include "check.h"

namespace lcnn {

struct Affine {
  int64_t first, slope;  // a number for a batch of N: first + slope * N
  int64_t at(int64_t batch) const {
    const Wide value = Wide(first) + Wide(slope) * batch;
    require(value >= INT64_MIN && value <= INT64_MAX, "a number for a batch of this size is too large");
    return int64_t(value);
  }
};

inline Affine read_affine(WordReader& words) {
  const int64_t first = words.next();
  return {first, words.next()};
}

// As serial.py has them.
enum Tag : int64_t { CONSTANT, GROWING, TABLE, PLAN };

struct Port {
  std::string name;
  std::vector<int64_t> sizes;  // behind the batch
  int64_t elements = 1;
};

struct PlanForm {
  int64_t weight;
  std::vector<Affine> geometry, pool;
};

struct ValueForm {
  int64_t tensor;
  Affine offset, images;
  int64_t image, elements, bytes;
};

struct CallForm {
  int64_t kind, y;
  std::vector<int64_t> reads;
  struct Word {
    Tag tag;
    Affine value;  // or, in `first`, which table or plan
  };
  std::vector<Word> words;
};

// Everything for one batch.
struct Instance {
  std::vector<Extent> values;
  std::vector<std::unique_ptr<PlanOf>> plans;
  std::vector<CallWords> calls;
  Held program{nullptr, nullptr};
};

class Model {
 public:
  static constexpr int64_t MOST_BYTES = int64_t(1) << 36;  // of the values of one call
  static constexpr int64_t PART = 64;  // images that are run at a time, at most
  static constexpr int64_t PART_BYTES = int64_t(1) << 30;  // of their values, unless one image takes more

  Model(const char* path, int threads, const KernelTable& kernels) : file_(path), kernels_(kernels), threads_(threads) {
    read();
    if (dynamic_ && arena_.slope > 0) part_ = std::clamp<int64_t>(PART_BYTES / arena_.slope, 1, PART);
    instance(dynamic_ ? 1 : batch_);  // what is wrong is found now
  }
  ~Model() {
    for (auto& at : instances_) delete at.load();
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const std::vector<Port>& inputs() const { return inputs_; }
  const std::vector<Port>& outputs() const { return outputs_; }
  int64_t batch() const { return batch_; }
  bool dynamic() const { return dynamic_; }
  const std::vector<CallForm>& calls() const { return calls_; }

  // `seconds`: null, or a sum for each call.
  void run(int64_t batch, const float* const* inputs, float* const* outputs, double* seconds) const {
    std::vector<void*> tensors(inputs_.size() + outputs_.size());
    for (int64_t start = 0; start < batch;) {
      const int64_t images = dynamic_ ? std::min(part_, batch - start) : batch_;
      for (size_t i = 0; i < inputs_.size(); ++i) tensors[i] = const_cast<float*>(inputs[i] + start * inputs_[i].elements);
      for (size_t i = 0; i < outputs_.size(); ++i) tensors[inputs_.size() + i] = outputs[i] + start * outputs_[i].elements;
      if (kernels_.program_run(instance(images).program.get(), tensors.data(), seconds)) throw std::bad_alloc();
      start += images;
    }
  }

 private:
  void read();
  void read_ports(WordReader& words, std::vector<Port>& ports);
  void check_order(const Instance& made, const std::vector<Access>& accesses, int64_t batch, Work& work) const;
  std::unique_ptr<Instance> make(int64_t batch) const;
  std::unique_ptr<PlanOf> make_plan(const PlanForm& form, int64_t batch, Work& work) const;

  // Threads that ask for the same batch at once may each make an instance; one of them is kept.
  const Instance& instance(int64_t batch) const {
    std::atomic<const Instance*>& at = instances_[size_t(dynamic_ ? batch : 0)];
    const Instance* found = at.load(std::memory_order_acquire);
    if (found) return *found;
    std::unique_ptr<Instance> made = make(batch);
    if (at.compare_exchange_strong(found, made.get(), std::memory_order_acq_rel)) found = made.release();
    return *found;
  }

  File file_;
  const KernelTable& kernels_;
  int threads_;
  int64_t batch_ = 1, part_ = PART;
  bool dynamic_ = false;
  std::vector<Port> inputs_, outputs_;
  std::vector<Packed> weights_;
  std::vector<PlanForm> plans_;
  Affine arena_{};
  std::vector<ValueForm> values_;
  std::vector<CallForm> calls_;
  mutable std::atomic<const Instance*> instances_[PART + 1] = {};
};

inline void Model::read_ports(WordReader& words, std::vector<Port>& ports) {
  const int64_t count = words.next(0, 4096, "it has too many inputs or outputs");
  for (int64_t i = 0; i < count; ++i) {
    Port port;
    port.name = words.text();
    const int64_t rank = words.next(0, 7, "an input or output has too many dimensions");
    for (int64_t d = 0; d < rank; ++d) {
      port.sizes.push_back(words.next(1, int64_t(1) << 31, "an input or output has an impossible size"));
      require(Wide(port.elements) * port.sizes.back() <= MOST, "an input or output is too large");
      port.elements *= port.sizes.back();
    }
    ports.push_back(std::move(port));
  }
}

inline void Model::read() {
  WordReader words(file_.words, file_.count);
  batch_ = words.next(1, 1 << 20, "its batch is impossible");
  dynamic_ = words.next(0, 1, "whether it takes any batch is not said") != 0;
  require(words.next() == MOST_READ, "its calls read another number of values than this library's");
  read_ports(words, inputs_);
  read_ports(words, outputs_);
  require(!inputs_.empty() && !outputs_.empty(), "it has no inputs, or no outputs");
  Work work(file_.mapping.size());
  const int64_t weights = words.length(14, "it states more weights than it holds");
  for (int64_t i = 0; i < weights; ++i) weights_.push_back(read_weight(words, file_, kernels_, work));
  constexpr size_t GEOMETRY = sizeof(Geometry) / 8, POOL_WORDS = sizeof(Pool) / 8;
  const int64_t plans = words.length(2 + 2 * int64_t(GEOMETRY), "it states more plans than it holds");
  for (int64_t i = 0; i < plans; ++i) {
    PlanForm plan{words.next(0, weights - 1, "a plan is of a weight that is not there"), {}, {}};
    for (size_t j = 0; j < GEOMETRY; ++j) plan.geometry.push_back(read_affine(words));
    const int64_t pool = words.next(0, int64_t(POOL_WORDS), "a pooling has other words than this library's");
    require(pool == 0 || pool == int64_t(POOL_WORDS), "a pooling has other words than this library's");
    for (int64_t j = 0; j < pool; ++j) plan.pool.push_back(read_affine(words));
    plans_.push_back(std::move(plan));
  }
  arena_ = read_affine(words);
  const int64_t values = words.length(8, "it states more values than it holds"), tensors = int64_t(inputs_.size() + outputs_.size());
  for (int64_t i = 0; i < values; ++i) {
    ValueForm value{words.next(-1, tensors - 1, "a value lies in no input, output or the arena"), read_affine(words), read_affine(words), 0, 0, 0};
    value.image = words.next(0, MOST, "a value is too large");
    value.elements = words.next(0, MOST, "a value is too large");
    value.bytes = words.next(1, 4, "a value's elements have an impossible size");
    require(value.bytes != 3, "a value's elements have an impossible size");
    values_.push_back(value);
  }
  const int64_t calls = words.length(5, "it states more calls than it holds");
  for (int64_t i = 0; i < calls; ++i) {
    CallForm call{};
    call.kind = words.next();
    call.y = words.next(0, values - 1, "a call makes a value that is not there");
    const int64_t reads = words.next(0, MOST_READ, "a call reads too many values");
    for (int64_t j = 0; j < reads; ++j) call.reads.push_back(words.next(0, values - 1, "a call reads a value that is not there"));
    const int64_t count = words.length(2, "a call states more words than the file holds");
    for (int64_t j = 0; j < count; ++j) {
      const Tag tag = Tag(words.next(CONSTANT, PLAN, "a word of a call is of no known kind"));
      const Affine value = tag == GROWING ? read_affine(words) : Affine{words.next(), 0};
      const bool address = tag == TABLE, plan = tag == PLAN;
      if (address) require(is_address(call.kind, size_t(j)), "a number of a call is said to be an address");
      if (plan) require(is_plan(call.kind, size_t(j)) && value.first >= 0 && value.first < plans, "a call has a plan that is not there");
      if (!address && !plan && (is_address(call.kind, size_t(j)) || is_plan(call.kind, size_t(j))))
        require(tag == CONSTANT && value.first == 0, "an address of a call is a number");
      call.words.push_back({tag, value});
    }
    calls_.push_back(std::move(call));
  }
  require(words.ended(), "it has words that nothing reads");
}

inline std::unique_ptr<PlanOf> Model::make_plan(const PlanForm& form, int64_t batch, Work& work) const {
  auto plan = std::make_unique<PlanOf>();
  plan->weight = &weights_[size_t(form.weight)];
  const auto fill = [&](const std::vector<Affine>& from, void* to) {
    for (size_t i = 0; i < from.size(); ++i) {
      const int64_t value = from[i].at(batch);
      std::memcpy(static_cast<char*>(to) + 8 * i, &value, 8);
    }
  };
  fill(form.geometry, &plan->geometry);
  plan->geometry.threads = threads_;
  plan->geometry.pairs = plan->weight->packing == HALVES && kernels_.multiplies_pairs();
  plan->pooled = !form.pool.empty();
  fill(form.pool, &plan->pool);
  check_geometry(*plan, work);
  const bool bytes = plan->weight->packing == QUADS;
  require(!bytes || !plan->pooled, "a convolution of bytes pools");
  void* const made = bytes ? kernels_.bytes_plan_new(plan->weight->kernels.get(), &plan->geometry)
                           : kernels_.plan_new(plan->weight->kernels.get(), &plan->geometry, plan->pooled ? &plan->pool : nullptr);
  if (!made) throw std::bad_alloc();
  plan->kernels = Held(made, bytes ? kernels_.bytes_plan_free : kernels_.plan_free);
  return plan;
}

// Nothing is read before it has been written, and all of the outputs is.
inline void Model::check_order(const Instance& made, const std::vector<Access>& accesses, int64_t batch, Work& work) const {
  std::vector<Written> known(1 + inputs_.size() + outputs_.size());  // the arena, inputs, outputs
  for (size_t c = 0; c < made.calls.size(); ++c) {
    const CallWords& call = made.calls[c];
    for (size_t i = 0; i < call.x.size(); ++i) {
      const Extent& x = *call.x[i];
      const bool given = x.tensor >= 0 && x.tensor < int64_t(inputs_.size());
      require(given || known[size_t(x.tensor + 1)].covers(x, accesses[c].reads.at(i), work), "a call reads what nothing has written before");
    }
    known[size_t(call.y->tensor + 1)].add(*call.y, accesses[c].writes, work);
  }
  for (size_t i = 0; i < outputs_.size(); ++i)
    require(known[1 + inputs_.size() + i].covers({0, Wide(outputs_[i].elements) * batch * 4}), "an output is not written, or only in part");
}

inline std::unique_ptr<Instance> Model::make(int64_t batch) const {
  auto made = std::make_unique<Instance>();
  Work work(file_.mapping.size());
  std::vector<Access> accesses;
  const int64_t arena = arena_.at(batch);
  require(arena >= 0 && arena <= MOST_BYTES, "its values take too much memory");
  for (const ValueForm& form : values_) {
    const Extent value{form.tensor, form.offset.at(batch), form.images.at(batch), form.image, form.elements, form.bytes};
    require(value.offset >= 0 && value.offset % value.bytes == 0 && value.images >= 0 && value.images <= MOST && value.image >= 0, "a value lies in an impossible place");
    Wide room = arena;
    if (value.tensor >= 0) {
      const size_t i = size_t(value.tensor), inputs = inputs_.size();
      room = Wide(batch) * (i < inputs ? inputs_[i].elements : outputs_[i - inputs].elements) * 4;
    }
    require(value.offset + value.available() * value.bytes <= room, "a value reaches past its memory");
    made->values.push_back(value);
  }
  for (const PlanForm& plan : plans_) made->plans.push_back(make_plan(plan, batch, work));
  std::vector<Step> steps;
  for (const CallForm& form : calls_) {
    CallWords call{};
    call.work = &work;
    for (const auto& word : form.words) {
      call.tables.push_back(word.tag == TABLE ? &file_.table(word.value.first) : nullptr);
      call.plans.push_back(word.tag == PLAN ? made->plans[size_t(word.value.first)].get() : nullptr);
      const void* const at = call.tables.back() ? call.tables.back()->at : call.plans.back() ? call.plans.back()->kernels.get() : nullptr;
      call.words.push_back(at ? int64_t(reinterpret_cast<intptr_t>(at)) : word.tag == TABLE || word.tag == PLAN ? 0 : word.value.at(batch));
    }
    call.y = &made->values[size_t(form.y)];
    require(call.y->tensor < 0 || call.y->tensor >= int64_t(inputs_.size()), "a call writes to an input");
    for (const int64_t x : form.reads) call.x.push_back(&made->values[size_t(x)]);
    require(!call.words.empty(), "a call has no words");
    accesses.push_back(check_call(form.kind, call));
    call.work = nullptr;
    made->calls.push_back(std::move(call));
  }
  check_order(*made, accesses, batch, work);
  for (size_t i = 0; i < calls_.size(); ++i) {
    Step step{calls_[i].kind, made->calls[i].words.data(), calls_[i].y, int64_t(calls_[i].reads.size()), {}};
    std::copy(calls_[i].reads.begin(), calls_[i].reads.end(), step.x);
    steps.push_back(step);
  }
  std::vector<Place> places;
  for (const Extent& value : made->values) places.push_back({value.tensor, value.offset});
  void* const program = kernels_.program_new(steps.data(), int64_t(steps.size()), places.data(), int64_t(places.size()), arena, threads_);
  if (!program) throw std::bad_alloc();
  made->program = Held(program, kernels_.program_free);
  return made;
}

}  // namespace lcnn
