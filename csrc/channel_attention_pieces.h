// What the kernels of channel_attention are made of: two products with a packed map, and passes over rows of channels.
//
// Everything has internal linkage: the linker keeps one copy of a shared inline function, and an AVX-512 copy would
// crash an older processor.
#pragma once

#include "workspace.h"

namespace odn_fast::channel_attention::ODN_FAST_INSTRUCTION_SET {
namespace {

using namespace odn_fast::ODN_FAST_INSTRUCTION_SET;

// Sums over as many positions are added to each other, so that errors stay those of short sums.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t group = 64;
#else
constexpr int64_t group = 32;  // each product is rounded too
#endif
constexpr int64_t cache_bytes = 28 << 10;  // of the innermost operand, so that it stays in L1

template <typename Real>
constexpr int64_t panel = 64 / sizeof(Real);  // channels of K side by side
template <typename Real>
constexpr int panel_vectors = panel<Real> / lanes<Real>;

// Rows of a register tile that is `vectors` wide: a divisor of a panel that leaves registers for the operands.
template <int vectors>
constexpr int tile_rows = (vectors == 1 ? 8 : vectors == 4 ? 2 : 4) * (vector_registers / 16);

template <int rows, int vectors, int64_t row_step, int64_t term_step, typename Real>
inline void multiply(Vector<Real> (&sum)[rows][vectors], const Real* k, const Real* b, int64_t terms) {
  for (int64_t term = 0; term < terms; ++term, k += term_step, b += vectors * lanes<Real>) {
    Vector<Real> row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[v] = load(b + v * lanes<Real>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += k[r * row_step] * row[v];
    }
  }
}

// out[j] (+)= sum over `count` positions of k[position][j] x[position], for `channels` channels j of K; x and out have
// rows of `vectors` vectors.
template <int vectors, typename Real>
void correlate(const Real* k, int64_t panel_step, int64_t count, int64_t channels, const Real* x, bool add, Real* out) {
  constexpr int rows = tile_rows<vectors> < panel<Real> ? tile_rows<vectors> : panel<Real>;
  constexpr int64_t width = vectors * lanes<Real>;
  for (int64_t j = 0; j < channels; j += rows) {
    Vector<Real> sum[rows][vectors] = {};
    const Real* column = k + j / panel<Real> * panel_step + j % panel<Real>;
    multiply<rows, vectors, 1, panel<Real>>(sum, column, x, count);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        Real* to = out + (j + r) * width + v * lanes<Real>;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);  // added last: errors stay those of a short sum
      }
    }
  }
}

template <typename Real>
struct Affine {  // alpha * base[position] + beta; without a base, beta
  const Real* base;
  int64_t step;
  const Real* alpha;  // one row
  const Real* beta;
};

template <int rows, int vectors, typename Real>
int64_t project_rows(int64_t position, int64_t count, const Real* k, int64_t panel_step, int64_t panels, const Real* b,
                     const Affine<Real>& start, Real* out, int64_t out_step) {
  constexpr int64_t width = vectors * lanes<Real>;
  for (; position + rows <= count; position += rows) {
    Vector<Real> sum[rows][vectors] = {};
    for (int64_t i = 0; i < panels; ++i) {
      multiply<rows, vectors, panel<Real>, 1>(sum, k + i * panel_step + position * panel<Real>, b + i * panel<Real> * width,
                                             panel<Real>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = v * lanes<Real>;
        Vector<Real> from = load(start.beta + at);
        if (start.base) from += load(start.alpha + at) * load(start.base + (position + r) * start.step + at);
        store(out + (position + r) * out_step + at, from - sum[r][v]);
      }
    }
  }
  if constexpr (rows > 1) {
    position = project_rows<rows / 2, vectors>(position, count, k, panel_step, panels, b, start, out, out_step);
  }
  return position;
}

