// What one thread does for its part of a row of logits: softmax, gradient, loss. The mathematics
// stands in softmax.h, the dealing of elements to threads in row_split.h.
//
// x: a row's logits; z: the same, capped if there is a cap; y: its label.
// plain: neither softcap nor label smoothing, which is what nearly all training uses.
#pragma once

#include "device.cuh"

namespace fasttune::cuda {

constexpr int kStreamed = 4;  // vectors a thread has in flight where a row is not held

// x <= 0. The fast one is right to 2 ulp and what rounding x * log2(e) adds, which 16-bit logits
// can't show.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 4 ? expf(x) : fast_exp(x);
}

struct Cap {
  float cap, inverse;  // 0 for none; 1 / cap
};

__device__ __forceinline__ Cap cap_of(const CrossEntropyParams& p) {
  return {p.options.softcap, p.inverse_softcap};
}

// With q = 1 / (1 + exp(2 |t|)): tanh |t| = 1 - 2 q, and its derivative 4 q (1 - q) keeps its
// digits where the tanh is all but 1. The tanh is off by 1e-7, the rounding of a logit of the cap's
// size: too much for small ones in fp32.
template <typename T>
__device__ __forceinline__ float capped(float x, Cap c, float& slope) {
  if (sizeof(T) == 4) {
    const float tanh = tanhf(x * c.inverse);
    slope = (1.0f - tanh) * (1.0f + tanh);
    return c.cap * tanh;
  }
  // q is 0 from 40 on; further up, the fast division would see infinity.
  const float t = fminf(fabsf(x * c.inverse), 40.0f);
  const float q = fast_divide(1.0f, 1.0f + fast_exp(2.0f * t));
  slope = 4.0f * q * (1.0f - q);
  return x != x ? x : copysignf(c.cap - 2.0f * c.cap * q, x);
}

template <typename T, bool kPlain>
__device__ __forceinline__ float cap_if(float x, Cap c) {
  float unused;
  return kPlain || c.cap == 0.0f ? x : capped<T>(x, c, unused);
}

// One row as one block of a cluster sees it. The n-th vector of a thread begins at column(n).
template <typename T>
struct Row {
  const T* x;  // [columns]
  T* g;        // [columns]: where the gradient goes; x itself in place
  RowSpan span;
  int32_t columns, cluster, rank;

  __device__ __forceinline__ int32_t count() const {
    return vector_count(span, cluster, rank, blockDim.x, threadIdx.x);
  }
  __device__ __forceinline__ int32_t column(int32_t n) const {
    return span.head + kPerVector<T> * vector_index(n, cluster, rank, blockDim.x, threadIdx.x);
  }
  // The edges are few: the first block has them, unless the row is all edge.
  __device__ __forceinline__ int32_t first_edge() const {
    return rank * static_cast<int32_t>(blockDim.x) + static_cast<int32_t>(threadIdx.x);
  }
  __device__ __forceinline__ int32_t edge_step() const {
    return cluster * static_cast<int32_t>(blockDim.x);
  }
};

template <typename T>
__device__ __forceinline__ Row<T> row_at(const CrossEntropyParams& p, int64_t row, int32_t cluster,
                                         int32_t rank) {
  const T* x = static_cast<const T*>(p.logits) + row * p.stride;
  T* g = p.grad == nullptr ? nullptr : static_cast<T*>(p.grad) + row * p.grad_stride;
  const auto columns = static_cast<int32_t>(p.classes);
  const auto from = reinterpret_cast<uint64_t>(x), to = reinterpret_cast<uint64_t>(g);
  const RowSpan span =
      g == nullptr ? row_span(from, columns, sizeof(T)) : row_span(from, to, columns, sizeof(T));
  return {x, g, span, columns, cluster, rank};
}

__device__ __forceinline__ bool out_of_range(const CrossEntropyParams& p, int64_t label) {
  return label != p.ignore_index && (label < 0 || label >= p.classes);
}

// Called by one thread of each bad row; only the first bad row goes on. Walking back from each, all
// of them together walk the rows once.
__device__ __noinline__ inline void report_label(const CrossEntropyParams& p, int64_t row,
                                                 int64_t label) {
  for (int64_t before = row - 1; before >= 0; --before) {
    if (out_of_range(p, p.target[before])) return;
  }
  LabelFault* fault = p.fault;
  if (atomic_claim(&fault->state) != 0) return;
  fault->row = row;
  fault->label = label;
  fault->classes = p.classes;
  fault->ignore_index = p.ignore_index;
  publish(&fault->state, 2);
}

