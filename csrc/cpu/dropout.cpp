// Dropout on CPU in two stages over pieces that stay in the first-level cache: draw the piece's
// mask as one bit an element, then apply it. The mask stage knows nothing of the storage type.
//
// Each stage exists once per instruction set, compiled by function attributes and chosen at run
// time, so that one binary serves every x86-64 machine. All paths give the same bits, but for a
// NaN's payload.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "../philox.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTTUNE_X86 1
#include <immintrin.h>
#define FASTTUNE_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FASTTUNE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif

namespace fasttune::cpu {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kPiece = 4096;        // elements
constexpr int64_t kGrain = 8 * kPiece;  // elements a thread takes at least

template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// bits[i / 16] bit i % 16 is set where element first + i is kept; first is a multiple of
// kElementsPerDraw, threshold fits 16 bits, and the last step of a path may write bits past n.
using DrawFn = void (*)(uint64_t seed, uint64_t first, int64_t n, uint32_t threshold,
                        uint16_t* bits);

void draw_default(uint64_t seed, uint64_t first, int64_t n, uint32_t threshold, uint16_t* bits) {
  for (int64_t i = 0; i < n; i += 16) {
    uint32_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const uint64_t draw = (first + static_cast<uint64_t>(i)) / kElementsPerDraw;
      const Philox4 u = philox_draw(seed, draw + static_cast<uint64_t>(half));
      for (int lane = 0; lane < 4; ++lane) {
        const int bit = 8 * half + 2 * lane;
        word |= static_cast<uint32_t>((u.word[lane] & 0xFFFFu) >= threshold) << bit;
        word |= static_cast<uint32_t>((u.word[lane] >> 16) >= threshold) << (bit + 1);
      }
    }
    bits[i / 16] = static_cast<uint16_t>(word);
  }
}

template <typename T, bool kAccumulate>
void apply_range(const T* x, T* out, const uint16_t* bits, int64_t begin, int64_t end,
                 double scale) {
  using A = Arithmetic<T>;
  const A factor = static_cast<A>(scale);
  for (int64_t i = begin; i < end; ++i) {
    const bool kept = (bits[i / 16] >> (i % 16)) & 1;
    const A value = kept ? static_cast<A>(x[i]) * factor : A(0);
    out[i] = kAccumulate ? static_cast<T>(static_cast<A>(out[i]) + value) : static_cast<T>(value);
  }
}

template <typename T, bool kAccumulate>
void apply_default(const T* x, T* out, const uint16_t* bits, int64_t n, double scale) {
  apply_range<T, kAccumulate>(x, out, bits, 0, n, scale);
}

#ifdef FASTTUNE_X86

// The state lives in the low halves of 64-bit lanes, one counter a lane: a 32 x 32 -> 64 multiply
// reads just those, so whatever a product or a key leaves in the high half needs no clearing. The
// first round has one product instead of two, because the counter's upper half is 0. The last one
// ends with words 0 and 1 in one lane, 2 and 3 in another: a product, turned by half a lane, has a
// new word in the high half already, and the low half is where the other one is XORed in.

