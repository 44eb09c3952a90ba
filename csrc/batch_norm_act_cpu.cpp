// The CPU kernels of batch_norm_act, compiled once per instruction set.
#include "batch_norm_act_mask.h"

namespace odn_fast::batch_norm_act::ODN_FAST_INSTRUCTION_SET {
namespace {

// Calls work.operator()<G>(begin, end, channel, block) for groups of pixels and, within a group, for every G blocks of
// channels: what belongs to channels stays in registers, and sums stay short. Memory is best read in order, so that the
// rows of up to `widest` blocks are taken whole, and others in long pieces.
template <typename Storage, typename Work>
[[gnu::always_inline]] inline void sweep(int64_t channels, int64_t first_pixel, int64_t last_pixel, const Work& work) {
  constexpr int64_t L = lanes<Real<Storage>>, group = 64;
  constexpr int widest = vector_registers / 4;
  for (int64_t begin = first_pixel; begin < last_pixel; begin += group) {
    const int64_t end = begin + group < last_pixel ? begin + group : last_pixel;
    int64_t channel = 0;
    const auto blocks = [&]<int G>() {
      work.template operator()<G>(begin, end, channel, WholeBlock<Storage>{});
      channel += G * L;
    };
    while (channel + widest * L <= channels) blocks.template operator()<widest>();
    if (widest > 4 && channel + 4 * L <= channels) blocks.template operator()<4>();
    if (channel + 2 * L <= channels) blocks.template operator()<2>();
    if (channel + L <= channels) blocks.template operator()<1>();
    if (channel < channels) work.template operator()<1>(begin, end, channel, PartOfBlock<Storage>{channels - channel});
  }
}

template <typename Storage>
void statistics(const Statistics& p, int64_t first_pixel, int64_t last_pixel, double* sums) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  sweep<Storage>(p.channels, first_pixel, last_pixel,
                 [&]<int G>(int64_t begin, int64_t end, int64_t channel, auto of_block) {
    const Storage* z = static_cast<const Storage*>(p.z) + channel;
    Vector<R> pivot[G], sum[G] = {}, squares[G] = {};
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) pivot[i] = at_channel<R>(p.pivot, channel + i * L);
    for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 8
      for (int i = 0; i < G; ++i) {
        const Vector<R> value = of_block.read(z + pixel * p.channels + i * L) - pivot[i];
        sum[i] += value;
        squares[i] += value * value;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      add_lanes(sums + channel + i * L, sum[i]);
      add_lanes(sums + padded<R>(p.channels) + channel + i * L, squares[i]);
    }
  });
}

template <typename Storage, typename Residual>
[[gnu::always_inline]] inline void finish_with(const Finish& p, int64_t first_pixel, int64_t last_pixel,
                                               const Residual& residual) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  const Vector<R> lowest = broadcast(p.relu ? R{0} : -static_cast<R>(__builtin_huge_val()));
  sweep<Storage>(p.channels, first_pixel, last_pixel,
                 [&]<int G>(int64_t begin, int64_t end, int64_t channel, auto of_block) {
    const Storage* z = static_cast<const Storage*>(p.z);
    Storage* y = static_cast<Storage*>(p.y);
    Vector<R> scale[G], shift[G];
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      scale[i] = at_channel<R>(p.scale, channel + i * L);
      shift[i] = at_channel<R>(p.shift, channel + i * L);
    }
    for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 8
      for (int i = 0; i < G; ++i) {
        const int64_t of = channel + i * L, at = pixel * p.channels + of;
        const Vector<R> value = scale[i] * of_block.read(z + at) + shift[i] + residual(of_block, of, at);
        of_block.write(y + at, value < lowest ? lowest : value);  // NaN stays NaN
      }
    }
  });
}

