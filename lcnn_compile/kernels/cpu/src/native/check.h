// What each call of a program may do: read and write the values that it names, and the tables that it was given, and nothing else.
#pragma once

#include <array>

#include "access.h"
#include "weights.h"

namespace lcnn {

// Images of so many elements, `image` apart, must lie in a value, none over another.
inline Box within(const Extent& value, int64_t images, int64_t image, Wide elements, int64_t bytes, const char* what) {
  require(images >= 0 && images <= MOST && image >= 0 && image <= MOST && elements >= 0 && (images < 2 || image >= elements), what);
  require(value.bytes == bytes && (images == 0 || Wide(images - 1) * image + elements <= value.available()), what);
  return images_of(images, image, images ? elements : 0);
}

inline void sized(std::initializer_list<int64_t> values, int64_t least, const char* what) {
  for (const int64_t value : values) require(value >= least && value <= (int64_t(1) << 31), what);
}

// A kernel that slides over a padded image: it is not much larger than that, and its windows end there or, where padding behind it is wide, not
// far from there.
inline void slides(const int64_t* kernel, const int64_t* dilation, const int64_t* stride, int64_t height, int64_t width, int64_t top, int64_t left,
                   int64_t out_height, int64_t out_width, int64_t planes, const char* what) {
  constexpr int64_t MARGIN = 1 << 20, KERNEL_MARGIN = 1 << 12;
  const Wide rows = Wide(kernel[0] - 1) * dilation[0] + 1, columns = Wide(kernel[1] - 1) * dilation[1] + 1;
  require(top <= MARGIN && left <= MARGIN, what);
  const Wide tall = 2 * (Wide(height) + top) + KERNEL_MARGIN, wide = 2 * (Wide(width) + left) + KERNEL_MARGIN;
  require(rows <= tall && columns <= wide && stride[0] <= tall && stride[1] <= wide, what);
  const Wide down = Wide(out_height - 1) * stride[0] + rows, right = Wide(out_width - 1) * stride[1] + columns;
  require(down <= Wide(height) + top + rows + MARGIN && right <= Wide(width) + left + columns + MARGIN, what);
  require((down + height) * (right + width) <= MOST / planes, what);
}

// A call as the file has it: its structure, whose words are numbers or addresses, and the tables that these are of.
struct CallWords {
  std::vector<int64_t> words;
  std::vector<const Table*> tables;         // of each word, or null
  std::vector<const struct PlanOf*> plans;  // the same
  std::vector<const Extent*> x;
  const Extent* y;
  Work* work;

