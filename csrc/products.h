// Matrix products over blocked buffers, tile by tile in registers.
//
// A blocked buffer holds rows (pixels) of channels as [block][row][lane]: a block is as many channels as a vector has
// lanes, so every address inside a tile is a constant offset. Channels are padded with zeros to whole blocks.
#pragma once

#include "workspace.h"

namespace odn_fast::ODN_FAST_INSTRUCTION_SET {
namespace {

// Rows of a tile that is one or two blocks wide: sums for two multiply-adds a cycle, and registers left for the factors.
constexpr int tile_rows(int blocks) { return vector_registers / (2 * blocks); }

// How operands are multiplied: `terms` inputs at a time, whose products are added to the sum of one lane.
template <typename Operand>
struct Multiply {
  static constexpr int64_t terms = 1;
  using Factor = Vector<Operand>;
  static Factor read(const Operand* right) { return load(right); }
  static void add(Vector<Operand>& sum, const Operand* left, Factor right) { sum += *left * right; }
};

#if defined(__AVX512BF16__)
template <>
struct Multiply<Bfloat16> {
  static constexpr int64_t terms = 2;
  using Factor = __m512bh;
  static Factor read(const Bfloat16* right) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(right)); }
  static void add(Vector<float>& sum, const Bfloat16* left, Factor right) {
    int32_t pair;
    __builtin_memcpy(&pair, left, sizeof pair);
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), right);
  }
};

// Rows of vectors as operands, in the same order.
inline void convert_rows(const float* from, int64_t rows, Bfloat16* to) {
  for (int64_t row = 0; row < rows; ++row) store(to + row * lanes<float>, load(from + row * lanes<float>));
}

// Pairs of rows as [row / 2][lane][2], the last of an odd number with a row of zeros.
inline void convert_pairs(const float* from, int64_t rows, Bfloat16* to) {
  constexpr int64_t L = lanes<float>;
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t row = 0; row < rows; row += 2) {
    const Vector<float> second = row + 1 < rows ? load(from + (row + 1) * L) : Vector<float>{};
    const __m512bh both = _mm512_cvtne2ps_pbh(second, load(from + row * L));
    _mm512_storeu_si512(to + row * L, _mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(both)));
  }
}
#endif

template <typename Operand>
inline int64_t whole_terms(int64_t count) {
  return rounded_up(count, Multiply<Operand>::terms);
}

inline void convert(float* to, float value) { *to = value; }
inline void convert(double* to, double value) { *to = value; }
inline void convert(Bfloat16* to, float value) {
  to->bits = static_cast<uint16_t>(rounded_bits(broadcast(value))[0] >> 16);
}

// The right factor, of `inputs` rows and `outputs` columns, in the order in which tiles read it: pairs of blocks of
// columns, and a single one if their number is odd, each [input / terms][block][lane][term].
template <typename Real, typename Operand>
void pack_pointwise(int64_t inputs, int64_t outputs, const void* weight, int64_t input_stride, int64_t output_stride,
                    void* packed) {
  constexpr int64_t terms = Multiply<Operand>::terms;
  Operand* to = static_cast<Operand*>(packed);
  for (int64_t first = 0; first < outputs; first += 2 * lanes<Real>) {
    const int64_t columns = outputs - first <= lanes<Real> ? lanes<Real> : 2 * lanes<Real>;
    const int64_t given = smaller(columns, outputs - first);
    for (int64_t input = 0; input < inputs; input += terms, to += columns * terms) {
      for (int64_t term = 0; term < terms; ++term) {
        const Real* from = static_cast<const Real*>(weight) + first * output_stride + (input + term) * input_stride;
        const int64_t inside = input + term < inputs ? given : 0;
        for (int64_t column = 0; column < inside; ++column) convert(to + column * terms + term, from[column * output_stride]);
        for (int64_t column = inside; column < columns; ++column) convert(to + column * terms + term, Real{});
      }
    }
  }
}

template <typename Real, typename Operand>
int64_t pointwise_bytes(int64_t inputs, int64_t outputs) {
  return whole_terms<Operand>(inputs) * padded<Real>(outputs) * static_cast<int64_t>(sizeof(Operand));
}

// sums[m][j] += left[m][input] * right[input][j] over the inputs.
template <int M, int J, typename Operand>
[[gnu::always_inline]] inline void multiply_tile(const Operand* left, int64_t block_size, const Operand* right,
                                                 int64_t inputs, Vector<Real<Operand>> (&sums)[M][J]) {
  using Multiplier = Multiply<Operand>;
  constexpr int64_t L = lanes<Real<Operand>>, terms = Multiplier::terms;
  for (; inputs > 0; inputs -= L, left += block_size) {
    const int64_t count = inputs < L ? inputs : L;
    for (int64_t input = 0; input < count; input += terms, right += J * L * terms) {
      typename Multiplier::Factor factor[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) factor[j] = Multiplier::read(right + j * L * terms);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) Multiplier::add(sums[m][j], left + m * L + input, factor[j]);
      }
    }
  }
}

// Tiles of M rows as long as they fit, then of M / 2, and so on.
template <int M, int J, typename Operand, typename Done>
inline void product_rows(int64_t row, int64_t rows, const Operand* left, int64_t block_size, const Operand* right,
                         int64_t inputs, const Real<Operand>* start, int64_t block, const Done& done) {
  constexpr int64_t L = lanes<Real<Operand>>;
  for (; row + M <= rows; row += M) {
    Vector<Real<Operand>> sums[M][J];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) sums[m][j] = load(start + (block + j) * L);
    }
    multiply_tile(left + row * L, block_size, right, inputs, sums);
    done(row, block, sums);
  }
  if constexpr (M > 1) product_rows<M / 2, J>(row, rows, left, block_size, right, inputs, start, block, done);
}

