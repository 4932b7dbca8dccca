// A few floats at a time, in the vectors that GCC and Clang provide on every machine: one source,
// instantiated with the width of each instruction set. Each operation is an IEEE one and lane by
// lane, and nothing is contracted (setup.py: -ffp-contract=off), so every width gives the same
// bits. Attention and deformable attention are the exceptions: there, multiplies and adds are fused
// where that exists.
//
// All of it is inlined into functions that name their instruction set: a vector must never be an
// argument of a real call, whose ABI would depend on that set.
#pragma once

#if defined(__GNUC__)
#define FASTTUNE_VECTORS 1

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#pragma GCC diagnostic ignored "-Wpsabi"  // about calls with vectors, which do not happen
#define FASTTUNE_INLINE inline __attribute__((always_inline))
#define FASTTUNE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#define FASTTUNE_X86 1
#define FASTTUNE_AVX2 __attribute__((target("avx2,fma")))
#define FASTTUNE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

// With multiplies and adds fused. Clang has no such attribute, and goes without.
#ifdef __clang__
#define FASTTUNE_FUSED
#else
#define FASTTUNE_FUSED optimize("fp-contract=fast"),
#endif
#define FASTTUNE_FUSED_AVX2 __attribute__((FASTTUNE_FUSED target("avx2,fma")))
#define FASTTUNE_FUSED_AVX512 \
  __attribute__((FASTTUNE_FUSED target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

namespace fasttune::cpu {

constexpr int64_t kGroup = 16;  // floats: what sums keep apart on every machine

// Written out three times: gcc 12 does not convert between vectors whose size is a template's.
template <int kWidth>
struct VectorTypes;
#define FASTTUNE_VECTOR_TYPES(WIDTH)                            \
  template <>                                                   \
  struct VectorTypes<WIDTH> {                                   \
    typedef float F __attribute__((vector_size(4 * WIDTH)));    \
    typedef int32_t I __attribute__((vector_size(4 * WIDTH)));  \
    typedef uint32_t U __attribute__((vector_size(4 * WIDTH))); \
    typedef uint16_t H __attribute__((vector_size(2 * WIDTH))); \
  }
FASTTUNE_VECTOR_TYPES(4);
FASTTUNE_VECTOR_TYPES(8);
FASTTUNE_VECTOR_TYPES(16);
#undef FASTTUNE_VECTOR_TYPES

// kWidth: floats in a vector.
template <int kWidth>
struct Vector {
  using F = typename VectorTypes<kWidth>::F;
  using I = typename VectorTypes<kWidth>::I;
  using U = typename VectorTypes<kWidth>::U;
  using H = typename VectorTypes<kWidth>::H;

  static FASTTUNE_INLINE F all(float x) { return x - F{}; }
  static FASTTUNE_INLINE F larger(F a, F b) { return a > b ? a : b; }  // b where one is NaN

  static FASTTUNE_INLINE F load(const float* x) {
    F v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }

  // As integers: the bits of bfloat16 in the lower halves of the lanes.
  static FASTTUNE_INLINE U bits16(const c10::BFloat16* x) {
    H raw;
    __builtin_memcpy(&raw, x, sizeof raw);
    return __builtin_convertvector(raw, U);
  }

  // To nearest, ties to even, subnormal numbers too (vcvtneps2bf16 flushes those); NaN stays NaN.
  static FASTTUNE_INLINE U bits16(F v) {
    const U raw = reinterpret_cast<U>(v);
    const U rounded = (raw + 0x7FFFu + ((raw >> 16) & 1u)) >> 16;
    return v == v ? rounded : U{} + 0x7FC0u;
  }

  static FASTTUNE_INLINE F load(const c10::BFloat16* x) {
    return reinterpret_cast<F>(bits16(x) << 16);
  }

  static FASTTUNE_INLINE void store(float* out, F v) { __builtin_memcpy(out, &v, sizeof v); }

  static FASTTUNE_INLINE void store(c10::BFloat16* out, F v) {
    const H half = __builtin_convertvector(bits16(v), H);
    __builtin_memcpy(out, &half, sizeof half);
  }

  // Of sixteen lanes: halves against each other, in one order for every width.
  static FASTTUNE_INLINE float sum(const F (&parts)[kGroup / kWidth]) {
    return fold(parts, [](F a, F b) FASTTUNE_LAMBDA { return a + b; });
  }

  static FASTTUNE_INLINE float largest(const F (&parts)[kGroup / kWidth]) {
    return fold(parts, [](F a, F b) FASTTUNE_LAMBDA { return larger(a, b); });
  }

  template <typename Two>
  static FASTTUNE_INLINE float fold(const F (&parts)[kGroup / kWidth], const Two& two) {
    F v = parts[0];
    if constexpr (kWidth == 8) v = two(v, parts[1]);
    if constexpr (kWidth == 4) v = two(two(v, parts[2]), two(parts[1], parts[3]));
    if constexpr (kWidth == 16) {
      v = two(v,
              __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
      v = two(v,
              __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
      v = two(v,
              __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    } else if constexpr (kWidth == 8) {
      v = two(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
      v = two(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    } else {
      v = two(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    }
    return two(v, F{} + v[1])[0];
  }

  // Four times sum(), in the same order and half the steps.
  static FASTTUNE_INLINE void four_sums(const F (&w)[4][kGroup / kWidth], float* to) {
    typename VectorTypes<4>::F sums;
    if constexpr (kWidth == 16) {
      F half[2];
      for (int i = 0; i < 2; ++i) {
        const F a = w[2 * i][0], b = w[2 * i + 1][0];
        half[i] =
            __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
            __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                    31);
      }
      F v = __builtin_shufflevector(half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24,
                                    25, 26, 27) +
            __builtin_shufflevector(half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23,
                                    28, 29, 30, 31);
      v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
      v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
      sums = __builtin_shufflevector(v, v, 0, 4, 8, 12);
    } else if constexpr (kWidth == 8) {
      F half[2];
      for (int i = 0; i < 2; ++i) {
        const F a = w[2 * i][0] + w[2 * i][1], b = w[2 * i + 1][0] + w[2 * i + 1][1];
        half[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
                  __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
      }
      F v = __builtin_shufflevector(half[0], half[1], 0, 1, 4, 5, 8, 9, 12, 13) +
            __builtin_shufflevector(half[0], half[1], 2, 3, 6, 7, 10, 11, 14, 15);
      v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
      sums = __builtin_shufflevector(v, v, 0, 2, 4, 6);
    } else {
      F half[2];
      for (int i = 0; i < 2; ++i) {
        const F a = (w[2 * i][0] + w[2 * i][2]) + (w[2 * i][1] + w[2 * i][3]);
        const F b = (w[2 * i + 1][0] + w[2 * i + 1][2]) + (w[2 * i + 1][1] + w[2 * i + 1][3]);
        half[i] =
            __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
      }
      sums = __builtin_shufflevector(half[0], half[1], 0, 2, 4, 6) +
             __builtin_shufflevector(half[0], half[1], 1, 3, 5, 7);
    }
    __builtin_memcpy(to, &sums, sizeof sums);
  }

  // e^x = 2^n (1 + small) with n = round(x / ln 2), for |x| <= 126 ln 2.
  struct Exponential {
    F power, small;
  };

  static FASTTUNE_INLINE Exponential split_exp(F x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const F shifted = x * 1.44269504f + kRound;
    const F n = shifted - kRound;
    // ln 2 in two parts; the first has nine bits, so its product with n is exact.
    const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, a least-squares fit weighted until the relative
    // error of e^r is level: below 4e-9.
    F q = r * 0x1.6a1a72p-10f + 0x1.123fc6p-7f;
    q = q * r + 0x1.555916p-5f;
    q = q * r + 0x1.55548ap-3f;
    q = q * r + 0x1.fffffcp-2f;
    const I exponent = reinterpret_cast<I>(shifted) << 23;  // the low bits hold n
    return {reinterpret_cast<F>(exponent + 0x3F800000), q * (r * r) + r};
  }

  // e^x for x <= 88; 0 below -87 (e^-87 is 1e-38); NaN stays NaN.
  static FASTTUNE_INLINE F exp(F x) {
    const Exponential e = split_exp(x);
    return x < -87.0f ? F{} : e.power * (1.0f + e.small);
  }

  struct Tanh {
    F value, slope;  // tanh x; its derivative, without the cancellation of 1 - tanh^2
  };

  // By e^(2|x|) - 1 = 2^n small + (2^n - 1), which keeps the digits near 0.
  static FASTTUNE_INLINE Tanh tanh(F x) {
    F twice = x < 0.0f ? x * -2.0f : x * 2.0f;
    twice = twice > 80.0f ? all(80.0f) : twice;
    const Exponential e = split_exp(twice);
    const F less_one = e.power * e.small + (e.power - 1.0f);
    const F below = 1.0f / (less_one + 2.0f);
    const F value = less_one * below;
    return {x < 0.0f ? -value : value, 4.0f * ((less_one + 1.0f) * below) * below};
  }
};

}  // namespace fasttune::cpu

#endif  // __GNUC__
