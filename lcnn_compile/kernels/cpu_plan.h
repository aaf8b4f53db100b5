// What is worked out once for all calls of the same geometry: how S is laid out, and how work is cut into bands.
#pragma once

#include <new>

#include "cpu_weight.h"

namespace lcnn {

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

// The phase that a tap reads, from this column on.
struct Shift {
  int64_t phase, column;
};

constexpr int64_t EVEN = 8;  // rows of aligned copies start at multiples of so many floats

// A plane's size in whole lines, an odd number of them, lest planes fall into the same cache sets.
inline int64_t odd_lines(int64_t floats) { return (floats / LANES | 1) * LANES; }

// S of a band: for each dictionary vector, `phases` grids of `rows` x `pitch`.
struct Plan {
  const Weight& w;
  Geometry g;
  std::vector<Phase> phases;
  std::vector<Shift> shifts;     // that the taps read
  std::vector<int32_t> offsets;  // of the taps, in S
  int64_t reach_h, reach_w;      // farthest row and column of a phase that a tap adds
  int64_t pitch, phase_plane, plane;            // of S as it is formed
  int64_t read_pitch, shift_plane, read_plane;  // of S as it is read: the same, or a copy for each shift
  int64_t band, bands;                          // output rows per band, and bands per image
  int64_t tile;                                 // vectors of pixels in a tile of the dictionary stage, at most
  int64_t extent;                               // floats from the address of x to the end of its memory
  bool connected;  // a fully connected layer: images become the pixels of one row, and lie next to their filters in y
  bool few;        // too few pixels for vectors
  bool aligned;    // S is copied for each shift, so that vectors seldom cross cache lines
  bool by_rows;    // vectors of output pixels start at each row, rather than anywhere
  bool fetch;      // lines of the output are asked for before they are written
  bool stream;     // output goes past the caches
  bool cooperate;  // all threads share one band, rather than each having its own

  Plan(const Weight& weight, const Geometry& geometry);
  int64_t formed() const { return round_up(w.k * plane, LANES); }
  int64_t scratch() const { return formed() + (aligned ? w.k * read_plane : 0); }
  int64_t packed() const { return w.m * tile * LANES; }
  int64_t vectors(int64_t rows, int64_t row_pitch) const { return ceil_div((rows - 1) * row_pitch + g.out_width, LANES); }

