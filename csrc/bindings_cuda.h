// What bindings.cpp takes from bindings_cuda.cpp where the CUDA kernels are compiled.
#pragma once

#include <string>
#include <vector>

namespace fasttune {

// "13.0": the toolkit that compiled the kernels.
std::string cuda_version();

// "9.0a" and the like: what TORCH_CUDA_ARCH_LIST named.
std::vector<std::string> cuda_architectures();

// IndexError if a kernel that has ended met a label out of range, on any device. Waits for nothing:
// called after a synchronisation, it tells of everything launched before that.
void raise_pending();

}  // namespace fasttune
