// The backward kernels of separable_conv.
#pragma once

#include "batch_norm_act_mask.h"
#include "separable_conv_gather.h"

namespace odn_fast::separable_conv::ODN_FAST_INSTRUCTION_SET {
namespace {

using namespace odn_fast::batch_norm_act::ODN_FAST_INSTRUCTION_SET;

// The gradient at z of `pixels` pixels, blocked; `from` is the offset of the first.
template <typename Storage>
void z_gradient(const Gradient& p, int64_t from, int64_t pixels, int64_t channels, Real<Storage>* to) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  with_mask<Storage>(p, [&](const auto& masked) {
    for (int64_t channel = 0; channel < channels; channel += L) {
      const Vector<R> scale = at_channel<R>(p.scale, channel), constant = at_channel<R>(p.constant, channel);
      const Vector<R> slope = at_channel<R>(p.slope, channel);
      const Storage* z = static_cast<const Storage*>(p.z) + from + channel;
      R* of_block_to = to + channel * pixels;
      with_block<Storage>(channels - channel, [&](auto of_block) {
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
          const Vector<R> value = of_block.read(z + pixel * channels);
          const Vector<R> grad = masked(of_block, from + channel + pixel * channels, channel, value);
          store(of_block_to + pixel * L, scale * grad + (slope * value + constant));
        }
      });
    }
  });
}

// The gradient of one row and block of x from what came through the depthwise convolution, [column][lane]. Where x is
// normalised as it is read, `sum` and `product` receive what Backward's sums are made of.
template <typename Storage>
void finish_row(const Backward& p, int64_t image, int64_t row, int64_t channel, const Real<Storage>* from,
                const Real<Storage>* x, Vector<Real<Storage>>& sum, Vector<Real<Storage>>& product) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  const Layer& layer = p.layer;
  const int64_t channels = layer.in_channels, width = layer.width;
  const int64_t offset = (image * layer.height + row) * width * channels + channel;
  Storage* to = static_cast<Storage*>(p.grad_x) + offset;
  with_block<Storage>(channels - channel, [&](auto of_block) {
    if (layer.in_scale) {  // x is relu(in_scale * raw + in_shift)
      const Storage* raw = static_cast<const Storage*>(layer.x) + offset;
      const Vector<R> mean = at_channel<R>(p.in_mean, channel);
      Vector<R> row_sum{}, row_product{};
      for (int64_t column = 0; column < width; ++column) {
        const Vector<R> unmasked = loaded(load(from + column * L));
        const Vector<R> grad = load(x + column * L) <= 0 ? Vector<R>{} : unmasked;
        row_sum += grad;
        row_product += grad * (of_block.read(raw + column * channels) - mean);
        of_block.write(to + column * channels, grad);
      }
      sum += row_sum;
      product += row_product;
    } else if (p.skip_grad) {
      const Storage* skip = static_cast<const Storage*>(p.skip_grad) + offset;
      const Storage* y = static_cast<const Storage*>(p.skip_y) + offset;
      for (int64_t column = 0; column < width; ++column) {
        const int64_t at = column * channels;
        const Vector<R> grad = loaded(of_block.read(skip + at));
        const Vector<R> let_through = of_block.read(y + at) <= 0 ? Vector<R>{} : grad;
        of_block.write(to + at, load(from + column * L) + let_through);
      }
    } else if (p.pooled_grad) {
      const int64_t window = p.pooled_window, out_row = row / window;
      const int64_t out_height = (layer.height + window - 1) / window, out_width = (width + window - 1) / window;
      const int64_t rows = smaller(window, layer.height - out_row * window);
      const Storage* pooled =
          static_cast<const Storage*>(p.pooled_grad) + (image * out_height + out_row) * out_width * channels + channel;
      for (int64_t first = 0; first < width; first += window, pooled += channels) {
        const int64_t last = smaller(first + window, width);
        const Vector<R> share = of_block.read(pooled) / static_cast<R>(rows * (last - first));
        for (int64_t column = first; column < last; ++column) {
          of_block.write(to + column * channels, load(from + column * L) + share);
        }
      }
    } else {
      for (int64_t column = 0; column < width; ++column) of_block.write(to + column * channels, load(from + column * L));
    }
  });
}

