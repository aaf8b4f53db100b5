// What is worked out once for all calls of the same geometry: how S is laid out, and how work is cut into bands.
#pragma once

#include <new>

#include "pool.h"
#include "weight.h"

namespace lcnn {

// What the caller knows about a call, apart from addresses. Strides are in elements.
struct Geometry {
  int64_t batch, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t out_height, out_width;
  int64_t out_image, residual_image;  // from one image of the output, and of the residual, to the next
  int64_t stride[2], dilation[2];
  int64_t top, left;
  int64_t activation, residual_last;
  int64_t threads;
  int64_t pairs;  // multiply pairs of bfloat16, where the weight is rounded
};

// Pixels of x with the same remainder by the step between formed pixels: S keeps a plane of its own for each.
struct Phase {
  int64_t row, column;
  int64_t first_valid, end_valid;  // columns of the grid that lie in the image
};

// What a tap reads of S as it is formed, from this row and column on.
struct Shift {
  int64_t phase, row, column;
  bool operator==(const Shift& other) const {
    return phase == other.phase && row == other.row && column == other.column;
  }
};


constexpr int64_t EVEN = 8;  // rows of aligned copies start at multiples of so many floats

// Room for so many elements in whole lines, an odd number of them, lest planes fall into the same cache sets.
inline int64_t odd_lines(int64_t elements, int64_t line = LANES) { return (ceil_div(elements, line) | 1) * line; }

// S of a band: for each dictionary vector, `phases` grids of formed rows x `pitch`.
//
// Where a stride uses every pixel of x, S is formed at all of them in their order, and then split: k planes are cheaper to
// take apart than the channels of x.
struct Plan {
  const Weight& w;
  Geometry g;
  std::vector<Phase> phases;
  std::vector<Shift> shifts;     // that the taps read
  std::vector<int32_t> offsets, joint_offsets;  // of the taps in S, and of those of `joint`
  std::vector<int32_t> first_of_row;  // for few pixels: of each block, the first tap of each kernel row and the end
  int64_t step[2];               // between the pixels of a phase
  int64_t skip[2];               // pixels of a phase from one output to the next: 1 unless S is split
  int64_t reach_h, reach_w;      // farthest row and column of a phase that a tap adds
  int64_t read_reach_h, read_reach_w;  // of S as it is read
  int64_t pitch, phase_plane, plane;            // of S as it is formed
  int64_t read_pitch, shift_plane, read_plane;  // of S as it is read: the same, or a copy for each shift
  Pool pooling;                                 // of the output before it is written, where `pool` points to it
  const Pool* pool;
  int64_t rows;                                 // of the output as it is written: pooled where it is
  int64_t band_rows, bands;                     // of those per band, and bands per image
  int64_t band;                                 // output rows of the convolution per band, at most
  int64_t pool_plane;                           // of the output of a band that is to be pooled
  int64_t tile;                                 // vectors of pixels in a tile of the dictionary stage, at most
  int64_t extent;                               // floats from the address of x to the end of its memory
  bool connected;  // a fully connected layer: images become the pixels of one row, and lie next to their filters in y
  bool few;        // too few pixels for vectors
  bool halves;     // S is kept in bfloat16, and pixels go by twos of vectors
  bool bytes;      // S is kept in bytes, four times LANES of them to a vector
  bool matrix;     // a matrix unit looks up, where filters share their taps
  bool matrix_forms;  // it forms S
  bool joint;      // it looks up all taps of a group at once
  bool aligned;    // S is copied for each column, so that vectors seldom cross cache lines
  bool copied;     // S is copied to be read: it is split, or aligned
  bool by_rows;    // vectors of output pixels start at each row, rather than anywhere
  bool fetch;      // lines of the output are asked for before they are written
  bool stream;     // output goes past the caches
  bool cooperate;  // all threads share one band, rather than each having its own

  Plan(const Weight& weight, const Geometry& geometry, const Pool* after = nullptr);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  // Floats that S takes.
  int64_t formed() const { return round_up(ceil_div(w.k * plane * element(), 4), LANES); }
  int64_t element() const { return bytes ? 1 : halves ? 2 : 4; }  // bytes of S
  int64_t formed_rows(int64_t rows) const { return (rows - 1) * skip[0] + 1 + reach_h; }
  int64_t scratch() const { return formed() + (copied ? w.k * read_plane : 0) + pooled(); }
  int64_t pooled() const { return pool ? round_up(w.n * pool_plane, LANES) : 0; }
  // Rows of the convolution that these rows of the output need.
  int64_t first_row(int64_t row) const { return pool ? pool->first_row(row) : row; }
  int64_t end_row(int64_t end) const { return pool ? pool->end_row(end - 1) : end; }
  int64_t packed() const {
    if (bytes) return round_up(w.m, 4) * LANES * QUAD_WORDS;
    return (matrix_forms ? std::max(w.m, w.row_chunks() * SIDE) : w.m) * tile * LANES;
  }
  int64_t vectors(int64_t rows, int64_t row_pitch) const { return whole((rows - 1) * row_pitch + g.out_width); }
  // Vectors of so many pixels.
  int64_t whole(int64_t pixels) const {
    if (bytes) return ceil_div(pixels, BYTES);
    return halves ? 2 * ceil_div(pixels, 2 * LANES) : ceil_div(pixels, LANES);
  }