template <typename Storage>
void finish(const Finish& p, int64_t first_pixel, int64_t last_pixel) {
  using R = Real<Storage>;
  const Storage* residual = static_cast<const Storage*>(p.residual);
  const void* scale = p.residual_scale;
  const void* shift = p.residual_shift;
  if (!residual) {
    finish_with<Storage>(p, first_pixel, last_pixel, [](auto, int64_t, int64_t) { return Vector<R>{}; });
  } else if (!scale) {
    finish_with<Storage>(p, first_pixel, last_pixel,
                         [=](auto of_block, int64_t, int64_t at) { return of_block.read(residual + at); });
  } else {
    finish_with<Storage>(p, first_pixel, last_pixel, [=](auto of_block, int64_t channel, int64_t at) {
      return at_channel<R>(scale, channel) * of_block.read(residual + at) + at_channel<R>(shift, channel);
    });
  }
}

template <typename Storage>
void reduce(const Reduce& p, int64_t first_pixel, int64_t last_pixel, double* sums) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  const int64_t stride = padded<R>(p.channels);
  with_mask<Storage>(p.gradient, [&](const auto& masked) {
    sweep<Storage>(p.channels, first_pixel, last_pixel,
                   [&]<int G>(int64_t begin, int64_t end, int64_t channel, auto of_block) {
      const Storage* z = static_cast<const Storage*>(p.gradient.z);
      const Storage* other = static_cast<const Storage*>(p.other);
      Storage* to = static_cast<Storage*>(p.masked);
      Vector<R> sum[G] = {}, product[G] = {}, other_product[G] = {};
      for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 8
        for (int i = 0; i < G; ++i) {
          const int64_t of = channel + i * L, at = pixel * p.channels + of;
          const Vector<R> value = of_block.read(z + at), grad = masked(of_block, at, of, value);
          sum[i] += grad;
          product[i] += grad * (value - at_channel<R>(p.mean, of));
          if (other) other_product[i] += grad * (of_block.read(other + at) - at_channel<R>(p.other_mean, of));
          if (to) of_block.write(to + at, grad);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < G; ++i) {
        double* of_channel = sums + channel + i * L;
        add_lanes(of_channel, sum[i]);
        add_lanes(of_channel + stride, product[i]);
        if (other) add_lanes(of_channel + 2 * stride, other_product[i]);
      }
    });
  });
}

template <typename Storage>
void apply(const Apply& p, int64_t first_pixel, int64_t last_pixel) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  with_mask<Storage>(p.gradient, [&](const auto& masked) {
    sweep<Storage>(p.channels, first_pixel, last_pixel,
                   [&]<int G>(int64_t begin, int64_t end, int64_t channel, auto of_block) {
      const Storage* z = static_cast<const Storage*>(p.gradient.z);
      Storage* to = static_cast<Storage*>(p.grad_z);
      Vector<R> scale[G], constant[G], slope[G], mean[G];
#pragma GCC unroll 8
      for (int i = 0; i < G; ++i) {
        scale[i] = at_channel<R>(p.gradient.scale, channel + i * L);
        constant[i] = at_channel<R>(p.gradient.constant, channel + i * L);
        slope[i] = at_channel<R>(p.gradient.slope, channel + i * L);
        mean[i] = at_channel<R>(p.mean, channel + i * L);
      }
      for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 8
        for (int i = 0; i < G; ++i) {
          const int64_t of = channel + i * L, at = pixel * p.channels + of;
          const Vector<R> value = of_block.read(z + at), grad = masked(of_block, at, of, value);
          of_block.write(to + at, scale[i] * grad + (slope[i] * (value - mean[i]) + constant[i]));
        }
      }
    });
  });
}

template <typename Storage>
constexpr Functions functions{
    lanes<Real<Storage>>,
    statistics<Storage>,
    finish<Storage>,
    reduce<Storage>,
    apply<Storage>,
};

}  // namespace

extern const Kernels kernels{functions<float>, functions<Bfloat16>, functions<double>};

}  // namespace odn_fast::batch_norm_act::ODN_FAST_INSTRUCTION_SET
