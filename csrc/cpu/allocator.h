// A memory for PyTorch's larger CPU tensors that keeps its pages from step to step.
#pragma once

#include <cstdint>

namespace fasttune::cpu {

// Puts `KeptMemory` (allocator.cpp) in the place of PyTorch's CPU allocator, for tensors made from
// now on and for good. False, and nothing done, where the system has no such memory to give.
bool keep_memory();

// Whether it has been put there.
bool keeps_memory();

// Bytes of that memory: in tensors now, and the most that ever was touched. Both 0 without
// keep_memory.
struct KeptBytes {
  int64_t live, touched;
};
KeptBytes kept_bytes();

}  // namespace fasttune::cpu
