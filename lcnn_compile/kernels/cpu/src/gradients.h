// The backward pass of the lookup stage at stride 1: the gradients of S and of the coefficients in one pass over the taps.
//
// A tap's filters share what it reads, forwards and backwards: per vector of S one load serves all their gradients, and the
// gradient of S is loaded and stored once for all of them. Where images are small, several lie side by side in memory, so that
// a row of them fills whole vectors; pixels that a tap reads from the padding are left out. Work is cut into sections by
// the batch alone, whose sums are added in order: results do not depend on the number of threads.
#pragma once

#include "run.h"

namespace lcnn {

struct GradientProblem {
  int64_t batch, groups, k, n, height, width, out_height, out_width, kernel_width, top, left, dilation[2];
  int64_t filter_groups, size, taps;  // of the weight: filter groups, filters of each, taps in all
  int64_t threads;
};

struct GradientTensors {
  const float *grad, *s, *coefficients;  // [batch, n, out_height, out_width], [batch, groups * k, height, width], [taps, size]
  const int32_t *indices, *positions, *offsets, *filters;
  float *grad_s, *grad_coefficients;  // as s and coefficients
};

// Planes of images that lie side by side: pixel (y, x) of image i at (y * width + x) * lanes + i.
struct SideBySide {
  const float *grad, *s;
  float* grad_s;
};

class Gradients {
 public:
  Gradients(const GradientProblem& problem, const GradientTensors& tensors) : p(problem), t(tensors) {
    const int64_t pixels = p.out_height * p.out_width;
    if (pixels <= FEW_PIXELS) {
      const int64_t wide = LANES * std::clamp<int64_t>(32 / std::max<int64_t>(1, pixels), 1, 4);
      if (round_up(p.batch, wide) <= 2 * p.batch) lanes = wide;
    }
    images = ceil_div(p.batch, lanes);
    sections = std::min(images, SECTIONS);
    band_rows = std::clamp<int64_t>(BAND_FLOATS / (p.out_width * lanes), 1, p.out_height);
    width = std::min<int64_t>(p.size, BLOCK);
    // Floats of one thread's scratch: three tensors side by side, and a vector of sums for each coefficient.
    in_floats = lanes > 1 ? round_up(p.groups * p.k * p.height * p.width * lanes, 64) : 0;
    out_floats = lanes > 1 ? round_up(p.n * pixels * lanes, 64) : 0;
    sum_floats = p.taps * ceil_div(p.size, BLOCK) * width * LANES;
    scratch = round_up(2 * in_floats + out_floats + sum_floats, 1024);
  }

  void run() const {
    const int64_t coefficients = p.taps * p.size;
    std::vector<float> partial(sections * coefficients);
    float* const shared = run_scratch(p.threads * scratch);
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(p.threads))
    for (int64_t section = 0; section < sections; ++section) {
#if defined(_OPENMP)
      float* const own = shared + omp_get_thread_num() * scratch;
#else
      float* const own = shared;
#endif
      run_section(section, own, partial.data() + section * coefficients);
    }
    for (int64_t i = 0; i < coefficients; ++i) {
      float sum = 0.0f;
      for (int64_t section = 0; section < sections; ++section) sum += partial[section * coefficients + i];
      t.grad_coefficients[i] = sum;
    }
  }

 private:
  static constexpr int64_t FEW_PIXELS = 256, SECTIONS = 32;
  static constexpr int64_t BAND_FLOATS = 512;  // of one filter's rows: those of eight filters stay in L1

  GradientProblem p;
  GradientTensors t;
  int64_t lanes = 1, images, sections, band_rows, width;
  int64_t in_floats, out_floats, sum_floats, scratch;

  void run_section(int64_t section, float* own, float* partial) const {
    float* const sums = own + 2 * in_floats + out_floats;
    std::memset(sums, 0, sizeof(float) * sum_floats);
    for (int64_t image = section * images / sections; image < (section + 1) * images / sections; ++image) {
      const int64_t first = image * lanes, count = std::min(lanes, p.batch - first);
      const int64_t in = p.groups * p.k * p.height * p.width, out = p.n * p.out_height * p.out_width;
      float* const grad_s = t.grad_s + first * in;
      if (lanes == 1) {
        std::memset(grad_s, 0, sizeof(float) * in);
        run_image({t.grad + first * out, t.s + first * in, grad_s}, sums);
        continue;
      }
      float *const s = own, *const side_grad_s = own + in_floats, *const grad = own + 2 * in_floats;
      put_side_by_side(t.s + first * in, in, count, s);
      put_side_by_side(t.grad + first * out, out, count, grad);
      std::memset(side_grad_s, 0, sizeof(float) * in_floats);
      run_image({grad, s, side_grad_s}, sums);
      take_apart(side_grad_s, in, count, grad_s);
    }
    add_up(sums, partial);
  }

  // Absent images are zeros.
  void put_side_by_side(const float* from, int64_t pixels, int64_t count, float* to) const {
    for (int64_t i = 0; i < pixels; ++i, to += lanes) {
      for (int64_t image = 0; image < count; ++image) to[image] = from[image * pixels + i];
      for (int64_t image = count; image < lanes; ++image) to[image] = 0.0f;
    }
  }
  void take_apart(const float* from, int64_t pixels, int64_t count, float* to) const {
    for (int64_t i = 0; i < pixels; ++i, from += lanes)
      for (int64_t image = 0; image < count; ++image) to[image * pixels + i] = from[image];
  }

