// The kernels that work between PyTorch's own products: their calls hold tensors.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "kernels.h"

namespace fasttune::cpu {

struct AttentionCall {
  at::Tensor query;  // [b, heads, q, d], float32 or bfloat16, unit stride in d
  at::Tensor key;    // [b, key heads, k, d]; heads is a multiple of key heads
  at::Tensor value;  // [b, key heads, k, d]
  at::Tensor mask;   // expanded to [b, heads, q, k], unit stride in k, float32 or query's type; or
                     // undefined
  at::Tensor stats;  // [b, heads, q, 2] float32: maximum, 1 / sum of exp(score - maximum)
  float scale;       // of the scores
  double p;          // of dropping a weight
  uint64_t seed;
};

// Whether they run on this machine: by the small products of brgemm.h.
bool has_attention(at::ScalarType type);

// out: [b, heads, q, d] of any strides but a unit one in d. Writes call.stats too.
void attention(const AttentionCall& call, const at::Tensor& out);

// dq, dk, dv: like query, key, value. dout: like out. Reads call.stats.
void attention_backward(const AttentionCall& call, const at::Tensor& dout, const at::Tensor& dq,
                        const at::Tensor& dk, const at::Tensor& dv);

}  // namespace fasttune::cpu
