// Check, allocate, launch: batch normalisation on CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "vector.h"

#ifdef FASTTUNE_VECTORS

namespace fasttune::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_images(const char* name, const Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                   "batch_norm: ", name, ": expected float32 or bfloat16 on CPU, found ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "batch_norm: ", name, ": expected [n, c, h, w] in channels_last, found shape ",
                    x.sizes(), " with strides ", x.strides());
}

// As fp32 [channels]; `otherwise` where there is none.
std::vector<float> by_channel(const char* name, const OptionalTensor& given, int64_t channels,
                              float otherwise) {
  if (!given.has_value()) return std::vector<float>(channels, otherwise);
  TORCH_CHECK_VALUE(given->dim() == 1 && given->size(0) == channels, "batch_norm: ", name,
                    ": expected shape [", channels, "], found ", given->sizes());
  const Tensor wide = given->to(at::kFloat).contiguous();
  const float* from = wide.const_data_ptr<float>();
  return std::vector<float>(from, from + channels);
}

std::vector<double> inverse_deviations(const float* variance, int64_t channels, double eps) {
  std::vector<double> inverse(channels);
  for (int64_t j = 0; j < channels; ++j) inverse[j] = 1.0 / std::sqrt(variance[j] + eps);
  return inverse;
}

BatchNormParams images(const Tensor& x) {
  BatchNormParams params = {};
  params.channels = x.size(1);
  params.rows = x.numel() / std::max<int64_t>(1, params.channels);
  params.dtype = dtype_of(x);
  return params;
}

Tensor normalised(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  const float* mean, const float* variance, double eps) {
  BatchNormParams params = images(x);
  Tensor y = at::empty_like(x);
  std::vector<float> scale = by_channel("weight", weight, params.channels, 1.0f);
  const std::vector<float> shift = by_channel("bias", bias, params.channels, 0.0f);
  if (x.numel() == 0) return y;
  const std::vector<double> inverse = inverse_deviations(variance, params.channels, eps);
  for (int64_t j = 0; j < params.channels; ++j) {
    scale[j] = static_cast<float>(scale[j] * inverse[j]);
  }
  params.x = x.const_data_ptr();
  params.out = y.mutable_data_ptr();
  params.mean = mean;
  params.scale = scale.data();
  params.shift = shift.data();
  batch_norm_apply(params);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bound_batch_norm(const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, double eps) {
  check_images("x", x);
  TORCH_CHECK_VALUE(x.numel() > 0, "batch_norm: x: expected elements, found shape ", x.sizes());
  BatchNormParams params = images(x);
  params.x = x.const_data_ptr();
  const auto wide = x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const Tensor mean = at::empty({params.channels}, wide);
  const Tensor variance = at::empty({params.channels}, wide);
  batch_norm_statistics(params, mean.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>());
  Tensor y = normalised(x, weight, bias, mean.const_data_ptr<float>(),
                        variance.const_data_ptr<float>(), eps);
  return {y, mean, variance};
}

Tensor bound_batch_norm_fixed(const Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const Tensor& mean,
                              const Tensor& variance, double eps) {
  check_images("x", x);
  const std::vector<float> means = by_channel("mean", mean, x.size(1), 0.0f);
  const std::vector<float> variances = by_channel("variance", variance, x.size(1), 0.0f);
  return normalised(x, weight, bias, means.data(), variances.data(), eps);
}

// x may be missing where the statistics are fixed and only dx is wanted.
std::tuple<Tensor, Tensor, Tensor> bound_batch_norm_backward(
    const Tensor& dy_, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& mean,
    const Tensor& variance, double eps, bool batch_statistics, std::array<bool, 3> wanted) {
  const Tensor dy = dy_.contiguous(at::MemoryFormat::ChannelsLast);
  check_images("dy", dy);
  const bool sums = batch_statistics || wanted[1] || wanted[2];
  TORCH_CHECK_VALUE(x.has_value() || !sums, "batch_norm_backward: expected x, found None");
  if (x.has_value()) {
    check_images("x", *x);
    TORCH_CHECK_VALUE(x->sizes() == dy.sizes() && x->scalar_type() == dy.scalar_type(),
                      "batch_norm_backward: dy of shape ", dy.sizes(), " and ", dy.scalar_type(),
                      " does not fit x of ", x->sizes(), " and ", x->scalar_type());
  }
  BatchNormParams params = images(dy);
  const int64_t channels = params.channels;
  const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  const auto vector = options.dtype(weight.has_value() ? weight->scalar_type() : at::kFloat);
  const Tensor dx = wanted[0] ? at::empty_like(dy) : at::empty({0}, options);
  const Tensor dweight = at::zeros({wanted[1] ? channels : 0}, vector);
  const Tensor dbias = at::zeros({wanted[2] ? channels : 0}, vector);
  if (dy.numel() == 0) return {dx, dweight, dbias};

  const std::vector<float> means = by_channel("mean", mean, channels, 0.0f);
  const std::vector<float> variances = by_channel("variance", variance, channels, 0.0f);
  const std::vector<double> inverse = inverse_deviations(variances.data(), channels, eps);
  std::vector<float> scale = by_channel("weight", weight, channels, 1.0f);
  std::vector<float> shift(channels), slope(channels);
  params.dy = dy.const_data_ptr();
  params.mean = means.data();
  if (sums) {
    params.x = x->const_data_ptr();
    std::vector<double> dy_sum(channels), product_sum(channels);
    batch_norm_sums(params, dy_sum.data(), product_sum.data());
    const double n = static_cast<double>(params.rows);
    const Tensor wide = at::empty({2, channels}, options.dtype(at::kFloat));
    float* const gradients = wide.mutable_data_ptr<float>();
    for (int64_t j = 0; j < channels; ++j) {
      gradients[j] = static_cast<float>(product_sum[j] * inverse[j]);
      gradients[channels + j] = static_cast<float>(dy_sum[j]);
      shift[j] = static_cast<float>(dy_sum[j] / n);
      slope[j] = static_cast<float>(product_sum[j] * inverse[j] * inverse[j] / n);
    }
    if (wanted[1]) dweight.copy_(wide[0]);
    if (wanted[2]) dbias.copy_(wide[1]);
  }
  if (wanted[0]) {
    for (int64_t j = 0; j < channels; ++j) scale[j] = static_cast<float>(scale[j] * inverse[j]);
    params.out = dx.mutable_data_ptr();
    params.scale = scale.data();
    params.shift = shift.data();
    params.slope = slope.data();
    if (!batch_statistics) params.x = nullptr;
    batch_norm_gradient(params);
  }
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fasttune::cpu

TORCH_LIBRARY_IMPL(fasttune, CPU, m) {
  namespace cpu = fasttune::cpu;
  m.impl("batch_norm", &cpu::bound_batch_norm);
  m.impl("batch_norm_fixed", &cpu::bound_batch_norm_fixed);
  m.impl("batch_norm_backward", &cpu::bound_batch_norm_backward);
}

#endif  // FASTTUNE_VECTORS
