// What bindings_cuda.cpp and the CUDA kernels share: plain structs whose pointers carry their
// shapes, and one launcher a kernel; no torch header.
//
// A launcher returns a cudaError_t as int: 0 for success. It neither allocates nor synchronises.
#pragma once

#include <cstdint>

#include "row_split.h"
#include "softmax.h"

namespace fasttune::cuda {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// Where a kernel launches.
struct Device {
  void* stream;  // cudaStream_t
  int multiprocessors;
};

// The first label out of range that a kernel met, in pinned host memory. A launch has one writer at
// most: the row that has no bad row before it. It claims the record (0 -> 1), fills it in and
// publishes it (1 -> 2); the host reads a published record without waiting for anything, and frees
// it (2 -> 0).
struct LabelFault {
  uint32_t state;  // 0 free, 1 claimed, 2 published
  int64_t row, label, classes, ignore_index;
};

// A row whose label is neither in [0, classes) nor ignore_index has loss NaN, stats (0, 0) and
// gradient 0, and fills in `fault`. Ignored rows have loss 0, stats (0, 0) and gradient 0.
struct CrossEntropyParams {
  const void* logits;       // [rows, classes], row stride `stride`, no alignment beyond the type's
  void* grad;               // [rows, classes], row stride `grad_stride`; logits itself in place
  const int64_t* target;    // [rows]
  const float* weight;      // [classes] or null: 1
  const float* weight_sum;  // [1], null without weight
  const float* factor;      // [rows], stride `factor_stride` (0: one number for all)
  float* loss;              // [rows]
  float* stats;             // [rows, 2]: max and log_sum, softmax.h; in for the backward, else out
  LabelFault* fault;
  int64_t rows, classes, stride, grad_stride, factor_stride;
  int64_t ignore_index;
  CrossEntropyOptions options;
  float inverse_softcap;  // filled in by the launcher
  RowPlan plan;           // plan_row(); for the in-place gradient only
  DType dtype;
};

// plan_row's max_cluster on the current device.
int cross_entropy_max_cluster();

int cross_entropy_rows(const CrossEntropyParams& params, const Device& device);
int cross_entropy_rows_backward(const CrossEntropyParams& params, const Device& device);
int cross_entropy_grad(const CrossEntropyParams& params, const Device& device);

// Fills in `fault` for the first bad label, before rows are dealt out in chunks. Reads target,
// rows, classes and ignore_index.
int check_labels(const CrossEntropyParams& params, const Device& device);

// out[i]  = kept(i) ? x[i] * scale : 0      (accumulate false; out may be x)
// out[i] += kept(i) ? x[i] * scale : 0      (accumulate true)
// in fp32, with one rounding; scale = 1 / (1 - p).
struct DropoutParams {
  const void* x;  // [n], contiguous
  void* out;      // [n], contiguous, of x's type
  int64_t n;      // elements
  double p;       // in [0, 1]
  uint64_t seed;
  DType dtype;
  bool accumulate;
};

int dropout(const DropoutParams& params, const Device& device);

// x *= factor, and x is left alone, unread, where the factor is 1.
struct ScaleParams {
  void* x;              // [n], contiguous
  const float* factor;  // [1]
  int64_t n;            // elements
  DType dtype;
};

int scale(const ScaleParams& params, const Device& device);

// The mask of a LoRA op: that of dropout for x [rows, ins], contiguous. p = 0 keeps everything.
struct MaskParams {
  double p;
  uint64_t seed;
};

// out [rows, rank] = scale (mask o x) a^T,  scale = 1 / (1 - p)
struct LoraDownParams {
  const void* x;     // [rows, ins], contiguous
  const void* a;     // [rank, ins], contiguous
  void* out;         // [rows, rank]
  float* workspace;  // lora_down_workspace() floats
  int64_t rows, ins, rank;
  MaskParams mask;
  DType dtype;
};

// dlow [rows, rank] = dy b,  db [outs, rank] = dy^T low, with one reading of dy
struct LoraUpBackwardParams {
  const void* dy;    // [rows, outs], contiguous
  const void* low;   // [rows, rank], contiguous
  const void* b;     // [outs, rank], contiguous
  void* dlow;        // [rows, rank]
  float* db;         // [outs, rank]
  float* workspace;  // lora_up_backward_workspace() floats
  int64_t rows, outs, rank;
  DType dtype;
};

// da [rank, ins] = scale dlow^T (mask o x)
struct LoraDownBackwardParams {
  const void* x;     // [rows, ins], contiguous
  const void* dlow;  // [rows, rank], contiguous
  float* da;         // [rank, ins]
  float* workspace;  // lora_down_backward_workspace() floats
  int64_t rows, ins, rank;
  MaskParams mask;
  DType dtype;
};

// dx [rows, ins] += scale mask o (dlow a), added in fp32 before the one rounding
struct LoraAddParams {
  void* dx;          // [rows, ins], contiguous
  const void* dlow;  // [rows, rank], contiguous
  const void* a;     // [rank, ins], contiguous
  int64_t rows, ins, rank;
  MaskParams mask;
  DType dtype;
};

int64_t lora_down_workspace(const LoraDownParams& params, const Device& device);
int64_t lora_up_backward_workspace(const LoraUpBackwardParams& params, const Device& device);
int64_t lora_down_backward_workspace(const LoraDownBackwardParams& params, const Device& device);

int lora_down(const LoraDownParams& params, const Device& device);
int lora_up_backward(const LoraUpBackwardParams& params, const Device& device);
int lora_down_backward(const LoraDownBackwardParams& params, const Device& device);
int lora_add(const LoraAddParams& params, const Device& device);

}  // namespace fasttune::cuda
