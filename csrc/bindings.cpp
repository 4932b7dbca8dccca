// Check, allocate, launch. The schemas of the ops stand beside their references, in fasttune/ops/.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/allocator.h"
#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/vector.h"
#include "philox.h"

#define FASTTUNE_TEXT_(x) #x
#define FASTTUNE_TEXT(x) FASTTUNE_TEXT_(x)
#ifndef FASTTUNE_REVISION
#define FASTTUNE_REVISION unknown
#endif

namespace fasttune {
namespace {

cpu::DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return cpu::DType::kFloat64;
    case at::kFloat:
      return cpu::DType::kFloat32;
    case at::kHalf:
      return cpu::DType::kFloat16;
    case at::kBFloat16:
      return cpu::DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "dropout: expected float64, float32, float16 or bfloat16, found ",
                       x.scalar_type());
  }
}

void check_dropout(double p, const at::Tensor& seed) {
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, "dropout: p must be in [0, 1], found ", p);
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1,
                    "dropout: seed must be one int64, found ", seed.scalar_type(), " of shape ",
                    seed.sizes());
}

cpu::DropoutParams dropout_params(const at::Tensor& x, const at::Tensor& out, double p,
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
  cpu::dropout(dropout_params(input, out, p, seed, false));
  return out;
}

void dropout_add_(at::Tensor& acc, const at::Tensor& x, double p, const at::Tensor& seed) {
  check_dropout(p, seed);
  TORCH_CHECK_VALUE(acc.is_contiguous() && acc.sizes() == x.sizes() &&
                        acc.scalar_type() == x.scalar_type() && acc.device() == x.device(),
                    "dropout_add_: acc must be contiguous and match x of shape ", x.sizes(),
                    " and ", x.scalar_type(), ", found ", acc.sizes(), " and ", acc.scalar_type());
  const at::Tensor input = x.contiguous();
  cpu::dropout(dropout_params(input, acc, p, seed, true));
}

at::Tensor lora_input_backward(const at::Tensor& x, const at::Tensor& dlow, const at::Tensor& a,
                               const std::optional<at::Tensor>& dx, double p,
                               const std::optional<at::Tensor>& seed) {
  const at::ScalarType type = x.scalar_type();
  const at::ScalarType wide = type == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(x.dim() == 2 && a.dim() == 2 && a.size(1) == x.size(1) && dlow.dim() == 2 &&
                        dlow.size(0) == x.size(0) && dlow.size(1) == a.size(0) &&
                        a.scalar_type() == type && dlow.scalar_type() == type,
                    "lora_input_backward: x ", x.sizes(), ", dlow ", dlow.sizes(), " and a ",
                    a.sizes(), " do not fit, or their types differ");
  TORCH_CHECK_VALUE(!dx.has_value() || (dx->is_contiguous() && dx->sizes() == x.sizes() &&
                                        dx->scalar_type() == type),
                    "lora_input_backward: dx must be contiguous and match x");
  if (!seed.has_value()) {
    if (dx.has_value()) dx->addmm_(dlow, a);
    return at::mm(dlow.t(), x).to(wide);
  }
  check_dropout(p, *seed);
  const at::Tensor input = x.contiguous();
  const cpu::DropoutParams dropout = dropout_params(input, input, p, *seed, false);
  return cpu::lora_input_backward(dropout, input, dlow, a, dx.value_or(at::Tensor())).to(wide);
}

#ifdef FASTTUNE_VECTORS

at::Tensor unit_width(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

cpu::AttentionCall attention_call(const at::Tensor& query, const at::Tensor& key,
                                  const at::Tensor& value, const std::optional<at::Tensor>& mask,
                                  double scale, double p, const std::optional<at::Tensor>& seed) {
  const at::ScalarType type = query.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16,
                   "attention: expected float32 or bfloat16 on CPU, found ", type);
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && key.sizes() == value.sizes() &&
                        key.size(0) == query.size(0) && key.size(3) == query.size(3) &&
                        key.size(1) > 0 && query.size(1) % key.size(1) == 0 &&
                        key.scalar_type() == type && value.scalar_type() == type,
                    "attention: query ", query.sizes(), ", key ", key.sizes(), " and value ",
                    value.sizes(), " do not fit");
  cpu::AttentionCall call{unit_width(query), unit_width(key), unit_width(value)};
  if (mask.has_value()) {
    const at::Tensor full =
        mask->to(type).expand({query.size(0), query.size(1), query.size(2), key.size(2)});
    call.mask = unit_width(full);
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

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& query, const at::Tensor& key,
                                             const at::Tensor& value,
                                             const std::optional<at::Tensor>& mask, double scale,
                                             double p, const std::optional<at::Tensor>& seed) {
  cpu::AttentionCall call = attention_call(query, key, value, mask, scale, p, seed);
  call.stats = at::empty({query.size(0), query.size(1), query.size(2), 2},
                         query.options().dtype(at::kFloat));
  const at::Tensor out = heads_side_by_side(query);
  cpu::attention(call, out);
  return {out.transpose(1, 2), call.stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, const at::Tensor& out, const at::Tensor& stats,
    double scale, double p, const std::optional<at::Tensor>& seed) {
  cpu::AttentionCall call = attention_call(query, key, value, mask, scale, p, seed);
  call.stats = stats.contiguous();
  TORCH_CHECK_VALUE(dout.sizes() == out.sizes() && dout.scalar_type() == query.scalar_type(),
                    "attention_backward: dout ", dout.sizes(), " does not fit out ", out.sizes());
  const at::Tensor dq = heads_side_by_side(query), dk = heads_side_by_side(key);
  const at::Tensor dv = heads_side_by_side(value);
  cpu::attention_backward(call, unit_width(out).transpose(1, 2), unit_width(dout).transpose(1, 2),
                          dq, dk, dv);
  return {dq, dk, dv};
}

#endif  // FASTTUNE_VECTORS

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " FASTTUNE_TEXT(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["torch"] = TORCH_VERSION;
  info["revision"] = FASTTUNE_TEXT(FASTTUNE_REVISION);
  info["cuda"] = py::none();
  info["architectures"] = py::list();
  info["cpu"] = cpu::capability();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace fasttune

TORCH_LIBRARY_IMPL(fasttune, CPU, m) {
  m.impl("dropout_seeded", &fasttune::dropout_seeded);
  m.impl("dropout_add_", &fasttune::dropout_add_);
  m.impl("lora_input_backward", &fasttune::lora_input_backward);
#ifdef FASTTUNE_VECTORS
  m.impl("attention", &fasttune::attention);
  m.impl("attention_backward", &fasttune::attention_backward);
#endif
}

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &fasttune::build_info,
        "What was compiled: compiler, torch, revision, cuda, architectures, cpu, openmp.");
  m.def("keep_memory", &fasttune::cpu::keep_memory,
        "Larger CPU tensors keep their pages from now on; False where that is impossible.");
  m.def("keeps_memory", &fasttune::cpu::keeps_memory, "Whether they do.");
  m.def("kept_bytes", [] {
    const fasttune::cpu::KeptBytes bytes = fasttune::cpu::kept_bytes();
    return std::array<int64_t, 2>{bytes.live, bytes.touched};
  });
  m.def("philox4x32_10", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const fasttune::Philox4 in{{counter[0], counter[1], counter[2], counter[3]}};
    const fasttune::Philox4 out = fasttune::philox4x32_10(in, key[0], key[1]);
    return std::array<uint32_t, 4>{out.word[0], out.word[1], out.word[2], out.word[3]};
  });
}
