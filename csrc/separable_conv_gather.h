// Rows of x, blocked and bordered with zeros, and what the pointwise product reads: the depthwise convolution of
// those rows, or averages over windows of x.
#pragma once

#include "products.h"
#include "separable_conv.h"
#include "workspace.h"

namespace odn_fast::separable_conv::ODN_FAST_INSTRUCTION_SET {
namespace {

using namespace odn_fast::ODN_FAST_INSTRUCTION_SET;

// Output rows worked on at a time. Maps are read and written in runs long enough for the processor to fetch ahead of
// them, and the buffers in between stay in the second-level cache.
inline int64_t rows_per_band(const Layer& layer) {
  constexpr int64_t values = 16384, fewest_pixels = 64;
  const int64_t pixels = larger(values / larger(layer.in_channels, layer.out_channels), fewest_pixels);
  return smaller((pixels + layer.out_width - 1) / layer.out_width, layer.rows_per_range);
}

struct Range {  // a work unit: output rows [first, last) of an image
  int64_t image, first, last;
};

inline Range range_of(const Layer& layer, int64_t unit) {
  const int64_t first = unit % layer.ranges * layer.rows_per_range;
  return {unit / layer.ranges, first, smaller(first + layer.rows_per_range, layer.out_height)};
}

// The last `capacity` rows of one image, each [block][column + 1][lane] with a column of zeros at either side.
template <typename Real>
class RowRing {
 public:
  RowRing(Workspace& workspace, int64_t capacity, int64_t width, int64_t channels, int64_t height)
      : capacity_(capacity),
        height_(height),
        block_size_((width + 2) * lanes<Real>),
        row_size_(block_size_ * blocks_of<Real>(channels)),
        rows_(workspace.take<Real>(capacity * row_size_)),
        zeros_(workspace.take<Real>(block_size_)) {}

  void clear_borders() {
    constexpr int64_t L = lanes<Real>;
    for (Real* block = rows_; block < rows_ + capacity_ * row_size_; block += block_size_) {
      store(block, Vector<Real>{});
      store(block + block_size_ - L, Vector<Real>{});
    }
    clear(zeros_, block_size_);
  }

  Real* row(int64_t row) const { return rows_ + row % capacity_ * row_size_; }

  // A block of a row, from its column -1 on; zeros above and below the image.
  const Real* block(int64_t row, int64_t block) const {
    return 0 <= row && row < height_ ? this->row(row) + block * block_size_ : zeros_;
  }

  int64_t block_size() const { return block_size_; }

 private:
  int64_t capacity_, height_, block_size_, row_size_;
  Real* rows_;
  Real* zeros_;
};

template <typename Storage>
void stage_row(const Layer& layer, int64_t image, int64_t row, const RowRing<Real<Storage>>& ring) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  const int64_t channels = layer.in_channels, width = layer.width;
  const Storage* x = static_cast<const Storage*>(layer.x) + (image * layer.height + row) * width * channels;
  R* to = ring.row(row) + L;
  for (int64_t channel = 0; channel < channels; channel += L, to += ring.block_size()) {
    with_block<Storage>(channels - channel, [&](auto of_block) {
      if (layer.in_scale) {
        const Vector<R> scale = load(static_cast<const R*>(layer.in_scale) + channel);
        const Vector<R> shift = load(static_cast<const R*>(layer.in_shift) + channel);
        for (int64_t column = 0; column < width; ++column) {
          store(to + column * L, relu(scale * of_block.read(x + column * channels + channel) + shift));
        }
      } else {
        for (int64_t column = 0; column < width; ++column) {
          store(to + column * L, of_block.read(x + column * channels + channel));
        }
      }
    });
  }
}

// M neighbouring outputs of a depthwise row of one block; rows point at the first column read.
template <int S, int M, typename Real>
[[gnu::always_inline]] inline void depthwise_columns(const Real* const (&rows)[3], const Vector<Real> (&weight)[9],
                                                     Vector<Real> start, Real* to) {
  constexpr int64_t L = lanes<Real>;
  Vector<Real> sums[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = start;
#pragma GCC unroll 3
  for (int y = 0; y < 3; ++y) {
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[m] += weight[3 * y + x] * load(rows[y] + (m * S + x) * L);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store(to + m * L, sums[m]);
}

template <int S, typename Real>
inline void depthwise_row(const Real* above, const Real* centre, const Real* below, const Real* weights, const Real* bias,
                          int64_t width, Real* to) {
  constexpr int64_t L = lanes<Real>;
  constexpr int M = vector_registers / 4;
  const Real* rows[3] = {above, centre, below};
  Vector<Real> weight[9];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) weight[i] = load(weights + i * L);
  const Vector<Real> start = bias ? load(bias) : Vector<Real>{};
  int64_t column = 0;
  for (; column + M <= width; column += M, to += M * L) {
    depthwise_columns<S, M>(rows, weight, start, to);
    for (const Real*& row : rows) row += M * S * L;
  }
  for (; column < width; ++column, to += L) {
    depthwise_columns<S, 1>(rows, weight, start, to);
    for (const Real*& row : rows) row += S * L;
  }
}

// Averages over windows of x, whose last ones are cut off at its border.
template <typename Storage>
void pool_row(const Layer& layer, int64_t image, int64_t out_row, int64_t block, Real<Storage>* to) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  const int64_t channels = layer.in_channels, channel = block * L, window = layer.window;
  const int64_t first_row = out_row * window, last_row = smaller(first_row + window, layer.height);
  const Storage* x = static_cast<const Storage*>(layer.x) + image * layer.height * layer.width * channels + channel;
  with_block<Storage>(channels - channel, [&](auto of_block) {
    for (int64_t column = 0; column < layer.out_width; ++column, to += L) {
      const int64_t first = column * window, last = smaller(first + window, layer.width);
      Vector<R> sum{};
      for (int64_t row = first_row; row < last_row; ++row) {
        for (int64_t i = first; i < last; ++i) sum += of_block.read(x + (row * layer.width + i) * channels);
      }
      store(to, sum / static_cast<R>((last_row - first_row) * (last - first)));
    }
  });
}

// Reads rows of x as they are needed and gathers what the pointwise product reads.
template <typename Storage>
class Gather {
 public:
  using R = Real<Storage>;