// How often `product` calls done, at least.
template <typename Real>
inline int64_t tiles_of(int64_t rows, int64_t outputs) {
  const int64_t blocks = blocks_of<Real>(outputs);
  return larger(blocks / 2 * (rows / tile_rows(2)) + blocks % 2 * (rows / tile_rows(1)), 1);
}

// start + left * right for a blocked `left` of `rows` rows, whose blocks are block_size elements apart, a packed `right`
// and a padded `start`. done(row, block, sums[M][J]) receives the rows from `row` on of J blocks from `block` on.
template <typename Operand, typename Done>
inline void product(int64_t rows, const Operand* left, int64_t block_size, const Operand* right, int64_t inputs,
                    int64_t outputs, const Real<Operand>* start, const Done& done) {
  using R = Real<Operand>;
  const int64_t blocks = blocks_of<R>(outputs);
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2, right += whole_terms<Operand>(inputs) * 2 * lanes<R>) {
    product_rows<tile_rows(2), 2>(0, rows, left, block_size, right, inputs, start, block, done);
  }
  if (block < blocks) product_rows<tile_rows(1), 1>(0, rows, left, block_size, right, inputs, start, block, done);
}

// The product into a blocked buffer.
template <typename Operand>
void product_into(Real<Operand>* to, int64_t to_block_size, int64_t rows, const Operand* left, int64_t block_size,
                  const Operand* right, int64_t inputs, int64_t outputs, const Real<Operand>* start) {
  using R = Real<Operand>;
  product(rows, left, block_size, right, inputs, outputs, start,
          [=]<int M, int J>(int64_t row, int64_t block, const Vector<R>(&sums)[M][J]) {
#pragma GCC unroll 2
            for (int j = 0; j < J; ++j) {
#pragma GCC unroll 16
              for (int m = 0; m < M; ++m) store(to + (block + j) * to_block_size + (row + m) * lanes<R>, sums[m][j]);
            }
          });
}

template <int J, typename Operand>
inline void outer_product_columns(int64_t rows, const Operand* left, int64_t outputs, const Operand* right,
                                  int64_t block_size, Real<Operand>* sums, int64_t stride) {
  using Multiplier = Multiply<Operand>;
  constexpr int64_t L = lanes<Real<Operand>>, terms = Multiplier::terms;
  constexpr int M = tile_rows(J) < L ? tile_rows(J) : L;
  for (int64_t output = 0; output < outputs; output += M, sums += M * stride) {
    const Operand* factor = left + output / L * block_size + output % L * terms;
    Vector<Real<Operand>> tile[M][J];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) tile[m][j] = load(sums + m * stride + j * L);
    }
    for (int64_t row = 0; row < rows; row += terms) {
      typename Multiplier::Factor value[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) value[j] = Multiplier::read(right + j * block_size + row * L);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) Multiplier::add(tile[m][j], factor + row * L + m * terms, value[j]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) store(sums + m * stride + j * L, tile[m][j]);
    }
  }
}

// sums[output][input] += left[row][output] * right[row][input] over the rows; both blocked, [block][row / terms][lane][term]
// with blocks block_size apart. sums has padded(outputs) rows of `stride` elements.
template <typename Operand>
inline void outer_product(int64_t rows, const Operand* left, int64_t outputs, const Operand* right, int64_t inputs,
                          int64_t block_size, Real<Operand>* sums, int64_t stride) {
  constexpr int64_t L = lanes<Real<Operand>>;
  const int64_t blocks = blocks_of<Real<Operand>>(inputs);
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2) {
    outer_product_columns<2>(rows, left, outputs, right + block * block_size, block_size, sums + block * L, stride);
  }
  if (block < blocks) {
    outer_product_columns<1>(rows, left, outputs, right + block * block_size, block_size, sums + block * L, stride);
  }
}

// Values in the type of arithmetic as operands: themselves, or converted copies in a buffer of its own.
template <typename Storage>
class Operands {
 public:
  using R = Real<Storage>;
  using O = Operand<Storage>;

  Operands(Workspace& workspace, int64_t most_rows, int64_t channels)
      : copies_(converts ? workspace.take<O>(whole_terms<O>(most_rows) * padded<R>(channels)) : nullptr) {}

  // [block][row][lane], blocks rows * lanes apart.
  const O* by_row(const R* values, int64_t rows, int64_t channels) const {
    if constexpr (converts) {
      convert_rows(values, rows * blocks_of<R>(channels), copies_);
      return copies_;
    } else {
      return values;
    }
  }

  // [block][row / terms][lane][term], blocks whole_terms(rows) * lanes apart.
  const O* by_pair(const R* values, int64_t rows, int64_t channels) const {
    if constexpr (converts) {
      for (int64_t block = 0; block < blocks_of<R>(channels); ++block) {
        convert_pairs(values + block * rows * lanes<R>, rows, copies_ + block * whole_terms<O>(rows) * lanes<R>);
      }
      return copies_;
    } else {
      return values;
    }
  }

 private:
  static constexpr bool converts = sizeof(O) != sizeof(R);
  O* copies_;
};

}  // namespace
}  // namespace odn_fast::ODN_FAST_INSTRUCTION_SET
