// The softmax of attention, and its gradient, over a block of rows of scores between two products.
#pragma once

#include <cmath>
#include <cstring>

#include "pack.h"

#ifdef FASTTUNE_VECTORS

namespace fasttune::cpu {

// A block of rows of scores of one key head and batch row. `keys` are padded to `stride`, and the
// padding of mask_rows is -inf, so that its weights are 0.
struct ScoreRows {
  int64_t first, count;  // among the rows of the key head: query head by query head
  int64_t keys, stride;
  float scale;      // of the scores
  float* scores;    // [count, stride]: raw on entry
  float* dweights;  // [count, stride]: the gradient of the dropped weights, times 1 - p; or null
  float* stats;     // [count, 2]: maximum, 1 / sum of exp(score - maximum)
  const uint16_t* kept;  // bit `skip` is the first row's first element; null without dropout
  int64_t skip;
  const char* mask;     // of row 0 of the key head: added to the scaled scores, float or T; or null
  int64_t head_bytes;   // from query head to query head of the mask
  int64_t query_bytes;  // from query to query
  int64_t queries;
  bool mask_is_float;
  float* mask_rows;  // [2, stride]: the masks of two rows; 0 where there is no mask
};

// Rows go by two: one row of scores is too short to hide the latency of exp and of the sums over
// lanes, and bfloat16 is packed in pairs of rows. Every sum is of sixteen lanes, whatever the
// width.
template <int kWidth, typename T>
struct RowKernel {
  using V = Vector<kWidth>;
  using F = typename V::F;
  using U = typename V::U;
  static constexpr int kParts = kGroup / kWidth;

  const ScoreRows& s;
  const char* masked_as[2] = {nullptr, nullptr};

  // In place: row by row exp(score - maximum), where kept, as T; rows stay where they are.
  FASTTUNE_INLINE void softmax() {
    int64_t r = 0;
    for (; r + 2 <= s.count; r += 2) softmax_rows<2>(r);
    if (r < s.count) softmax_rows<1>(r);
  }

  // The dropped weights, times 1 - p, as pairs of rows to `weights`, and the gradient of the
  // scores: the rows in place of dweights, as T; and the pairs of rows of bfloat16 in place of the
  // scores, where each takes the room of two rows. Both gradients lack a factor of scale / (1 - p).
  FASTTUNE_INLINE void gradient(T* weights) {
    int64_t r = 0;
    for (; r + 2 <= s.count; r += 2) gradient_rows<2>(r, weights + r * s.stride);
    if (r < s.count) gradient_rows<1>(r, weights + r * s.stride);
  }

