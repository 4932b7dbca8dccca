// Sixteen floats at a time, in the vectors that GCC and Clang provide on every machine: one source
// compiled once per instruction set. Each operation is an IEEE one and lane by lane, and nothing
// is contracted (setup.py: -ffp-contract=off), so every instruction set gives the same bits.
//
// A function here is inlined into one that names its instruction set (FASTTUNE_AVX512, ...); a
// vector is never an argument of a real call, whose ABI would depend on that set.
#pragma once

#if defined(__GNUC__)
#define FASTTUNE_VECTORS 1

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about calls with vectors, which do not happen
#endif
#define FASTTUNE_INLINE inline __attribute__((always_inline))

namespace fasttune::cpu {

constexpr int64_t kLanes = 16;
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

FASTTUNE_INLINE F16 all(float x) { return x - F16{}; }
FASTTUNE_INLINE F16 larger(F16 a, F16 b) { return a > b ? a : b; }  // b where one is NaN

FASTTUNE_INLINE F16 load(const float* x) {
  F16 v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

FASTTUNE_INLINE F16 load(const c10::BFloat16* x) {
  H16 raw;
  __builtin_memcpy(&raw, x, sizeof raw);
  return reinterpret_cast<F16>(__builtin_convertvector(raw, U16) << 16);
}

FASTTUNE_INLINE void store(float* out, F16 v) { __builtin_memcpy(out, &v, sizeof v); }

// To nearest, ties to even, subnormal numbers too (vcvtneps2bf16 flushes those); NaN stays NaN.
FASTTUNE_INLINE void store(c10::BFloat16* out, F16 v) {
  const U16 raw = reinterpret_cast<U16>(v);
  const U16 rounded = (raw + 0x7FFFu + ((raw >> 16) & 1u)) >> 16;
  const H16 half = __builtin_convertvector(v == v ? rounded : U16{} + 0x7FC0u, H16);
  __builtin_memcpy(out, &half, sizeof half);
}

// The first n < 16 elements; the other lanes are `rest`, or stay unwritten.
template <typename T>
FASTTUNE_INLINE F16 load_some(const T* x, int64_t n, float rest) {
  T lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n ? x[i] : static_cast<T>(rest);
  return load(lanes);
}

template <typename T>
FASTTUNE_INLINE void store_some(T* out, F16 v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) out[i] = lanes[i];
}

// The first n lanes of v, 0 in the others.
FASTTUNE_INLINE F16 first(F16 v, int64_t n) {
  const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < static_cast<int32_t>(n) ? v : F16{};
}

// Halves against each other, four times; v[0] holds the result.
#define FASTTUNE_FOLD(fold, v)                                                                   \
  v = fold(v,                                                                                    \
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = fold(v,                                                                                    \
           __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  v = fold(v,                                                                                    \
           __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  v = fold(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));

FASTTUNE_INLINE F16 plus(F16 a, F16 b) { return a + b; }

FASTTUNE_INLINE float sum_of_lanes(F16 v) {
  FASTTUNE_FOLD(plus, v)
  return v[0];
}

FASTTUNE_INLINE float largest_of_lanes(F16 v) {
  FASTTUNE_FOLD(larger, v)
  return v[0];
}

// e^x = 2^n (1 + small) with n = round(x / ln 2). For |x| <= 126 ln 2.
struct Exponential {
  F16 power, small;  // 2^n; e^(x - n ln 2) - 1
};

FASTTUNE_INLINE Exponential split_exp(F16 x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F16 shifted = x * 1.44269504f + kRound;
  const F16 n = shifted - kRound;
  // ln 2 in two parts; the first has nine bits, so its product with n is exact.
  const F16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, a weighted least-squares fit that levels the relative
  // error of e^r: below 4e-9.
  F16 q = r * 0x1.6a1a72p-10f + 0x1.123fc6p-7f;
  q = q * r + 0x1.555916p-5f;
  q = q * r + 0x1.55548ap-3f;
  q = q * r + 0x1.fffffcp-2f;
  const I16 exponent = reinterpret_cast<I16>(shifted) << 23;  // the low bits hold n
  return {reinterpret_cast<F16>(exponent + 0x3F800000), q * (r * r) + r};
}

// e^x. 0 below -87 (e^-87 is 1e-38) and infinite above 88; NaN stays NaN.
FASTTUNE_INLINE F16 exp(F16 x) {
  const Exponential e = split_exp(x);
  F16 y = e.power + e.power * e.small;
  y = x < -87.0f ? F16{} : y;
  return x > 88.0f ? all(INFINITY) : y;
}

struct Tanh {
  F16 value, slope;  // tanh x; its derivative, 1 - tanh^2 without the cancellation
};

// By e^(2|x|) - 1 = 2^n small + (2^n - 1), which keeps the digits near 0.
FASTTUNE_INLINE Tanh tanh(F16 x) {
  F16 twice = x < 0.0f ? x * -2.0f : x * 2.0f;
  twice = twice > 80.0f ? all(80.0f) : twice;
  const Exponential e = split_exp(twice);
  const F16 less_one = e.power * e.small + (e.power - 1.0f);
  const F16 below = 1.0f / (less_one + 2.0f);
  const F16 value = less_one * below;
  return {x < 0.0f ? -value : value, 4.0f * ((less_one + 1.0f) * below) * below};
}

}  // namespace fasttune::cpu

#endif  // __GNUC__
