// oneDNN's products of small matrices, compiled for each shape and called by PyTorch's thin door
// to them: some tenths of a microsecond a call, where at::mm spends ten.
//
// Each thread keeps what it has compiled (some 40 us a shape): sizes that vary are best padded to
// multiples of sixteen, so that few shapes exist.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fasttune::cpu {

// c [m, n] = a [m, k] b [k, n], or added to c; strides from row to row. b of bfloat16 is in pairs
// of rows, [k / 2, n, 2] with k even, and its stride is from pair to pair, in pairs of elements.
template <typename T>
void small_product(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b,
                   int64_t b_stride, float* c, int64_t c_stride, bool add) {
  if constexpr (std::is_same_v<T, float>) {
    // One sum of many terms loses the last digits: parts of it are summed apart.
    constexpr int64_t kPart = 128;
    for (int64_t i = 0; i < k; i += kPart) {
      at::native::cpublas::brgemm(m, n, std::min(kPart, k - i), a_stride, b_stride, c_stride,
                                  add || i > 0, a + i, b + i * b_stride, c, false);
    }
  } else {
    at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, add, a, b, c, true);
  }
}

// To be called by a thread that is done with products of T: AMX has a state to give back.
template <typename T>
void end_small_products() {
  at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
}

// Whether this processor has them (bfloat16 from AVX-512 on, float from AVX2 on), and the user has
// not switched oneDNN off. Only an attempt tells: PyTorch asks oneDNN for it and raises.
template <typename T>
bool has_small_products() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool works = [] {
    alignas(64) T a[16 * 16] = {}, b[16 * 16] = {};
    alignas(64) float c[16 * 16];
    try {
      small_product<T>(16, 16, 16, a, 16, b, 16, c, 16, false);
      end_small_products<T>();
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return works;
}

}  // namespace fasttune::cpu
