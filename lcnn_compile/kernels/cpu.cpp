// Lookup convolution on CPU in float32: y = act(conv(x, P·D) + bias + residual), each output written once.
//
// Work proceeds in bands of output rows. The dictionary stage forms S = D * x for a band in a scratch that stays in L2;
// the lookup stage then reads S at one base offset per tap. Padding belongs to S: x is never padded. S is split by the
// phases of the stride, so that a tap is a contiguous vector for any stride. Within a phase, pixels are numbered over rows
// of `pitch`, so that small images fill vectors too. Every sum has a fixed order, whatever the bands and threads are.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu_narrow.h"

namespace lcnn {
namespace {

const Kernels kernels;
const NarrowKernels<Channels> narrow_form;
const NarrowKernels<const int32_t*> narrow_look_up;

int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Filters that share their taps, few enough for one call of the micro-kernel (or two, where registers are few).
struct Block {
  int64_t first_tap, taps, coefficients;
  int size, first_filter;
};

// A lookup weight, packed by blocks of filters: coefficients [taps][size].
struct Weight {
  int64_t groups, k, m, kh, kw, n;
  std::vector<float> dictionary, coefficients;
  std::vector<Block> rows, blocks;
  std::vector<int64_t> first_block;  // of each convolution group
  std::vector<int32_t> indices, positions, filters;
};

// Sizes as equal as possible, none above BLOCK.
int part_size(int64_t total, int64_t parts, int64_t i) { return int((i + 1) * total / parts - i * total / parts); }

void pack_dictionary(Weight& w, const float* dictionary) {
  const int64_t parts = ceil_div(w.k, BLOCK);
  w.dictionary.resize(w.groups * w.k * w.m);
  float* to = w.dictionary.data();
  for (int64_t i = 0, row = 0; i < parts; ++i) {
    const int size = part_size(w.k, parts, i);
    w.rows.push_back({0, w.m, row * w.m, size, int(row)});
    row += size;
  }
  for (int64_t g = 0; g < w.groups; ++g)
    for (const Block& block : w.rows)
      for (int64_t c = 0; c < w.m; ++c)
        for (int f = 0; f < block.size; ++f) *to++ = dictionary[((g * w.k) + block.first_filter + f) * w.m + c];
}

void pack_lookups(Weight& w, int64_t filter_groups, int64_t size, const float* coefficients, const int32_t* indices,
                  const int32_t* positions, const int32_t* offsets, const int32_t* table) {
  std::vector<int32_t> order;
  for (int64_t j = 0; j < filter_groups; ++j) {
    if (j % (filter_groups / w.groups) == 0) w.first_block.push_back(int64_t(w.blocks.size()));
    const int64_t first = int64_t(w.indices.size()), taps = offsets[j + 1] - offsets[j];
    order.resize(taps);
    std::iota(order.begin(), order.end(), offsets[j]);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {  // by address: kinder to the TLB
      return indices[a] != indices[b] ? indices[a] < indices[b] : positions[a] < positions[b];
    });
    for (int32_t t : order) {
      w.indices.push_back(indices[t]);
      w.positions.push_back(positions[t]);
    }
    std::vector<int> columns;
    for (int64_t f = 0; f < size; ++f)
      if (table[j * size + f] >= 0) columns.push_back(int(f));
    const int64_t members = int64_t(columns.size()), parts = ceil_div(members, BLOCK);
    for (int64_t i = 0, next = 0; i < parts; ++i) {
      const int part = part_size(members, parts, i);
      w.blocks.push_back({first, taps, int64_t(w.coefficients.size()), part, int(w.filters.size())});
      for (int32_t t : order)
        for (int f = 0; f < part; ++f) w.coefficients.push_back(coefficients[t * size + columns[next + f]]);
      for (int f = 0; f < part; ++f) w.filters.push_back(table[j * size + columns[next + f]]);
      next += part;
    }
  }
  w.first_block.push_back(int64_t(w.blocks.size()));
  w.n = int64_t(w.filters.size());
}

// What the caller knows about a call, apart from addresses. Strides are in elements.
struct Geometry {
  int64_t batch, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t out_height, out_width;
  int64_t stride[2], dilation[2];
  int64_t top, left;
  int64_t activation, residual_last;
  int64_t threads;
};

// Pixels of x with the same remainder by the stride: S keeps a plane of its own for each.
struct Phase {
  int64_t row, column;
  int64_t first_valid, end_valid;  // columns of the grid that lie in the image
};

// S of a band: for each dictionary vector, `phases` grids of `rows` x `pitch`.
struct Plan {
  const Weight& w;
  Geometry g;
  std::vector<Phase> phases;
  std::vector<int32_t> offsets;  // of the taps, in S
  int64_t reach_h, reach_w;      // farthest row and column of a phase that a tap adds
  int64_t pitch, band, bands, phase_plane, plane, tile;
  int64_t extent;         // floats from the address of x to the end of its memory
  bool connected;  // a fully connected layer: images become the pixels of one row, and lie next to their filters in y
  bool few;        // too few pixels for vectors
  bool by_rows;     // vectors of output pixels start at each row, rather than anywhere
  bool stream;    // output goes past the caches
  bool cooperate;   // all threads share one band, rather than each having its own

