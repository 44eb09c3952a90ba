// The CPU kernels of batch_norm_act, compiled once per instruction set.
#include "batch_norm_act_mask.h"

namespace odn_fast::batch_norm_act::ODN_FAST_INSTRUCTION_SET {
namespace {

// G blocks of channels at a time: their coefficients stay in registers and memory is read in order.
template <int G, typename Storage, typename Access, typename Residual>
[[gnu::always_inline]] inline void finish_blocks(const Finish& p, int64_t first_pixel, int64_t last_pixel, int64_t channel,
                                                 Access of_block, Residual residual) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  Vector<R> scale[G], shift[G];
#pragma GCC unroll 4
  for (int i = 0; i < G; ++i) {
    scale[i] = load(static_cast<const R*>(p.scale) + channel + i * L);
    shift[i] = load(static_cast<const R*>(p.shift) + channel + i * L);
  }
  const Vector<R> lowest = broadcast(p.relu ? R{0} : -static_cast<R>(__builtin_huge_val()));
  const int64_t channels = p.channels;
  const Storage* z = static_cast<const Storage*>(p.z) + channel;
  Storage* y = static_cast<Storage*>(p.y) + channel;
  for (int64_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) {
      const int64_t at = pixel * channels + i * L;
      const Vector<R> value = scale[i] * of_block.read(z + at) + shift[i] + residual(channel + i * L, channel + at);
      of_block.write(y + at, value < lowest ? lowest : value);
    }
  }
}

template <typename Storage, typename Residual>
void finish_all(const Finish& p, int64_t first_pixel, int64_t last_pixel, const Residual& residual) {
  constexpr int64_t L = lanes<Real<Storage>>;
  int64_t channel = 0;
  const auto blocks = [&]<int G>(auto of_block) {
    finish_blocks<G, Storage>(p, first_pixel, last_pixel, channel, of_block, [&](int64_t of_channel, int64_t at) {
      return residual(of_block, of_channel, at);
    });
    channel += G * L;
  };
  while (channel + 4 * L <= p.channels) blocks.template operator()<4>(WholeBlock<Storage>{});
  while (channel + L <= p.channels) blocks.template operator()<1>(WholeBlock<Storage>{});
  if (channel < p.channels) blocks.template operator()<1>(PartOfBlock<Storage>{p.channels - channel});
}

template <typename Storage>
void finish(const Finish& p, int64_t first_pixel, int64_t last_pixel) {
  using R = Real<Storage>;
  const Storage* residual = static_cast<const Storage*>(p.residual);
  const R* scale = static_cast<const R*>(p.residual_scale);
  const R* shift = static_cast<const R*>(p.residual_shift);
  if (!residual) {
    finish_all<Storage>(p, first_pixel, last_pixel, [](auto, int64_t, int64_t) { return Vector<R>{}; });
  } else if (!scale) {
    finish_all<Storage>(p, first_pixel, last_pixel,
                        [=](auto of_block, int64_t, int64_t at) { return of_block.read(residual + at); });
  } else {
    finish_all<Storage>(p, first_pixel, last_pixel, [=](auto of_block, int64_t channel, int64_t at) {
      return load(scale + channel) * of_block.read(residual + at) + load(shift + channel);
    });
  }
}

// Sums of G blocks of channels over a group of pixels.
template <int G, typename Storage, typename Access, typename Masked>
[[gnu::always_inline]] inline void reduce_blocks(const Reduce& p, int64_t begin, int64_t end, int64_t channel, Access of_block,
                                                 const Masked& masked, double* sums) {
  using R = Real<Storage>;
  constexpr int64_t L = lanes<R>;
  const int64_t channels = p.channels, stride = padded<R>(p.channels);
  const Storage* z = static_cast<const Storage*>(p.gradient.z);
  const Storage* other = static_cast<const Storage*>(p.other);
  Storage* to = static_cast<Storage*>(p.masked);
  Vector<R> sum[G] = {}, product[G] = {}, other_product[G] = {};
  for (int64_t pixel = begin; pixel < end; ++pixel) {
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) {
      const int64_t of = channel + i * L, at = pixel * channels + of;
      const Vector<R> value = of_block.read(z + at), grad = masked(of_block, at, of, value);
      sum[i] += grad;
      product[i] += grad * (value - at_channel<R>(p.mean, of));
      if (other) other_product[i] += grad * (of_block.read(other + at) - at_channel<R>(p.other_mean, of));
      if (to) of_block.write(to + at, grad);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < G; ++i) {
    for (int64_t lane = 0; lane < L; ++lane) {
      double* of_channel = sums + channel + i * L + lane;
      of_channel[0] += sum[i][lane];
      of_channel[stride] += product[i][lane];
      of_channel[2 * stride] += other_product[i][lane];
    }
  }
}

template <typename Storage>
void reduce(const Reduce& p, int64_t first_pixel, int64_t last_pixel, double* sums) {
  constexpr int64_t L = lanes<Real<Storage>>, group = 64;  // pixels: short sums in R, their sum in double
  with_mask<Storage>(p.gradient, [&](const auto& masked) {
    for (int64_t begin = first_pixel; begin < last_pixel; begin += group) {
      const int64_t end = begin + group < last_pixel ? begin + group : last_pixel;
      int64_t channel = 0;
      for (; channel + 4 * L <= p.channels; channel += 4 * L) {
        reduce_blocks<4, Storage>(p, begin, end, channel, WholeBlock<Storage>{}, masked, sums);
      }
      for (; channel + L <= p.channels; channel += L) {
        reduce_blocks<1, Storage>(p, begin, end, channel, WholeBlock<Storage>{}, masked, sums);
      }
      if (channel < p.channels) {
        reduce_blocks<1, Storage>(p, begin, end, channel, PartOfBlock<Storage>{p.channels - channel}, masked, sums);
      }
    }
  });
}

template <typename Storage>
constexpr Functions functions{
    lanes<Real<Storage>>,
    finish<Storage>,
    reduce<Storage>,
};

}  // namespace

extern const Kernels kernels{functions<float>, functions<Bfloat16>, functions<double>};

}  // namespace odn_fast::batch_norm_act::ODN_FAST_INSTRUCTION_SET