  // Filters of a filter group by eights: their columns in the table.
  template <class Do>
  void each_block(Do act) const {
    int64_t at = 0;
    for (int64_t j = 0; j < p.filter_groups; ++j)
      for (int64_t f = 0; f < p.size; f += BLOCK) {
        int columns[BLOCK], members = 0;
        for (int64_t column = f; column < std::min(f + BLOCK, p.size); ++column)
          if (t.filters[j * p.size + column] >= 0) columns[members++] = int(column);
        if (members > 0) act(j, columns, members, at);
        at += (t.offsets[j + 1] - t.offsets[j]) * width * LANES;
      }
  }

  void run_image(const SideBySide& image, float* sums) const {
    each_block([&](int64_t j, const int* columns, int members, int64_t at) {
      switch (members) {
        case 1: return run_block<1>(image, j, columns, sums + at);
        case 2: return run_block<2>(image, j, columns, sums + at);
        case 3: return run_block<3>(image, j, columns, sums + at);
        case 4: return run_block<4>(image, j, columns, sums + at);
        case 5: return run_block<5>(image, j, columns, sums + at);
        case 6: return run_block<6>(image, j, columns, sums + at);
        case 7: return run_block<7>(image, j, columns, sums + at);
        default: return run_block<8>(image, j, columns, sums + at);
      }
    });
  }

  template <int F>
  void run_block(const SideBySide& image, int64_t j, const int* columns, float* sums) const {
    const int64_t in_plane = p.height * p.width * lanes, out_plane = p.out_height * p.out_width * lanes;
    const int64_t group = j / (p.filter_groups / p.groups);
    const float* grads[F];
    for (int f = 0; f < F; ++f) grads[f] = image.grad + t.filters[j * p.size + columns[f]] * out_plane;
    for (int64_t band = 0; band < p.out_height; band += band_rows) {
      float* sum = sums;
      for (int32_t tap = t.offsets[j]; tap < t.offsets[j + 1]; ++tap, sum += width * LANES) {
        const int64_t position = t.positions[tap];
        const int64_t down = position / p.kernel_width * p.dilation[0] - p.top;
        const int64_t right = position % p.kernel_width * p.dilation[1] - p.left;
        const int64_t row = std::max(band, -down), end = std::min({band + band_rows, p.out_height, p.height - down});
        const int64_t column = std::max<int64_t>(0, -right), wide = std::min(p.out_width, p.width - right) - column;
        if (row >= end || wide <= 0) continue;
        const int64_t plane = (group * p.k + t.indices[tap]) * in_plane;
        const int64_t source = plane + ((row + down) * p.width + column + right) * lanes;
        float coefficients[F];
        for (int f = 0; f < F; ++f) coefficients[f] = t.coefficients[tap * p.size + columns[f]];
        run_tap<F>(grads, (row * p.out_width + column) * lanes, image.s + source, image.grad_s + source, coefficients, sum, end - row,
                   wide * lanes);
      }
    }
  }

  // One tap of F filters at `rows` rows of `length` floats.
  template <int F>
  void run_tap(const float* const (&grads)[F], int64_t target, const float* s, float* grad_s, const float (&coefficients)[F], float* sum,
               int64_t rows, int64_t length) const {
    Vec weights[F], sums[F];
    UNROLL for (int f = 0; f < F; ++f) {
      weights[f] = splat(coefficients[f]);
      sums[f] = load(sum + f * LANES);
    }
    const int64_t whole = length / LANES * LANES;
    const int rest = int(length - whole);
    for (int64_t row = 0; row < rows; ++row, target += p.out_width * lanes, s += p.width * lanes, grad_s += p.width * lanes) {
      for (int64_t i = 0; i < whole; i += LANES) {
        const Vec value = load(s + i);
        Vec even = load(grad_s + i), odd{};  // two chains of additions
        UNROLL for (int f = 0; f < F; ++f) {
          const Vec grad = load(grads[f] + target + i);
          sums[f] += grad * value;
          (f % 2 ? odd : even) += weights[f] * grad;
        }
        store(grad_s + i, even + odd);
      }
      if (rest > 0) {
        const Vec value = load_first(s + whole, rest);
        Vec even = load_first(grad_s + whole, rest), odd{};
        UNROLL for (int f = 0; f < F; ++f) {
          const Vec grad = load_first(grads[f] + target + whole, rest);
          sums[f] += grad * value;
          (f % 2 ? odd : even) += weights[f] * grad;
        }
        store_first(grad_s + whole, even + odd, rest);
      }
    }
    UNROLL for (int f = 0; f < F; ++f) store(sum + f * LANES, sums[f]);
  }

  // The lanes of every sum; coefficients of filters that do not exist get zero.
  void add_up(const float* sums, float* partial) const {
    std::fill(partial, partial + p.taps * p.size, 0.0f);
    each_block([&](int64_t j, const int* columns, int members, int64_t at) {
      for (int32_t tap = t.offsets[j]; tap < t.offsets[j + 1]; ++tap, at += width * LANES)
        for (int f = 0; f < members; ++f) {
          float sum = 0.0f;
          for (int lane = 0; lane < LANES; ++lane) sum += sums[at + f * LANES + lane];
          partial[tap * p.size + columns[f]] = sum;
        }
    });
  }
};

}  // namespace lcnn