  Plan(const Weight& weight, const Geometry& geometry);
  int64_t scratch() const { return w.k * plane; }
  int64_t packed() const { return w.m * tile * LANES; }
  void layout(int64_t rows);
};

constexpr int64_t DIRECT_BLOCKS = 4;  // up to so many blocks of D, x is read where it lies rather than packed
constexpr int64_t LINES_AHEAD = 8;    // of each channel, wanted for the next tile

static int64_t env(const char* n, int64_t d) { const char* v = getenv(n); return v ? atoll(v) : d; }
const int64_t S_BYTES = env("LCNN_S", 160 << 10);

Plan::Plan(const Weight& weight, const Geometry& geometry) : w(weight), g(geometry) {
  connected = w.kh * w.kw == 1 && g.height * g.width == 1 && g.out_height * g.out_width == 1 && g.top + g.left == 0;
  if (connected) {
    g.width = g.out_width = g.batch;
    g.stride_w = g.stride_n;
    g.batch = g.stride[0] = g.stride[1] = 1;
  }
  few = connected || g.out_height * g.out_width <= 4;
  reach_h = (w.kh - 1) * g.dilation[0] / g.stride[0];
  reach_w = (w.kw - 1) * g.dilation[1] / g.stride[1];
  pitch = g.out_width;
  for (int64_t r = 0; r < w.kh; ++r)
    for (int64_t c = 0; c < w.kw; ++c) {
      Phase p{r * g.dilation[0] % g.stride[0], c * g.dilation[1] % g.stride[1], 0, 0};
      const auto same = [&](const Phase& q) { return q.row == p.row && q.column == p.column; };
      if (std::any_of(phases.begin(), phases.end(), same)) continue;
      p.first_valid = std::max<int64_t>(0, ceil_div(g.left - p.column, g.stride[1]));
      p.end_valid = std::min(ceil_div(g.width + g.left - p.column, g.stride[1]), g.out_width + reach_w);
      // The zeros to the right of a row may be those to the left of the next one.
      pitch = std::max({pitch, p.end_valid, g.out_width + reach_w - p.first_valid});
      phases.push_back(p);
    }
  layout(1);
  const int64_t one = scratch();
  layout(2);
  const int64_t per_row = std::max<int64_t>(1, (scratch() - one));
  int64_t rows = std::clamp<int64_t>(1 + (S_BYTES / 4 - one) / per_row, 1, g.out_height);
  int64_t count = ceil_div(g.out_height, rows);
  cooperate = g.batch * count < g.threads;
  if (!cooperate && g.batch * count < 8 * g.threads)
    while (g.batch * count % g.threads && count < g.out_height) ++count;
  layout(ceil_div(g.out_height, count));
  bands = ceil_div(g.out_height, band);
  by_rows = ceil_div(g.out_width, LANES) * band <= ceil_div((band - 1) * pitch + g.out_width, LANES);
  tile = w.m > 1024 ? 3 : TILE;
  extent = (g.batch - 1) * g.stride_n + (w.groups * w.m - 1) * g.stride_c + (g.height - 1) * g.stride_h +
           (g.width - 1) * g.stride_w + 1;
  stream = by_rows && g.out_width % LANES == 0 && w.n * g.out_height * g.out_width * 4 > env("LCNN_STREAM", 8 << 20);
  offsets.resize(w.indices.size());
  for (size_t t = 0; t < offsets.size(); ++t) {
    const int64_t down = w.positions[t] / w.kw * g.dilation[0], right = w.positions[t] % w.kw * g.dilation[1];
    int64_t phase = 0;
    while (phases[phase].row != down % g.stride[0] || phases[phase].column != right % g.stride[1]) ++phase;
    offsets[t] = int32_t(w.indices[t] * plane + phase * phase_plane + down / g.stride[0] * pitch + right / g.stride[1]);
  }
}

void Plan::layout(int64_t rows) {
  band = rows;
  // Vectors may start at the last valid pixel, so that a vector's worth of slack lies behind it, twice for the shift.
  phase_plane = round_up((rows + reach_h) * pitch + reach_w + 2 * LANES, LANES);
  plane = phase_plane * int64_t(phases.size());
  if (plane / LANES % 2 == 0) plane += LANES;  // keeps planes from falling into the same cache sets
  if (plane > INT32_MAX / std::max<int64_t>(1, w.k)) throw std::bad_alloc();
}

// The threads that work on one band, and the place of this one among them.
struct Team {
  int64_t rank, size;
  void wait() const {
#if defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
};

struct Grid;

struct Call {
  const Plan& p;
  const float* x;
  const float* bias;
  const float* residual;
  float* y;