// out[position] = start - sum over the channels of K of k[position][j] b[j], for `count` positions.
template <int vectors, typename Real>
void project(const Real* k, int64_t panel_step, int64_t panels, int64_t count, const Real* b, Affine<Real> start,
             Real* out, int64_t out_step) {
  constexpr int64_t width = vectors * lanes<Real>;
  constexpr int64_t most = cache_bytes / (width * panel<Real> * sizeof(Real));
  Real one[width], zero[width] = {};
  for (Real& value : one) value = 1;
  for (int64_t first = 0; first < panels; first += most) {
    project_rows<tile_rows<vectors>, vectors>(0, count, k + first * panel_step, panel_step,
                                              smaller(most, panels - first), b + first * panel<Real> * width, start, out,
                                              out_step);
    start = {out, out_step, one, zero};
  }
}

// total[c] = sum over positions of visit(position, v, x) of the `vectors` vectors from `from` on; `count` channels are
// there, the rest reads as zero.
template <int vectors, bool whole, typename Storage, typename Visit>
void sum_over_positions(const Storage* from, int64_t step, int64_t positions, int64_t count, Visit visit,
                        double* total) {
  using R = Real<Storage>;
  constexpr int chains = vectors >= 4 ? 1 : 4 / vectors;  // enough additions in flight
  constexpr int64_t width = vectors * lanes<R>;
  for (int64_t c = 0; c < width; ++c) total[c] = 0;
  const auto one = [&](int64_t position, int v) {
    const Storage* x = from + position * step + v * lanes<R>;
    if constexpr (whole) {
      return visit(position, v, load(x));
    } else {
      return visit(position, v, load_up_to(x, count - v * lanes<R>));
    }
  };
  for (int64_t begin = 0; begin < positions; begin += group) {
    const int64_t end = smaller(begin + group, positions);
    Vector<R> sum[chains][vectors] = {};
    int64_t position = begin;
    for (; position + chains <= end; position += chains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[chain][v] += one(position + chain, v);
      }
    }
    for (; position < end; ++position) {
      for (int v = 0; v < vectors; ++v) sum[0][v] += one(position, v);
    }
    R part[width];
    for (int v = 0; v < vectors; ++v) {
      for (int chain = 1; chain < chains; ++chain) sum[0][v] += sum[chain][v];
      store(part + v * lanes<R>, sum[0][v]);
    }
    for (int64_t c = 0; c < width; ++c) total[c] += part[c];
  }
}

template <int vectors, typename Storage, typename Visit>
void sum_over_positions(const Storage* from, int64_t step, int64_t positions, int64_t count, Visit visit,
                        double* total) {
  if (count >= vectors * lanes<Real<Storage>>) {
    sum_over_positions<vectors, true>(from, step, positions, count, visit, total);
  } else {
    sum_over_positions<vectors, false>(from, step, positions, count, visit, total);
  }
}

// Means over positions. Taken around the first position, so that a constant channel has its value for a mean.
template <int vectors, typename Storage>
void means(const Storage* from, int64_t step, int64_t positions, int64_t count, double* mean) {
  using R = Real<Storage>;
  constexpr int64_t width = vectors * lanes<R>;
  Vector<R> first[vectors];
  double total[width];
  R pivot[width];
  for (int v = 0; v < vectors; ++v) {
    first[v] = load_up_to(from + v * lanes<R>, count - v * lanes<R>);
    store(pivot + v * lanes<R>, first[v]);
  }
  sum_over_positions<vectors>(
      from, step, positions, count, [&](int64_t, int v, Vector<R> x) { return x - first[v]; }, total);
  for (int64_t c = 0; c < width; ++c) mean[c] = pivot[c] + total[c] / static_cast<double>(positions);
}

constexpr auto itself = [](auto x) { return x; };
constexpr auto square = [](auto x) { return x * x; };

// Rows less `mean`, and the sums of `term` of them.
template <int vectors, auto term, typename Storage, typename R>
void centre(const Storage* from, int64_t step, int64_t positions, int64_t count, const R* mean, R* to, double* total) {
  Vector<R> middle[vectors];
  for (int v = 0; v < vectors; ++v) middle[v] = load(mean + v * lanes<R>);
  sum_over_positions<vectors>(
      from, step, positions, count,
      [&](int64_t position, int v, Vector<R> x) {
        x -= middle[v];
        store(to + (position * vectors + v) * lanes<R>, x);
        return term(x);
      },
      total);
}

}  // namespace
}  // namespace odn_fast::channel_attention::ODN_FAST_INSTRUCTION_SET
