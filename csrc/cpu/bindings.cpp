// Check, allocate, launch: the CPU kernels. The schemas stand beside the references, in
// fasttune/ops/.
#include "bindings.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "products.h"
#include "vector.h"

namespace fasttune::cpu {
namespace {

DropoutParams dropout_params(const at::Tensor& x, const at::Tensor& out, double p,
                             const at::Tensor& seed, bool accumulate) {
  return {x.const_data_ptr(),
          out.mutable_data_ptr(),
          x.numel(),
          p,
          static_cast<uint64_t>(seed.item<int64_t>()),
          dtype_of(x),
          accumulate};
}

at::Tensor dropout_seeded(const at::Tensor& x, double p, const at::Tensor& seed) {
  check_dropout(p, seed);
  const at::Tensor input = x.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  dropout(dropout_params(input, out, p, seed, false));
  return out;
}

void dropout_add_(at::Tensor& acc, const at::Tensor& x, double p, const at::Tensor& seed) {
  check_dropout(p, seed);
  TORCH_CHECK_VALUE(acc.is_contiguous() && acc.sizes() == x.sizes() &&
                        acc.scalar_type() == x.scalar_type() && acc.device() == x.device(),
                    "dropout_add_: acc must be contiguous and match x of shape ", x.sizes(),
                    " and ", x.scalar_type(), ", found ", acc.sizes(), " and ", acc.scalar_type());
  const at::Tensor input = x.contiguous();
  dropout(dropout_params(input, acc, p, seed, true));
}

#ifdef FASTTUNE_VECTORS

at::Tensor unit_width(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

AttentionCall attention_call(const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const std::optional<at::Tensor>& mask,
                             double scale, double p, const std::optional<at::Tensor>& seed) {
  const at::ScalarType type = query.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16,
                   "attention: expected float32 or bfloat16 on CPU, found ", type);
  TORCH_CHECK_NOT_IMPLEMENTED(has_attention(type), "attention: oneDNN has no small products of ",
                              type, " for this CPU, or is switched off");
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && key.sizes() == value.sizes() &&
                        key.size(0) == query.size(0) && key.size(3) == query.size(3) &&
                        key.size(1) > 0 && query.size(1) % key.size(1) == 0 &&
                        key.scalar_type() == type && value.scalar_type() == type,
                    "attention: query ", query.sizes(), ", key ", key.sizes(), " and value ",
                    value.sizes(), " do not fit");
  AttentionCall call{unit_width(query), unit_width(key), unit_width(value)};
  if (mask.has_value()) {
    TORCH_CHECK_TYPE(mask->scalar_type() == type || mask->scalar_type() == at::kFloat,
                     "attention: expected a mask of ", type, " or float32, found ",
                     mask->scalar_type());
    // The last dimension first and alone: what is broadcast over rows need not be copied for each.
    const at::Tensor rows = mask->dim() == 0 ? mask->reshape({1}) : *mask;
    std::vector<int64_t> sizes = rows.sizes().vec();
    sizes.back() = key.size(2);
    call.mask = unit_width(rows.expand(sizes))
                    .expand({query.size(0), query.size(1), query.size(2), key.size(2)});
  }
  call.scale = static_cast<float>(scale);
  call.p = seed.has_value() ? p : 0.0;
  if (seed.has_value()) {
    check_dropout(p, *seed);
    call.seed = static_cast<uint64_t>(seed->item<int64_t>());
  }
  return call;
}

// As [b, heads, length, d] over memory in which the heads of a position lie side by side, as the
// linear layers before and after attention have them.
at::Tensor heads_side_by_side(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options())
      .transpose(1, 2);
}

std::tuple<at::Tensor, at::Tensor> bound_attention(const at::Tensor& query, const at::Tensor& key,
                                                   const at::Tensor& value,
                                                   const std::optional<at::Tensor>& mask,
                                                   double scale, double p,
                                                   const std::optional<at::Tensor>& seed) {
  AttentionCall call = attention_call(query, key, value, mask, scale, p, seed);
  call.stats = at::empty({query.size(0), query.size(1), query.size(2), 2},
                         query.options().dtype(at::kFloat));
  const at::Tensor out = heads_side_by_side(query);
  attention(call, out);
  return {out.transpose(1, 2), call.stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bound_attention_backward(
    const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, const at::Tensor& stats, double scale, double p,
    const std::optional<at::Tensor>& seed) {
  AttentionCall call = attention_call(query, key, value, mask, scale, p, seed);
  call.stats = stats.contiguous();
  TORCH_CHECK_VALUE(dout.sizes() == query.transpose(1, 2).sizes() &&
                        dout.scalar_type() == query.scalar_type() &&
                        stats.numel() == 2 * query.size(0) * query.size(1) * query.size(2) &&
                        stats.scalar_type() == at::kFloat,
                    "attention_backward: dout ", dout.sizes(), " or stats ", stats.sizes(),
                    " does not fit query ", query.sizes());
  const at::Tensor dq = heads_side_by_side(query), dk = heads_side_by_side(key);
  const at::Tensor dv = heads_side_by_side(value);
  attention_backward(call, unit_width(dout).transpose(1, 2), dq, dk, dv);
  return {dq, dk, dv};
}

#endif  // FASTTUNE_VECTORS

}  // namespace
}  // namespace fasttune::cpu

TORCH_LIBRARY_IMPL(fasttune, CPU, m) {
  namespace cpu = fasttune::cpu;
  m.impl("dropout_seeded", &cpu::dropout_seeded);
  m.impl("dropout_add_", &cpu::dropout_add_);
#ifdef FASTTUNE_VECTORS
  m.impl("attention", &cpu::bound_attention);
  m.impl("attention_backward", &cpu::bound_attention_backward);
#endif
}
