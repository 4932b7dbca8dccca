// One row's softmax and cross entropy: what every kernel computes, on host and device alike; no
// torch header.
//
// z: logits, capped if there is a cap; y: the row's target; V: classes; w: class weights (1 if
// there are none).
//   loss      = (1 - e) w_y nll_y + e/V sum_c w_c nll_c + z_loss w_y lse^2       nll_c = log_sum -
//   (z_c - max) d loss/dz = A p_c - B [c = y] - E w_c                                        p_c =
//   exp(z_c - max) / sum
// Never lse - z_y: that rounds at the size of the logits, not at the size of the loss.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"  // FASTTUNE_HOST_DEVICE

namespace fasttune {

// max: of the elements seen, -inf for none. sum: of exp(z - max) over them.
struct OnlineSoftmax {
  float max, sum;
};

FASTTUNE_HOST_DEVICE OnlineSoftmax empty_softmax() { return {-INFINITY, 0.0f}; }

// Of two disjoint sets of elements. Symmetric to the bit, so a tree of fixed shape repeats exactly.
// A NaN among the elements has made its sum NaN, and it stays so.
FASTTUNE_HOST_DEVICE OnlineSoftmax combine(OnlineSoftmax a, OnlineSoftmax b) {
  const float top = a.max > b.max ? a.max : b.max;
  // A side that has seen nothing, or only -inf, would turn -inf - -inf into NaN.
  const float left = a.max == -INFINITY ? a.sum : a.sum * expf(a.max - top);
  const float right = b.max == -INFINITY ? b.sum : b.sum * expf(b.max - top);
  return {top, left + right};
}

struct CrossEntropyOptions {
  float label_smoothing;  // e, in [0, 1]
  float softcap;          // > 0; 0 for none
  float z_loss;           // >= 0
};

struct RowFactors {
  float a, b, e;  // the gradient's factors of p_c, of the target and of w_c
};

// target_weight: w_y. weight_sum: over all classes, V without weights.
FASTTUNE_HOST_DEVICE RowFactors row_factors(CrossEntropyOptions options, float max, float log_sum,
                                            float target_weight, float weight_sum,
                                            int64_t classes) {
  const float smooth = options.label_smoothing / static_cast<float>(classes);
  const float hard = (1.0f - options.label_smoothing) * target_weight;
  const float square = 2.0f * options.z_loss * target_weight * (max + log_sum);
  return {hard + smooth * weight_sum + square, hard, smooth};
}

// target_shifted: z_y - max. weighted_shifted: sum_c w_c (z_c - max), used with label_smoothing > 0
// only.
FASTTUNE_HOST_DEVICE float row_loss(CrossEntropyOptions options, float max, float log_sum,
                                    float target_shifted, float weighted_shifted,
                                    float target_weight, float weight_sum, int64_t classes) {
  float loss = (1.0f - options.label_smoothing) * target_weight * (log_sum - target_shifted);
  if (options.label_smoothing > 0.0f) {
    const float smooth = options.label_smoothing / static_cast<float>(classes);
    loss += smooth * (weight_sum * log_sum - weighted_shifted);
  }
  if (options.z_loss > 0.0f) {
    const float lse = max + log_sum;
    loss += options.z_loss * target_weight * lse * lse;
  }
  return loss;
}

}  // namespace fasttune
