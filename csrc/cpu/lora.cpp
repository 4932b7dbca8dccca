// The low-rank side of a LoRA linear layer, a block of rows at a time: a block's dropout, products
// and sums stay in cache, and what is as large as x is read or written once. The mask is applied
// by zeroing; the factor 1 / (1 - p) is left to the products' float32 results.
//
// n: features, of x or of dy. r: rank; padded to a multiple of kRankUnit where it is a dimension
// of a buffer.
#include "lora.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "brgemm.h"
#include "kernels.h"
#include "lora_parts.h"

#ifdef FASTTUNE_VECTORS

namespace fasttune::cpu {
namespace {

constexpr int64_t kRows = 32;      // of a block; a multiple of 16: its bits begin a word
constexpr int64_t kColumns = 256;  // of a strip of a block
constexpr int64_t kRankUnit = 16;
constexpr int64_t kSumRows = 512;  // a sum takes at least, where there are more than kFewSums
constexpr int64_t kFewSums = 8;
constexpr int64_t kSumBytes = 64 << 20;  // of all of them, at most

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t padded_rank(int64_t rank) { return round_up(rank, kRankUnit); }

float keep_scale(const LoraMask& mask) {
  return mask.p < 1 ? static_cast<float>(1.0 / (1.0 - mask.p)) : 0.0f;
}

template <typename T>
Part<T> part_of(const at::Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return {static_cast<T*>(x.const_data_ptr()), x.size(1), x.size(0), x.size(1)};
  } else {
    return {static_cast<T*>(x.mutable_data_ptr()), x.size(1), x.size(0), x.size(1)};
  }
}

// m, or m^T, [k, n] as the right operand of products: [padded k / kPairs, padded n, kPairs].
template <typename T>
std::vector<T> packed(const at::Tensor& m, bool transpose, int64_t padded_k, int64_t padded_n) {
  std::vector<T> out(padded_k * padded_n, T(0.0f));
  const T* from = m.const_data_ptr<T>();
  const int64_t k_size = m.size(transpose), n_size = m.size(!transpose);
  const int64_t k_step = transpose ? 1 : m.size(1), n_step = transpose ? m.size(1) : 1;
  for (int64_t k = 0; k < k_size; k += kPairs<T>) {
    const int64_t pairs = std::min(kPairs<T>, k_size - k);
    T* to = out.data() + k * padded_n;
    for (int64_t n = 0; n < n_size; ++n, to += kPairs<T>) {
      for (int64_t i = 0; i < pairs; ++i) to[i] = from[(k + i) * k_step + n * n_step];
    }
  }
  return out;
}

// How blocks of rows are divided into sums: by the sizes alone.
struct Division {
  int64_t rows, blocks, sums;

  Division(int64_t all_rows, int64_t sum_floats)
      : rows(all_rows), blocks((rows + kRows - 1) / kRows) {
    const int64_t wanted = std::max(kFewSums, rows / kSumRows);
    const int64_t fitting = kSumBytes / (sum_floats * static_cast<int64_t>(sizeof(float)));
    sums = std::min({blocks, wanted, std::max<int64_t>(fitting, 1)});
  }

  int64_t begin(int64_t sum) const { return sum * blocks / sums; }
};

// A thread's buffers, and the block of rows it is at.
template <typename T>
struct Worker {
  const int64_t rank, padded = padded_rank(rank);
  std::vector<T> strip, filled, turned;  // [kRows, kColumns], [kRows, padded], [r, kRows]
  std::vector<float> wide, narrow;       // [kRows, kColumns], [kRows, padded]
  const T* left = nullptr;               // [rows, padded]: `filled`, or a part of low itself
  std::vector<uint16_t> bits;
  int64_t first = 0, rows = 0;

  explicit Worker(int64_t r)
      : rank(r),
        strip(kRows * kColumns),
        filled(kRows * padded),
        turned(rank * kRows),
        wide(kRows * kColumns),
        narrow(kRows * padded) {}

  ~Worker() { end_small_products<T>(); }

  void go_to(int64_t block, int64_t all_rows) {
    first = block * kRows;
    rows = std::min(kRows, all_rows - first);
  }

