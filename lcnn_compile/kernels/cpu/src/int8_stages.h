// A band of bytes: x packed and S formed, or x copied where D is the identity, then the lookups.
#pragma once

#include <cmath>
#include <limits>

#include "form.h"
#include "int8_kernels.h"
#include "run.h"

namespace lcnn {

static constexpr ByteKernels byte_kernels;

struct ByteCall {
  const BytePlan& of;
  const uint8_t* x;
  const void* residual;
  void* y;
  const Plan& p = of.plan;

  void band(int64_t image, int64_t index, float* s, float* packed, Team team) const;

 private:
  BytePixels pixels_in(const Grid& grid, const Phase& at, int64_t first) const;
  void copy_plane(const uint8_t* origin, const Phase& at, const Grid& grid, uint8_t* plane) const;
  void pack(const uint8_t* origin, const Phase& at, const Grid& grid, int64_t first, Quad* packed) const;
  void dictionary_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, uint8_t* s, Quad* packed, Team team) const;
  void depthwise(int64_t image, int64_t first_row, int64_t rows, Team team) const;
  void lookup_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, const uint8_t* s, Team team) const;
};

// The vector of grid pixels from `first` on; only those in the image are valid.
inline BytePixels ByteCall::pixels_in(const Grid& grid, const Phase& at, int64_t first) const {
  BytePixels found{0, first, {}};
  for (int64_t row = first / p.pitch; row * p.pitch < std::min(first + BYTES, grid.stop); ++row) {
    const int64_t from = std::max({first, grid.begin, row * p.pitch + at.first_valid});
    const int64_t end = std::min({first + BYTES, row * p.pitch + at.end_valid, grid.stop});
    if (end <= from) continue;
    if (!found.lanes.count) found.source = grid.first_source + row * grid.row_source + (from - row * p.pitch) * grid.column_source;
    found.lanes.add(from - first, end - first);
  }
  return found;
}

// One plane of x where S would be formed of it, between its padding.
inline void ByteCall::copy_plane(const uint8_t* origin, const Phase& at, const Grid& grid, uint8_t* plane) const {
  if (grid.stop == 0) return;
  const int64_t length = at.end_valid - at.first_valid;
  for (int64_t row = grid.begin / p.pitch; row * p.pitch < grid.stop; ++row) {
    uint8_t* to = plane + row * p.pitch + at.first_valid;
    const uint8_t* from = origin + grid.first_source + row * grid.row_source + at.first_valid * grid.column_source;
    copy_spread_bytes(to, from, length, grid.column_source);
  }
}

// Quads of `channels` channels, of which `read(from)` gives a vector; behind the last there are zeros.
template <class Read>
static inline __attribute__((always_inline)) void pack_channels(const uint8_t* x, int64_t step, int64_t channels, Quad* packed, Read read) {
  const auto put = [&](Bytes a, Bytes b, Bytes c, Bytes d) __attribute__((always_inline)) {
    interleave_bytes<0>(a, b, c, d, packed[0], packed[1]);
    interleave_bytes<1>(a, b, c, d, packed[2], packed[3]);
    packed += 4;
  };
  int64_t i = 0;
  for (; i + 4 <= channels; i += 4, x += 4 * step) put(read(x), read(x + step), read(x + 2 * step), read(x + 3 * step));
  if (i < channels)
    put(read(x), i + 1 < channels ? read(x + step) : no_bytes(), i + 2 < channels ? read(x + 2 * step) : no_bytes(), no_bytes());
}

