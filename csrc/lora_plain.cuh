// The products of lora.cu by plain multiply and add: fp32, features that are no multiple of 8, and
// tensors that start off a 16-byte boundary. Right for every shape; not tuned.
#pragma once

#include "device.cuh"

namespace fasttune::cuda {

constexpr int kPlainThreads = 256;
constexpr int kPlainRanks = 16;  // a thread sums at a time

// out [rows, rank] = scale (mask o x) w^T, with w(j, c) at j * w_rank + c * w_column. A warp a row.
struct PlainDownArguments {
  const void* x;  // [rows, columns]
  const void* w;
  void* out;
  int64_t rows, columns, rank, w_rank, w_column;
  Mask mask;
  bool masked;
};

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    plain_down_kernel(const __grid_constant__ PlainDownArguments p) {
  const int64_t blocks = (p.rank + kPlainRanks - 1) / kPlainRanks;
  const int64_t rank0 = blockIdx.x % blocks * kPlainRanks;
  const int64_t row = blockIdx.x / blocks * (kPlainThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  float sum[kPlainRanks] = {};
  for (int64_t c = lane; c < p.columns; c += 32) {
    const int64_t at = row * p.columns + c;
    if (p.masked && !keeps_element(p.mask, static_cast<uint64_t>(at))) continue;
    const float x = to_float(static_cast<const T*>(p.x)[at]);
#pragma unroll
    for (int j = 0; j < kPlainRanks; ++j) {
      if (rank0 + j >= p.rank) break;
      sum[j] += x * to_float(static_cast<const T*>(p.w)[(rank0 + j) * p.w_rank + c * p.w_column]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPlainRanks; ++j) {
    if (rank0 + j >= p.rank) break;
    const float total = warp_reduce(sum[j], Add()) * p.mask.scale;
    if (lane == 0) static_cast<T*>(p.out)[row * p.rank + rank0 + j] = from_float<T>(total);
  }
}

template <typename T>
int plain_down(const PlainDownArguments& p, const Device& device) {
  constexpr int64_t rows = kPlainThreads / 32;
  const int64_t blocks = (p.rows + rows - 1) / rows * ((p.rank + kPlainRanks - 1) / kPlainRanks);
  return launch(plain_down_kernel<T>, LaunchShape{blocks, kPlainThreads}, device.stream, p);
}

// out(s, j, c) = scale * sum over the rows of split s of small(row, j) (mask o x)(row, c), stored
// at s * columns * rank + j * out_rank + c * out_column. A thread a column.
struct PlainOuterArguments {
  const void* x;      // [rows, columns]
  const void* small;  // [rows, rank]
  float* out;
  int64_t rows, split_rows, columns, rank, out_rank, out_column;
  Mask mask;
  bool masked;
  float scale;
};

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    plain_outer_kernel(const __grid_constant__ PlainOuterArguments p) {
  const int64_t rank_blocks = (p.rank + kPlainRanks - 1) / kPlainRanks;
  const int64_t column_blocks = (p.columns + kPlainThreads - 1) / kPlainThreads;
  const int64_t rank0 = blockIdx.x % rank_blocks * kPlainRanks;
  const int64_t c = blockIdx.x / rank_blocks % column_blocks * kPlainThreads + threadIdx.x;
  const int64_t split = blockIdx.x / rank_blocks / column_blocks;
  if (c >= p.columns) return;
  const int64_t begin = split * p.split_rows;
  const int64_t end = begin + p.split_rows < p.rows ? begin + p.split_rows : p.rows;
  float sum[kPlainRanks] = {};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * p.columns + c;
    if (p.masked && !keeps_element(p.mask, static_cast<uint64_t>(at))) continue;
    const float x = to_float(static_cast<const T*>(p.x)[at]);
#pragma unroll
    for (int j = 0; j < kPlainRanks; ++j) {
      if (rank0 + j >= p.rank) break;
      sum[j] += x * to_float(static_cast<const T*>(p.small)[row * p.rank + rank0 + j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPlainRanks; ++j) {
    if (rank0 + j >= p.rank) break;
    p.out[split * p.columns * p.rank + (rank0 + j) * p.out_rank + c * p.out_column] =
        sum[j] * p.scale;
  }
}

template <typename T>
int plain_outer(const PlainOuterArguments& p, const Device& device) {
  // Without rows too there is a split, which writes zeros.
  const int64_t splits = p.rows <= p.split_rows ? 1 : (p.rows + p.split_rows - 1) / p.split_rows;
  const int64_t blocks = (p.rank + kPlainRanks - 1) / kPlainRanks *
                         ((p.columns + kPlainThreads - 1) / kPlainThreads) * splits;
  return launch(plain_outer_kernel<T>, LaunchShape{blocks, kPlainThreads}, device.stream, p);
}

// dx [rows, ins] += scale mask o (dlow a). A thread an element.
struct PlainAddArguments {
  void* dx;
  const void* dlow;  // [rows, rank]
  const void* a;     // [rank, ins]
  int64_t rows, ins, rank;
  Mask mask;
  bool masked;
};

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    plain_add_kernel(const __grid_constant__ PlainAddArguments p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (at >= p.rows * p.ins) return;
  if (p.masked && !keeps_element(p.mask, static_cast<uint64_t>(at))) return;
  const int64_t row = at / p.ins, c = at % p.ins;
  float sum = 0.0f;
  for (int64_t j = 0; j < p.rank; ++j) {
    sum += to_float(static_cast<const T*>(p.dlow)[row * p.rank + j]) *
           to_float(static_cast<const T*>(p.a)[j * p.ins + c]);
  }
  T* dx = static_cast<T*>(p.dx) + at;
  *dx = from_float<T>(to_float(*dx) + sum * p.mask.scale);
}

template <typename T>
int plain_add(const PlainAddArguments& p, const Device& device) {
  const int64_t blocks = (p.rows * p.ins + kPlainThreads - 1) / kPlainThreads;
  return launch(plain_add_kernel<T>, LaunchShape{blocks, kPlainThreads}, device.stream, p);
}

}  // namespace fasttune::cuda