  // `kept`: rows of x above those the current band reads that must stay readable.
  Gather(const Layer& layer, Workspace& workspace, int64_t kept)
      : layer_(layer),
        ring_(workspace, layer.window ? 0 : (rows_per_band(layer) - 1) * layer.stride + 3 + kept, layer.width,
              layer.in_channels, layer.height),
        band_(workspace.take<R>(rows_per_band(layer) * layer.out_width * padded<R>(layer.in_channels))) {}

  void clear_borders() { ring_.clear_borders(); }

  void begin(int64_t image, int64_t first_row) {
    image_ = image;
    staged_ = larger(0, first_row * layer_.stride - 1);
  }

  // Output rows [first, last) into band(), [block][pixel][lane].
  void rows(int64_t first, int64_t last, const R* bias) {
    constexpr int64_t L = lanes<R>;
    const int64_t width = layer_.out_width;
    if (!layer_.window) {
      const int64_t needed = smaller((last - 1) * layer_.stride + 2, layer_.height);
      for (; staged_ < needed; ++staged_) stage_row<Storage>(layer_, image_, staged_, ring_);
    }
    R* to = band_;
    for (int64_t block = 0; block < blocks_of<R>(layer_.in_channels); ++block) {
      const R* weights = static_cast<const R*>(layer_.dw) + block * 9 * L;
      const R* start = bias ? bias + block * L : nullptr;
      for (int64_t row = first; row < last; ++row, to += width * L) {
        const int64_t at = row * layer_.stride;
        if (layer_.window) {
          pool_row<Storage>(layer_, image_, row, block, to);
        } else if (layer_.stride == 1) {
          depthwise_row<1>(ring_.block(at - 1, block), ring_.block(at, block), ring_.block(at + 1, block), weights, start,
                           width, to);
        } else {
          depthwise_row<2>(ring_.block(at - 1, block), ring_.block(at, block), ring_.block(at + 1, block), weights, start,
                           width, to);
        }
      }
    }
  }

  // As much of x as a band reads, from where the last one ended, in `pieces` pieces.
  Ahead ahead(int64_t pieces) const {
    if (layer_.window) return {};
    const int64_t row_bytes = layer_.width * layer_.in_channels * static_cast<int64_t>(sizeof(Storage));
    const int64_t row = image_ * layer_.height + staged_, all = layer_.batch * layer_.height;
    const int64_t last = smaller(row + rows_per_band(layer_) * layer_.stride, all);
    const char* x = static_cast<const char*>(layer_.x);
    return {x + row * row_bytes, x + last * row_bytes, rounded_up((last - row) * row_bytes / pieces + 1, 64)};
  }

  R* band() const { return band_; }
  const RowRing<R>& ring() const { return ring_; }

 private:
  const Layer& layer_;
  RowRing<R> ring_;
  R* band_;
  int64_t image_ = 0, staged_ = 0;
};

}  // namespace
}  // namespace odn_fast::separable_conv::ODN_FAST_INSTRUCTION_SET
