// Cross entropy over rows of logits: loss, statistics and gradient. The mathematics of a row stands
// in softmax.h, the dealing of its elements to threads in row_split.h, figures and rejected designs
// in cross_entropy.md.
#include "cross_entropy_row.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kForwardThreads = 512;   // of a block, which reads one row
constexpr int kBackwardThreads = 256;  // of a block, which writes kHeldVectors vectors a thread

struct Shared {
  OnlineSoftmax softmax[kMaxCluster * kMaxThreads / 32];
  float weighted[kMaxCluster * kMaxThreads / 32];
};

// Loss, statistics and gradient; a cluster a row, held in registers: one reading, one writing.
template <typename T, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, 1)
    held_kernel(const __grid_constant__ CrossEntropyParams p) {
  Shared& shared = block_shared<Shared>();
  const int32_t cluster = cluster_size(), rank = cluster_rank();
  const int64_t index = static_cast<int64_t>(blockIdx.x) / cluster;
  const int64_t label = p.target[index];
  const Row<T> row = row_at<T>(p, index, cluster, rank);
  const bool first = rank == 0 && threadIdx.x == 0;
  if (label == p.ignore_index || out_of_range(p, label)) {
    if (first) write_skipped(p, index, label);
    write_zeros(row);
    return;
  }
  cluster_arrive_relaxed();
  Vector held[kHeldVectors] = {};
  const int32_t count = row.count();
#pragma unroll
  for (int n = 0; n < kHeldVectors; ++n) {
    if (n < count) held[n] = load_vector(row.x + row.column(n));
  }
  // Read before the barrier, since the gradient overwrites it after.
  const float target_logit = first ? to_float(row.x[label]) : 0.0f;
  const OnlineSoftmax own = held_softmax<T, kPlain>(row, held, cap_of(p));
  const OnlineSoftmax total =
      cluster_reduce(own, shared.softmax, empty_softmax(), Combine(), /*starting=*/true);

  const RowGradient r = row_gradient(p, index, label, total.max, logf(total.sum));
  float weighted = 0.0f;
#pragma unroll
  for (int n = 0; n < kHeldVectors; ++n) {
    if (n < count) write_gradient<T, kPlain>(r, row, held[n], row.column(n), weighted);
  }
  write_edges<T, kPlain>(r, row, weighted);
  if (!kPlain && r.smoothing) {
    weighted = cluster_reduce(weighted, shared.weighted, 0.0f, Add(), /*starting=*/false);
  }
  if (first) write_loss<T, kPlain>(p, index, label, total, target_logit, weighted);
}

// Loss and statistics, and the gradient if p.grad is given; a block a row, of any length. A second
// reading, from the second-level cache at best, serves the gradient and the smoothed loss.
template <typename T, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, 1)
    streamed_kernel(const __grid_constant__ CrossEntropyParams p) {
  Shared& shared = block_shared<Shared>();
  const int64_t index = blockIdx.x;
  const int64_t label = p.target[index];
  const Row<T> row = row_at<T>(p, index, 1, 0);
  const bool first = threadIdx.x == 0;
  if (label == p.ignore_index || out_of_range(p, label)) {
    if (first) write_skipped(p, index, label);
    if (row.g != nullptr) write_zeros(row);
    return;
  }
  const float target_logit = first ? to_float(row.x[label]) : 0.0f;
  const OnlineSoftmax own = streamed_softmax<T, kPlain>(row, cap_of(p));
  const OnlineSoftmax total =
      cluster_reduce(own, shared.softmax, empty_softmax(), Combine(), /*starting=*/false);
  float weighted = 0.0f;
  if (row.g != nullptr || p.options.label_smoothing > 0.0f) {
    RowGradient r = {total.max};
    r.smoothing = true;
    r.weight = p.weight;
    r.cap = cap_of(p);
    if (row.g != nullptr) r = row_gradient(p, index, label, total.max, logf(total.sum));
    const int32_t count = row.count();
    for (int32_t n = 0; n < count; ++n) {
      const int32_t column = row.column(n);
      write_gradient<T, kPlain>(r, row, load_vector(row.x + column), column, weighted);
    }
    write_edges<T, kPlain>(r, row, weighted);
    if (!kPlain && r.smoothing) {
      weighted = cluster_reduce(weighted, shared.weighted, 0.0f, Add(), /*starting=*/false);
    }
  }
  if (first) write_loss<T, kPlain>(p, index, label, total, target_logit, weighted);
}