// Loss and statistics of a row that isn't computed.
__device__ __forceinline__ void write_skipped(const CrossEntropyParams& p, int64_t row,
                                              int64_t label) {
  const bool bad = out_of_range(p, label);
  p.loss[row] = bad ? NAN : 0.0f;
  p.stats[2 * row] = p.stats[2 * row + 1] = 0.0f;
  if (bad) report_label(p, row, label);
}

template <typename T>
__device__ __forceinline__ void write_zeros(const Row<T>& row) {
  const int32_t count = row.count();
  for (int32_t n = 0; n < count; ++n) store_vector(row.g + row.column(n), Vector{});
  for (int32_t e = row.first_edge(); e < edge_count(row.span); e += row.edge_step()) {
    row.g[edge_column(row.span, e, row.columns)] = from_float<T>(0.0f);
  }
}

// Adds n elements to a running maximum and sum.
template <typename T, bool kPlain, int n>
__device__ __forceinline__ void add_elements(OnlineSoftmax& seen, const float (&x)[n], Cap cap) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < n; ++i) top = fmaxf(top, x[i]);
  top = fmaxf(seen.max, cap_if<T, kPlain>(top, cap));
  const float shift = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < n; ++i) sum += exponential<T>(cap_if<T, kPlain>(x[i], cap) - shift);
  seen.sum = (seen.max == -INFINITY ? seen.sum : seen.sum * expf(seen.max - shift)) + sum;
  seen.max = top;
}

template <typename T, bool kPlain>
__device__ __forceinline__ void add_edges(OnlineSoftmax& seen, const Row<T>& row, Cap cap) {
  for (int32_t e = row.first_edge(); e < edge_count(row.span); e += row.edge_step()) {
    const float x[1] = {to_float(row.x[edge_column(row.span, e, row.columns)])};
    add_elements<T, kPlain>(seen, x, cap);
  }
}

// A thread's part of a row in its registers: one maximum, then the sum with one exponential each.
template <typename T, bool kPlain>
__device__ __forceinline__ OnlineSoftmax held_softmax(const Row<T>& row,
                                                      const Vector (&held)[kHeldVectors], Cap cap) {
  constexpr int per = kPerVector<T>;
  const int32_t count = row.count();
  OnlineSoftmax seen = empty_softmax();
#pragma unroll
  for (int n = 0; n < kHeldVectors; ++n) {
    if (n < count) {
      float x[per];
      unpack<T>(held[n], x);
#pragma unroll
      for (int i = 0; i < per; ++i) seen.max = fmaxf(seen.max, x[i]);
    }
  }
  // The cap rises with x, but its rounding might not: any shift does that all threads agree on.
  if (count > 0) seen.max = cap_if<T, kPlain>(seen.max, cap);
  const float shift = seen.max == -INFINITY ? 0.0f : seen.max;
#pragma unroll
  for (int n = 0; n < kHeldVectors; ++n) {
    if (n < count) {
      float x[per];
      unpack<T>(held[n], x);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < per; ++i) {
        sum += exponential<T>(cap_if<T, kPlain>(x[i], cap) - shift);
      }
      seen.sum += sum;
    }
  }
  add_edges<T, kPlain>(seen, row, cap);
  return seen;
}

// The same by reading the row once, kStreamed vectors at a time.
template <typename T, bool kPlain>
__device__ __forceinline__ OnlineSoftmax streamed_softmax(const Row<T>& row, Cap cap) {
  constexpr int per = kPerVector<T>;
  const int32_t count = row.count();
  OnlineSoftmax seen = empty_softmax();
  int32_t n = 0;
  for (; n + kStreamed <= count; n += kStreamed) {
    Vector v[kStreamed];
    float x[kStreamed * per];
#pragma unroll
    for (int i = 0; i < kStreamed; ++i) v[i] = load_vector(row.x + row.column(n + i));
#pragma unroll
    for (int i = 0; i < kStreamed; ++i) {
      float part[per];
      unpack<T>(v[i], part);
#pragma unroll
      for (int j = 0; j < per; ++j) x[i * per + j] = part[j];
    }
    add_elements<T, kPlain>(seen, x, cap);
  }
  for (; n < count; ++n) {
    float x[per];
    unpack<T>(load_vector(row.x + row.column(n)), x);
    add_elements<T, kPlain>(seen, x, cap);
  }
  add_edges<T, kPlain>(seen, row, cap);
  return seen;
}