// One row of a block of x, stride 1: its gradient, and what it adds to that of the depthwise weights. Both read the
// gradient of the depthwise output, of which above, centre and below are rows from column -1 on.
template <typename Real>
[[gnu::always_inline]] inline void depthwise_backward_row(const Real* above, const Real* centre, const Real* below,
                                                          const Real* x, const Vector<Real> (&weight)[9],
                                                          Vector<Real> (&sums)[9], int64_t width, Real* to) {
  constexpr int64_t L = lanes<Real>;
  const Real* rows[3] = {below, centre, above};  // the outputs that read this row through the taps' row 0, 1, 2
  for (int64_t column = 0; column < width; ++column) {
    const Vector<Real> value = load(x + column * L);
    Vector<Real> grad{};
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const Vector<Real> output = load(rows[i] + (column + 2 - j) * L);
        grad += weight[3 * i + j] * output;
        sums[3 * i + j] += value * output;
      }
    }
    store(to + column * L, grad);
  }
}

// The same with stride 2, for a pair of rows of x, which outputs `here` and `next` (from column 0 on) read. The right
// border of x is a column of zeros, and so is the row below an odd height.
template <typename Real>
[[gnu::always_inline]] inline void depthwise_backward_rows(const Real* here, const Real* next, const Real* upper,
                                                           const Real* lower, const Vector<Real> (&weight)[9],
                                                           Vector<Real> (&sums)[9], int64_t width, Real* to_upper,
                                                           Real* to_lower) {
  constexpr int64_t L = lanes<Real>;
  for (int64_t column = 0; column < width; column += 2, here += L, next += L) {
    const Vector<Real> x00 = load(upper + column * L), x01 = load(upper + (column + 1) * L);
    const Vector<Real> x10 = load(lower + column * L), x11 = load(lower + (column + 1) * L);
    const Vector<Real> g00 = load(here), g01 = load(here + L), g10 = load(next), g11 = load(next + L);
    sums[0] += x11 * g11;
    sums[1] += x10 * g10;
    sums[2] += x11 * g10;
    sums[3] += x01 * g01;
    sums[4] += x00 * g00;
    sums[5] += x01 * g00;
    sums[6] += x11 * g01;
    sums[7] += x10 * g00;
    sums[8] += x11 * g00;
    store(to_upper + column * L, weight[4] * g00);
    store(to_upper + (column + 1) * L, weight[5] * g00 + weight[3] * g01);
    store(to_lower + column * L, weight[7] * g00 + weight[1] * g10);
    store(to_lower + (column + 1) * L, (weight[8] * g00 + weight[6] * g01) + (weight[2] * g10 + weight[0] * g11));
  }
}

// Everything one unit of the backward pass works with.
template <typename Storage>
class BackwardUnit {
 public:
  using R = Real<Storage>;
  using O = Operand<Storage>;
  static constexpr int64_t L = lanes<R>;

  BackwardUnit(const Backward& p, const BackwardSums& to, Workspace& workspace)
      : p_(p),
        layer_(p.layer),
        to_(to),
        gather_(p.layer, workspace, p.layer.stride),
        gradients_(workspace, p.layer.window ? 0 : rows_per_band(p.layer) + 2, p.layer.out_width, p.layer.in_channels,
                   p.layer.out_height),
        z_gradient_(workspace.take<R>(rows_per_band(p.layer) * p.layer.out_width * padded<R>(p.layer.out_channels))),
        x_gradient_(workspace.take<R>(
            (p.layer.window ? rows_per_band(p.layer) * blocks_of<R>(p.layer.in_channels) : 2) * (p.layer.width + 1) * L)),
        zeros_(workspace.take<R>(padded<R>(p.layer.in_channels))),
        left_(workspace, rows_per_band(p.layer) * p.layer.out_width, p.layer.out_channels),
        right_(workspace, rows_per_band(p.layer) * p.layer.out_width, p.layer.in_channels) {}

  void clear_borders() {
    gather_.clear_borders();
    gradients_.clear_borders();
    clear(zeros_, padded<R>(layer_.in_channels));
  }

  void run(const Range& range) {
    image_ = range.image;
    gather_.begin(range.image, range.first);
    if (layer_.window) {
      for (int64_t row = range.first; row < range.last; row += rows_per_band(layer_)) {
        band(row, smaller(row + rows_per_band(layer_), range.last), true);
      }
      return;
    }
    // Rows of x at the range's border are also read by outputs beyond it, whose gradients are computed here again.
    done_ = range.first;
    const int64_t above = layer_.stride == 1 ? larger(range.first - 1, 0) : range.first;
    const int64_t below = smaller(range.last + 1, layer_.out_height);
    if (above < range.first) band(above, range.first, false);
    for (int64_t row = range.first; row < range.last; row += rows_per_band(layer_)) {
      const int64_t last = smaller(row + rows_per_band(layer_), range.last);
      band(row, last, true);
      inputs(last == layer_.out_height ? last : last - 1);
    }
    if (range.last < below) {
      band(range.last, below, false);
      inputs(range.last);
    }
  }

