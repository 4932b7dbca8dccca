// What bindings.cpp and the CPU kernels share: one plain struct and one launcher a kernel.
#pragma once

#include <cstdint>

#include "../softmax.h"

namespace fasttune::cpu {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// out[i]  = kept(i) ? x[i] * scale : 0      (accumulate false; out may be x)
// out[i] += kept(i) ? x[i] * scale : 0      (accumulate true)
// scale = 1 / (1 - p) and the arithmetic are fp32 (fp64 for fp64), with one rounding at the end.
struct DropoutParams {
  const void* x;  // [n], contiguous
  void* out;      // [n], contiguous, of x's type
  int64_t n;      // elements
  double p;       // in [0, 1]
  uint64_t seed;
  DType dtype;
  bool accumulate;
};

void dropout(const DropoutParams& params);

// Draws, on this thread, the mask of n elements from element `first` on: bit
// first % kElementsPerDraw + i of `bits` is set where element first + i is kept.
// bits: [(n + kDrawSlack) / 16], because a draw, a step and a word are drawn whole.
constexpr int64_t kDrawStep = 384;
constexpr int64_t kDrawSlack = kElementsPerDraw + kDrawStep + 15;
void draw_mask(uint64_t seed, uint64_t first, int64_t n, double p, uint16_t* bits);

// What dropout does, on this thread, with a mask whose bit 0 is x's first element; the seed is not
// used.
void apply_mask(const DropoutParams& params, const uint16_t* bits);

// Loss, statistics and gradient of each row, as csrc/softmax.h has them; 0 where the target is
// ignore_index, whatever the row holds. A target other than that is in [0, classes). grad may be
// logits. Without loss, the statistics are read instead of written.
struct CrossEntropyParams {
  const void* logits;     // [rows, classes], unit stride within a row; fp32 or bf16
  void* grad;             // [rows, classes] likewise, of the logits' type; null: not wanted
  const int64_t* target;  // [rows]
  const float* factor;    // [rows], by factor_stride; multiplies the row's gradient
  const float* weight;    // [classes]; null: all 1
  float* loss;            // [rows]; null: only the gradient is wanted
  float* stats;           // [rows, 2]: max and log_sum of the capped logits
  int64_t rows, classes;
  int64_t logits_stride, grad_stride, factor_stride;  // elements from row to row
  int64_t ignore_index;
  float weight_sum;  // over all classes, in case of smoothing
  CrossEntropyOptions options;
  DType dtype;
};

void cross_entropy(const CrossEntropyParams& params);

// Batch normalisation of x [rows, channels], contiguous: images in channels_last. fp32 or bf16; all
// else is fp32 and [channels]. Sums go over blocks of rows whose size depends on the shape alone,
// so that the number of threads does not change a bit.
struct BatchNormParams {
  const void* x;      // may be null in batch_norm_gradient: dx = dy * scale then
  const void* dy;     // null in the forward
  void* out;          // y or dx; may be x or dy
  const float* mean;  // null with x null
  const float* scale;
  const float* shift;
  const float* slope;
  int64_t rows, channels;  // 1 or more
  DType dtype;
};

// [channels]: the mean, and the mean of the squares of what is left without it.
void batch_norm_statistics(const BatchNormParams& params, float* mean, float* variance);
// out = (x - mean) * scale + shift
void batch_norm_apply(const BatchNormParams& params);
// [channels]: the sums of dy, and of dy * (x - mean).
void batch_norm_sums(const BatchNormParams& params, double* dy_sum, double* product_sum);
// out = (dy - shift - (x - mean) * slope) * scale
void batch_norm_gradient(const BatchNormParams& params);

// A level of the maps that deformable attention samples: its rows of value begin at `first`.
struct DeformableLevel {
  int64_t height, width, first, points;
};

// Multi-scale deformable attention (arXiv 2010.04159), zeros outside the maps; sums are fp32.
// b: batch rows. s: rows of value, level after level. q: queries. n: points, level after level.
// d: a head's width, a multiple of kDeformableWidth.
constexpr int64_t kDeformableWidth = 16;
struct DeformableParams {
  const void* value;      // [b, s, heads, d] by strides, a head's row contiguous; fp32 or bf16
  const void* locations;  // [b, q, heads, n, 2], contiguous: x, y; fp32 or bf16
  const void* weights;    // [b, q, heads, n], contiguous; fp32 or bf16
  const DeformableLevel* levels;
  int64_t level_count;
  int64_t b, s, q, heads, d, n;
  int64_t batch_stride, row_stride, head_stride;  // of value, in elements
  DType dtype, locations_dtype, weights_dtype;
  void* out;         // [b, q, heads, d], contiguous, of value's type; null in the backward
  const void* dout;  // [b, q, heads, d] likewise; the rest is of the backward too
  void* dvalue;      // [b, s, heads, d], contiguous, of value's type
  void* dlocations;  // as locations
  void* dweights;    // as weights
};

void deformable_attention(const DeformableParams& params);
void deformable_attention_backward(const DeformableParams& params);

// The instruction set that the kernels use on this machine: "avx512", "avx2" or "default".
const char* capability();

}  // namespace fasttune::cpu