// What the gradient of a row needs: upstream times the factors of softmax.h.
struct RowGradient {
  float max, scale, hard, smooth;  // of exp(z_c - max), of the target and of w_c
  const float* weight;             // [classes] or null
  int32_t label;
  Cap cap;
  bool smoothing;
};

__device__ __forceinline__ float weight_of(const CrossEntropyParams& p, int64_t label) {
  return p.weight == nullptr ? 1.0f : p.weight[label];
}

__device__ __forceinline__ float weight_sum(const CrossEntropyParams& p) {
  return p.weight_sum == nullptr ? static_cast<float>(p.classes) : *p.weight_sum;
}

__device__ __forceinline__ RowGradient row_gradient(const CrossEntropyParams& p, int64_t row,
                                                    int64_t label, float max, float log_sum) {
  const float upstream = p.factor[row * p.factor_stride];
  const RowFactors f =
      row_factors(p.options, max, log_sum, weight_of(p, label), weight_sum(p), p.classes);
  return {
      max,      upstream * f.a * expf(-log_sum), upstream * f.b, upstream * f.e,
      p.weight, static_cast<int32_t>(label),     cap_of(p),      p.options.label_smoothing > 0.0f};
}

// Of the element x in `column`. Adds w_c (z_c - max) to `weighted`, which the smoothed loss needs.
template <typename T, bool kPlain>
__device__ __forceinline__ float gradient(const RowGradient& r, float x, int32_t column,
                                          bool is_target, float& weighted) {
  float slope = 1.0f;
  const float z = kPlain || r.cap.cap == 0.0f ? x : capped<T>(x, r.cap, slope);
  float g = r.scale * exponential<T>(z - r.max);
  if (!kPlain && r.smoothing) {
    const float w = r.weight == nullptr ? 1.0f : r.weight[column];
    weighted += w * (z - r.max);
    g -= r.smooth * w;
  }
  if (is_target) g -= r.hard;
  return kPlain ? g : g * slope;
}

template <typename T, bool kPlain>
__device__ __forceinline__ void write_gradient(const RowGradient& r, const Row<T>& row,
                                               const Vector& v, int32_t column, float& weighted) {
  constexpr int per = kPerVector<T>;
  float x[per];
  unpack<T>(v, x);
  float sum = 0.0f;
  const int32_t target = r.label - column;
#pragma unroll
  for (int i = 0; i < per; ++i) {
    x[i] = gradient<T, kPlain>(r, x[i], column + i, i == target, sum);
  }
  weighted += sum;
  if (row.g != nullptr) store_vector(row.g + column, pack<T>(x));
}

template <typename T, bool kPlain>
__device__ __forceinline__ void write_edges(const RowGradient& r, const Row<T>& row,
                                            float& weighted) {
  for (int32_t e = row.first_edge(); e < edge_count(row.span); e += row.edge_step()) {
    const int32_t column = edge_column(row.span, e, row.columns);
    const float x = to_float(row.x[column]);
    const float g = gradient<T, kPlain>(r, x, column, column == r.label, weighted);
    if (row.g != nullptr) row.g[column] = from_float<T>(g);
  }
}

template <typename T, bool kPlain>
__device__ __forceinline__ void write_loss(const CrossEntropyParams& p, int64_t row, int64_t label,
                                           OnlineSoftmax total, float target_logit,
                                           float weighted) {
  const float log_sum = logf(total.sum);
  const float z = cap_if<T, kPlain>(target_logit, cap_of(p));
  p.loss[row] = row_loss(p.options, total.max, log_sum, z - total.max, weighted,
                         weight_of(p, label), weight_sum(p), p.classes);
  p.stats[2 * row] = total.max;
  p.stats[2 * row + 1] = log_sum;
}

}  // namespace fasttune::cuda