  int64_t padded_rows() const { return round_up(rows, 16); }

  template <typename U>
  Part<U> here(const Part<U>& whole) const {
    return {whole.row(first), whole.stride, rows, whole.columns};
  }

  Kept draw(const LoraMask& mask, int64_t columns) {
    if (mask.p == 0) return {nullptr, 0, 0};
    bits.resize((kRows * columns + kDrawSlack) / 16);
    draw_mask(mask.seed, static_cast<uint64_t>(first) * static_cast<uint64_t>(columns),
              rows * columns, mask.p, bits.data());
    return {bits.data(), 0, columns};
  }

  // out [rows, r] = factor (mask o x) m.  m: packed, [n, padded rank]
  void shrink(const Part<const T>& x, const Kept& kept, const T* m, float factor,
              const Part<T>& out) {
    if (kept.bits == nullptr && rows % 16 == 0 && x.columns % kPairs<T> == 0) {
      small_product<T>(rows, padded, x.columns, x.data, x.stride, m, padded, narrow.data(), padded,
                       false);
    } else {
      for (int64_t j = 0; j < x.columns; j += kColumns) {
        const int64_t width = std::min(kColumns, x.columns - j);
        const int64_t k = round_up(width, kPairs<T>);
        run_masked(Copy<T>{x.strip(j, width), kept.strip(j), strip.data(), k});
        small_product<T>(padded_rows(), padded, k, strip.data(), k, m + j * padded, padded,
                         narrow.data(), padded, j > 0);
      }
    }
    run<false>(Convert<float, T>{{narrow.data(), padded, rows, rank}, factor, out});
  }

  // Takes over the block's rows of low, [rows, r], for the left side of what follows.
  void take(const Part<const T>& low) {
    for (int64_t k = 0; k < rank; ++k) {
      T* to = turned.data() + k * kRows;
      for (int64_t i = 0; i < rows; ++i) to[i] = low.data[i * low.stride + k];
      std::fill(to + rows, to + kRows, T(0.0f));
    }
    if (rank == padded && rows % 16 == 0) {
      left = low.data;
      return;
    }
    std::fill(filled.begin(), filled.end(), T(0.0f));
    for (int64_t i = 0; i < rows; ++i) {
      std::copy(low.row(i), low.row(i) + rank, filled.data() + i * padded);
    }
    left = filled.data();
  }

  // sum [r, n] = low^T (mask o x), or += for `add`. For one strip of x.
  void accumulate(const Part<const T>& x, const Kept& kept, float* sum, int64_t sum_stride,
                  bool add) {
    run_masked(Interleave<T>{x, kept, padded_rows(), strip.data()});
    small_product<T>(rank, x.columns, padded_rows(), turned.data(), kRows, strip.data(), x.columns,
                     sum, sum_stride, add);
  }

  // out = low m + bias. For one strip of out; m: packed, [padded rank, all columns]
  void widen(const T* m, int64_t m_stride, const T* bias, const Part<T>& out) {
    small_product<T>(padded_rows(), out.columns, padded, left, padded, m, m_stride, wide.data(),
                     out.columns, false);
    run<false>(Convert<float, T>{{wide.data(), out.columns, rows, out.columns}, 1.0f, out, bias});
  }

