// Check, allocate, compose: the LoRA linear layer on CPU. Parameters are cast and scaled here, so
// that a layer's forward or backward is one call from outside.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "lora.h"

namespace fasttune::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Wanted = std::array<bool, 3>;  // dx, da, db

LoraMask mask_of(double p, const OptionalTensor& seed) {
  if (!seed.has_value()) return {0.0, 0};
  check_dropout(p, *seed);
  return {p, static_cast<uint64_t>(seed->item<int64_t>())};
}

// The kernels for these operands: blocks know no empty ones.
const LoraKernels& kernels_for(const Tensor& large, const Tensor& small) {
  const LoraKernels* blocks = lora_blocks(large.scalar_type());
  return blocks != nullptr && large.numel() > 0 && small.numel() > 0 ? *blocks : kPlainLora;
}

void check_matrix(const char* op, const char* name, const Tensor& x) {
  dtype_of(x);  // raises for what is not a floating type
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": ", name, ": expected two dimensions, found ", x.sizes());
}

void check_like(const char* op, const char* name, const Tensor& x, at::IntArrayRef sizes,
                const Tensor& like) {
  TORCH_CHECK_VALUE(x.sizes() == sizes && x.scalar_type() == like.scalar_type(), op, ": ", name,
                    ": expected ", like.scalar_type(), " of shape ", sizes, ", found ",
                    x.scalar_type(), " of shape ", x.sizes());
}

Tensor lora_down(const Tensor& x, const Tensor& a, double p, const OptionalTensor& seed) {
  constexpr const char* kOp = "lora_down";
  check_matrix(kOp, "x", x);
  check_matrix(kOp, "a", a);
  check_like(kOp, "a", a, {a.size(0), x.size(1)}, x);
  return kernels_for(x, a).down(x.contiguous(), a.contiguous(), mask_of(p, seed));
}

std::tuple<Tensor, Tensor> lora_up_backward(const Tensor& dy, const Tensor& low, const Tensor& b) {
  constexpr const char* kOp = "lora_up_backward";
  check_matrix(kOp, "dy", dy);
  check_matrix(kOp, "b", b);
  check_like(kOp, "b", b, {dy.size(1), b.size(1)}, dy);
  check_like(kOp, "low", low, {dy.size(0), b.size(1)}, dy);
  return kernels_for(dy, b).up_backward(dy.contiguous(), low.contiguous(), b.contiguous(), 1.0);
}

Tensor lora_input_backward(const Tensor& x, const Tensor& dlow, const Tensor& a,
                           const OptionalTensor& dx, double p, const OptionalTensor& seed) {
  constexpr const char* kOp = "lora_input_backward";
  check_matrix(kOp, "x", x);
  check_matrix(kOp, "a", a);
  check_like(kOp, "a", a, {a.size(0), x.size(1)}, x);
  check_like(kOp, "dlow", dlow, {x.size(0), a.size(0)}, x);
  if (dx.has_value()) {
    check_like(kOp, "dx", *dx, x.sizes(), x);
    TORCH_CHECK_VALUE(dx->is_contiguous(), kOp, ": dx must be contiguous, found strides ",
                      dx->strides(), " of shape ", dx->sizes());
  }
  return kernels_for(x, a).input_backward(x.contiguous(), dlow.contiguous(), a.contiguous(),
                                          dx.value_or(Tensor()), mask_of(p, seed));
}

void check_layer(const char* op, const Tensor& x, const Tensor& weight, const Tensor& a,
                 const Tensor& b) {
  check_matrix(op, "x", x);
  check_matrix(op, "weight", weight);
  check_matrix(op, "lora_a", a);
  check_matrix(op, "lora_b", b);
  const int64_t outs = weight.size(0), ins = weight.size(1), rank = a.size(0);
  TORCH_CHECK_VALUE(x.size(1) == ins && a.size(1) == ins && b.size(0) == outs &&
                        b.size(1) == rank && weight.scalar_type() == x.scalar_type(),
                    op, ": x ", x.sizes(), ", weight ", weight.sizes(), ", lora_a ", a.sizes(),
                    " and lora_b ", b.sizes(), " do not fit, or weight is not of x's type");
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x_, const Tensor& weight,
                                       const OptionalTensor& bias, const Tensor& lora_a,
                                       const Tensor& lora_b, double scale, double p,
                                       const OptionalTensor& seed) {
  check_layer("lora_linear", x_, weight, lora_a, lora_b);
  const LoraMask mask = mask_of(p, seed);
  const Tensor x = x_.contiguous();
  const Tensor a = scaled_to(lora_a, 1.0, x.scalar_type());
  const Tensor b = scaled_to(lora_b, scale, x.scalar_type());
  const Tensor low = kernels_for(x, a).down(x, a, mask);
  // The small part first: the large product adds to it what it would otherwise add to the bias.
  const Tensor bias_row = bias.has_value() ? bias->contiguous() : Tensor();
  const Tensor y = kernels_for(x, b).up(low, b, bias_row);
  y.addmm_(x, weight.t());
  return {y, low};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& dy_, const Tensor& x_,
                                                        const Tensor& low, const Tensor& weight,
                                                        const Tensor& lora_a, const Tensor& lora_b,
                                                        double scale, double p,
                                                        const OptionalTensor& seed, Wanted wanted) {
  constexpr const char* kOp = "lora_linear_backward";
  check_layer(kOp, x_, weight, lora_a, lora_b);
  check_like(kOp, "dy", dy_, {x_.size(0), weight.size(0)}, x_);
  check_like(kOp, "low", low, {x_.size(0), lora_a.size(0)}, x_);
  const LoraMask mask = mask_of(p, seed);
  const at::ScalarType type = x_.scalar_type();
  const Tensor dy = dy_.contiguous(), b = scaled_to(lora_b, scale, type);
  const auto [dlow, up] =
      kernels_for(dy, b).up_backward(dy, wanted[2] ? low.contiguous() : Tensor(), b, scale);
  const Tensor none = at::empty({0}, x_.options());
  Tensor dx, down;
  if (wanted[0]) dx = at::mm(dy, weight);
  if (wanted[0] || wanted[1]) {
    const Tensor a = scaled_to(lora_a, 1.0, type);
    down = kernels_for(x_, a).input_backward(x_.contiguous(), dlow, a, dx, mask);
  }
  return {wanted[0] ? dx : none, wanted[1] ? scaled_to(down, 1.0, lora_a.scalar_type()) : none,
          wanted[2] ? scaled_to(up, 1.0, lora_b.scalar_type()) : none};
}

}  // namespace
}  // namespace fasttune::cpu

TORCH_LIBRARY_IMPL(fasttune, CPU, m) {
  namespace cpu = fasttune::cpu;
  m.impl("lora_down", &cpu::lora_down);
  m.impl("lora_up_backward", &cpu::lora_up_backward);
  m.impl("lora_input_backward", &cpu::lora_input_backward);
  m.impl("lora_linear", &cpu::lora_linear);
  m.impl("lora_linear_backward", &cpu::lora_linear_backward);
}