  Grid grid(const Phase& at, int64_t first_row, int64_t rows) const;
  void form_few(const float* origin, const float* dictionary, const Phase& at, const Grid& grid, float* plane, Team team) const;
  Pixels out_pixels(int64_t v, int64_t per_row, int64_t rows) const;
  void look_up_few(const Lookup& to, int64_t group, int64_t rows, Team team) const;
  Pixels pixels_in(const Grid& grid, const Phase& at, int64_t first) const;
  void band(int64_t image, int64_t index, float* s, float* packed, Team team) const;
  void dictionary_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, float* s, float* packed, Team team) const;
  void lookup_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, const float* s, Team team) const;
};

// Where the dictionary stage stands in the grid of a phase.
struct Grid {
  int64_t begin, stop;  // the pixels to form; zeros around them
  int64_t first_source, row_source, column_source;  // in a channel of x: of pixel (0, 0), and per row and column
};

Grid Call::grid(const Phase& at, int64_t first_row, int64_t rows) const {
  const Geometry& g = p.g;
  const auto row_of = [&](int64_t h) {
    return std::clamp<int64_t>(ceil_div(h + g.top - at.row - first_row * g.stride[0], g.stride[0]), 0, rows + p.reach_h);
  };
  const int64_t first = row_of(0), end = row_of(g.height);
  const bool empty = first >= end || at.first_valid >= at.end_valid;
  return {empty ? 0 : first * p.pitch + at.first_valid,
          empty ? 0 : (end - 1) * p.pitch + at.end_valid,
          (first_row * g.stride[0] + at.row - g.top) * g.stride_h + (at.column - g.left) * g.stride_w,
          g.stride[0] * g.stride_h,
          g.stride[1] * g.stride_w};
}

// The vector of grid pixels from `first` on.
Pixels Call::pixels_in(const Grid& grid, const Phase& at, int64_t first) const {
  Pixels found{0, first, 0, 0};
  for (int64_t lane = 0, row = first / p.pitch; lane < LANES && first + lane < grid.stop; ++row) {
    const int64_t from = std::max(first + lane, row * p.pitch + at.first_valid);
    const int64_t end = std::min({first + LANES, row * p.pitch + at.end_valid, grid.stop});
    if (end > from) {
      if (!found.count)
        found.source = grid.first_source + row * grid.row_source + (from - row * p.pitch) * grid.column_source;
      found.mask |= ((1u << (end - from)) - 1) << (from - first);
      found.count += int(end - from);
    }
    lane = (row + 1) * p.pitch - first;
  }
  return found;
}

// `length` floats that lie `step` apart.
void copy_spread(float* to, const float* from, int64_t length, int64_t step) {
  int64_t i = 0;
  if (step == 1)
    for (; i + LANES <= length; i += LANES) store(to + i, load(from + i));
  if (step == 2)
    for (; i + LANES < length; i += LANES) store(to + i, even_lanes(load(from + 2 * i), load(from + 2 * i + LANES)));
  for (; i < length; ++i) to[i] = from[i * step];
}

