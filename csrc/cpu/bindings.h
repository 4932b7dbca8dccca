// What the bindings of the CPU kernels share.
#pragma once

#include <ATen/ATen.h>

#include "kernels.h"

namespace fasttune::cpu {

inline DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected float64, float32, float16 or bfloat16, found ",
                       x.scalar_type());
  }
}

inline void check_dropout(double p, const at::Tensor& seed) {
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, "dropout: p must be in [0, 1], found ", p);
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1,
                    "dropout: seed must be one int64, found ", seed.scalar_type(), " of shape ",
                    seed.sizes());
}

}  // namespace fasttune::cpu
