// The gradient that a ReLU after batch norm lets through, for all kernels that read one.
#pragma once

#include "batch_norm_act.h"
#include "vectors.h"

namespace odn_fast::batch_norm_act::ODN_FAST_INSTRUCTION_SET {
namespace {

using namespace odn_fast::ODN_FAST_INSTRUCTION_SET;

template <typename Real>
inline Vector<Real> at_channel(const void* padded_values, int64_t channel) {
  return load(static_cast<const Real*>(padded_values) + channel);
}

// Calls work(masked), where masked(block, offset, channel, z) is the gradient that the ReLU lets through.
template <typename Storage, typename Work>
[[gnu::always_inline]] inline void with_mask(const Gradient& p, const Work& work) {
  using V = Vector<Real<Storage>>;
  const Storage* grad = static_cast<const Storage*>(p.grad);
  const Storage* y = static_cast<const Storage*>(p.y);
  const void* scale = p.mask_scale;
  const void* shift = p.mask_shift;
  if (!p.relu) {
    work([=](auto of_block, int64_t offset, int64_t, V) { return of_block.read(grad + offset); });
  } else if (y) {
    work([=](auto of_block, int64_t offset, int64_t, V) {
      const V value = loaded(of_block.read(grad + offset));
      return of_block.read(y + offset) <= 0 ? V{} : value;
    });
  } else {
    work([=](auto of_block, int64_t offset, int64_t channel, V z) {
      const V before = at_channel<Real<Storage>>(scale, channel) * z + at_channel<Real<Storage>>(shift, channel);
      const V value = loaded(of_block.read(grad + offset));
      return before <= 0 ? V{} : value;
    });
  }
}

}  // namespace
}  // namespace odn_fast::batch_norm_act::ODN_FAST_INSTRUCTION_SET