// Copy one tile of every channel, vectors side by side; lanes that are not valid become zeros.
void pack(const float* x, const Former& to, const Pixels* pixels, int64_t count, const Phase& at, const Grid& grid,
          int64_t pitch, int64_t first_pixel, bool contiguous, float* packed) {
  if (contiguous) {
    for (int64_t c = 0; c < to.channels; ++c, x += to.pitch)
      for (int64_t v = 0; v < count; ++v, packed += LANES)
        store(packed, pixels[v].mask == FULL ? load(x + pixels[v].source)
                                             : expand(load_first(x + pixels[v].source, pixels[v].count), pixels[v].mask));
    return;
  }
  const int64_t lanes = count * LANES, last_pixel = std::min(first_pixel + lanes, grid.stop);
  for (int64_t c = 0; c < to.channels; ++c, x += to.pitch, packed += lanes) {
    std::memset(packed, 0, sizeof(float) * lanes);
    for (int64_t row = first_pixel / pitch; row * pitch < last_pixel; ++row) {
      const int64_t from = std::max(first_pixel, row * pitch + at.first_valid);
      const int64_t length = std::min(last_pixel, row * pitch + at.end_valid) - from;
      const float* source = x + grid.first_source + row * grid.row_source + (from - row * pitch) * grid.column_source;
      copy_spread(packed + (from - first_pixel), source, length, grid.column_source);
    }
  }
}

// A member's share of the units of a stage: every block at one tile of pixels, then at the next.
struct Share {
  int64_t unit, end, blocks, tile, block;
  bool new_tile = true;

  Share(int64_t tiles, int64_t count, Team team)
      : unit(tiles * count * team.rank / team.size),
        end(tiles * count * (team.rank + 1) / team.size),
        blocks(count),
        tile(count ? unit / count : 0),
        block(count ? unit % count : 0) {}
  bool more() const { return unit < end; }
  void advance() {
    ++unit;
    new_tile = ++block == blocks;
    if (new_tile) block = 0, ++tile;
  }
};

// Calls `pass(f, filters, v, vectors)` for pieces of `size` filters x `count` vectors that fit the registers.
template <class Pass>
inline void in_passes(int size, int64_t count, Pass pass) {
  for (int f = 0; f < size; f += FILTERS) {
    const int filters = std::min(FILTERS, size - f), fit = vectors_for(filters);
    if (count <= fit) {
      pass(f, filters, 0, count);
      continue;
    }
    const int64_t passes = (count + fit - 1) / fit;
    for (int64_t i = 0, v = 0; i < passes; ++i) {
      const int64_t next = count * (i + 1) / passes;
      pass(f, filters, v, next - v);
      v = next;
    }
  }
}

// Calls `at_pixels(index, pixels)` for every pixel from `begin` on in steps of FEW and 1.
template <class Each>
void in_few(int64_t count, Each at_pixels) {
  for (int64_t i = 0; i < count;) {
    const int size = count - i >= FEW ? FEW : 1;
    at_pixels(i, size);
    i += size;
  }
}

void Call::form_few(const float* origin, const float* dictionary, const Phase& at, const Grid& grid, float* plane,
                    Team team) const {
  const int64_t blocks = int64_t(p.w.rows.size()), width = at.end_valid - at.first_valid;
  const int64_t first = grid.begin / p.pitch, pixels = grid.stop ? width * ((grid.stop - 1) / p.pitch + 1 - first) : 0;
  for (int64_t b = blocks * team.rank / team.size; b < blocks * (team.rank + 1) / team.size; ++b) {
    const Block& block = p.w.rows[b];
    for (int f = 0; f < block.size; ++f) std::fill_n(plane + (block.first_filter + f) * p.plane, p.phase_plane, 0.0f);
    in_few(pixels, [&](int64_t begin, int size) {
      const float* base[FEW];
      int64_t target[FEW];
      for (int i = 0; i < size; ++i) {
        const int64_t row = first + (begin + i) / width, column = at.first_valid + (begin + i) % width;
        base[i] = origin + grid.first_source + row * grid.row_source + column * grid.column_source;
        target[i] = row * p.pitch + column;
      }
      float sums[FEW * BLOCK];
      narrow_form.at[block.size][size](base, {p.g.stride_c}, dictionary + block.coefficients, p.w.m, sums);
      for (int i = 0; i < size; ++i)
        for (int f = 0; f < block.size; ++f) plane[(block.first_filter + f) * p.plane + target[i]] = sums[i * block.size + f];
    });
  }
}

