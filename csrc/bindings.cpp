// The Python side of the compiled kernels: what was built, and the memory that is kept. The ops
// register themselves: cpu/bindings*.cpp.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <array>
#include <string>
#include <vector>

#include "cpu/allocator.h"
#include "cpu/kernels.h"
#include "cpu/lora.h"
#include "cpu/products.h"
#include "cpu/vector.h"
#include "philox.h"
#ifdef FASTTUNE_CUDA
#include "bindings_cuda.h"
#endif

#define FASTTUNE_TEXT_(x) #x
#define FASTTUNE_TEXT(x) FASTTUNE_TEXT_(x)
#ifndef FASTTUNE_REVISION
#define FASTTUNE_REVISION unknown
#endif

namespace fasttune {
namespace {

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

std::vector<std::string> attention_types() {
  std::vector<std::string> types;
#ifdef FASTTUNE_VECTORS
  if (cpu::has_attention(at::kFloat)) types.emplace_back("float32");
  if (cpu::has_attention(at::kBFloat16)) types.emplace_back("bfloat16");
#endif
  return types;
}

std::vector<std::string> lora_block_types() {
  std::vector<std::string> types;
  if (cpu::lora_blocks(at::kFloat) != nullptr) types.emplace_back("float32");
  if (cpu::lora_blocks(at::kBFloat16) != nullptr) types.emplace_back("bfloat16");
  return types;
}

}  // namespace

#ifndef FASTTUNE_CUDA
// On CPU a label is checked by the call it comes with.
void raise_pending() {}
#endif
}  // namespace fasttune

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &fasttune::build_info,
        "What was compiled: compiler, torch, revision, cuda, architectures, cpu, openmp.");
  m.def("attention_types", &fasttune::attention_types,
        "The types, by their names in torch, that CPU attention has a kernel for on this machine.");
  m.def("lora_block_types", &fasttune::lora_block_types,
        "The types, by their names in torch, of which LoRA's low-rank products on CPU run in "
        "blocks that stay in "
        "cache on this machine, not as PyTorch's.");
  m.def("keep_memory", &fasttune::cpu::keep_memory,
        "Larger CPU tensors keep their pages from now on; False where that is impossible.");
  m.def("keeps_memory", &fasttune::cpu::keeps_memory, "Whether they do.");
  m.def("kept_bytes", [] {
    const fasttune::cpu::KeptBytes bytes = fasttune::cpu::kept_bytes();
    return std::array<int64_t, 2>{bytes.live, bytes.touched};
  });
  m.def("raise_pending", &fasttune::raise_pending,
        "IndexError if a CUDA kernel that has ended met a label out of range. Waits for nothing.");
  m.def("philox4x32_10", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const fasttune::Philox4 in{{counter[0], counter[1], counter[2], counter[3]}};
    const fasttune::Philox4 out = fasttune::philox4x32_10(in, key[0], key[1]);
    return std::array<uint32_t, 4>{out.word[0], out.word[1], out.word[2], out.word[3]};
  });
  m.def(
      "draw_mask",
      [](int64_t seed, uint64_t first, int64_t n, double p) {
        std::vector<uint16_t> bits((n + fasttune::cpu::kDrawSlack) / 16);
        fasttune::cpu::draw_mask(static_cast<uint64_t>(seed), first, n, p, bits.data());
        std::vector<bool> kept(n);
        const int64_t skip = first % fasttune::kElementsPerDraw;
        for (int64_t i = 0; i < n; ++i) kept[i] = bits[(skip + i) / 16] >> (skip + i) % 16 & 1;
        return kept;
      },
      "Whether dropout keeps elements first .. first + n - 1, which no tensor needs to reach to.");
}
