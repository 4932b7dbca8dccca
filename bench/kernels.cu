// Times every CUDA kernel alone, without torch, beside the time that its bytes take: what a first
// look at a new chip or a new design needs.
//
//   nvcc -std=c++17 -O3 -arch=sm_90a -Icsrc bench/kernels.cu csrc/*.cu -o kernels && ./kernels
//
// Columns: milliseconds (median of 20), bytes that must move, the share of the bandwidth that a
// plain copy reaches in the same run. Results are not looked at: that is what `make test-gpu` does.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "kernels.h"

using namespace fasttune;
using namespace fasttune::cuda;

namespace {

constexpr int kRuns = 20;
double copy_rate = 0;  // bytes a millisecond

void check(int status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::exit(1);
}

// Numbers in [-4, 4), as bf16 or float.
__global__ void fill(uint32_t* words, int64_t count, bool half) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{256}) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u;
    h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
    const float x = (h & 0xFFFF) / 8192.0f - 4.0f, y = (h >> 16) / 8192.0f - 4.0f;
    words[i] =
        half ? __float_as_uint(x) >> 16 | (__float_as_uint(y) & 0xFFFF0000u) : __float_as_uint(x);
  }
}

void* make(int64_t bytes, bool half = true) {
  void* memory;
  check(cudaMalloc(&memory, std::max<int64_t>(bytes, 256)), "cudaMalloc");
  fill<<<1024, 256>>>(static_cast<uint32_t*>(memory), bytes / 4, half);
  return memory;
}

double median_ms(const std::function<int(int)>& run) {
  std::vector<float> all;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event"), check(cudaEventCreate(&end), "event");
  for (int i = -3; i < kRuns; ++i) {
    check(cudaEventRecord(begin), "event");
    check(run(i + 3), "launch");
    check(cudaEventRecord(end), "event"), check(cudaEventSynchronize(end), "kernel");
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 0) all.push_back(ms);
  }
  std::nth_element(all.begin(), all.begin() + kRuns / 2, all.end());
  return all[kRuns / 2];
}

void report(const char* name, double bytes, const std::function<int(int)>& run) {
  const double ms = median_ms(run);
  std::printf("%-52s %9.4f ms %8.1f MB %6.1f %% of a copy's rate\n", name, ms, bytes / 1e6,
              100 * bytes / copy_rate / ms);
}

void cross_entropy(const Device& device, int64_t rows, int64_t columns) {
  const double bytes = 2.0 * rows * columns;
  std::vector<int64_t> labels(rows);
  for (int64_t i = 0; i < rows; ++i) labels[i] = i * 7919 % columns;
  CrossEntropyParams p = {};
  int64_t* target;
  check(cudaMalloc(&target, rows * 8), "cudaMalloc");
  check(cudaMemcpy(target, labels.data(), rows * 8, cudaMemcpyHostToDevice), "copy");
  void *logits = make(rows * columns * 2), *grad = make(rows * columns * 2);
  p.logits = logits, p.target = target, p.rows = rows, p.classes = columns;
  p.stride = p.grad_stride = columns, p.ignore_index = -100, p.dtype = DType::kBFloat16;
  p.loss = static_cast<float*>(make(rows * 4)), p.stats = static_cast<float*>(make(rows * 8));
  p.factor = static_cast<float*>(make(4, false));
  check(cudaHostAlloc(reinterpret_cast<void**>(&p.fault), sizeof(LabelFault), cudaHostAllocMapped),
        "cudaHostAlloc");
  *p.fault = {};
  std::printf("cross entropy, bf16, %lld x %lld\n", static_cast<long long>(rows),
              static_cast<long long>(columns));
  report("  rows: loss and statistics", bytes, [&](int) { return cross_entropy_rows(p, device); });
  p.grad = grad;
  report("  rows_backward: gradient from statistics", 2 * bytes,
         [&](int) { return cross_entropy_rows_backward(p, device); });
  p.grad = logits;  // the gradient of a gradient is as good a row as any
  const RowPlan chosen = plan_row(columns, 2, cross_entropy_max_cluster());
  std::vector<RowPlan> plans = {chosen, {1, kMaxThreads, false}};
  for (int cluster = 1; cluster <= cross_entropy_max_cluster(); cluster *= 2) {
    for (int threads = 128; threads <= kMaxThreads; threads *= 2) {
      const int64_t held = int64_t{cluster} * threads * kHeldVectors * 8;
      if (held >= columns && held < 4 * columns) plans.push_back({cluster, threads, true});
    }
  }
  for (const RowPlan& plan : plans) {
    char name[80];
    std::snprintf(name, sizeof(name), "  grad_: %s, %d x %d threads%s",
                  plan.held ? "held" : "two passes", plan.cluster, plan.threads,
                  &plan == &plans[0] ? " (its plan)" : "");
    p.plan = plan;
    report(name, 2 * bytes, [&](int) { return cross_entropy_grad(p, device); });
  }
  for (const void* memory :
       {static_cast<const void*>(target), p.logits, static_cast<const void*>(grad)}) {
    check(cudaFree(const_cast<void*>(memory)), "cudaFree");
  }
}