FASTTUNE_AVX512 inline __m512i xor3(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

FASTTUNE_AVX512 inline __m512i key512(const PhiloxKeys& keys, int i) {
  return _mm512_set1_epi32(static_cast<int>(keys.word[i]));
}

FASTTUNE_AVX512 void draw_avx512(uint64_t seed, uint64_t first, int64_t n, uint32_t threshold,
                                 uint16_t* bits) {
  constexpr int kVectors = 6;  // independent chains, to hide the multiplier's latency
  constexpr int64_t kStep = 8 * kElementsPerDraw * kVectors;
  static_assert(kStep <= kDrawStep);
  const PhiloxKeys keys = philox_keys(seed);
  // Counters enter in the order that makes the unpacking at the end yield elements in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  for (int64_t i = 0; i < n; i += kStep) {
    const uint64_t draw = (first + static_cast<uint64_t>(i)) / kElementsPerDraw;
    __m512i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const __m512i begin = _mm512_set1_epi64(static_cast<int64_t>(draw + 8 * v));
      const __m512i counter = _mm512_add_epi64(begin, order);
      const __m512i product0 = _mm512_mul_epu32(counter, m0);
      c0[v] = _mm512_xor_si512(_mm512_srli_epi64(counter, 32), key512(keys, 0));
      c1[v] = _mm512_setzero_si512();
      c2[v] = _mm512_xor_si512(_mm512_srli_epi64(product0, 32), key512(keys, 1));
      c3[v] = product0;
    }
    for (int round = 1; round < kPhiloxRounds - 1; ++round) {
      const __m512i k0 = key512(keys, 2 * round);
      const __m512i k1 = key512(keys, 2 * round + 1);
      for (int v = 0; v < kVectors; ++v) {
        const __m512i product0 = _mm512_mul_epu32(c0[v], m0);
        const __m512i product1 = _mm512_mul_epu32(c2[v], m1);
        c0[v] = xor3(_mm512_srli_epi64(product1, 32), c1[v], k0);
        c1[v] = product1;
        c2[v] = xor3(_mm512_srli_epi64(product0, 32), c3[v], k1);
        c3[v] = product0;
      }
    }
    const __m512i k0 = key512(keys, 2 * kPhiloxRounds - 2);
    const __m512i k1 = key512(keys, 2 * kPhiloxRounds - 1);
    for (int v = 0; v < kVectors; ++v) {
      const __m512i turned0 = _mm512_ror_epi64(_mm512_mul_epu32(c0[v], m0), 32);
      const __m512i turned1 = _mm512_ror_epi64(_mm512_mul_epu32(c2[v], m1), 32);
      const __m512i words01 = _mm512_mask_ternarylogic_epi32(turned1, 0x5555, c1[v], k0, 0x96);
      const __m512i words23 = _mm512_mask_ternarylogic_epi32(turned0, 0x5555, c3[v], k1, 0x96);
      const __mmask32 kept[2] = {
          _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(words01, words23), limit),
          _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(words01, words23), limit)};
      std::memcpy(bits + i / 16 + 4 * v, kept, sizeof(kept));
    }
  }
}

FASTTUNE_AVX2 inline __m256i xor3(__m256i a, __m256i b, __m256i c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}

FASTTUNE_AVX2 inline __m256i at_least(__m256i halves, __m256i limit) {
  return _mm256_cmpeq_epi16(_mm256_max_epu16(halves, limit), halves);
}

FASTTUNE_AVX2 inline __m256i key256(const PhiloxKeys& keys, int i) {
  return _mm256_set1_epi32(static_cast<int>(keys.word[i]));
}

FASTTUNE_AVX2 void draw_avx2(uint64_t seed, uint64_t first, int64_t n, uint32_t threshold,
                             uint16_t* bits) {
  constexpr int kVectors = 4;  // the fastest of 2 to 4, though sixteen registers hold three
  constexpr int64_t kStep = 4 * kElementsPerDraw * kVectors;
  static_assert(kStep <= kDrawStep);
  const PhiloxKeys keys = philox_keys(seed);
  const __m256i order = _mm256_setr_epi64x(0, 1, 2, 3);
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  for (int64_t i = 0; i < n; i += kStep) {
    const uint64_t draw = (first + static_cast<uint64_t>(i)) / kElementsPerDraw;
    __m256i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const __m256i begin = _mm256_set1_epi64x(static_cast<int64_t>(draw + 4 * v));
      const __m256i counter = _mm256_add_epi64(begin, order);
      const __m256i product0 = _mm256_mul_epu32(counter, m0);
      c0[v] = _mm256_xor_si256(_mm256_srli_epi64(counter, 32), key256(keys, 0));
      c1[v] = _mm256_setzero_si256();
      c2[v] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), key256(keys, 1));
      c3[v] = product0;
    }
    for (int round = 1; round < kPhiloxRounds - 1; ++round) {
      const __m256i k0 = key256(keys, 2 * round);
      const __m256i k1 = key256(keys, 2 * round + 1);
      for (int v = 0; v < kVectors; ++v) {
        const __m256i product0 = _mm256_mul_epu32(c0[v], m0);
        const __m256i product1 = _mm256_mul_epu32(c2[v], m1);
        c0[v] = xor3(_mm256_srli_epi64(product1, 32), c1[v], k0);
        c1[v] = product1;
        c2[v] = xor3(_mm256_srli_epi64(product0, 32), c3[v], k1);
        c3[v] = product0;
      }
    }
    const __m256i k0 = key256(keys, 2 * kPhiloxRounds - 2);
    const __m256i k1 = key256(keys, 2 * kPhiloxRounds - 1);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i turned0 = _mm256_shuffle_epi32(_mm256_mul_epu32(c0[v], m0), 0xB1);
      const __m256i turned1 = _mm256_shuffle_epi32(_mm256_mul_epu32(c2[v], m1), 0xB1);
      const __m256i words01 = _mm256_blend_epi32(turned1, xor3(turned1, c1[v], k0), 0x55);
      const __m256i words23 = _mm256_blend_epi32(turned0, xor3(turned0, c3[v], k1), 0x55);
      const __m256i even = at_least(_mm256_unpacklo_epi64(words01, words23), limit);
      const __m256i odd = at_least(_mm256_unpackhi_epi64(words01, words23), limit);
      const int kept = _mm256_movemask_epi8(_mm256_packs_epi16(even, odd));
      std::memcpy(bits + i / 16 + 2 * v, &kept, sizeof(kept));
    }
  }
}