  template <class T>
  const T& as() const {
    require(words.size() * 8 == sizeof(T), "a call has too many words, or too few");
    return *reinterpret_cast<const T*>(words.data());
  }
  // The table behind an address in the structure; null where there is none.
  const Table* table(const void* member) const {
    return tables[size_t(static_cast<const int64_t*>(member) - words.data())];
  }
  void reads(size_t least, size_t most) const { require(x.size() >= least && x.size() <= most, "a call reads another number of values"); }
};

// Of each image of a value: how far the next one is, how many elements of it a call reads or writes, and their bytes.
struct Images {
  int64_t apart;
  Wide elements;
  int64_t bytes;
};

// What a call does that reads its first value image by image, and writes its result so.
inline Access by_images(const CallWords& call, int64_t count, const Images& x, const Images& y, const char* what) {
  return {{within(*call.x[0], count, x.apart, x.elements, x.bytes, what)}, within(*call.y, count, y.apart, y.elements, y.bytes, what)};
}

struct PlanOf {
  const Packed* weight;
  Geometry geometry;
  bool pooled;
  Pool pool;
  Held kernels{nullptr, nullptr};
};

inline void check_pool(const Pool& p) {
  const char* const what = "a pooling has impossible sizes";
  sized({p.planes, p.height, p.width, p.out_height, p.out_width, p.kernel[0], p.kernel[1], p.stride[0], p.stride[1], p.dilation[0], p.dilation[1]}, 1, what);
  sized({p.top, p.left}, 0, what);
  require(p.lanes == 1 && p.mean >= 0 && p.mean <= 2, what);
  require(p.top < p.kernel[0] * p.dilation[0] && p.left < p.kernel[1] * p.dilation[1], what);
  slides(p.kernel, p.dilation, p.stride, p.height, p.width, p.top, p.left, p.out_height, p.out_width, 1, what);
  // Every window begins inside of the image or before it.
  require(Wide(p.out_height - 1) * p.stride[0] < Wide(p.height) + p.top && Wide(p.out_width - 1) * p.stride[1] < Wide(p.width) + p.left, what);
}

// What a plan reads and writes, apart from addresses; the numbers that the kernels derive from it must not overflow.
inline void check_geometry(const PlanOf& plan, Work& work) {
  const Geometry& g = plan.geometry;
  const char* const what = "a convolution has impossible sizes";
  sized({g.height, g.width, g.out_height, g.out_width, g.stride[0], g.stride[1], g.dilation[0], g.dilation[1], g.threads}, 1, what);
  sized({g.top, g.left}, 0, what);
  sized({g.batch}, 1, what);
  require(g.activation >= 0 && g.activation <= 4 && (g.residual_last | 1) == 1 && (g.pairs | 1) == 1, what);
  require(g.stride_w == 1 && g.stride_h == g.width && g.stride_c == g.height * g.width && g.stride_n >= 0 && g.stride_n <= MOST, what);
  require(g.out_image >= 0 && g.out_image <= MOST && g.residual_image >= 0 && g.residual_image <= MOST, what);  // read or not
  require(Wide(g.batch) * g.height * g.width < MOST && Wide(g.batch) * g.out_height * g.out_width < MOST, what);
  const Packed& w = *plan.weight;
  const int64_t kernel[2] = {w.kh, w.kw}, area = w.kh * w.kw;
  work.spend(64 + Wide(area + w.taps) * area / 4);  // each tap finds the plane that it reads
  slides(kernel, g.dilation, g.stride, g.height, g.width, g.top, g.left, g.out_height, g.out_width, std::max(w.k, w.n), what);
  require(Wide(g.batch) * g.stride_n + Wide(w.groups) * w.m * g.height * g.width <= 2 * Wide(MOST), what);  // from x to its end
  if (plan.pooled) {
    check_pool(plan.pool);
    // Bands make room for the rows of plain windows alone, and for one image.
    require(plan.pool.dilation[0] == 1 && plan.pool.dilation[1] == 1 && g.out_height * g.out_width > 1, "a convolution's pooling is none that it can do");
    require(Wide(w.n) * g.out_height * g.out_width <= Wide(1) << 32, what);
    require(plan.pool.height == g.out_height && plan.pool.width == g.out_width && plan.pool.mean < 2, "a convolution's pooling is of another size");
    require(plan.pool.planes == g.batch * w.n || plan.pool.planes == w.n, "a convolution's pooling is of another size");
  }
}

// Of a table where one is needed, and of null where it may be.
inline void floats_or_null(const CallWords& call, const void* member, int64_t least, const char* what) {
  if (const Table* table = call.table(member)) require(table->type == FLOAT32 && table->count >= least, what);
}
inline const float* floats(const CallWords& call, const void* member, Wide least, const char* what) {
  const Table* table = call.table(member);
  require(table && table->type == FLOAT32 && least <= table->count, what);
  return static_cast<const float*>(table->at);
}
inline const int32_t* places(const CallWords& call, const void* member, Wide count, int64_t least, int64_t bound, const char* what) {
  const Table* table = call.table(member);
  require(table && table->type == INT32 && count <= table->count, what);
  call.work->spend(count);
  const auto* const found = static_cast<const int32_t*>(table->at);
  for (int64_t i = 0; i < int64_t(count); ++i) require(found[i] >= least && found[i] < bound, what);
  return found;
}

inline Access check_look_up(const CallWords& call, bool of_bytes) {
  const char* const what = "a convolution reaches past its values";
  call.reads(1, 2);
  const PlanOf* const plan = call.plans[0];
  require(plan && (plan->weight->packing == QUADS) == of_bytes, "a convolution has no plan, or one of another kind");
  const Geometry& g = plan->geometry;
  const Packed& w = *plan->weight;
  const int64_t area = g.out_height * g.out_width;
  const Wide made = plan->pooled ? Wide(w.n) * plan->pool.out_height * plan->pool.out_width : Wide(w.n) * area;
  const Images x{g.stride_n, Wide(w.groups) * w.m * g.height * g.width, of_bytes ? 1 : 4};
  Access found = by_images(call, g.batch, x, {g.out_image, made, of_bytes && w.finish.to_bytes ? 1 : 4}, what);
  require(!of_bytes || (call.x.size() == 2) == (w.finish.has_residual != 0), "a convolution has a residual that its weight does not add");
  if (call.x.size() == 2) {
    require(!plan->pooled, "a convolution that pools has a residual");
    found.reads.push_back(within(*call.x[1], g.batch, g.residual_image, Wide(w.n) * area, of_bytes && w.finish.has_residual == 1 ? 1 : 4, what));
  }
  if (!of_bytes) floats_or_null(call, &call.as<LookUpStep>().bias, w.n, "a bias is too short");
  return found;
}

// `bytes`: which operands are bytes, and what stands for the result; null where all are floats.
inline Access check_map(const CallWords& call, const ByteMap* bytes = nullptr) {
  const char* const what = "an element-wise step reaches past its values";
  const Map& m = bytes ? bytes->map : call.as<Map>();
  const auto size = [&](double scale, int64_t zero) {
    require(!bytes || scale == 0 || is_scale(scale), "an element-wise step has a scale that is none");
    require(!bytes || (zero >= 0 && zero <= 255), "an element-wise step has a zero that is no byte");
    return bytes && scale != 0 ? 1 : 4;
  };
  require(m.operands >= 1 && m.operands <= MAP_OPERANDS && m.count >= 1 && m.count <= MAP_OPERATIONS && m.buffers >= 1 && m.buffers <= MAP_OPERATIONS,
          "an element-wise step has too many operands");
  for (int d = 0; d < MAP_DIMENSIONS; ++d) require(m.sizes[d] >= 0 && m.sizes[d] <= MOST, what);
  Wide elements = 1;
  for (const int64_t size : m.sizes) elements *= std::max<int64_t>(1, size), require(elements <= MOST, what);
  const auto last = [&](const int64_t* strides) {
    Wide sum = 1;
    for (int d = 0; d < MAP_DIMENSIONS; ++d) {
      require(strides[d] >= 0 && strides[d] <= MOST, what);
      sum += Wide(std::max<int64_t>(0, m.sizes[d] - 1)) * strides[d];
    }
    return sum;
  };
  require(m.to[MAP_DIMENSIONS - 1] == 1 || m.sizes[MAP_DIMENSIONS - 1] <= 1, what);
  require(call.y->bytes == (bytes ? size(bytes->scale, bytes->zero) : 4) && last(m.to) <= call.y->available() && elements <= std::max<Wide>(1, call.y->available()), what);
  const auto box = [&](const int64_t* strides) {
    Box found{0, {}};
    for (int d = 0; d < MAP_DIMENSIONS; ++d) found.dimensions.push_back({m.sizes[d], strides[d]});
    return found;
  };
  Access found{{}, box(m.to)};
  size_t next = 0;
  for (int64_t i = 0; i < m.operands; ++i) {
    const int64_t wanted = bytes ? size(bytes->scales[i], bytes->zeros[i]) : 4;
    if (const Table* table = call.table(&m.constants[i])) {
      require(wanted == 4 && table->type == FLOAT32 && last(m.strides[i]) <= table->count, what);
      continue;
    }
    require(next < call.x.size(), "an element-wise step has more operands than values");
    const Extent& x = *call.x[next++];
    require(x.bytes == wanted && last(m.strides[i]) <= x.available(), what);
    found.reads.push_back(box(m.strides[i]));
  }
  require(next == call.x.size(), "an element-wise step reads another number of values");
  std::vector<bool> made(size_t(m.operands + m.buffers), false);
  std::fill_n(made.begin(), m.operands, true);
  for (int64_t i = 0; i < m.count; ++i) {
    const Operation& o = m.operations[i];
    const int64_t registers = m.operands + m.buffers;
    require(o.function >= 0 && o.function < FUNCTIONS && o.a >= 0 && o.a < registers && o.b >= 0 && o.b < registers && o.to >= m.operands && o.to < registers,
            "an element-wise operation is unknown, or of registers that are not there");
    require(made[size_t(o.a)] && made[size_t(o.b)], "an element-wise operation reads what nothing has made");
    made[size_t(o.to)] = true;
  }
  return found;
}

inline Access check_move(const CallWords& call) {
  const char* const what = "a copy reaches past its values";
  const Move& m = call.as<Move>();
  call.reads(1, 1);
  require((m.bytes == 1 || m.bytes == 2 || m.bytes == 4) && m.bytes == call.x[0]->bytes && m.bytes == call.y->bytes, what);
  Wide elements = 1;
  for (const int64_t size : m.sizes) {
    require(size >= 1 && size <= MOST, what);
    elements *= size, require(elements <= call.y->available(), what);
  }
  const auto inside = [&](const int64_t* strides, int64_t offset, const Extent& value) {
    Wide low = offset, high = offset;
    for (int d = 0; d < MOVE_DIMENSIONS; ++d) {
      require(strides[d] >= -MOST && strides[d] <= MOST, what);
      (strides[d] < 0 ? low : high) += Wide(m.sizes[d] - 1) * strides[d];
    }
    require(offset >= -MOST && offset <= MOST && low >= 0 && high < value.available(), what);
    Box found{offset, {}};
    for (int d = 0; d < MOVE_DIMENSIONS; ++d) found.dimensions.push_back({m.sizes[d], strides[d]});
    return found;
  };
  return {{inside(m.from, m.from_offset, *call.x[0])}, inside(m.to, m.to_offset, *call.y)};
}

inline Access check_pick(const CallWords& call) {
  const char* const what = "rows and columns are picked from outside of a value";
  const Pick& p = call.as<Pick>();
  call.reads(1, 1);
  sized({p.images, p.planes}, 0, what);
  sized({p.x_plane, p.x_width, p.height, p.width}, 1, what);
  Access found = by_images(call, p.images, {p.x_image, Wide(p.planes) * p.x_plane, 4}, {p.y_image, Wide(p.planes) * p.height * p.width, 4}, what);
  places(call, &p.rows, p.height, -1, p.x_plane / p.x_width, what);
  const int32_t* const columns = places(call, &p.columns, p.width, -1, p.x_width, what);
  require(0 <= p.inner && p.inner <= p.inner_end && p.inner_end <= p.width, what);
  require(p.inner == p.inner_end || (columns[p.inner] >= 0 && columns[p.inner] + (p.inner_end - p.inner) <= p.x_width), what);
  return found;
}

inline Access check_reduce(const CallWords& call) {
  const char* const what = "a reduction reaches past its values";
  const Reduce& r = call.as<Reduce>();
  call.reads(1, 1);
  require(r.kind >= REDUCE_MEAN && r.kind <= LOG_SOFTMAX, "a reduction is unknown");
  sized({r.images, r.outer, r.inner}, 0, what);
  sized({r.size}, 1, what);
  const Wide outer = Wide(r.outer) * r.inner;
  require(outer < MOST && outer * r.size < MOST, what);
  Access found = by_images(call, r.images, {r.x_image, outer * r.size, 4}, {r.y_image, r.kind >= NORMALIZE ? outer * r.size : outer, 4}, what);
  if (r.kind != NORMALIZE) return found;
  require(r.per_entry >= 1 && r.per_entry <= MOST && r.per_outer >= 0 && r.per_outer <= MOST, what);
  const Wide entries = Wide(std::max<int64_t>(1, r.outer) - 1) * r.per_outer + (r.size - 1) / r.per_entry + 1;
  require(entries <= MOST, what);
  floats_or_null(call, &r.weight, int64_t(entries), what);
  floats_or_null(call, &r.bias, int64_t(entries), what);
  return found;
}

inline Access check_resize(const CallWords& call) {
  const char* const what = "a resizing reaches past its values";
  const Resize& r = call.as<Resize>();
  call.reads(1, 1);
  sized({r.images, r.planes}, 0, what);
  sized({r.x_height, r.x_width, r.height, r.width, r.row_taps, r.column_taps}, 1, what);
  Access found = by_images(call, r.images, {r.x_image, Wide(r.planes) * r.x_height * r.x_width, 4}, {r.y_image, Wide(r.planes) * r.height * r.width, 4}, what);
  require(Wide(r.x_height) * r.width <= int64_t(1) << 30, what);  // what lies between columns and rows
  places(call, &r.rows, Wide(r.height) * r.row_taps, 0, r.x_height, what);
  places(call, &r.columns, Wide(r.width) * r.column_taps, 0, r.x_width, what);
  floats(call, &r.row_weights, Wide(r.height) * r.row_taps, what);
  floats(call, &r.column_weights, Wide(r.width) * r.column_taps, what);
  return found;
}

inline Access check_depthwise(const CallWords& call) {
  const char* const what = "a depthwise convolution reaches past its values";
  const Depthwise& d = call.as<Depthwise>();
  call.reads(1, 2);
  sized({d.images, d.top, d.left}, 0, what);
  sized({d.channels, d.multiplier, d.height, d.width, d.out_height, d.out_width, d.kernel[0], d.kernel[1], d.stride[0], d.stride[1], d.dilation[0], d.dilation[1]}, 1, what);
  require(d.activation >= 0 && d.activation <= 4 && (d.residual_last | 1) == 1 && d.channels % d.multiplier == 0, what);
  slides(d.kernel, d.dilation, d.stride, d.height, d.width, d.top, d.left, d.out_height, d.out_width, 1, what);
  require(d.residual_image >= 0 && d.residual_image <= MOST, what);
  const Wide copied = ((Wide(d.out_height - 1) * d.stride[0] + Wide(d.kernel[0] - 1) * d.dilation[0] + 1) * (d.out_width + Wide(d.kernel[1] - 1) * d.dilation[1]) + 128) * d.stride[1];
  require(copied <= int64_t(1) << 32, what);  // of a plane
  const Wide made = Wide(d.channels) * d.out_height * d.out_width;
  Access found = by_images(call, d.images, {d.x_image, Wide(d.channels / d.multiplier) * d.height * d.width, 4}, {d.y_image, made, 4}, what);
  if (call.x.size() == 2) found.reads.push_back(within(*call.x[1], d.images, d.residual_image, made, 4, what));
  floats(call, &d.weight, Wide(d.channels) * d.kernel[0] * d.kernel[1], what);
  floats_or_null(call, &d.bias, d.channels, what);
  return found;
}

inline Access check_pool_step(const CallWords& call, bool of_bytes) {
  const char* const what = "a pooling reaches past its values";
  const PoolStep& s = call.as<PoolStep>();
  const Pool& p = s.pool;
  call.reads(1, 1);
  check_pool(p);
  const int64_t bytes = of_bytes ? 1 : 4;
  Access found = by_images(call, s.images, {s.x_image, Wide(p.planes) * p.height * p.width, bytes}, {s.y_image, Wide(p.planes) * p.out_height * p.out_width, bytes}, what);
  require(!of_bytes || (p.mean == 0 && p.dilation[0] == 1 && p.dilation[1] == 1), "a pooling of bytes is of no known kind");
  require(!call.table(&s.rows) == !call.table(&s.columns), what);
  floats_or_null(call, &s.rows, p.out_height, what);
  floats_or_null(call, &s.columns, p.out_width, what);
  return found;
}

inline Access check_mean(const CallWords& call) {
  const char* const what = "a mean reaches past its values";
  const ByteMean& m = call.as<ByteMean>();
  const Pool& p = m.pool;
  call.reads(1, 1);
  check_pool(p);
  require((m.reads_bytes | 1) == 1 && (m.writes_bytes | 1) == 1 && m.x_zero >= 0 && m.x_zero <= 255 && m.y_zero >= 0 && m.y_zero <= 255, what);
  require(p.lanes == 1 && p.dilation[0] == 1 && p.dilation[1] == 1, what);
  require(!m.reads_bytes || 255 * Wide(p.kernel[0]) * p.kernel[1] <= INT32_MAX, "a mean's sums leave 32 bits");
  Access found = by_images(call, m.images, {m.x_image, Wide(p.planes) * p.height * p.width, m.reads_bytes ? 1 : 4}, {m.y_image, Wide(p.planes) * p.out_height * p.out_width, m.writes_bytes ? 1 : 4}, what);
  floats(call, &m.rows, p.out_height, what);
  floats(call, &m.columns, p.out_width, what);
  return found;
}

inline Access check_linear(const CallWords& call) {
  const char* const what = "a linear layer reaches past its values";
  const Linear& l = call.as<Linear>();
  call.reads(1, 1);
  sized({l.images, l.rows}, 0, what);
  sized({l.inputs, l.outputs}, 1, what);
  Access found = by_images(call, l.images, {l.x_image, Wide(l.rows) * l.inputs, 4}, {l.y_image, Wide(l.rows) * l.outputs, 4}, what);
  require(Wide(l.images) * l.rows * l.inputs * l.outputs < Wide(1) << 62, what);
  floats(call, &l.weight, Wide(l.outputs) * l.inputs, what);
  floats_or_null(call, &l.bias, l.outputs, what);
  return found;
}

inline Access check_cast(const CallWords& call) {
  const char* const what = "a rounding reaches past its values";
  const CastStep& c = call.as<CastStep>();
  call.reads(1, 1);
  require(is_scale(c.scale) && c.zero >= 0 && c.zero <= 255 && (c.to_bytes | 1) == 1 && c.count >= 0 && c.count <= MOST, what);
  return by_images(call, c.images, {c.x_image, c.count, c.to_bytes ? 4 : 1}, {c.y_image, c.count, c.to_bytes ? 1 : 4}, what);
}

// A kind that is new to program.h must be known to everything below.
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wswitch-enum"

// What a call reads and writes; throws BadFile unless it stays within what it was given.
inline Access check_call(int64_t kind, const CallWords& call) {
  switch (Kind(kind)) {
    case LOOK_UP: call.as<LookUpStep>(); return check_look_up(call, false);
    case LOOK_UP_BYTES: call.as<ByteLookUpStep>(); return check_look_up(call, true);
    case POOL: return check_pool_step(call, false);
    case POOL_BYTES: return check_pool_step(call, true);
    case LINEAR: return check_linear(call);
    case MAP: return check_map(call);
    case MOVE: return check_move(call);
    case PICK: return check_pick(call);
    case REDUCE: return check_reduce(call);
    case RESIZE: return check_resize(call);
    case DEPTHWISE: return check_depthwise(call);
    case CAST: return check_cast(call);
    case MAP_BYTES: return check_map(call, &call.as<ByteMap>());
    case MEAN_BYTES: return check_mean(call);
    case TURN: break;  // images side by side are for freeze() alone
  }
  throw BadFile("it has a step of a kind that this library does not know");
}

inline const char* kind_name(int64_t kind) {
  switch (Kind(kind)) {
    case LOOK_UP: return "lookup convolution";
    case LOOK_UP_BYTES: return "lookup convolution of bytes";
    case POOL: return "pooling";
    case POOL_BYTES: return "pooling of bytes";
    case LINEAR: return "linear";
    case MAP: return "element-wise";
    case MOVE: return "copy";
    case PICK: return "rows and columns";
    case REDUCE: return "reduction";
    case RESIZE: return "resizing";
    case DEPTHWISE: return "depthwise convolution";
    case CAST: return "rounding";
    case MAP_BYTES: return "element-wise of bytes";
    case MEAN_BYTES: return "mean of bytes";
    case TURN: break;
  }
  return "unknown";
}

// Which words of a call's structure are addresses of tables, the rest are numbers.
inline bool is_address(int64_t kind, size_t word) {
  const auto one = [&](size_t offset, size_t bytes = 8) { return word >= offset / 8 && word < (offset + bytes) / 8; };
  switch (Kind(kind)) {
    case LOOK_UP: return one(offsetof(LookUpStep, bias));
    case POOL:
    case POOL_BYTES: return one(offsetof(PoolStep, rows)) || one(offsetof(PoolStep, columns));
    case LINEAR: return one(offsetof(Linear, weight)) || one(offsetof(Linear, bias));
    case DEPTHWISE: return one(offsetof(Depthwise, weight)) || one(offsetof(Depthwise, bias));
    case MAP: return one(offsetof(Map, constants), sizeof(Map::constants));
    case MAP_BYTES: return one(offsetof(ByteMap, map) + offsetof(Map, constants), sizeof(Map::constants));
    case MEAN_BYTES: return one(offsetof(ByteMean, rows)) || one(offsetof(ByteMean, columns));
    case PICK: return one(offsetof(Pick, rows)) || one(offsetof(Pick, columns));
    case REDUCE: return one(offsetof(Reduce, weight)) || one(offsetof(Reduce, bias));
    case RESIZE: return one(offsetof(Resize, rows), 4 * 8);
    case LOOK_UP_BYTES:
    case MOVE:
    case CAST:
    case TURN: break;
  }
  return false;
}
#pragma GCC diagnostic pop

// The word that is the address of a plan, if any.
inline bool is_plan(int64_t kind, size_t word) { return word == 0 && (kind == LOOK_UP || kind == LOOK_UP_BYTES); }

}  // namespace lcnn