 private:
  // The gradient at the gathered values for output rows [first, last), and, for rows of this range, the sums of the
  // pointwise weights' gradient.
  void band(int64_t first, int64_t last, bool own) {
    const int64_t width = layer_.out_width, pixels = (last - first) * width;
    const int64_t offset = (image_ * layer_.out_height + first) * width;
    const int64_t outputs = layer_.out_channels, channels = layer_.in_channels;
    const O* pw = static_cast<const O*>(p_.pw);
    z_gradient<Storage>(p_.gradient, offset * outputs, pixels, outputs, z_gradient_);
    if (own) {
      gather_.rows(first, last, nullptr);
      outer_product(pixels, left_.by_pair(z_gradient_, pixels, outputs), outputs,
                    right_.by_pair(gather_.band(), pixels, channels), channels, whole_terms<O>(pixels) * L,
                    static_cast<R*>(to_.grad_pw), padded<R>(channels));
    }
    const O* gradient = left_.by_row(z_gradient_, pixels, outputs);
    if (layer_.window) {
      if (!p_.grad_x) return;
      product_into(x_gradient_, pixels * L, pixels, gradient, pixels * L, pw, outputs, channels, zeros_);
      for (int64_t channel = 0; channel < channels; channel += L) {
        Storage* to = static_cast<Storage*>(p_.grad_x) + offset * channels + channel;
        with_block<Storage>(channels - channel, [&](auto of_block) {
          for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            of_block.write(to + pixel * channels, load(x_gradient_ + channel * pixels + pixel * L));
          }
        });
      }
      return;
    }
    for (int64_t row = first; row < last; ++row) {
      product_into(gradients_.row(row) + L, gradients_.block_size(), width, gradient + (row - first) * width * L,
                   pixels * L, pw, outputs, channels, zeros_);
    }
  }

  // Rows of x (pairs of rows with stride 2) from the last one done up to `last`.
  void inputs(int64_t last) {
    if (last <= done_) return;
    for (int64_t block = 0; block < blocks_of<R>(layer_.in_channels); ++block) {
      R* grad_dw = static_cast<R*>(to_.grad_dw) + block * 9 * L;
      Vector<R> weight[9], sums[9], sum{}, product{};
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) {
        weight[i] = load(static_cast<const R*>(layer_.dw) + (block * 9 + i) * L);
        sums[i] = load(grad_dw + i * L);
      }
      const auto finish = [&](int64_t row, const R* from) {
        if (!p_.grad_x) return;
        finish_row<Storage>(p_, image_, row, block * L, from, gather_.ring().block(row, block) + L, sum, product);
      };
      for (int64_t row = done_; row < last; ++row) {
        if (layer_.stride == 1) {
          const R* x = gather_.ring().block(row, block) + L;
          depthwise_backward_row(gradients_.block(row - 1, block), gradients_.block(row, block),
                                 gradients_.block(row + 1, block), x, weight, sums, layer_.width, x_gradient_);
          finish(row, x_gradient_);
        } else {
          R* lower = x_gradient_ + (layer_.width + 1) * L;
          depthwise_backward_rows(gradients_.block(row, block) + L, gradients_.block(row + 1, block) + L,
                                  gather_.ring().block(2 * row, block) + L, gather_.ring().block(2 * row + 1, block) + L,
                                  weight, sums, layer_.width, x_gradient_, lower);
          finish(2 * row, x_gradient_);
          if (2 * row + 1 < layer_.height) finish(2 * row + 1, lower);
        }
      }
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) store(grad_dw + i * L, sums[i]);
      if (layer_.in_scale) {
        add_lanes(to_.sums + block * L, sum);
        add_lanes(to_.sums + padded<R>(layer_.in_channels) + block * L, product);
      }
    }
    done_ = last;
  }

  const Backward& p_;
  const Layer& layer_;
  const BackwardSums& to_;
  Gather<Storage> gather_;
  RowRing<R> gradients_;
  R* z_gradient_;
  R* x_gradient_;
  R* zeros_;
  Operands<Storage> left_, right_;
  int64_t image_ = 0, done_ = 0;
};

template <typename Storage>
int64_t backward_workspace(const Backward& p) {
  Workspace workspace{0};
  BackwardUnit<Storage>(p, {}, workspace);
  return static_cast<int64_t>(workspace.next);
}

template <typename Storage>
void backward(const Backward& p, const BackwardSums& to, int64_t first_unit, int64_t last_unit, void* memory) {
  Workspace workspace{reinterpret_cast<uintptr_t>(memory)};
  BackwardUnit<Storage> unit(p, to, workspace);
  unit.clear_borders();
  for (int64_t index = last_unit; index-- > first_unit;) unit.run(range_of(p.layer, index));
}

}  // namespace
}  // namespace odn_fast::separable_conv::ODN_FAST_INSTRUCTION_SET
