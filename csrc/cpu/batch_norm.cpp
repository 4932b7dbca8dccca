// Batch normalisation on CPU of [rows, channels], two passes forward and two backward.
//
// Few channels are no multiple of a vector, so rows are taken side by side as lines: of 12 channels
// sixteen rows make a line of 192 columns. A column is a channel in a place of its own, and lane by
// lane every line adds up like the one before; channels are put together once a block. Blocks are
// combined in double precision as Chan, Golub and LeVeque do (Updating formulae and a pairwise
// algorithm for computing sample variances, 1979): nothing cancels, however large the mean.
//
// No sum depends on the width of a vector or on the number of threads.
#include "vector.h"

#ifdef FASTTUNE_VECTORS

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace fasttune::cpu {
namespace {

constexpr int64_t kColumns = 64;          // taken at once
constexpr int64_t kBlockLines = 512;      // at most: so many numbers are added in fp32
constexpr int64_t kBlockElements = 65536; // at most, but for very long lines; half a MiB with dy
constexpr int64_t kMinLines = 8;

struct Lines {
  int64_t fold;   // rows in a line
  int64_t width;  // columns of a line: a multiple of kGroup
  int64_t count;
  int64_t rest;   // rows that make no whole line
  int64_t block;  // lines

  Lines(int64_t rows, int64_t channels) {
    width = std::lcm(channels, channels < kColumns ? kColumns : kGroup);
    fold = width / channels;
    count = rows / fold;
    rest = rows % fold;
    block = std::clamp(kBlockElements / width, kMinLines, kBlockLines);
  }

  int64_t blocks() const { return std::max<int64_t>(1, (count + block - 1) / block); }
};

enum class Pass { kStatistics, kApply, kSums, kGradient, kScale };

struct Call {
  const BatchNormParams& params;
  Lines lines;
  Pass pass;
  std::vector<float> factors;   // [4, width]: mean, scale, shift, slope, repeated along a line
  std::vector<float> partials;  // [blocks + 1, 2, channels]; the rest's come last

  Call(const BatchNormParams& params, Pass pass)
      : params(params), lines(params.rows, params.channels), pass(pass), factors(4 * lines.width) {
    const float* const given[] = {params.mean, params.scale, params.shift, params.slope};
    for (int64_t i = 0; i < 4; ++i) {
      if (given[i] == nullptr) continue;
      float* to = factors.data() + i * lines.width;
      for (int64_t row = 0; row < lines.fold; ++row, to += params.channels) {
        std::copy_n(given[i], params.channels, to);
      }
    }
    if (pass == Pass::kStatistics || pass == Pass::kSums) {
      partials.resize(2 * params.channels * (lines.blocks() + 1));
    }
  }
};

template <int kWidth, typename T>
struct Kernel {
  using V = Vector<kWidth>;
  using F = typename V::F;

  const Call& call;
  const Lines& lines = call.lines;
  const int64_t channels = call.params.channels;
  const T* x = static_cast<const T*>(call.params.x);
  const T* dy = static_cast<const T*>(call.params.dy);
  T* out = static_cast<T*>(call.params.out);
  const float* mean = call.factors.data();
  const float* scale = mean + lines.width;
  const float* shift = scale + lines.width;
  const float* slope = shift + lines.width;

  // body(number of vectors, first column), for all columns of a line.
  template <typename Body>
  FASTTUNE_INLINE void over_columns(const Body& body) const {
    int64_t j = 0;
    for (; j + kColumns <= lines.width; j += kColumns) {
      body(std::integral_constant<int, kColumns / kWidth>{}, j);
    }
    for (; j < lines.width; j += kGroup) {
      body(std::integral_constant<int, kGroup / kWidth>{}, j);
    }
  }

  // Of `n` lines from `first` on, by columns [width]: the second pass over a few columns finds them
  // in the first-level cache.
  FASTTUNE_INLINE void column_statistics(int64_t first, int64_t n, float* means,
                                         float* squares) const {
    over_columns([&](auto vectors, int64_t j) FASTTUNE_LAMBDA {
      constexpr int kVectors = decltype(vectors)::value;
      const T* const from = x + first * lines.width + j;
      F sum[kVectors] = {}, square[kVectors] = {};
      for (int64_t i = 0; i < n; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[v] += V::load(from + i * lines.width + v * kWidth);
      }
      for (int v = 0; v < kVectors; ++v) sum[v] /= static_cast<float>(n);
      for (int64_t i = 0; i < n; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          const F off = V::load(from + i * lines.width + v * kWidth) - sum[v];
          square[v] += off * off;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        V::store(means + j + v * kWidth, sum[v]);
        V::store(squares + j + v * kWidth, square[v]);
      }
    });
  }

  FASTTUNE_INLINE void column_sums(int64_t first, int64_t n, float* sums, float* products) const {
    over_columns([&](auto vectors, int64_t j) FASTTUNE_LAMBDA {
      constexpr int kVectors = decltype(vectors)::value;
      F center[kVectors], sum[kVectors] = {}, product[kVectors] = {};
      for (int v = 0; v < kVectors; ++v) center[v] = V::load(mean + j + v * kWidth);
      for (int64_t i = first; i < first + n; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = i * lines.width + j + v * kWidth;
          const F gradient = V::load(dy + at);
          sum[v] += gradient;
          product[v] += gradient * (V::load(x + at) - center[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        V::store(sums + j + v * kWidth, sum[v]);
        V::store(products + j + v * kWidth, product[v]);
      }
    });
  }

  // What the places of a channel hold put together, in [channels].
  FASTTUNE_INLINE void fold_statistics(const float* means, const float* squares, int64_t n,
                                       float* of_means, float* of_squares) const {
    fold_sums(means, of_means);
    fold_sums(squares, of_squares);
    if (lines.fold == 1) return;
    for (int64_t j = 0; j < channels; ++j) of_means[j] /= static_cast<float>(lines.fold);
    for (int64_t i = 0; i < lines.fold; ++i, means += channels) {
      for (int64_t j = 0; j < channels; ++j) {
        const float off = means[j] - of_means[j];
        of_squares[j] += static_cast<float>(n) * (off * off);
      }
    }
  }

  FASTTUNE_INLINE void fold_sums(const float* sums, float* folded) const {
    std::copy_n(sums, channels, folded);
    for (int64_t i = 1; i < lines.fold; ++i) {
      sums += channels;
      for (int64_t j = 0; j < channels; ++j) folded[j] += sums[j];
    }
  }

  FASTTUNE_INLINE void rest_statistics(float* means, float* squares) const {
    const T* const from = x + lines.count * lines.width;
    for (int64_t i = 0; i < lines.rest * channels; ++i) means[i % channels] += static_cast<float>(from[i]);
    for (int64_t j = 0; j < channels; ++j) means[j] /= static_cast<float>(lines.rest);
    for (int64_t i = 0; i < lines.rest * channels; ++i) {
      const float off = static_cast<float>(from[i]) - means[i % channels];
      squares[i % channels] += off * off;
    }
  }

  FASTTUNE_INLINE void rest_sums(float* sums, float* products) const {
    const int64_t at = lines.count * lines.width;
    for (int64_t i = 0; i < lines.rest * channels; ++i) {
      const float gradient = static_cast<float>(dy[at + i]);
      sums[i % channels] += gradient;
      products[i % channels] += gradient * (static_cast<float>(x[at + i]) - mean[i % channels]);
    }
  }

  // out = of(element of x or dy, its column), of lines [first, last); and of the rest behind them.
  // `of` is called with loaders, so that one expression serves vectors and single elements.
  template <typename Of>
  FASTTUNE_INLINE void map(int64_t first, int64_t last, bool and_rest, const Of& of) const {
    const auto vector = [](const auto* p) FASTTUNE_LAMBDA { return V::load(p); };
    const auto single = [](const auto* p) FASTTUNE_LAMBDA { return static_cast<float>(*p); };
    for (int64_t i = first; i < last; ++i) {
      over_columns([&](auto vectors, int64_t j) FASTTUNE_LAMBDA {
        for (int v = 0; v < decltype(vectors)::value; ++v, j += kWidth) {
          V::store(out + i * lines.width + j, of(vector, i * lines.width + j, j));
        }
      });
    }
    if (!and_rest) return;
    for (int64_t i = 0; i < lines.rest * channels; ++i) {
      const int64_t at = lines.count * lines.width + i;
      out[at] = static_cast<T>(of(single, at, i));
    }
  }

  FASTTUNE_INLINE void map_block(int64_t first, int64_t last, bool and_rest) const {
    switch (call.pass) {
      case Pass::kApply:
        return map(first, last, and_rest, [&](auto load, int64_t at, int64_t j) FASTTUNE_LAMBDA {
          return (load(x + at) - load(mean + j)) * load(scale + j) + load(shift + j);
        });
      case Pass::kGradient:
        return map(first, last, and_rest, [&](auto load, int64_t at, int64_t j) FASTTUNE_LAMBDA {
          const auto along = (load(x + at) - load(mean + j)) * load(slope + j);
          return (load(dy + at) - load(shift + j) - along) * load(scale + j);
        });
      default:
        return map(first, last, and_rest, [&](auto load, int64_t at, int64_t j) FASTTUNE_LAMBDA {
          return load(dy + at) * load(scale + j);
        });
    }
  }

  FASTTUNE_INLINE void reduce_block(int64_t first, int64_t n, float* columns, float* partial) const {
    float* const others = columns + lines.width;
    if (n == 0) return;
    if (call.pass == Pass::kStatistics) {
      column_statistics(first, n, columns, others);
      fold_statistics(columns, others, n, partial, partial + channels);
    } else {
      column_sums(first, n, columns, others);
      fold_sums(columns, partial);
      fold_sums(others, partial + channels);
    }
  }

  // Blocks [begin, end). The passes that write go backwards: what a thread has read last is still
  // in its cache.
  FASTTUNE_INLINE void blocks(int64_t begin, int64_t end, float* columns, float* partials) const {
    const bool reduces = partials != nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = reduces ? i : begin + end - 1 - i;
      const int64_t first = block * lines.block;
      const int64_t last = std::min(first + lines.block, lines.count);
      const bool and_rest = lines.rest > 0 && block == lines.blocks() - 1;
      if (!reduces) {
        map_block(first, last, and_rest);
        continue;
      }
      reduce_block(first, last - first, columns, partials + 2 * channels * block);
      if (!and_rest) continue;
      float* const partial = partials + 2 * channels * (block + 1);
      if (call.pass == Pass::kStatistics) {
        rest_statistics(partial, partial + channels);
      } else {
        rest_sums(partial, partial + channels);
      }
    }
  }
};

using BlocksFn = void (*)(const Call& call, int64_t begin, int64_t end, float* columns,
                          float* partials);

template <typename T>
void blocks_default(const Call& call, int64_t begin, int64_t end, float* columns, float* partials) {
  Kernel<4, T>{call}.blocks(begin, end, columns, partials);
}

#ifdef FASTTUNE_X86
template <typename T>
FASTTUNE_AVX2 void blocks_avx2(const Call& call, int64_t begin, int64_t end, float* columns,
                               float* partials) {
  Kernel<8, T>{call}.blocks(begin, end, columns, partials);
}

template <typename T>
FASTTUNE_AVX512 void blocks_avx512(const Call& call, int64_t begin, int64_t end, float* columns,
                                   float* partials) {
  Kernel<16, T>{call}.blocks(begin, end, columns, partials);
}
#endif

template <typename T>
BlocksFn choose() {
#ifdef FASTTUNE_X86
  if (std::strcmp(capability(), "avx512") == 0) return blocks_avx512<T>;
  if (std::strcmp(capability(), "avx2") == 0) return blocks_avx2<T>;
#endif
  return blocks_default<T>;
}

void run(Call& call) {
  const bool is_float = call.params.dtype == DType::kFloat32;
  const BlocksFn work = is_float ? choose<float>() : choose<c10::BFloat16>();
  float* const partials = call.partials.empty() ? nullptr : call.partials.data();
  at::parallel_for(0, call.lines.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> columns(partials == nullptr ? 0 : 2 * call.lines.width);
    work(call, begin, end, columns.data(), partials);
  });
}

}  // namespace

void batch_norm_statistics(const BatchNormParams& params, float* mean, float* variance) {
  Call call(params, Pass::kStatistics);
  run(call);
  const Lines& lines = call.lines;
  const int64_t channels = params.channels, blocks = lines.blocks();
  const auto rows_in = [&](int64_t block) {
    if (block == blocks) return static_cast<double>(lines.rest);
    return static_cast<double>(lines.fold * std::min(lines.block, lines.count - block * lines.block));
  };
  const double rows = static_cast<double>(params.rows);
  std::vector<double> means(channels), squares(channels);
  const float* partial = call.partials.data();
  for (int64_t block = 0; block <= blocks; ++block, partial += 2 * channels) {
    const double n = rows_in(block);
    for (int64_t j = 0; j < channels; ++j) means[j] += n / rows * partial[j];
  }
  partial = call.partials.data();
  for (int64_t block = 0; block <= blocks; ++block, partial += 2 * channels) {
    const double n = rows_in(block);
    for (int64_t j = 0; j < channels; ++j) {
      const double off = partial[j] - means[j];
      squares[j] += partial[channels + j] + n * off * off;
    }
  }
  for (int64_t j = 0; j < channels; ++j) {
    mean[j] = static_cast<float>(means[j]);
    variance[j] = static_cast<float>(squares[j] / rows);
  }
}

void batch_norm_apply(const BatchNormParams& params) {
  Call call(params, Pass::kApply);
  run(call);
}

void batch_norm_sums(const BatchNormParams& params, double* dy_sum, double* product_sum) {
  Call call(params, Pass::kSums);
  run(call);
  const int64_t channels = params.channels;
  std::fill_n(dy_sum, channels, 0.0);
  std::fill_n(product_sum, channels, 0.0);
  const float* partial = call.partials.data();
  for (int64_t block = 0; block <= call.lines.blocks(); ++block, partial += 2 * channels) {
    for (int64_t j = 0; j < channels; ++j) {
      dy_sum[j] += partial[j];
      product_sum[j] += partial[channels + j];
    }
  }
}

void batch_norm_gradient(const BatchNormParams& params) {
  Call call(params, params.x == nullptr ? Pass::kScale : Pass::kGradient);
  run(call);
}

}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