 private:
  void find_phases();
  void layout(int64_t rows);
  void find_offsets();
};

constexpr int64_t DIRECT_BLOCKS = 4;  // up to so many blocks of D, x is read where it lies rather than packed
constexpr int64_t LINES_AHEAD = 8;    // of each channel, wanted for the next tile
constexpr int64_t L2_BYTES = 1 << 20;
constexpr int64_t S_BYTES = L2_BYTES / 2;  // of a band
constexpr int64_t STREAM_ABOVE = 8 << 20;  // bytes of an output that would push everything else out of the caches
constexpr int64_t ALIGN_ABOVE = 24;        // lookups per element of the copies that repay making them

inline Plan::Plan(const Weight& weight, const Geometry& geometry) : w(weight), g(geometry) {
  connected = g.batch > 0 && w.kh * w.kw == 1 && g.height * g.width == 1 && g.out_height * g.out_width == 1 && g.top + g.left == 0;
  if (connected) {
    g.width = g.out_width = g.batch;
    g.stride_w = g.stride_n;
    g.batch = g.stride[0] = g.stride[1] = 1;
  }
  few = connected || g.out_height * g.out_width <= 4;
  extent = (g.batch - 1) * g.stride_n + (w.groups * w.m - 1) * g.stride_c + (g.height - 1) * g.stride_h +
           (g.width - 1) * g.stride_w + 1;
  tile = w.m > 1024 ? 3 : TILE;
  find_phases();
  const int64_t even = round_up(g.out_width, EVEN), copies = w.groups * w.k * int64_t(shifts.size());
  aligned = !few && LANES >= 8 && w.lone_taps() > ALIGN_ABOVE * copies &&
            20 * vectors(g.out_height, even) <= 21 * vectors(g.out_height, pitch);
  layout(1);
  const int64_t one = scratch();
  layout(2);
  const int64_t rows = std::clamp<int64_t>(1 + (S_BYTES / 4 - one) / std::max<int64_t>(1, scratch() - one), 1, g.out_height);
  int64_t count = ceil_div(g.out_height, rows);
  cooperate = g.batch * count < g.threads;
  if (!cooperate && g.batch * count < 8 * g.threads)
    while (g.batch * count % g.threads && count < g.out_height) ++count;
  layout(ceil_div(g.out_height, count));
  bands = ceil_div(g.out_height, band);
  by_rows = ceil_div(g.out_width, LANES) * band <= vectors(band, read_pitch);
  const int64_t out_bytes = 4 * w.n * g.out_height * g.out_width;
  fetch = out_bytes > L2_BYTES / 2;
  stream = by_rows && g.out_width % LANES == 0 && out_bytes > STREAM_ABOVE;
  find_offsets();
}

inline void Plan::find_phases() {
  reach_h = (w.kh - 1) * g.dilation[0] / g.stride[0];
  reach_w = (w.kw - 1) * g.dilation[1] / g.stride[1];
  pitch = g.out_width;
  for (int64_t r = 0; r < w.kh; ++r)
    for (int64_t c = 0; c < w.kw; ++c) {
      Phase p{r * g.dilation[0] % g.stride[0], c * g.dilation[1] % g.stride[1], 0, 0};
      const auto same = [&](const Phase& q) { return q.row == p.row && q.column == p.column; };
      const int64_t phase = std::find_if(phases.begin(), phases.end(), same) - phases.begin();
      const Shift shift{phase, c * g.dilation[1] / g.stride[1]};
      const auto equal = [&](const Shift& q) { return q.phase == shift.phase && q.column == shift.column; };
      if (std::none_of(shifts.begin(), shifts.end(), equal)) shifts.push_back(shift);
      if (phase < int64_t(phases.size())) continue;
      p.first_valid = std::max<int64_t>(0, ceil_div(g.left - p.column, g.stride[1]));
      p.end_valid = std::min(ceil_div(g.width + g.left - p.column, g.stride[1]), g.out_width + reach_w);
      // The zeros to the right of a row may be those to the left of the next one.
      pitch = std::max({pitch, p.end_valid, g.out_width + reach_w - p.first_valid});
      phases.push_back(p);
    }
}

inline void Plan::layout(int64_t rows) {
  band = rows;
  // Vectors may start at the last valid pixel, so that a vector's worth of slack lies behind it, twice for the shift.
  const int64_t slack = 2 * LANES;
  phase_plane = round_up((rows + reach_h) * pitch + reach_w + slack, LANES);
  plane = odd_lines(phase_plane * int64_t(phases.size()));
  read_pitch = aligned ? round_up(g.out_width, EVEN) : pitch;
  shift_plane = round_up((rows + reach_h) * read_pitch + slack, LANES);
  read_plane = aligned ? odd_lines(shift_plane * int64_t(shifts.size())) : plane;
  if (std::max(plane, read_plane) > INT32_MAX / w.k) throw std::bad_alloc();
}

inline void Plan::find_offsets() {
  offsets.resize(w.indices.size());
  for (size_t t = 0; t < offsets.size(); ++t) {
    const int64_t down = w.positions[t] / w.kw * g.dilation[0], right = w.positions[t] % w.kw * g.dilation[1];
    const int64_t column = right / g.stride[1];
    int64_t at = 0;
    const auto reads = [&](const Shift& shift) {
      const Phase& phase = phases[shift.phase];
      return shift.column == column && phase.row == down % g.stride[0] && phase.column == right % g.stride[1];
    };
    while (!reads(shifts[at])) ++at;
    const int64_t start = aligned ? at * shift_plane : shifts[at].phase * phase_plane + column;
    offsets[t] = int32_t(w.indices[t] * read_plane + start + down / g.stride[0] * read_pitch);
  }
}

}  // namespace lcnn
