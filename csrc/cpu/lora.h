// The low-rank side of a LoRA linear layer on CPU: what bindings_lora.cpp composes.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <tuple>

namespace fasttune::cpu {

// The mask of a LoRA layer: that of dropout for x. p = 0 keeps everything.
struct LoraMask {
  double p;
  uint64_t seed;
};

// Operands are contiguous, of one type and not empty. Sums over rows come in float32 (float64 for
// float64).
struct LoraKernels {
  // x: [rows, in], a: [r, in] -> dropout(x) a^T, [rows, r].
  at::Tensor (*down)(const at::Tensor& x, const at::Tensor& a, const LoraMask& mask);

  // low: [rows, r], b: [out, r], bias: [out] or undefined -> low b^T + bias, [rows, out].
  at::Tensor (*up)(const at::Tensor& low, const at::Tensor& b, const at::Tensor& bias);

  // dy: [rows, out], low: [rows, r] or undefined, b: [out, r] -> dy b, [rows, r], and
  // factor dy^T low, [out, r]; undefined without low.
  std::tuple<at::Tensor, at::Tensor> (*up_backward)(const at::Tensor& dy, const at::Tensor& low,
                                                    const at::Tensor& b, double factor);

  // x: [rows, in], dlow: [rows, r], a: [r, in] -> dlow^T dropout(x), [r, in].
  // dx: [rows, in] or undefined; dx += mask o (dlow a) / (1 - p).
  at::Tensor (*input_backward)(const at::Tensor& x, const at::Tensor& dlow, const at::Tensor& a,
                               const at::Tensor& dx, const LoraMask& mask);
};

// By PyTorch's products of whole matrices, for every floating type: lora_plain.cpp.
extern const LoraKernels kPlainLora;

// In blocks of rows that stay in cache, dropout included: lora.cpp. Sums are made in an order that
// the sizes alone decide, so that their bits do not depend on the number of threads. Null where
// there is none for this type on this machine.
const LoraKernels* lora_blocks(at::ScalarType type);

// x factor as a matrix of another floating type, multiplied in float32 (float64 for float64) and
// rounded once; contiguous, and x itself if nothing is to be done. For matrices as small as an
// adapter's, where PyTorch's conversions take longer to dispatch than to run.
at::Tensor scaled_to(const at::Tensor& x, double factor, at::ScalarType type);
at::Tensor scaled_by_pytorch(const at::Tensor& x, double factor, at::ScalarType type);

}  // namespace fasttune::cpu