FASTTUNE_AVX512 inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
FASTTUNE_AVX512 inline __m512 load16(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
FASTTUNE_AVX512 inline void store16(float* out, __m512 v) { _mm512_storeu_ps(out, v); }
FASTTUNE_AVX512 inline void store16(Half* out, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// 32 bf16: a float's upper half each, those of even index in the lower halves of 32-bit lanes.
struct Floats32 {
  __m512 even, odd;
};
FASTTUNE_AVX512 inline Floats32 widen(__m512i x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(x, upper))};
}
// To nearest even, in the upper half. By integers and not by vcvtneps2bf16, which flushes subnormal
// numbers to zero. A NaN stays one as long as its lower half is 0: made of bf16 ones by
// multiplication and addition it is.
FASTTUNE_AVX512 inline __m512i round_upper(__m512 v) {
  const __m512i raw = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(raw, _mm512_set1_epi32(0x10000));
  const __m512i up = _mm512_add_epi32(raw, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}
FASTTUNE_AVX512 inline __m512i narrow(const Floats32& v) {
  const __m512i even = _mm512_srli_epi32(round_upper(v.even), 16);
  return _mm512_mask_mov_epi16(even, 0xAAAAAAAA, round_upper(v.odd));
}

// Between two pieces lies a drawing, after which the processor's own prefetching begins anew:
// without this, x that comes from memory takes twice the time. An address past x's end does no
// harm.
template <typename T>
inline void fetch_next_piece(const T* x) {
  const uintptr_t next = reinterpret_cast<uintptr_t>(x) + kPiece * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(next));
}

template <typename T, bool kAccumulate>
FASTTUNE_AVX512 void apply_avx512(const T* x, T* out, const uint16_t* bits, int64_t n,
                                  double scale) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, double>) {
    const __m512d factor = _mm512_set1_pd(scale);
    for (; i + 8 <= n; i += 8) {
      fetch_next_piece(x + i);
      const __mmask8 kept = static_cast<__mmask8>(bits[i / 16] >> (i % 16));
      __m512d v = _mm512_maskz_mul_pd(kept, _mm512_loadu_pd(x + i), factor);
      if constexpr (kAccumulate) v = _mm512_add_pd(_mm512_loadu_pd(out + i), v);
      _mm512_storeu_pd(out + i, v);
    }
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
    for (; i + 32 <= n; i += 32) {
      fetch_next_piece(x + i);
      __mmask32 kept;
      std::memcpy(&kept, bits + i / 16, sizeof(kept));
      Floats32 v = widen(_mm512_maskz_loadu_epi16(kept, x + i));
      v = {_mm512_mul_ps(v.even, factor), _mm512_mul_ps(v.odd, factor)};
      if constexpr (kAccumulate) {
        const Floats32 sum = widen(_mm512_loadu_si512(out + i));
        v = {_mm512_add_ps(sum.even, v.even), _mm512_add_ps(sum.odd, v.odd)};
      }
      _mm512_storeu_si512(out + i, narrow(v));
    }
  } else {
    const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
    for (; i + 16 <= n; i += 16) {
      fetch_next_piece(x + i);
      __m512 v = _mm512_maskz_mul_ps(bits[i / 16], load16(x + i), factor);
      if constexpr (kAccumulate) v = _mm512_add_ps(load16(out + i), v);
      store16(out + i, v);
    }
  }
  apply_range<T, kAccumulate>(x, out, bits, i, n, scale);
}