 private:
  void find_phases();
  Shift shift_of(int64_t position) const;
  void find_shifts();
  void layout(int64_t written);
  void find_offsets();
  void find_kernel_rows();
};

constexpr int64_t DIRECT_BLOCKS = 4;  // up to so many blocks of D, x is read where it lies rather than packed
constexpr int64_t LINES_AHEAD = 8;    // of each channel, wanted for the next tile
constexpr int64_t L2_BYTES = 1 << 20;
constexpr int64_t S_BYTES = L2_BYTES / 2;  // of a band, with the output that is to be pooled
constexpr int64_t STREAM_ABOVE = 8 << 20;  // bytes of an output that would push everything else out of the caches
constexpr int64_t ALIGN_ABOVE = 24;        // lookups per element of the copies that repay making them

inline Plan::Plan(const Weight& weight, const Geometry& geometry, const Pool* after)
    : w(weight), g(geometry), pooling(after ? *after : Pool{}), pool(after ? &pooling : nullptr),
      rows(after ? after->out_height : geometry.out_height) {
  bytes = w.bytes;
  connected = !bytes && g.batch > 0 && w.kh * w.kw == 1 && g.height * g.width == 1 && g.out_height * g.out_width == 1 && g.top + g.left == 0;
  if (connected) {
    g.width = g.out_width = g.batch;
    g.stride_w = g.stride_n;
    g.batch = g.stride[0] = g.stride[1] = 1;
  }
  few = connected || (!bytes && g.out_height * g.out_width <= FEW);
  matrix = w.rounded && g.pairs && !few && has_matrix_unit();
  if (matrix) w.tile();
  matrix_forms = matrix && w.m >= FEW_CHANNELS;
  joint = matrix && !w.joint_tiles.empty();
  // Where a matrix unit has formed S, lookups that share nothing are faster in float32.
  halves = w.rounded && g.pairs && !few && (!matrix_forms || joint || w.group_size >= SHARED);
  if (w.rounded && !few && !halves) w.widen();
  extent = (g.batch - 1) * g.stride_n + (w.groups * w.m - 1) * g.stride_c + (g.height - 1) * g.stride_h +
           (g.width - 1) * g.stride_w + 1;
  tile = w.m > 1024 ? 3 : TILE;
  find_phases();
  const int64_t even = round_up(g.out_width, EVEN);
  aligned = true;
  find_shifts();
  aligned = !few && !halves && !bytes && LANES >= 8 && w.lone_taps() > ALIGN_ABOVE * w.groups * w.k * int64_t(shifts.size()) &&
            20 * vectors(g.out_height, even) <= 21 * vectors(g.out_height, skip[1] > 1 ? g.out_width + read_reach_w : pitch);
  find_shifts();
  copied = aligned || skip[0] * skip[1] > 1;
  layout(1);
  const int64_t one = scratch(), budget = S_BYTES / 4;
  layout(std::min<int64_t>(2, rows));
  const int64_t most = std::clamp<int64_t>(1 + (budget - one) / std::max<int64_t>(1, scratch() - one), 1, rows);
  int64_t count = ceil_div(rows, most);
  cooperate = g.batch * count < g.threads;
  if (!few && !cooperate && g.batch * count < 8 * g.threads)
    while (g.batch * count % g.threads && count < rows) ++count;
  layout(ceil_div(rows, count));
  bands = ceil_div(rows, band_rows);
  by_rows = whole(g.out_width) * band <= vectors(band, read_pitch);
  const int64_t out_bytes = 4 * w.n * g.out_height * g.out_width;
  fetch = !pool && out_bytes > L2_BYTES / 2;
  stream = !pool && !bytes && by_rows && g.out_width % (halves ? 2 * LANES : LANES) == 0 && g.out_image % LANES == 0 &&
           out_bytes > STREAM_ABOVE;
  find_offsets();
  find_kernel_rows();
}

inline void Plan::find_phases() {
  // Remainders of the taps' rows and columns by the stride.
  const auto used = [&](int64_t count, int64_t dilation, int64_t stride) {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t remainder = i * dilation % stride;
      if (std::find(found.begin(), found.end(), remainder) == found.end()) found.push_back(remainder);
    }
    return found;
  };
  std::vector<int64_t> rows = used(w.kh, g.dilation[0], g.stride[0]), columns = used(w.kw, g.dilation[1], g.stride[1]);
  // In bfloat16 and in bytes x is packed anyway, and taken apart as that is done.
  const bool all = !few && !halves && !bytes && int64_t(rows.size()) == g.stride[0] && int64_t(columns.size()) == g.stride[1];
  for (int i : {0, 1}) step[i] = all ? 1 : g.stride[i], skip[i] = g.stride[i] / step[i];
  if (all) rows = columns = {0};
  reach_h = (w.kh - 1) * g.dilation[0] / step[0];
  reach_w = (w.kw - 1) * g.dilation[1] / step[1];
  read_reach_h = (w.kh - 1) * g.dilation[0] / g.stride[0];
  read_reach_w = (w.kw - 1) * g.dilation[1] / g.stride[1];
  const int64_t width = (g.out_width - 1) * skip[1] + 1;
  pitch = width;
  for (int64_t row : rows)
    for (int64_t column : columns) {
      Phase p{row, column, 0, 0};
      p.first_valid = std::max<int64_t>(0, ceil_div(g.left - column, step[1]));
      p.end_valid = std::min(ceil_div(g.width + g.left - column, step[1]), width + reach_w);
      // The zeros to the right of a row may be those to the left of the next one.
      pitch = std::max({pitch, p.end_valid, width + reach_w - p.first_valid});
      phases.push_back(p);
    }
}