  // out += factor mask o (low m). For one strip of out; m: packed, [padded rank, all columns]
  void expand(const T* m, int64_t m_stride, const Kept& kept, float factor, const Part<T>& out) {
    small_product<T>(padded_rows(), out.columns, padded, left, padded, m, m_stride, wide.data(),
                     out.columns, false);
    run_masked(Add<T>{{wide.data(), out.columns, rows, out.columns}, kept, factor, out});
  }
};

// The body gets a column and a width.
template <typename Body>
void each_strip(int64_t columns, const Body& body) {
  for (int64_t j = 0; j < columns; j += kColumns) body(j, std::min(kColumns, columns - j));
}

// Sums [count, r, n] to factor times their sum: [r, n], or [n, r] if turned.
at::Tensor total(const at::Tensor& sums, float factor, bool turned) {
  const int64_t count = sums.size(0), rank = sums.size(1), n = sums.size(2);
  const at::Tensor out =
      turned ? at::empty({n, rank}, sums.options()) : at::empty({rank, n}, sums.options());
  const float* from = sums.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  constexpr int64_t kSlice = 64;
  const int64_t slices = (n + kSlice - 1) / kSlice;
  const int64_t grain = std::max<int64_t>(1, 32768 / (count * rank * kSlice));
  at::parallel_for(0, slices, grain, [&](int64_t begin, int64_t end) {
    float row[kSlice];
    for (int64_t j = begin * kSlice; j < std::min(n, end * kSlice); j += kSlice) {
      const int64_t width = std::min(kSlice, n - j);
      for (int64_t k = 0; k < rank; ++k) {
        float* const direct = to + k * n + j;
        run<false>(Sum{from + k * n + j, count, rank * n, width, factor, turned ? row : direct});
        if (!turned) continue;
        for (int64_t i = 0; i < width; ++i) to[(j + i) * rank + k] = row[i];
      }
    }
  });
  return out;
}

template <typename T>
at::Tensor down(const at::Tensor& x, const at::Tensor& a, const LoraMask& mask) {
  const int64_t rows = x.size(0), ins = x.size(1), rank = a.size(0);
  const at::Tensor low = at::empty({rows, rank}, x.options());
  const Part<const T> all_x = part_of<const T>(x);
  const Part<T> all_low = part_of<T>(low);
  const std::vector<T> m = packed<T>(a, true, round_up(ins, kPairs<T>), padded_rank(rank));
  at::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(rank);
    for (int64_t block = begin; block < end; ++block) {
      worker.go_to(block, rows);
      worker.shrink(worker.here(all_x), worker.draw(mask, ins), m.data(), keep_scale(mask),
                    worker.here(all_low));
    }
  });
  return low;
}

template <typename T>
at::Tensor up(const at::Tensor& low, const at::Tensor& b, const at::Tensor& bias) {
  const int64_t rows = low.size(0), outs = b.size(0), rank = b.size(1);
  const at::Tensor y = at::empty({rows, outs}, low.options());
  const Part<const T> all_low = part_of<const T>(low);
  const T* const added = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  const std::vector<T> m = packed<T>(b, true, padded_rank(rank), outs);
  at::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(rank);
    for (int64_t block = begin; block < end; ++block) {
      worker.go_to(block, rows);
      worker.take(worker.here(all_low));
      each_strip(outs, [&](int64_t j, int64_t width) {
        worker.widen(m.data() + j * kPairs<T>, outs, added == nullptr ? nullptr : added + j,
                     worker.here(part_of<T>(y)).strip(j, width));
      });
    }
  });
  return y;
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> up_backward(const at::Tensor& dy, const at::Tensor& low,
                                               const at::Tensor& b, double factor) {
  const int64_t rows = dy.size(0), outs = dy.size(1), rank = b.size(1);
  const Division division(rows, rank * outs);
  const at::Tensor dlow = at::empty({rows, rank}, dy.options());
  at::Tensor sums;
  if (low.defined()) sums = at::empty({division.sums, rank, outs}, dy.options().dtype(at::kFloat));
  const Part<const T> all_dy = part_of<const T>(dy);
  const Part<T> all_dlow = part_of<T>(dlow);
  const std::vector<T> m = packed<T>(b, false, round_up(outs, kPairs<T>), padded_rank(rank));
  at::parallel_for(0, division.sums, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(rank);
    for (int64_t sum = begin; sum < end; ++sum) {
      for (int64_t block = division.begin(sum); block < division.begin(sum + 1); ++block) {
        worker.go_to(block, rows);
        const Part<const T> here = worker.here(all_dy);
        worker.shrink(here, {}, m.data(), 1.0f, worker.here(all_dlow));
        if (!low.defined()) continue;
        worker.take(worker.here(part_of<const T>(low)));
        float* const to = sums.mutable_data_ptr<float>() + sum * rank * outs;
        each_strip(outs, [&](int64_t j, int64_t width) {
          worker.accumulate(here.strip(j, width), {}, to + j, outs, block > division.begin(sum));
        });
      }
    }
  });
  return {dlow, low.defined() ? total(sums, static_cast<float>(factor), true) : at::Tensor()};
}