FASTTUNE_AVX2 inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
FASTTUNE_AVX2 inline __m256 load8(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
FASTTUNE_AVX2 inline __m256 load8(const BFloat16* x) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
FASTTUNE_AVX2 inline void store8(float* out, __m256 v) { _mm256_storeu_ps(out, v); }
FASTTUNE_AVX2 inline void store8(Half* out, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
FASTTUNE_AVX2 inline void store8(BFloat16* out, __m256 v) {
  const __m256i raw = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  const __m256i ordered = _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(ordered));
}

template <typename T, bool kAccumulate>
FASTTUNE_AVX2 void apply_avx2(const T* x, T* out, const uint16_t* bits, int64_t n, double scale) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, double>) {
    const __m256 factor = _mm256_set1_ps(static_cast<float>(scale));
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (; i + 8 <= n; i += 8) {
      const __m256i eight = _mm256_set1_epi32(bits[i / 16] >> (i % 16));
      const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(eight, bit), bit);
      __m256 v = _mm256_and_ps(_mm256_mul_ps(load8(x + i), factor), _mm256_castsi256_ps(kept));
      if constexpr (kAccumulate) v = _mm256_add_ps(load8(out + i), v);
      store8(out + i, v);
    }
  }
  apply_range<T, kAccumulate>(x, out, bits, i, n, scale);
}

#endif  // FASTTUNE_X86

enum class Isa { kDefault, kAvx2, kAvx512 };

// torch's own choice, so that ATEN_CPU_CAPABILITY moves both.
Isa detect() {
#ifdef FASTTUNE_X86
  const std::string name = at::get_cpu_capability();
  if (name.rfind("AVX512", 0) == 0) return Isa::kAvx512;
  if (name.rfind("AVX2", 0) == 0) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

DrawFn draw_here() {
#ifdef FASTTUNE_X86
  if (isa() == Isa::kAvx512) return draw_avx512;
  if (isa() == Isa::kAvx2) return draw_avx2;
#endif
  return draw_default;
}

template <typename T, bool kAccumulate>
void apply(const DropoutParams& params, int64_t first, int64_t n, const uint16_t* bits) {
  auto here = apply_default<T, kAccumulate>;
#ifdef FASTTUNE_X86
  if (isa() == Isa::kAvx512) {
    here = apply_avx512<T, kAccumulate>;
  } else if (isa() == Isa::kAvx2) {
    here = apply_avx2<T, kAccumulate>;
  }
#endif
  here(static_cast<const T*>(params.x) + first, static_cast<T*>(params.out) + first, bits, n,
       dropout_scale(params.p));
}

template <typename T>
void apply(const DropoutParams& params, int64_t first, int64_t n, const uint16_t* bits) {
  params.accumulate ? apply<T, true>(params, first, n, bits)
                    : apply<T, false>(params, first, n, bits);
}

// Elements [first, first + n), whose mask starts at bit 0.
void apply(const DropoutParams& params, int64_t first, int64_t n, const uint16_t* bits) {
  switch (params.dtype) {
    case DType::kFloat64:
      return apply<double>(params, first, n, bits);
    case DType::kFloat32:
      return apply<float>(params, first, n, bits);
    case DType::kFloat16:
      return apply<Half>(params, first, n, bits);
    case DType::kBFloat16:
      return apply<BFloat16>(params, first, n, bits);
  }
}

}  // namespace

void dropout(const DropoutParams& params) {
  const int64_t pieces = (params.n + kPiece - 1) / kPiece;
  at::parallel_for(0, pieces, kGrain / kPiece, [&](int64_t begin, int64_t end) {
    uint16_t bits[(kPiece + kDrawSlack) / 16];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * kPiece;
      const int64_t n = std::min(kPiece, params.n - first);
      draw_mask(params.seed, static_cast<uint64_t>(first), n, params.p, bits);
      apply(params, first, n, bits);
    }
  });
}

void apply_mask(const DropoutParams& params, const uint16_t* bits) {
  apply(params, 0, params.n, bits);
}

void draw_mask(uint64_t seed, uint64_t first, int64_t n, double p, uint16_t* bits) {
  const uint32_t threshold = dropout_threshold(p);
  const uint64_t skip = first % kElementsPerDraw;
  n += static_cast<int64_t>(skip);
  if (threshold == kDropAll) {
    std::fill(bits, bits + (n + 15) / 16, 0);
  } else {
    draw_here()(seed, first - skip, n, threshold, bits);
  }
}

const char* capability() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kDefault:
      break;
  }
  return "default";
}

}  // namespace fasttune::cpu