// Where the plane begins that the tap at this position reads.
inline Shift Plan::shift_of(int64_t position) const {
  const int64_t down = position / w.kw * g.dilation[0], right = position % w.kw * g.dilation[1];
  const int64_t row = down % g.stride[0], column = right % g.stride[1];
  Shift found{0, skip[0] > 1 ? row : 0, skip[1] > 1 ? column : 0};
  while (step[0] > 1 && phases[found.phase].row != row) ++found.phase;
  while (step[1] > 1 && phases[found.phase].column != column) ++found.phase;
  if (aligned) found.column += right / g.stride[1] * skip[1];
  return found;
}

inline void Plan::find_shifts() {
  shifts.clear();
  for (int64_t position = 0; position < w.kh * w.kw; ++position) {
    const Shift shift = shift_of(position);
    if (std::find(shifts.begin(), shifts.end(), shift) == shifts.end()) shifts.push_back(shift);
  }
}

inline void Plan::layout(int64_t written) {
  band_rows = written;
  const int64_t rows = pool ? std::min(g.out_height, (written - 1) * pool->stride[0] + pool->kernel[0]) : written;
  band = rows;
  pool_plane = odd_lines(rows * g.out_width);
  // Vectors may start at the last valid pixel, so that a vector's worth of slack lies behind it, twice for the shift.
  const int64_t lanes = bytes ? BYTES : halves ? 2 * LANES : LANES, slack = (1 + skip[1]) * lanes;
  phase_plane = formed_rows(rows) * pitch + reach_w;
  if (!few) phase_plane = round_up(phase_plane + slack, bytes ? BYTES : LANES);
  plane = phase_plane * int64_t(phases.size());
  if (!few) plane = odd_lines(plane, lanes);
  read_pitch = aligned ? round_up(g.out_width, EVEN) : copied ? g.out_width + read_reach_w : pitch;
  shift_plane = copied ? round_up((rows + read_reach_h) * read_pitch + 2 * LANES, LANES) : phase_plane;
  read_plane = copied ? odd_lines(shift_plane * int64_t(shifts.size())) : plane;
  if (std::max(plane, read_plane) > INT32_MAX / w.k) throw std::bad_alloc();
}

inline void Plan::find_kernel_rows() {
  if (!few || !BY_POSITION || w.rounded) return;
  for (const Block& block : w.blocks) {
    const auto taps = w.positions.begin() + block.first_tap;
    for (int64_t row = 0; row <= w.kh; ++row)
      first_of_row.push_back(int32_t(std::lower_bound(taps, taps + block.taps, row * w.kw) - taps));
  }
}

inline void Plan::find_offsets() {
  const auto place = [&](std::vector<int32_t>& of, const std::vector<int32_t>& indices, const std::vector<int32_t>& positions) {
    of.resize(indices.size());
    for (size_t t = 0; t < of.size(); ++t) {
      const Shift shift = shift_of(positions[t]);
      const int64_t at = copied ? std::find(shifts.begin(), shifts.end(), shift) - shifts.begin() : shift.phase;
      const int64_t down = positions[t] / w.kw * g.dilation[0] / g.stride[0];
      const int64_t right = aligned ? 0 : positions[t] % w.kw * g.dilation[1] / g.stride[1];
      of[t] = int32_t(indices[t] * read_plane + at * shift_plane + down * read_pitch + right);
    }
  };
  place(offsets, w.indices, w.positions);
  if (joint) place(joint_offsets, w.joint_indices, w.joint_positions);
}

}  // namespace lcnn
