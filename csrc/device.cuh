// What the CUDA kernels share: numbers in and out of 16-byte vectors, reductions in a fixed order,
// the switch over dtypes. Compiled by nvcc for a device, or by any C++ compiler for the emulation
// that tests/ops/test_emulated.py runs.
#pragma once

#include "kernels.h"
#if defined(__CUDACC__)
#include "ptx.cuh"
#else
#include "emulation/simt.h"
#endif

namespace fasttune {

template <typename T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
template <typename T>
__device__ __forceinline__ float to_float(T x) {
  float first, second;
  unpack2<T>(x.bits, first, second);
  return first;
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pack2<T>(x, 0.0f))};
  }
}

template <typename T>
__device__ __forceinline__ void unpack(const Vector& v, float (&out)[kPerVector<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = bits_to_float(v.word[i]);
    } else {
      unpack2<T>(v.word[i], out[2 * i], out[2 * i + 1]);
    }
  }
}

template <typename T>
__device__ __forceinline__ Vector pack(const float (&in)[kPerVector<T>]) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v.word[i] = float_to_bits(in[i]);
    } else {
      v.word[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
    }
  }
  return v;
}

// Which elements dropout keeps, as philox.h says, and the factor of those kept.
struct Mask {
  PhiloxKeys keys;
  uint32_t threshold;  // in the upper half, the lower one 0
  bool none;           // is kept
  float scale;

  // By a word's upper half: whatever the lower one is, it does not change the comparison.
  __device__ __forceinline__ bool keeps_odd(uint32_t word) const {
    return !none && word >= threshold;
  }
  __device__ __forceinline__ bool keeps_even(uint32_t word) const { return keeps_odd(word << 16); }
};

inline Mask make_mask(double p, uint64_t seed) {
  const uint32_t threshold = dropout_threshold(p);
  return {philox_keys(seed), threshold << 16, threshold == kDropAll,
          static_cast<float>(dropout_scale(p))};
}

// Zeroes what isn't kept among the 16-bit elements 8 * draw .. 8 * draw + 7.
__device__ __forceinline__ void apply_mask(const Mask& mask, uint64_t draw, Vector& v) {
  const Philox4 u = philox_draw(mask.keys, draw);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.word[i] &= (mask.keeps_even(u.word[i]) ? 0x0000FFFFu : 0u) |
                 (mask.keeps_odd(u.word[i]) ? 0xFFFF0000u : 0u);
  }
}

// The slow way, for one element.
__device__ __forceinline__ bool keeps_element(const Mask& mask, uint64_t index) {
  const Philox4 u = philox_draw(mask.keys, index / kElementsPerDraw);
  const uint32_t first = index % 4 < 2 ? u.word[0] : u.word[1];
  const uint32_t second = index % 4 < 2 ? u.word[2] : u.word[3];
  const uint32_t word = index % kElementsPerDraw < 4 ? first : second;
  return index % 2 == 0 ? mask.keeps_even(word) : mask.keeps_odd(word);
}

__device__ __forceinline__ float shuffle(float value, int mask) { return shuffle_xor(value, mask); }
__device__ __forceinline__ OnlineSoftmax shuffle(OnlineSoftmax value, int mask) {
  return {shuffle_xor(value.max, mask), shuffle_xor(value.sum, mask)};
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Combine {
  __device__ OnlineSoftmax operator()(OnlineSoftmax a, OnlineSoftmax b) const {
    return combine(a, b);
  }
};

// All lanes get the result, equal to the bit: Op(a, b) == Op(b, a).
template <typename V, typename Op>
__device__ __forceinline__ V warp_reduce(V value, Op op) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = op(value, shuffle(value, mask));
  return value;
}

// All threads of the cluster get the result, equal to the bit, by one barrier: every warp writes
// its part into every block of the cluster. slots: [cluster * warps] of this block's shared memory,
// used once. The blocks' starting is waited for with `starting`, once a kernel, after an earlier
// cluster_arrive_relaxed().
template <typename V, typename Op>
__device__ __forceinline__ V cluster_reduce(V value, V* slots, V identity, Op op, bool starting) {
  const int cluster = cluster_size(), rank = cluster_rank();
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = warp_reduce(value, op);
  if (cluster > 1) {
    if (starting) cluster_wait();
    if (lane < cluster) *cluster_map(&slots[rank * warps + warp], lane) = value;
    cluster_arrive();
    cluster_wait();
  } else {
    if (lane == 0) slots[warp] = value;
    block_sync();
  }
  V all = identity;
  for (int i = lane; i < cluster * warps; i += 32) all = op(all, slots[i]);
  return warp_reduce(all, op);
}

template <typename T>
struct Tag {
  using Type = T;
};

// call(Tag<T>{}) for the type that dtype names.
template <typename Call>
int with_dtype(cuda::DType dtype, Call&& call) {
  switch (dtype) {
    case cuda::DType::kFloat16:
      return call(Tag<Half>{});
    case cuda::DType::kBFloat16:
      return call(Tag<BFloat16>{});
    case cuda::DType::kFloat32:
      break;
  }
  return call(Tag<float>{});
}

}  // namespace fasttune
