// Cross entropy on CPU, one row at a time: the maximum, the sums, then the gradient. A row is read
// from memory by the first pass and from the second-level cache by the others, so that loss and
// gradient in place cost one read and one write.
//
// The sums run over sixteen lanes in the same order on every instruction set, and a row never
// splits over threads: neither changes a bit of the result.
#include "vector.h"

#ifdef FASTTUNE_VECTORS

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../softmax.h"
#include "kernels.h"

namespace fasttune::cpu {
namespace {

constexpr int64_t kBlock = 64 * kGroup;  // elements summed apart: 1/64 of the rounding errors
constexpr int64_t kGrain = 32768;        // elements a thread takes at least

// A row in groups of sixteen, each a few vectors wide. The sums have sixteen lanes whatever the
// width, and at the end one order of adding them.
template <int kWidth, typename T, bool kCap, bool kSmooth>
struct Row {
  using V = Vector<kWidth>;
  using F = typename V::F;
  static constexpr int kParts = kGroup / kWidth;

  const T* z;           // [classes]
  const float* weight;  // [classes]; null: all 1
  int64_t classes;
  float cap;

  static FASTTUNE_INLINE F capped(F x, float cap) {
    if constexpr (kCap) x = V::tanh(x * (1.0f / cap)).value * cap;
    return x;
  }

  FASTTUNE_INLINE float capped(float x) const { return capped(V::all(x), cap)[0]; }

  FASTTUNE_INLINE float max() const {
    F top[kParts];
    for (int p = 0; p < kParts; ++p) top[p] = V::all(-INFINITY);
    int64_t i = 0;
    for (; i + kGroup <= classes; i += kGroup) {
      for (int p = 0; p < kParts; ++p) top[p] = V::larger(V::load(z + i + p * kWidth), top[p]);
    }
    float largest = -INFINITY;
    for (; i < classes; ++i) largest = std::max(largest, static_cast<float>(z[i]));
    return std::max(largest, V::largest(top));
  }

  struct Sums {
    float exp, shifted;  // of exp(z_c - max); of w_c (z_c - max), 0 unless kSmooth
  };

  // stored: [classes] for exp(z_c - max), may be z; null: not wanted.
  FASTTUNE_INLINE Sums sums(float max, float* stored) const {
    F exp_sum[kParts] = {}, shifted_sum[kParts] = {};
    const int64_t whole = classes - classes % kGroup;
    for (int64_t block = 0; block < whole; block += kBlock) {
      const int64_t end = std::min(block + kBlock, whole);
      F exp_part[kParts] = {}, shifted_part[kParts] = {};
      for (int64_t i = block; i < end; i += kGroup) {
        for (int p = 0; p < kParts; ++p) {
          const int64_t at = i + p * kWidth;
          F x = capped(V::load(z + at), cap) - max;
          const F e = V::exp(x);
          exp_part[p] += e;
          if (stored != nullptr) V::store(stored + at, e);
          if constexpr (kSmooth) {
            shifted_part[p] += weight == nullptr ? x : x * V::load(weight + at);
          }
        }
      }
      for (int p = 0; p < kParts; ++p) {
        exp_sum[p] += exp_part[p];
        shifted_sum[p] += shifted_part[p];
      }
    }
    Sums result = {V::sum(exp_sum), V::sum(shifted_sum)};
    for (int64_t c = whole; c < classes; ++c) {
      const F x = capped(V::all(static_cast<float>(z[c])), cap) - max;
      const float e = V::exp(x)[0];
      result.exp += e;
      if (stored != nullptr) stored[c] = e;
      if constexpr (kSmooth) result.shifted += weight == nullptr ? x[0] : x[0] * weight[c];
    }
    return result;
  }

  // grad_c = (scale exp(z_c - max) - hard - smooth w_c) slope_c, with `hard` at the target only.
  struct Factors {
    float scale, hard, smooth;
  };

  // x: the logits, or exp(z_c - max) if kStored.
  template <bool kStored>
  static FASTTUNE_INLINE F gradient(F x, F w, float max, float cap, float hard,
                                    const Factors& factors) {
    F slope = {};
    if constexpr (kCap) {
      const typename V::Tanh t = V::tanh(x * (1.0f / cap));
      x = t.value * cap;
      slope = t.slope;
    }
    F g = (kStored ? x : V::exp(x - max)) * factors.scale - hard;
    if constexpr (kSmooth) g -= w * factors.smooth;
    if constexpr (kCap) g *= slope;
    return g;
  }