void Call::dictionary_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, float* s, float* packed,
                            Team team) const {
  const Weight& w = p.w;
  const int64_t offset = image * p.g.stride_n + group * w.m * p.g.stride_c, blocks = int64_t(w.rows.size());
  const float* origin = x + offset;
  const float* dictionary = w.dictionary.data() + group * w.k * w.m;
  for (size_t phase = 0; phase < p.phases.size(); ++phase) {
    const Phase& at = p.phases[phase];
    const Grid grid = this->grid(at, first_row, rows);
    float* const plane = s + phase * p.phase_plane;
    if (p.few) {
      form_few(origin, dictionary, at, grid, plane, team);
      continue;
    }
    for (int64_t i = w.k * team.rank / team.size; i < w.k * (team.rank + 1) / team.size; ++i) {
      std::fill(plane + i * p.plane, plane + i * p.plane + grid.begin, 0.0f);
      std::fill(plane + i * p.plane + grid.stop, plane + i * p.plane + p.phase_plane, 0.0f);
    }
    // Valid lanes lie side by side in x, even where a vector goes from one row to the next.
    const bool contiguous = grid.column_source == 1 && grid.row_source == at.end_valid - at.first_valid;
    const int64_t vectors = ceil_div(grid.stop - grid.begin, LANES), tiles = ceil_div(vectors, p.tile);
    Pixels pixels[TILE];
    Former from{};
    int64_t count = 0, calls = 0;
    for (Share share(tiles, blocks, team); share.more(); share.advance()) {
      if (share.new_tile) {
        const int64_t first = vectors * share.tile / tiles;
        count = vectors * (share.tile + 1) / tiles - first;
        for (int64_t v = 0; v < count; ++v) pixels[v] = pixels_in(grid, at, grid.begin + (first + v) * LANES);
        from = {origin, p.g.stride_c, w.m, plane, p.plane, {}};
        const int64_t last = pixels[count - 1].source + LANES + (w.m - 1) * p.g.stride_c + offset;
        from.ahead = {reinterpret_cast<const char*>(origin + pixels[count - 1].source), p.g.stride_c * 4};
        if (!contiguous || blocks > DIRECT_BLOCKS || last > p.extent) {
          pack(origin, from, pixels, count, at, grid, p.pitch, grid.begin + first * LANES, contiguous, packed);
          from.x = packed;
          from.pitch = count * LANES;
          for (int64_t v = 0; v < count; ++v) pixels[v].source = v * LANES, pixels[v].mask = FULL;
        }
        calls = 0;
      }
      const Block& block = w.rows[share.block];
      in_passes(block.size, count, [&](int f, int filters, int64_t v, int64_t width) {
        const bool look_ahead = contiguous && calls++ < LINES_AHEAD / 2;
        kernels.form[filters][width](from, pixels + v, dictionary + block.coefficients + f, block.size,
                                     plane + (block.first_filter + f) * p.plane, look_ahead);
        from.ahead.at += 128;
      });
    }
  }
}

void Call::look_up_few(const Lookup& to, int64_t group, int64_t rows, Team team) const {
  const Weight& w = p.w;
  const int64_t first_block = w.first_block[group], blocks = w.first_block[group + 1] - first_block;
  for (int64_t b = blocks * team.rank / team.size; b < blocks * (team.rank + 1) / team.size; ++b) {
    const Block& block = w.blocks[first_block + b];
    in_few(rows * p.g.out_width, [&](int64_t begin, int size) {
      const float* base[FEW];
      for (int i = 0; i < size; ++i)
        base[i] = to.s + (begin + i) / p.g.out_width * p.pitch + (begin + i) % p.g.out_width;
      float sums[FEW * BLOCK];
      narrow_look_up.at[block.size][size](base, p.offsets.data() + block.first_tap,
                                          w.coefficients.data() + block.coefficients, block.taps, sums);
      for (int i = 0; i < size; ++i)
        for (int f = 0; f < block.size; ++f) {
          const int64_t filter = w.filters[block.first_filter + f];
          const int64_t target = p.connected ? (begin + i) * w.n + filter : filter * to.plane + begin + i;
          Vec y = splat(sums[i * block.size + f] + (bias ? bias[filter] : 0.0f));
          if (to.residual && !to.epilogue.residual_last) y += to.residual[target];
          y = to.epilogue(y);
          if (to.residual && to.epilogue.residual_last) y += to.residual[target];
          to.y[target] = y[0];
        }
    });
  }
}

// Vector number `v` of output pixels.
Pixels Call::out_pixels(int64_t v, int64_t per_row, int64_t rows) const {
  const int64_t wide = p.g.out_width, source = p.by_rows ? v / per_row * p.pitch + v % per_row * LANES : v * LANES;
  int64_t row = source / p.pitch, column = source % p.pitch;
  Pixels found{source, row * wide + std::min(column, wide), 0, 0};
  for (int64_t lane = 0; lane < LANES && row < rows; ++row, column = 0) {
    const int64_t valid = std::clamp<int64_t>(wide - column, 0, LANES - lane);
    found.mask |= ((1u << valid) - 1) << lane;
    found.count += int(valid);
    lane += p.pitch - column;
    if (p.by_rows) break;
  }
  return found;
}

