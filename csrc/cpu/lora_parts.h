// What happens to a part of a matrix (some rows, some columns) around the products of lora.cpp:
// jobs, each of which `run` does in the vectors of this machine.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels.h"
#include "vector.h"

#ifdef FASTTUNE_VECTORS

namespace fasttune::cpu {
namespace {

// Rows of a product's right operand that lie interleaved: brgemm.h.
template <typename T>
constexpr int64_t kPairs = sizeof(T) == 2 ? 2 : 1;

template <typename T>
struct Part {
  T* data;
  int64_t stride;  // elements from row to row
  int64_t rows, columns;

  T* row(int64_t i) const { return data + i * stride; }
  Part strip(int64_t column, int64_t count) const { return {data + column, stride, rows, count}; }
};

// The mask of a part: row i, column j is kept where bit first + i * stride + j is set.
struct Kept {
  const uint16_t* bits;  // null: all are kept; kDrawSlack bits may be read beyond the last
  int64_t first, stride;

  int64_t row(int64_t i) const { return first + i * stride; }
  Kept strip(int64_t column) const { return {bits, first + column, stride}; }
  bool has(int64_t bit) const { return bits == nullptr || (bits[bit / 16] >> (bit % 16)) & 1; }
};

// Numbers as they lie in memory, kWidth at a time, each in 32 bits.
template <int kWidth>
struct Raw {
  using U = typename Vector<kWidth>::U;
  using H = typename Vector<kWidth>::H;

  static FASTTUNE_INLINE U load(const float* x) {
    U v;
    std::memcpy(&v, x, sizeof v);
    return v;
  }

  static FASTTUNE_INLINE U load(const c10::BFloat16* x) {
    H v;
    std::memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, U);
  }

  static FASTTUNE_INLINE void store(float* out, U v) { std::memcpy(out, &v, sizeof v); }

  static FASTTUNE_INLINE void store(c10::BFloat16* out, U v) {
    const H narrow = __builtin_convertvector(v, H);
    std::memcpy(static_cast<void*>(out), &narrow, sizeof narrow);
  }
};

// Lanes of F or U whose bit, from `bit` on, is set; zero in the others.
template <int kWidth, bool kMasked, typename Lanes>
FASTTUNE_INLINE Lanes where_kept(const Kept& kept, int64_t bit, Lanes v) {
  if constexpr (kMasked) {
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(kept.bits) + bit / 8, sizeof word);
    typename Vector<kWidth>::U lanes;
    for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = 1u << lane;
    return (((word >> (bit % 8)) & lanes) != 0u) ? v : Lanes{};
  } else {
    return v;
  }
}

// out = mask o x, and zeros up to a multiple of kPairs columns.
template <typename T>
struct Copy {
  Part<const T> x;
  Kept kept;
  T* out;
  int64_t stride;  // of out

  template <int kWidth, bool kMasked>
  FASTTUNE_INLINE void run() const {
    for (int64_t i = 0; i < x.rows; ++i) {
      const T* from = x.row(i);
      T* to = out + i * stride;
      const int64_t bit = kept.row(i);
      int64_t j = 0;
      for (; j + kWidth <= x.columns; j += kWidth) {
        Raw<kWidth>::store(to + j,
                           where_kept<kWidth, kMasked>(kept, bit + j, Raw<kWidth>::load(from + j)));
      }
      for (; j < x.columns; ++j) to[j] = kept.has(bit + j) ? from[j] : T(0.0f);
      for (; j % kPairs<T> != 0; ++j) to[j] = T(0.0f);
    }
  }
};

// out = mask o x as the right operand of a product whose sum runs over rows: `padded` of them, a
// multiple of kPairs, those beyond x's zero.
template <typename T>
struct Interleave {
  Part<const T> x;
  Kept kept;
  int64_t padded;
  T* out;

  template <int kWidth, bool kMasked>
  FASTTUNE_INLINE void run() const {
    if constexpr (kPairs<T> == 1) {
      Copy<T>{x, kept, out, x.columns}.template run<kWidth, kMasked>();
    } else {
      for (int64_t i = 0; i + 1 < x.rows; i += 2) pair<kWidth, kMasked>(i);
      if (x.rows % 2 != 0) {
        const T* last = x.row(x.rows - 1);
        T* to = out + (x.rows - 1) * x.columns;
        for (int64_t j = 0; j < x.columns; ++j) {
          to[2 * j] = kept.has(kept.row(x.rows - 1) + j) ? last[j] : T(0.0f);
          to[2 * j + 1] = T(0.0f);
        }
      }
    }
    const int64_t filled = (x.rows + kPairs<T> - 1) / kPairs<T> * kPairs<T>;
    std::fill(out + filled * x.columns, out + padded * x.columns, T(0.0f));
  }