// The gradient from statistics; `parts` blocks a row, which need nothing of each other.
template <typename T, bool kPlain>
__global__ void __launch_bounds__(kBackwardThreads, 4)
    backward_kernel(const __grid_constant__ CrossEntropyParams p) {
  const int32_t parts = p.plan.cluster;
  const int64_t index = static_cast<int64_t>(blockIdx.x) / parts;
  const int64_t label = p.target[index];
  const Row<T> row = row_at<T>(p, index, parts, static_cast<int32_t>(blockIdx.x % parts));
  if (label == p.ignore_index || out_of_range(p, label)) return write_zeros(row);
  const RowGradient r = row_gradient(p, index, label, p.stats[2 * index], p.stats[2 * index + 1]);
  float unused = 0.0f;
  const int32_t count = row.count();
  for (int32_t begin = 0; begin < count; begin += kStreamed) {
    Vector v[kStreamed];
#pragma unroll
    for (int i = 0; i < kStreamed; ++i) {
      if (begin + i < count) v[i] = load_vector(row.x + row.column(begin + i));
    }
#pragma unroll
    for (int i = 0; i < kStreamed; ++i) {
      if (begin + i < count) {
        write_gradient<T, kPlain>(r, row, v[i], row.column(begin + i), unused);
      }
    }
  }
  write_edges<T, kPlain>(r, row, unused);
}

CrossEntropyParams completed(CrossEntropyParams p) {
  if (p.options.softcap > 0.0f) p.inverse_softcap = 1.0f / p.options.softcap;
  return p;
}

__global__ void __launch_bounds__(kBackwardThreads)
    labels_kernel(const __grid_constant__ CrossEntropyParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBackwardThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t label = p.target[row];
  if (out_of_range(p, label)) report_label(p, row, label);
}

bool is_plain(const CrossEntropyParams& p) {
  return p.options.softcap == 0.0f && p.options.label_smoothing == 0.0f;
}

}  // namespace

int cross_entropy_max_cluster() {
  return most_in_cluster(held_kernel<BFloat16, true>, kMaxThreads / 2, sizeof(Shared));
}

int cross_entropy_rows(const CrossEntropyParams& given, const Device& device) {
  CrossEntropyParams p = completed(given);
  p.grad = nullptr;
  const LaunchShape shape{p.rows, kForwardThreads, 1, sizeof(Shared)};
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto kernel = is_plain(p) ? streamed_kernel<T, true> : streamed_kernel<T, false>;
    return launch(kernel, shape, device.stream, p);
  });
}

int cross_entropy_rows_backward(const CrossEntropyParams& given, const Device& device) {
  CrossEntropyParams p = completed(given);
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int64_t block = int64_t{kBackwardThreads} * kHeldVectors * kPerVector<T>;
    p.plan.cluster = static_cast<int32_t>((p.classes + block - 1) / block);
    const auto kernel = is_plain(p) ? backward_kernel<T, true> : backward_kernel<T, false>;
    return launch(kernel, LaunchShape{p.rows * p.plan.cluster, kBackwardThreads}, device.stream, p);
  });
}

int check_labels(const CrossEntropyParams& p, const Device& device) {
  const LaunchShape shape{(p.rows + kBackwardThreads - 1) / kBackwardThreads, kBackwardThreads};
  return launch(labels_kernel, shape, device.stream, p);
}

int cross_entropy_grad(const CrossEntropyParams& given, const Device& device) {
  const CrossEntropyParams p = completed(given);
  LaunchShape shape{p.rows * p.plan.cluster, p.plan.threads, p.plan.cluster, sizeof(Shared)};
  return with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (p.plan.held) {
      return launch(is_plain(p) ? held_kernel<T, true> : held_kernel<T, false>, shape,
                    device.stream, p);
    }
    return launch(is_plain(p) ? streamed_kernel<T, true> : streamed_kernel<T, false>, shape,
                  device.stream, p);
  });
}

}  // namespace fasttune::cuda