 private:
  template <int kRows>
  FASTTUNE_INLINE void softmax_rows(int64_t first) {
    load_masks<kRows>(first);
    float* const scores = s.scores + first * s.stride;
    F top[kRows][kParts], sum[kRows][kParts] = {};
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kParts; ++p) top[r][p] = V::all(-INFINITY);
    }
    for (int64_t j = 0; j < s.keys; j += kGroup) {
      for (int r = 0; r < kRows; ++r) {
        for (int p = 0; p < kParts; ++p) {
          top[r][p] = V::larger(score(scores, r, j + p * kWidth), top[r][p]);
        }
      }
    }
    float max[kRows];
    for (int r = 0; r < kRows; ++r) max[r] = V::largest(top[r]);
    for (int64_t j = 0; j < s.keys; j += kGroup) {
      for (int r = 0; r < kRows; ++r) {
        for (int p = 0; p < kParts; ++p) {
          const int64_t at = j + p * kWidth;
          F e = V::exp(score(scores, r, at) - max[r]);
          sum[r][p] += e;
          if (s.kept != nullptr) e = where_kept(first + r, at, e);
          V::store(narrow(scores, r) + at, e);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      s.stats[2 * (first + r)] = max[r];
      s.stats[2 * (first + r) + 1] = 1.0f / V::sum(sum[r]);
    }
  }

  // w: weight, m: the dropout's mask, dw: the gradient of m w. That of a score is, but for the
  // factor, w (m dw - sum over the row of w m dw). The sum is also the row's out . dout, but only
  // by its own rounded terms does the difference vanish where one weight is nearly 1.
  template <int kRows>
  FASTTUNE_INLINE void gradient_rows(int64_t first, T* weights) {
    load_masks<kRows>(first);
    float* const scores = s.scores + first * s.stride;
    float* const dweights = s.dweights + first * s.stride;
    const float* const stats = s.stats + 2 * first;
    F sums[kRows][kParts] = {};
    for (int64_t j = 0; j < s.keys; j += kGroup) {
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = j + p * kWidth;
        F dropped[2] = {};
        for (int r = 0; r < kRows; ++r) {
          const F weight = V::exp(score(scores, r, at) - stats[2 * r]) * stats[2 * r + 1];
          F incoming = V::load(dweights + r * s.stride + at);
          dropped[r] = weight;
          if (s.kept != nullptr) {
            dropped[r] = where_kept(first + r, at, weight);
            incoming = where_kept(first + r, at, incoming);
            V::store(dweights + r * s.stride + at, incoming);
          }
          sums[r][p] += weight * incoming;
          V::store(scores + r * s.stride + at, weight);
        }
        if constexpr (kItem<T> == 2) {
          Pack<kWidth, T>::store_items(weights + 2 * at, V::bits16(dropped[0]),
                                       V::bits16(dropped[1]));
        } else {
          for (int r = 0; r < kRows; ++r) V::store(weights + r * s.stride + at, dropped[r]);
        }
      }
    }
    float sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = V::sum(sums[r]);
    for (int64_t j = 0; j < s.stride; j += kWidth) {
      F dscores[2] = {};
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = r * s.stride + j;
        dscores[r] = V::load(scores + at) * (V::load(dweights + at) - sum[r]);
        V::store(narrow(dweights, r) + j, dscores[r]);
      }
      if constexpr (kItem<T> == 2) {
        Pack<kWidth, T>::store_items(narrow(scores, 0) + 2 * j, V::bits16(dscores[0]),
                                     V::bits16(dscores[1]));
      }
    }
  }

  FASTTUNE_INLINE T* narrow(float* rows, int r) const {
    return reinterpret_cast<T*>(rows + r * s.stride);
  }

  FASTTUNE_INLINE F score(const float* scores, int r, int64_t j) const {
    return V::load(scores + r * s.stride + j) * s.scale + V::load(s.mask_rows + r * s.stride + j);
  }

  // The other lanes of v, that is of a row's elements j to j + kWidth, become 0.
  FASTTUNE_INLINE F where_kept(int64_t row, int64_t j, F v) const {
    const uint64_t bit = static_cast<uint64_t>(s.skip + row * s.keys + j);
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(s.kept) + bit / 8, sizeof word);
    U lane_bit;
    for (int lane = 0; lane < kWidth; ++lane) lane_bit[lane] = 1u << lane;
    return ((U{} + (word >> (bit % 8))) & lane_bit) != 0u ? v : F{};
  }

  template <int kRows>
  FASTTUNE_INLINE void load_masks(int64_t first) {
    if (s.mask == nullptr) return;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = s.first + first + r;
      const char* from = s.mask + row / s.queries * s.head_bytes + row % s.queries * s.query_bytes;
      if (from == masked_as[r]) continue;
      masked_as[r] = from;
      float* to = s.mask_rows + r * s.stride;
      if (s.mask_is_float) {
        std::memcpy(to, from, s.keys * sizeof(float));
      } else {
        const T* narrow = reinterpret_cast<const T*>(from);
        for (int64_t j = 0; j < s.keys; ++j) to[j] = static_cast<float>(narrow[j]);
      }
    }
  }
};

}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
