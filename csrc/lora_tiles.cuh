// How a warp holds tiles of the large matrix of a LoRA product in registers, without shared memory:
// straight from memory into the operands of mma (ptx.cuh), sixteen bytes a load.
//
// A product's sum runs over an index k, which mma spreads over t = lane % 4 and a lane's words. It
// may be renumbered, if both operands agree: so a lane's four numbers of 16 along k are neighbours.
//
//   along columns (k: 32 columns): lane (g, t) has columns 8t .. 8t + 7 of row g: words 0 and 1
//   belong
//     to a first mma, 2 and 3 to a second.
//   along rows (k: 16 rows, 64 columns): lane (g, t) has columns 8g .. 8g + 7 of rows 4t .. 4t + 3:
//     word pairs, rearranged, are the operands of eight mma, the j-th with columns j, 8 + j, 16 + j
//     ...
//
// One draw of a mask serves eight neighbouring columns of a row: both ways each lane draws its own.
#pragma once

#include "device.cuh"

namespace fasttune::cuda {

// Some rows of the large matrix, x or dy: contiguous, columns a multiple of 8. Within them offsets
// take 32 bits, since 64-bit ones take registers: kOffsetRows rows at most (kMaxColumns bounds
// columns).
constexpr int kOffsetRows = 256;
constexpr int64_t kMaxColumns = INT32_MAX / kOffsetRows;

template <typename T, bool kMasked>
struct Large {
  const T* data;        // [rows, columns]
  uint64_t first_draw;  // of data in the whole matrix
  int32_t rows, columns;
  const Mask& mask;  // among the kernel's arguments, which are constant memory

  // Rows first .. end - 1 of the whole matrix.
  __device__ __forceinline__ Large(const void* whole, int64_t first, int64_t end, int32_t columns,
                                   const Mask& mask)
      : data(static_cast<const T*>(whole) + first * columns),
        first_draw(static_cast<uint64_t>(first) * columns / kElementsPerDraw),
        rows(end - first < kOffsetRows ? static_cast<int32_t>(end - first) : kOffsetRows),
        columns(columns),
        mask(mask) {}

  // Columns c .. c + 7 of a row; zeros outside.
  __device__ __forceinline__ Vector load(int32_t row, int32_t c) const {
    return row < rows && c < columns ? load_vector(data + row * columns + c) : Vector{};
  }
  // The same where the multiprocessor reads it again soon.
  __device__ __forceinline__ Vector load_cached(int32_t row, int32_t c) const {
    return row < rows && c < columns ? load_vector_cached(data + row * columns + c) : Vector{};
  }
  __device__ __forceinline__ void apply(int32_t row, int32_t c, Vector& v) const {
    if constexpr (kMasked) {
      apply_mask(mask, first_draw + static_cast<uint32_t>(row * columns + c) / kElementsPerDraw, v);
    }
  }
};

__device__ __forceinline__ int lane_g() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int lane_t() { return threadIdx.x % 4; }

// d += x w^T over 32 columns: x [16, 32] as vectors of rows g and g + 8, w [8, 32] as one of row g.
template <typename T>
__device__ __forceinline__ void mma_along_columns(float (&d)[4], const Vector& upper,
                                                  const Vector& lower, const Vector& w) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t a[4] = {upper.word[2 * half], lower.word[2 * half], upper.word[2 * half + 1],
                           lower.word[2 * half + 1]};
    const uint32_t b[2] = {w.word[2 * half], w.word[2 * half + 1]};
    mma<T>(d, a, b);
  }
}

// d[j] += low^T x over 16 rows: low^T [16, 16] in a, x [16, 64] as vectors of rows 4t .. 4t + 3.
// d[j][2 h + i] is of rank g + 8 h and column 8 (2t + i) + j.
template <typename T>
__device__ __forceinline__ void mma_along_rows(float (&d)[8][4], const uint32_t (&a)[4],
                                               const Vector (&x)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t even[2] = {low_halves(x[0].word[w], x[1].word[w]),
                              low_halves(x[2].word[w], x[3].word[w])};
    const uint32_t odd[2] = {high_halves(x[0].word[w], x[1].word[w]),
                             high_halves(x[2].word[w], x[3].word[w])};
    mma<T>(d[2 * w], a, even);
    mma<T>(d[2 * w + 1], a, odd);
  }
}

struct alignas(8) Pair {
  uint32_t word[2];
};

// The small factor of a product along rows, turned: ranks [kRank] x rows [kRows] in shared memory.
// The pitch lets the eight-byte reads of a half-warp meet no bank twice.
template <typename T, int kRank, int kRows>
struct Turned {
  static constexpr int kPitch = (kRows + 63) / 64 * 64 + 16;
  alignas(16) T at[kRank][kPitch];

  // From small [rows, rank]: rows first .. first + kRows - 1, ranks from `rank0`; zeros outside.
  __device__ __forceinline__ void fill(const T* small, int64_t first, int64_t rows, int32_t rank0,
                                       int32_t rank) {
    for (int i = threadIdx.x; i < kRank * kRows; i += blockDim.x) {
      const int j = i % kRank, row = i / kRank;
      const bool inside = first + row < rows && rank0 + j < rank;
      at[j][row] = inside ? small[(first + row) * rank + rank0 + j] : T{};
    }
  }
  // The operand [16 ranks from j, 16 rows from `row`].
  __device__ __forceinline__ void operand(int j, int row, uint32_t (&a)[4]) const {
    const Pair upper = *reinterpret_cast<const Pair*>(&at[j + lane_g()][row + 4 * lane_t()]);
    const Pair lower = *reinterpret_cast<const Pair*>(&at[j + 8 + lane_g()][row + 4 * lane_t()]);
    a[0] = upper.word[0], a[1] = lower.word[0], a[2] = upper.word[1], a[3] = lower.word[1];
  }
};

// out[i] = scale * (sum over s of parts[s * n + i]), in the order of s.
struct SumArguments {
  const float* parts;  // [count, n]
  void* out;           // [n]
  int64_t n;
  int32_t count;
  float scale;
};

constexpr int kSumThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumArguments p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= p.n) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int32_t s = 0; s < p.count; ++s) sum += p.parts[s * p.n + i];
  static_cast<T*>(p.out)[i] = from_float<T>(sum * p.scale);
}

template <typename T>
int sum_parts(const SumArguments& p, const Device& device) {
  return launch(sum_kernel<T>, LaunchShape{(p.n + kSumThreads - 1) / kSumThreads, kSumThreads},
                device.stream, p);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fasttune::cuda