// One vector of grid pixels of every channel, in quads; what is not in the image is zero.
inline void ByteCall::pack(const uint8_t* origin, const Phase& at, const Grid& grid, int64_t first, Quad* packed) const {
  const bool contiguous = grid.column_source == 1 && grid.row_source == at.end_valid - at.first_valid;
  const Bytes fill = splat_byte(of.weight.x_zero);
  const BytePixels pixels = pixels_in(grid, at, first);
  const Lanes lanes = pixels.lanes;
  const uint8_t* const from = origin + pixels.source;
  const int64_t step = p.g.stride_c, channels = p.w.m;
  if (contiguous && lanes.mask == ALL_BYTES)
    return pack_channels(from, step, channels, packed, [&](const uint8_t* x) __attribute__((always_inline)) { return load_bytes(x); });
#if defined(__AVX512BW__)
  if (contiguous && lanes.runs <= 2)
    return pack_channels(from, step, channels, packed, [&](const uint8_t* x) __attribute__((always_inline)) {
      const Bytes begun = _mm512_mask_loadu_epi8(fill, lanes.run[0], x + lanes.shift[0]);
      return _mm512_mask_loadu_epi8(begun, lanes.run[1], x + lanes.shift[1]);
    });
#endif
  if (contiguous)
    return pack_channels(from, step, channels, packed, [&](const uint8_t* x) __attribute__((always_inline)) { return load_valid(x, lanes, fill); });
  // Rows one by one, the same ones for all channels: what lies between them stays `fill`. Some buffers, lest a vector waits for its own bytes.
  struct Piece {
    int64_t source, lane, length;
  } pieces[BYTES];
  int count = 0;
  for (int64_t row = first / p.pitch; row * p.pitch < std::min(first + BYTES, grid.stop); ++row) {
    const int64_t begin = std::max({first, grid.begin, row * p.pitch + at.first_valid});
    const int64_t end = std::min({first + BYTES, row * p.pitch + at.end_valid, grid.stop});
    if (end > begin)
      pieces[count++] = {grid.first_source + row * grid.row_source + (begin - row * p.pitch) * grid.column_source, begin - first, end - begin};
  }
  constexpr int BUFFERS = 8;
  alignas(64) uint8_t bytes[BUFFERS][BYTES];
  for (auto& buffer : bytes) store_bytes(buffer, fill);
  int turn = 0;
  pack_channels(origin, step, channels, packed, [&](const uint8_t* x) {
    uint8_t* const buffer = bytes[turn++ % BUFFERS];
    for (int i = 0; i < count; ++i) copy_spread_bytes(buffer + pieces[i].lane, x + pieces[i].source, pieces[i].length, grid.column_source);
    return load_bytes(buffer);
  });
}

inline void ByteCall::dictionary_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, uint8_t* s, Quad* packed, Team team) const {
  const ByteWeight& weight = of.weight;
  const Weight& w = p.w;
  const uint8_t* const origin = x + image * p.g.stride_n + group * w.m * p.g.stride_c;
  const Call places{p, nullptr, nullptr, nullptr, nullptr};
  for (size_t phase = 0; phase < p.phases.size(); ++phase) {
    const Phase& at = p.phases[phase];
    const Grid grid = places.grid(at, first_row, rows);
    uint8_t* const plane = s + phase * p.phase_plane;
    const int64_t first = w.k * team.rank / team.size, end = w.k * (team.rank + 1) / team.size;
    if (weight.identity) {
      for (int64_t i = first; i < end; ++i) {
        std::memset(plane + i * p.plane, weight.middle, p.phase_plane);
        copy_plane(origin + i * p.g.stride_c, at, grid, plane + i * p.plane);
      }
      continue;
    }
    // Whole vectors from the one in which the image begins.
    const int64_t begin = grid.begin / BYTES, vectors = grid.stop ? ceil_div(grid.stop, BYTES) - begin : 0;
    for (int64_t i = first; i < end; ++i) {
      std::memset(plane + i * p.plane, weight.middle, begin * BYTES);
      std::memset(plane + i * p.plane + (begin + vectors) * BYTES, weight.middle, p.phase_plane - (begin + vectors) * BYTES);
    }
    for (Share share(vectors, int64_t(weight.rows.size()), team); share.more(); share.advance()) {
      const int64_t pixel = (begin + share.tile) * BYTES;
      if (share.new_tile) pack(origin, at, grid, pixel, packed);
      const ByteBlock& block = weight.rows[share.block];
      const Four* const coefficients = weight.dictionary.data() + group * weight.dictionary_step + block.coefficients;
      for (int f = 0; f < block.size; f += BYTE_FILTERS) {
        const int64_t i = block.first_filter + f, row = group * w.k + i;
        byte_kernels.form[std::min(BYTE_FILTERS, block.size - f)](packed, block.quads, coefficients + f, block.size, weight.starts.data() + row,
                                                                  weight.row_factors.data() + row, plane + i * p.plane + pixel, p.plane);
      }
    }
  }
}