void Call::lookup_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, const float* s, Team team) const {
  const Weight& w = p.w;
  const Geometry& g = p.g;
  const int64_t area = g.out_height * g.out_width;
  const int64_t per_row = ceil_div(g.out_width, LANES);
  const int64_t vectors = p.by_rows ? per_row * rows : ceil_div((rows - 1) * p.pitch + g.out_width, LANES);
  const int64_t tiles = ceil_div(vectors, TILE);
  const int64_t first_block = w.first_block[group], blocks = w.first_block[group + 1] - first_block;
  const int64_t start = image * w.n * area + first_row * g.out_width;
  const Lookup to{s, bias, residual ? residual + start : nullptr, y + start, area,
                  Epilogue(int(g.activation), g.residual_last != 0), p.stream && reinterpret_cast<uintptr_t>(y) % 64 == 0};
  if (p.few) return look_up_few(to, group, rows, team);
  Pixels pixels[TILE];
  int64_t count = 0;
  for (Share share(tiles, blocks, team); share.more(); share.advance()) {
    if (share.new_tile) {
      const int64_t first = vectors * share.tile / tiles;
      count = vectors * (share.tile + 1) / tiles - first;
      for (int64_t i = 0; i < count; ++i) pixels[i] = out_pixels(first + i, per_row, rows);
    }
    const Block& block = w.blocks[first_block + share.block];
    in_passes(block.size, count, [&](int f, int filters, int64_t v, int64_t width) {
      kernels.look_up[filters][width](to, pixels + v, p.offsets.data() + block.first_tap,
                                      w.coefficients.data() + block.coefficients + f, block.size, block.taps,
                                      w.filters.data() + block.first_filter + f);
    });
  }
}

void Call::band(int64_t image, int64_t index, float* s, float* packed, Team team) const {
  const int64_t first_row = index * p.band, rows = std::min(p.band, p.g.out_height - first_row);
  for (int64_t group = 0; group < p.w.groups; ++group) {
    dictionary_stage(image, group, first_row, rows, s, packed, team);
    team.wait();
    lookup_stage(image, group, first_row, rows, s, team);
    if (p.stream) fence();
    team.wait();
  }
}

// Memory that the calling thread keeps between calls.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* at) const { std::free(at); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 4096, sizeof(float) * floats)) throw std::bad_alloc();
    memory.reset(static_cast<float*>(fresh));
    size = floats;
  }
  return memory.get();
}

void run(const Call& call, int threads) {
  const Plan& p = call.p;
  const int64_t items = p.g.batch * p.bands;
  const int64_t s_size = round_up(p.scratch(), 1024), packed_size = round_up(p.packed(), 1024) + 64;
  float* const shared = scratch(threads * (s_size + packed_size));
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int64_t rank = omp_get_thread_num(), size = omp_get_num_threads();
#else
    const int64_t rank = 0, size = 1;
#endif
    float* const packed = shared + threads * s_size + rank * packed_size;
    if (p.cooperate) {
      for (int64_t i = 0; i < items; ++i) call.band(i / p.bands, i % p.bands, shared, packed, {rank, size});
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items; ++i) call.band(i / p.bands, i % p.bands, shared + rank * s_size, packed, {0, 1});
    }
  }
}

}  // namespace
}  // namespace lcnn

// Everything the caller passes has been validated in Python; what may fail here is memory, answered by null or 1.
extern "C" {

void* lcnn_weight_new(const int64_t* sizes, const float* dictionary, const float* coefficients, const int32_t* indices,
                      const int32_t* positions, const int32_t* offsets, const int32_t* filters) try {
  auto w = std::make_unique<lcnn::Weight>();
  w->groups = sizes[0], w->k = sizes[1], w->m = sizes[2], w->kh = sizes[3], w->kw = sizes[4];
  lcnn::pack_dictionary(*w, dictionary);
  lcnn::pack_lookups(*w, sizes[5], sizes[6], coefficients, indices, positions, offsets, filters);
  return w.release();
} catch (const std::exception&) {
  return nullptr;
}

void lcnn_weight_free(void* weight) { delete static_cast<lcnn::Weight*>(weight); }

void* lcnn_plan_new(const void* weight, const lcnn::Geometry* geometry) try {
  return new lcnn::Plan(*static_cast<const lcnn::Weight*>(weight), *geometry);
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
}