  template <int kWidth, bool kMasked>
  FASTTUNE_INLINE void pair(int64_t i) const {
    const T *one = x.row(i), *two = x.row(i + 1);
    const int64_t bit = kept.row(i), next_bit = kept.row(i + 1);
    T* to = out + i * x.columns;
    int64_t j = 0;
    for (; j + kWidth <= x.columns; j += kWidth) {
      const auto low = where_kept<kWidth, kMasked>(kept, bit + j, Raw<kWidth>::load(one + j));
      const auto high = where_kept<kWidth, kMasked>(kept, next_bit + j, Raw<kWidth>::load(two + j));
      const auto both = low | (high << 16);  // little-endian: the lower row comes first
      std::memcpy(static_cast<void*>(to + 2 * j), &both, sizeof both);
    }
    for (; j < x.columns; ++j) {
      to[2 * j] = kept.has(bit + j) ? one[j] : T(0.0f);
      to[2 * j + 1] = kept.has(next_bit + j) ? two[j] : T(0.0f);
    }
  }
};

// out += mask o (x factor), with one rounding.
template <typename T>
struct Add {
  Part<const float> x;
  Kept kept;
  float factor;
  Part<T> out;

  template <int kWidth, bool kMasked>
  FASTTUNE_INLINE void run() const {
    using V = Vector<kWidth>;
    for (int64_t i = 0; i < out.rows; ++i) {
      const float* from = x.row(i);
      T* to = out.row(i);
      const int64_t bit = kept.row(i);
      int64_t j = 0;
      for (; j + kWidth <= out.columns; j += kWidth) {
        const auto v = where_kept<kWidth, kMasked>(kept, bit + j, V::load(from + j) * factor);
        V::store(to + j, V::load(to + j) + v);
      }
      for (; j < out.columns; ++j) {
        const float v = kept.has(bit + j) ? from[j] * factor : 0.0f;
        to[j] = static_cast<T>(static_cast<float>(to[j]) + v);
      }
    }
  }
};

// out = x factor + row, with one rounding. S, T: float or BFloat16. added: [columns], or null.
template <typename S, typename T>
struct Convert {
  Part<const S> x;
  float factor;
  Part<T> out;
  const T* added = nullptr;

  template <int kWidth, bool kMasked>
  FASTTUNE_INLINE void run() const {
    using V = Vector<kWidth>;
    for (int64_t i = 0; i < out.rows; ++i) {
      const S* from = x.row(i);
      T* to = out.row(i);
      int64_t j = 0;
      for (; j + kWidth <= out.columns; j += kWidth) {
        const auto v = V::load(from + j) * factor;
        V::store(to + j, added == nullptr ? v : v + V::load(added + j));
      }
      for (; j < out.columns; ++j) {
        const float v = static_cast<float>(from[j]) * factor;
        to[j] = static_cast<T>(added == nullptr ? v : v + static_cast<float>(added[j]));
      }
    }
  }
};

// out[i] = factor * the sum over s of sums[s * stride + i], in that order
struct Sum {
  const float* sums;
  int64_t count, stride, n;
  float factor;
  float* out;

  template <int kWidth, bool kMasked>
  FASTTUNE_INLINE void run() const {
    using V = Vector<kWidth>;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      auto total = V::load(sums + i);
      for (int64_t s = 1; s < count; ++s) total += V::load(sums + s * stride + i);
      V::store(out + i, total * factor);
    }
    for (; i < n; ++i) {
      float total = sums[i];
      for (int64_t s = 1; s < count; ++s) total += sums[s * stride + i];
      out[i] = total * factor;
    }
  }
};

template <bool kMasked, typename Job>
void run_default(const Job& job) {
  job.template run<4, kMasked>();
}

#ifdef FASTTUNE_X86
template <bool kMasked, typename Job>
FASTTUNE_AVX2 void run_avx2(const Job& job) {
  job.template run<8, kMasked>();
}

template <bool kMasked, typename Job>
FASTTUNE_AVX512 void run_avx512(const Job& job) {
  job.template run<16, kMasked>();
}
#endif

template <bool kMasked, typename Job>
void run(const Job& job) {
#ifdef FASTTUNE_X86
  static const std::string name = capability();
  static const bool avx512 = name == "avx512", avx2 = name == "avx2";
  if (avx512) return run_avx512<kMasked>(job);
  if (avx2) return run_avx2<kMasked>(job);
#endif
  run_default<kMasked>(job);
}

// The mask is asked for once a part, not once a vector.
template <typename Job>
void run_masked(const Job& job) {
  job.kept.bits == nullptr ? run<false>(job) : run<true>(job);
}

}  // namespace
}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