inline void ByteCall::lookup_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, const uint8_t* s, Team team) const {
  const ByteWeight& weight = of.weight;
  const ByteFinish& finish = weight.finish;
  const int64_t area = p.g.out_height * p.g.out_width, row = first_row * p.g.out_width;
  const int64_t start = image * p.g.out_image + row, residual_start = image * p.g.residual_image + row;
  const int64_t first_block = p.w.first_block[group], blocks = p.w.first_block[group + 1] - first_block;
  const bool rectified = finish.activation == RELU || finish.activation == RELU6;
  const bool late = rectified && residual && finish.residual_last;
  const bool plain = finish.to_bytes && finish.step == 1 && finish.has_residual < 2 && (finish.activation == NONE || rectified);
  const int zero = int(finish.zero);
  const float six = std::nearbyint(std::min(float(finish.six), 1024.0f));
  const ByteLookup to{s,
                      residual ? static_cast<const char*>(residual) + residual_start * (finish.has_residual == 2 ? 4 : 1) : nullptr,
                      static_cast<char*>(y) + start * (finish.to_bytes ? 1 : 4),
                      area,
                      weight,
                      rectified && !late ? zero : 0,
                      finish.activation == RELU6 && !late ? std::min(255, zero + int(six)) : 255,
                      plain,
                      late,
                      finish.activation == RELU6 ? float(finish.six) : std::numeric_limits<float>::infinity()};
  const BandPixels& pixels = of.pixels(rows);
  for (Share share(pixels.tiles(), blocks, team); share.more(); share.advance()) {
    const ByteBlock& block = weight.blocks[first_block + share.block];
    for (int f = 0; f < block.size; f += BYTE_FILTERS) {
      const int first = block.first_filter + f, size = std::min(BYTE_FILTERS, block.size - f);
      const ByteFilters filters{of.offsets.data() + block.first_offset,
                                p.w.filters.data() + first,
                                weight.bias.data() + first,
                                weight.filter_factors.data() + first,
                                weight.coefficients.data() + block.coefficients + f,
                                block.size,
                                block.quads};
      if (pixels.picked)
        byte_kernels.look_up_sixteen[size](to, pixels.sixteens[share.tile], filters);
      else
        byte_kernels.look_up[size](to, pixels.vectors[share.tile], filters);
    }
  }
}

// Channels one by one, each in a thread's own plane, whose padding all of them share.
inline void ByteCall::depthwise(int64_t image, int64_t first_row, int64_t rows, Team team) const {
  thread_local Memory memory;
  uint8_t* const s = reinterpret_cast<uint8_t*>(memory.at_least(ceil_div(p.plane, int64_t(sizeof(float)))));
  thread_local std::vector<Grid> grids;
  grids.clear();
  const Call places{p, nullptr, nullptr, nullptr, nullptr};
  for (const Phase& at : p.phases) grids.push_back(places.grid(at, first_row, rows));
  std::memset(s, of.weight.middle, size_t(p.plane));
  for (int64_t group = p.w.groups * team.rank / team.size; group < p.w.groups * (team.rank + 1) / team.size; ++group) {
    const uint8_t* const origin = x + image * p.g.stride_n + group * p.g.stride_c;
    for (size_t phase = 0; phase < p.phases.size(); ++phase) copy_plane(origin, p.phases[phase], grids[phase], s + phase * p.phase_plane);
    lookup_stage(image, group, first_row, rows, s, {0, 1});
  }
}

inline void ByteCall::band(int64_t image, int64_t index, float* scratch, float* packed, Team team) const {
  const int64_t first = index * p.band_rows, rows = std::min(first + p.band_rows, p.rows) - first;
  if (of.weight.depthwise()) return depthwise(image, first, rows, team);
  uint8_t* const s = reinterpret_cast<uint8_t*>(scratch);
  for (int64_t group = 0; group < p.w.groups; ++group) {
    if (group > 0) team.wait();
    dictionary_stage(image, group, first, rows, s, reinterpret_cast<Quad*>(packed), team);
    team.wait();
    lookup_stage(image, group, first, rows, s, team);
  }
}

}  // namespace lcnn
