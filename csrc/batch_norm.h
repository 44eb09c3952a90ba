// Batch norm as tensors, for every op that contains it: checks, values per channel, allocation and parallel launch.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <initializer_list>
#include <optional>
#include <vector>

#include "batch_norm_act.h"

namespace odn_fast::batch_norm {

using at::Tensor;
using Values = std::vector<double>;  // one per channel

// ValueError unless `tensor` is a floating CPU tensor of that shape, and of that dtype where one is asked for.
void check_tensor(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected,
                  std::optional<at::ScalarType> dtype = std::nullopt);

// The functions of a kernel table for maps stored as x is.
template <typename Kernels>
const auto& by_storage(const Kernels& table, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return table.bfloat16;
    case at::kDouble: return table.float64;
    default: return table.float32;
  }
}

at::ScalarType compute_type(const Tensor& x);
Tensor dense(const Tensor& map);                           // channels_last
Tensor dense_as(const Tensor& map, const Tensor& x);       // and of x's dtype
Tensor empty_map(const Tensor& x, at::IntArrayRef shape);  // dense, of x's dtype

// Calls work(pointer to the elements), typed.
template <typename Work>
void with_elements(const Tensor& tensor, Work&& work) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return work(tensor.const_data_ptr<double>());
    case at::kBFloat16: return work(tensor.const_data_ptr<at::BFloat16>());
    default: return work(tensor.const_data_ptr<float>());
  }
}

Values values_of(const Tensor& vector);
Tensor vector_of(const Values& values, at::ScalarType type);  // kFloat or kDouble
Tensor like(const Values& values, const Tensor& parameter);   // a parameter's gradient in its shape and dtype

int64_t padded(const Tensor& x, int64_t channels);

// Vectors over channels, padded with zeros, in the type of arithmetic.
class Vectors {
 public:
  Vectors(const Tensor& x, int64_t channels, std::initializer_list<const Values*> all);

  const void* operator[](int64_t row) const {
    return static_cast<const char*>(memory_.const_data_ptr()) + row * stride_ * memory_.element_size();
  }

 private:
  int64_t stride_;
  Tensor memory_;
};

// Work is cut into chunks by its size alone, so that sums, added in the order of the chunks, have the same bits with
// any number of threads.
constexpr int64_t most_chunks = 16;

struct Chunks {
  int64_t units, count;
  int64_t first(int64_t chunk) const { return units * chunk / count; }
};

// A sweep that follows another over the same maps goes backward: it begins with what is still in cache.
enum class Order { forward, backward };

void run(const Chunks& chunks, int64_t multiply_adds, Order order, const std::function<void(int64_t)>& work);

// The sums of `size` values of every chunk, which lie one after the other, added in the order of the chunks.
Values added(const std::vector<double>& sums, int64_t size);

struct Affine {  // scale * z + shift
  Values scale, shift;
};

// Batch norm as such.
Affine affine(const Tensor& z_mean, const Tensor& var, const Tensor& bn_weight, const Tensor& bn_bias, double eps);

// relu(affine(z) + residual), where the residual has an affine of its own or none.
Tensor finish(const Tensor& z, const Affine& affine, const Tensor* residual, const Affine* residual_affine, bool relu);

// The gradient at y, and what y was: the mask is y > 0 if y is given, else mask(z) > 0 if relu.
struct OutputGradient {
  Tensor grad;  // dense
  const Tensor* y;
  bool relu;
};

// Sums over all pixels of the masked gradient and of its products with z - mean and, where it is given, other - other_mean.
struct GradientSums {
  Values grad, product, other_product;
};

GradientSums reduce(const OutputGradient& gradient, const Tensor& z, const Values& z_mean, const Affine& mask,
                    const Tensor* other, const Values& other_mean, Tensor* masked);

// Batch norm's gradients: of weight and bias, and of z as scale * masked + constant + slope * z.
struct NormGradient {
  Values weight, bias;
  Values scale, constant, slope;
};

NormGradient norm_gradient(const Values& grad, const Values& product, const Tensor& z_mean, const Tensor& var,
                           const Tensor& bn_weight, double eps, int64_t values_per_channel);

}  // namespace odn_fast::batch_norm