void lora(const Device& device, int64_t rows, int64_t ins, int64_t rank, double p) {
  constexpr int kBuffers = 4;  // in turn: together they are larger than the second-level cache
  std::vector<void*> x(kBuffers);
  for (void*& buffer : x) buffer = make(rows * ins * 2);
  void *a = make(rank * ins * 2), *low = make(rows * rank * 2), *out = make(rows * rank * 2);
  float* sums = static_cast<float*>(make(rank * ins * 4));
  const MaskParams mask{p, 12345};
  LoraDownParams down{x[0], a, out, nullptr, rows, ins, rank, mask, DType::kBFloat16};
  LoraUpBackwardParams up{x[0], low, a, out, sums, nullptr, rows, ins, rank, DType::kBFloat16};
  LoraDownBackwardParams outer{x[0], low, sums, nullptr, rows, ins, rank, mask, DType::kBFloat16};
  LoraAddParams add{x[0], low, a, rows, ins, rank, mask, DType::kBFloat16};
  const int64_t space =
      std::max({lora_down_workspace(down, device), lora_up_backward_workspace(up, device),
                lora_down_backward_workspace(outer, device)});
  down.workspace = up.workspace = outer.workspace = static_cast<float*>(make(4 * space));
  const double bytes = 2.0 * rows * ins;
  std::printf("LoRA, bf16, rows %lld, features %lld, rank %lld, p = %.2f\n",
              static_cast<long long>(rows), static_cast<long long>(ins),
              static_cast<long long>(rank), p);
  report("  down", bytes, [&](int i) { return down.x = x[i % kBuffers], lora_down(down, device); });
  report("  up_backward", bytes,
         [&](int i) { return up.dy = x[i % kBuffers], lora_up_backward(up, device); });
  report("  down_backward", bytes,
         [&](int i) { return outer.x = x[i % kBuffers], lora_down_backward(outer, device); });
  report("  add_", 2 * bytes,
         [&](int i) { return add.dx = x[i % kBuffers], lora_add(add, device); });
  void* y = make(rows * ins * 2);
  report("  dropout, same size", 2 * bytes, [&](int i) {
    return dropout({x[i % kBuffers], y, rows * ins, p, 12345, DType::kBFloat16, false}, device);
  });
  for (void* buffer : x) check(cudaFree(buffer), "cudaFree");
  for (void* buffer :
       {a, low, out, static_cast<void*>(sums), y, static_cast<void*>(down.workspace)}) {
    check(cudaFree(buffer), "cudaFree");
  }
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "device");
  const int64_t bytes = int64_t{1} << 30;
  void *from = make(bytes), *to = make(bytes);
  const double ms = median_ms(
      [&](int) { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr); });
  copy_rate = 2 * bytes / ms;
  check(cudaFree(from), "cudaFree"), check(cudaFree(to), "cudaFree");
  std::printf("%s, sm_%d%d, %d multiprocessors; a copy moves %.2f TB/s\n", properties.name,
              properties.major, properties.minor, properties.multiProcessorCount, copy_rate / 1e9);
  const Device device{nullptr, properties.multiProcessorCount};
  for (const int64_t columns : {32000, 50257, 128256, 262144}) cross_entropy(device, 8192, columns);
  for (const double p : {0.0, 0.1}) {
    lora(device, 8192, 4096, 16, p);
    lora(device, 8192, 4096, 32, p);
    lora(device, 8192, 14336, 16, p);
    lora(device, 8192, 1024, 16, p);
  }
  return 0;
}
