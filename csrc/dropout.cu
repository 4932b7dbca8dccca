// Dropout, sixteen bytes a load. Bit for bit the CPU's result. Figures in dropout.md.
#include "device.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kThreads = 256;  // of a block
constexpr int kVectors = 2;    // a thread has in flight

struct Arguments {
  const void* x;
  void* out;
  int64_t n;
  Mask mask;
  bool aligned;  // x and out, to 16 bytes
};

template <typename T>
__device__ __forceinline__ void load(const Arguments& p, const void* from, int64_t first,
                                     float (&x)[kPerVector<T>]) {
  const T* source = static_cast<const T*>(from) + first;
  if (p.aligned && first + kPerVector<T> <= p.n) {
    unpack<T>(load_vector(source), x);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) x[i] = first + i < p.n ? to_float(source[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store(const Arguments& p, int64_t first,
                                      const float (&x)[kPerVector<T>]) {
  T* target = static_cast<T*>(p.out) + first;
  if (p.aligned && first + kPerVector<T> <= p.n) {
    store_vector(target, pack<T>(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if (first + i < p.n) target[i] = from_float<T>(x[i]);
  }
}

template <typename T, bool kAccumulate>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const __grid_constant__ Arguments p) {
  constexpr int per = kPerVector<T>;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads * kVectors;
  float x[kVectors][per], sum[kVectors][per];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = (block + v * kThreads + threadIdx.x) * per;
    if (first >= p.n) break;
    load<T>(p, p.x, first, x[v]);
    if (kAccumulate) load<T>(p, p.out, first, sum[v]);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = (block + v * kThreads + threadIdx.x) * per;
    if (first >= p.n) break;
    const Philox4 u = philox_draw(p.mask.keys, static_cast<uint64_t>(first / kElementsPerDraw));
    // Four floats take half of what was drawn, and the thread beside draws the same again.
    const bool upper = first % kElementsPerDraw != 0;
#pragma unroll
    for (int i = 0; i < per; ++i) {
      const uint32_t word = upper ? u.word[(i / 2 + 2) % 4] : u.word[i / 2];
      const bool kept = i % 2 == 0 ? p.mask.keeps_even(word) : p.mask.keeps_odd(word);
      x[v][i] = kept ? multiply(x[v][i], p.mask.scale) : 0.0f;
      if (kAccumulate) x[v][i] += sum[v][i];
    }
    store<T>(p, first, x[v]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  const float factor = *p.factor;
  if (factor == 1.0f) return;
  T* x = static_cast<T*>(p.x);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.n; i += step) {
    x[i] = from_float<T>(to_float(x[i]) * factor);
  }
}

}  // namespace

int scale(const ScaleParams& p, const Device& device) {
  const int64_t wanted = 8 * static_cast<int64_t>(device.multiprocessors);
  const int64_t blocks = (p.n + kThreads - 1) / kThreads;
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch(scale_kernel<T>, LaunchShape{blocks < wanted ? blocks : wanted, kThreads},
                  device.stream, p);
  });
}

int dropout(const DropoutParams& p, const Device& device) {
  const bool aligned =
      (reinterpret_cast<uint64_t>(p.x) | reinterpret_cast<uint64_t>(p.out)) % kVectorBytes == 0;
  const Arguments arguments{p.x, p.out, p.n, make_mask(p.p, p.seed), aligned};
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int64_t block = int64_t{kThreads} * kVectors * kPerVector<T>;
    const auto kernel = p.accumulate ? dropout_kernel<T, true> : dropout_kernel<T, false>;
    return launch(kernel, LaunchShape{(p.n + block - 1) / block, kThreads}, device.stream,
                  arguments);
  });
}

}  // namespace fasttune::cuda
