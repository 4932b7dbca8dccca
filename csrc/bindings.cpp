// Check, allocate, launch. The schemas of the ops stand beside their references, in fasttune/ops/.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <string>

#ifdef FASTTUNE_CUDA
#include "bindings_cuda.h"
#endif
#include "cpu/kernels.h"
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
#ifdef FASTTUNE_CUDA
  info["cuda"] = cuda_version();
  info["architectures"] = cuda_architectures();
#else
  info["cuda"] = py::none();
  info["architectures"] = py::list();
#endif
  info["cpu"] = cpu::capability();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

#ifndef FASTTUNE_CUDA
// On CPU a label is checked by the call it comes with.
void raise_pending() {}
#endif
}  // namespace fasttune

TORCH_LIBRARY_IMPL(fasttune, CPU, m) {
  m.impl("dropout_seeded", &fasttune::dropout_seeded);
  m.impl("dropout_add_", &fasttune::dropout_add_);
}

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &fasttune::build_info,
        "What was compiled: compiler, torch, revision, cuda, architectures, cpu, openmp.");
  m.def("raise_pending", &fasttune::raise_pending,
        "IndexError if a CUDA kernel that has ended met a label out of range. Waits for nothing.");
  m.def("philox4x32_10", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const fasttune::Philox4 in{{counter[0], counter[1], counter[2], counter[3]}};
    const fasttune::Philox4 out = fasttune::philox4x32_10(in, key[0], key[1]);
    return std::array<uint32_t, 4>{out.word[0], out.word[1], out.word[2], out.word[3]};
  });
}