  // from: z, or what sums() stored; grad may be either.
  template <bool kStored, typename S>
  FASTTUNE_INLINE void write_gradient(const S* from, T* grad, int64_t target, float max,
                                      const Factors& factors) const {
    const auto one = [&](int64_t c, float hard) __attribute__((always_inline)) {
      const float w = kSmooth && weight != nullptr ? weight[c] : 1.0f;
      const F x = V::all(static_cast<float>(from[c]));
      return T(gradient<kStored>(x, V::all(w), max, cap, hard, factors)[0]);
    };
    const T at_target = one(target, factors.hard);
    int64_t i = 0;
    for (; i + kWidth <= classes; i += kWidth) {
      const F w = kSmooth && weight != nullptr ? V::load(weight + i) : V::all(1.0f);
      V::store(grad + i, gradient<kStored>(V::load(from + i), w, max, cap, 0.0f, factors));
    }
    for (; i < classes; ++i) grad[i] = one(i, 0.0f);
    grad[target] = at_target;
  }
};

// scratch: [classes].
template <int kWidth, typename T, bool kCap, bool kSmooth>
FASTTUNE_INLINE void row(const CrossEntropyParams& params, int64_t r, float* scratch) {
  const int64_t classes = params.classes, target = params.target[r];
  const T* z = static_cast<const T*>(params.logits) + r * params.logits_stride;
  T* grad = static_cast<T*>(params.grad);
  if (grad != nullptr) grad += r * params.grad_stride;
  float* stats = params.stats + 2 * r;
  if (target == params.ignore_index) {
    if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, classes * sizeof(T));
    if (params.loss != nullptr) params.loss[r] = stats[0] = stats[1] = 0.0f;
    return;
  }
  const Row<kWidth, T, kCap, kSmooth> row = {z, params.weight, classes, params.options.softcap};
  const float target_weight = params.weight == nullptr ? 1.0f : params.weight[target];
  // Without a cap, the exponentials are kept for the gradient: in the gradient's row if they fit.
  float* stored = nullptr;
  if (!kCap && grad != nullptr && params.loss != nullptr) {
    stored = std::is_same_v<T, float> ? reinterpret_cast<float*>(grad) : scratch;
  }
  float max = stats[0], log_sum = stats[1], inverse;
  if (params.loss != nullptr) {
    max = row.capped(row.max());
    const float target_shifted = row.capped(static_cast<float>(z[target])) - max;
    const auto sums = row.sums(max, stored);
    log_sum = std::log(sums.exp);
    inverse = 1.0f / sums.exp;
    params.loss[r] = row_loss(params.options, max, log_sum, target_shifted, sums.shifted,
                              target_weight, params.weight_sum, classes);
    stats[0] = max;
    stats[1] = log_sum;
  } else {
    inverse = std::exp(-log_sum);
  }
  if (grad == nullptr) return;
  const RowFactors f =
      row_factors(params.options, max, log_sum, target_weight, params.weight_sum, classes);
  const float upstream = params.factor[r * params.factor_stride];
  const typename Row<kWidth, T, kCap, kSmooth>::Factors factors = {f.a * inverse * upstream,
                                                                   f.b * upstream, f.e * upstream};
  if (stored != nullptr) {
    row.template write_gradient<true>(stored, grad, target, max, factors);
  } else {
    row.template write_gradient<false>(z, grad, target, max, factors);
  }
}

template <int kWidth, typename T>
FASTTUNE_INLINE void rows(const CrossEntropyParams& params, int64_t begin, int64_t end,
                          float* scratch) {
  const bool cap = params.options.softcap > 0.0f, smooth = params.options.label_smoothing > 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    if (cap && smooth) {
      row<kWidth, T, true, true>(params, r, scratch);
    } else if (cap) {
      row<kWidth, T, true, false>(params, r, scratch);
    } else if (smooth) {
      row<kWidth, T, false, true>(params, r, scratch);
    } else {
      row<kWidth, T, false, false>(params, r, scratch);
    }
  }
}

using RowsFn = void (*)(const CrossEntropyParams& params, int64_t begin, int64_t end,
                        float* scratch);

template <typename T>
void rows_default(const CrossEntropyParams& params, int64_t begin, int64_t end, float* scratch) {
  rows<4, T>(params, begin, end, scratch);
}

#ifdef FASTTUNE_X86
template <typename T>
FASTTUNE_AVX2 void rows_avx2(const CrossEntropyParams& params, int64_t begin, int64_t end,
                             float* scratch) {
  rows<8, T>(params, begin, end, scratch);
}

template <typename T>
FASTTUNE_AVX512 void rows_avx512(const CrossEntropyParams& params, int64_t begin, int64_t end,
                                 float* scratch) {
  rows<16, T>(params, begin, end, scratch);
}
#endif

template <typename T>
RowsFn choose() {
#ifdef FASTTUNE_X86
  if (std::strcmp(capability(), "avx512") == 0) return rows_avx512<T>;
  if (std::strcmp(capability(), "avx2") == 0) return rows_avx2<T>;
#endif
  return rows_default<T>;
}

}  // namespace

void cross_entropy(const CrossEntropyParams& params) {
  const RowsFn work = params.dtype == DType::kFloat32 ? choose<float>() : choose<c10::BFloat16>();
  const bool needs = params.dtype != DType::kFloat32 && params.grad != nullptr;
  const int64_t grain = std::max<int64_t>(1, kGrain / params.classes);
  at::parallel_for(0, params.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(needs ? params.classes : 0);
    work(params, begin, end, scratch.data());
  });
}

}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
