// Batch normalisation on CPU: two passes forward, two backward. What blocks of rows add up to is
// combined in double precision, as Chan, Golub and LeVeque do (Updating formulae and a pairwise
// algorithm for computing sample variances, 1979). Blocks are the same for any number of threads.
#include "batch_norm_lines.h"

#ifdef FASTTUNE_VECTORS

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace fasttune::cpu {
namespace {

using namespace norm;

using BlocksFn = void (*)(const Call& call, int64_t begin, int64_t end, float* buffer,
                          float* partials);

template <typename T>
void blocks_default(const Call& call, int64_t begin, int64_t end, float* buffer, float* partials) {
  Kernel<4, T>(call, buffer).blocks(begin, end, partials);
}

#ifdef FASTTUNE_X86
template <typename T>
FASTTUNE_AVX2 void blocks_avx2(const Call& call, int64_t begin, int64_t end, float* buffer,
                               float* partials) {
  Kernel<8, T>(call, buffer).blocks(begin, end, partials);
}

template <typename T>
FASTTUNE_AVX512 void blocks_avx512(const Call& call, int64_t begin, int64_t end, float* buffer,
                                   float* partials) {
  Kernel<16, T>(call, buffer).blocks(begin, end, partials);
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
  at::parallel_for(0, call.lines.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(4 * call.lines.width);
    work(call, begin, end, buffer.data(), call.partials.data());
  });
}

}  // namespace

void batch_norm_statistics(const BatchNormParams& params, float* mean, float* variance) {
  Call call(params, Pass::kStatistics);
  run(call);
  const Lines lines = call.lines;
  const int64_t channels = params.channels, blocks = lines.blocks();
  const auto rows_in = [&](int64_t block) {
    if (block == blocks) return static_cast<double>(lines.rest);
    const int64_t n = std::min(lines.block, lines.count - block * lines.block);
    return static_cast<double>(lines.fold * n);
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