template <typename T>
at::Tensor input_backward(const at::Tensor& x, const at::Tensor& dlow, const at::Tensor& a,
                          const at::Tensor& dx, const LoraMask& mask) {
  const int64_t rows = x.size(0), ins = x.size(1), rank = a.size(0);
  const Division division(rows, rank * ins);
  const at::Tensor sums = at::empty({division.sums, rank, ins}, x.options().dtype(at::kFloat));
  const Part<const T> all_x = part_of<const T>(x), all_dlow = part_of<const T>(dlow);
  const float scale = keep_scale(mask);
  const bool masks_dx = dx.defined() && mask.p > 0;
  std::vector<T> m;
  if (masks_dx) m = packed<T>(a, false, padded_rank(rank), ins);
  at::parallel_for(0, division.sums, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(rank);
    for (int64_t sum = begin; sum < end; ++sum) {
      float* const to = sums.mutable_data_ptr<float>() + sum * rank * ins;
      for (int64_t block = division.begin(sum); block < division.begin(sum + 1); ++block) {
        worker.go_to(block, rows);
        worker.take(worker.here(all_dlow));
        const Kept kept = worker.draw(mask, ins);
        const Part<const T> here = worker.here(all_x);
        each_strip(ins, [&](int64_t j, int64_t width) {
          worker.accumulate(here.strip(j, width), kept.strip(j), to + j, ins,
                            block > division.begin(sum));
        });
        if (!masks_dx) continue;
        // Not strip by strip with the above: two streams of memory at once take half as long again.
        each_strip(ins, [&](int64_t j, int64_t width) {
          worker.expand(m.data() + j * kPairs<T>, ins, kept.strip(j), scale,
                        worker.here(part_of<T>(dx)).strip(j, width));
        });
      }
    }
  });
  // Without a mask oneDNN's own product, which adds to bf16 out of its registers, is faster.
  if (dx.defined() && !masks_dx) dx.addmm_(dlow, a);
  return total(sums, scale, false);
}

template <typename S, typename T>
at::Tensor converted(const at::Tensor& x, float factor) {
  const at::Tensor out =
      at::empty(x.sizes(), x.options().dtype(c10::CppTypeToScalarType<T>::value));
  run<false>(Convert<S, T>{part_of<const S>(x), factor, part_of<T>(out)});
  return out;
}

template <typename T>
constexpr LoraKernels kBlocks = {down<T>, up<T>, up_backward<T>, input_backward<T>};

}  // namespace

const LoraKernels* lora_blocks(at::ScalarType type) {
  if (type == at::kBFloat16 && has_small_products<c10::BFloat16>()) return &kBlocks<c10::BFloat16>;
  if (type == at::kFloat && has_small_products<float>()) return &kBlocks<float>;
  return nullptr;
}

at::Tensor scaled_to(const at::Tensor& x, double factor, at::ScalarType type) {
  using c10::BFloat16;
  const at::ScalarType from = x.scalar_type();
  const float f = static_cast<float>(factor);
  if (x.is_contiguous() && from == at::kFloat) {
    if (type == at::kFloat) return factor == 1.0 ? x : converted<float, float>(x, f);
    if (type == at::kBFloat16) return converted<float, BFloat16>(x, f);
  }
  if (x.is_contiguous() && from == at::kBFloat16) {
    if (type == at::kBFloat16) return factor == 1.0 ? x : converted<BFloat16, BFloat16>(x, f);
    if (type == at::kFloat) return converted<BFloat16, float>(x, f);
  }
  return scaled_by_pytorch(x, factor, type);
}

}  // namespace fasttune::cpu

#else

namespace fasttune::cpu {

const LoraKernels* lora_blocks(at::ScalarType) { return nullptr; }

at::Tensor scaled_to(const at::Tensor& x, double factor, at::ScalarType type) {
  return scaled_by_pytorch(x, factor, type);
}

}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
