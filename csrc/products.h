// Matrix products over blocked buffers, tile by tile in registers.
//
// A blocked buffer holds rows (pixels) of channels as [block][row][lane]: a block is as many channels as a vector has
// lanes, so every address inside a tile is a constant offset. Channels are padded with zeros to whole blocks.
#pragma once

#include "vectors.h"

namespace odn_fast::ODN_FAST_INSTRUCTION_SET {
namespace {

// Rows of a tile that is one or two blocks wide: sums for two multiply-adds a cycle, and registers left for the factors.
constexpr int tile_rows(int blocks) { return vector_registers / (2 * blocks); }

// The right factor, of `inputs` rows and `outputs` columns, in the order in which tiles read it: pairs of blocks of
// columns, and a single one if their number is odd, each [input][block][lane].
template <typename Real>
void pack_pointwise(int64_t inputs, int64_t outputs, const void* weight, int64_t input_stride, int64_t output_stride,
                    void* packed) {
  Real* to = static_cast<Real*>(packed);
  for (int64_t first = 0; first < outputs; first += 2 * lanes<Real>) {
    const int64_t columns = outputs - first <= lanes<Real> ? lanes<Real> : 2 * lanes<Real>;
    for (int64_t input = 0; input < inputs; ++input) {
      for (int64_t column = first; column < first + columns; ++column) {
        const Real* from = static_cast<const Real*>(weight) + input * input_stride + column * output_stride;
        *to++ = column < outputs ? *from : Real{};
      }
    }
  }
}

template <typename Real>
int64_t pointwise_size(int64_t inputs, int64_t outputs) {
  return inputs * padded<Real>(outputs);
}

// sums[m][j] += left[m][input] * right[input][j] over the inputs.
template <int M, int J, typename Real>
[[gnu::always_inline]] inline void multiply_tile(const Real* left, int64_t block_size, const Real* right, int64_t inputs,
                                                 Vector<Real> (&sums)[M][J]) {
  constexpr int64_t L = lanes<Real>;
  for (; inputs > 0; inputs -= L, left += block_size) {
    const int64_t count = inputs < L ? inputs : L;
    for (int64_t input = 0; input < count; ++input, right += J * L) {
      Vector<Real> factor[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) factor[j] = load(right + j * L);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) sums[m][j] += left[m * L + input] * factor[j];
      }
    }
  }
}

// Tiles of M rows as long as they fit, then of M / 2, and so on.
template <int M, int J, typename Real, typename Done>
inline void product_rows(int64_t row, int64_t rows, const Real* left, int64_t block_size, const Real* right,
                         int64_t inputs, const Real* start, int64_t block, const Done& done) {
  constexpr int64_t L = lanes<Real>;
  for (; row + M <= rows; row += M) {
    Vector<Real> sums[M][J];
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

// start + left * right for a blocked `left` of `rows` rows, whose blocks are block_size elements apart, a packed `right`
// and a padded `start`. done(row, block, sums[M][J]) receives the rows from `row` on of J blocks from `block` on.
template <typename Real, typename Done>
inline void product(int64_t rows, const Real* left, int64_t block_size, const Real* right, int64_t inputs, int64_t outputs,
                    const Real* start, const Done& done) {
  const int64_t blocks = blocks_of<Real>(outputs);
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2, right += inputs * 2 * lanes<Real>) {
    product_rows<tile_rows(2), 2>(0, rows, left, block_size, right, inputs, start, block, done);
  }
  if (block < blocks) product_rows<tile_rows(1), 1>(0, rows, left, block_size, right, inputs, start, block, done);
}

// The product into a blocked buffer.
template <typename Real>
void product_into(Real* to, int64_t to_block_size, int64_t rows, const Real* left, int64_t block_size, const Real* right,
                  int64_t inputs, int64_t outputs, const Real* start) {
  product(rows, left, block_size, right, inputs, outputs, start,
          [=]<int M, int J>(int64_t row, int64_t block, const Vector<Real>(&sums)[M][J]) {
#pragma GCC unroll 2
            for (int j = 0; j < J; ++j) {
#pragma GCC unroll 16
              for (int m = 0; m < M; ++m) store(to + (block + j) * to_block_size + (row + m) * lanes<Real>, sums[m][j]);
            }
          });
}

template <int J, typename Real>
inline void outer_product_columns(int64_t rows, const Real* left, int64_t left_block_size, int64_t outputs,
                                  const Real* right, int64_t right_block_size, Real* sums, int64_t stride) {
  constexpr int64_t L = lanes<Real>;
  constexpr int M = tile_rows(J) < L ? tile_rows(J) : L;
  for (int64_t output = 0; output < outputs; output += M, sums += M * stride) {
    const Real* factor = left + output / L * left_block_size + output % L;
    Vector<Real> tile[M][J];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) tile[m][j] = load(sums + m * stride + j * L);
    }
    for (int64_t row = 0; row < rows; ++row) {
      Vector<Real> value[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) value[j] = load(right + j * right_block_size + row * L);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) tile[m][j] += factor[row * L + m] * value[j];
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) store(sums + m * stride + j * L, tile[m][j]);
    }
  }
}

// sums[output][input] += left[row][output] * right[row][input] over the rows, both blocked; sums has padded(outputs)
// rows of `stride` elements.
template <typename Real>
inline void outer_product(int64_t rows, const Real* left, int64_t left_block_size, int64_t outputs, const Real* right,
                          int64_t right_block_size, int64_t inputs, Real* sums, int64_t stride) {
  const int64_t blocks = blocks_of<Real>(inputs);
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2) {
    outer_product_columns<2>(rows, left, left_block_size, outputs, right + block * right_block_size, right_block_size,
                             sums + block * lanes<Real>, stride);
  }
  if (block < blocks) {
    outer_product_columns<1>(rows, left, left_block_size, outputs, right + block * right_block_size, right_block_size,
                             sums + block * lanes<Real>, stride);
  }
}

}  // namespace
}  // namespace odn_fast::ODN_FAST_INSTRUCTION_SET
