// The skinny products of a LoRA linear layer on tensor cores, for 16-bit types and features that
// are multiples of 8. How tiles lie in registers stands in lora_tiles.cuh.
//
// rows: tokens; ranks go in blocks of 16 or 32, zeros where there are fewer. A sum that several
// warps share is added through shared memory, one that several blocks share by sum_kernel, in fixed
// order.
#pragma once

#include "lora_tiles.cuh"

namespace fasttune::cuda {

constexpr int kLoraThreads = 256;
constexpr int kLoraWarps = kLoraThreads / 32;

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

// A split's rows are first .. split_end - 1.
template <typename Arguments>
__device__ __forceinline__ int64_t split_end(const Arguments& p, int64_t split) {
  const int64_t end = (split + 1) * p.split_rows;
  return end < p.rows ? end : p.rows;
}

// ---- out = x a^T: 32 rows a block, the columns dealt to its warps, and to `splits` blocks.

constexpr int kDownRows = 32;

struct DownArguments {
  const void* x;  // [rows, ins]
  const void* a;  // [rank, ins]
  void* out;      // [rows, rank], or float parts [splits, rows, rank]
  int64_t rows;
  int32_t ins, rank, rank_blocks, splits;
  Mask mask;
};

template <int kRank>
struct DownShared {
  float part[kLoraWarps][kDownRows][kRank];
};

template <typename T, int kRank, bool kMasked>
__global__ void __launch_bounds__(kLoraThreads, 2)
    down_kernel(const __grid_constant__ DownArguments p) {
  constexpr int kTiles = kRank / 8;
  constexpr int kAhead =
      kRank == 16 && !kMasked ? 2 : 1;  // steps of 32 columns in flight: what registers allow
  auto& shared = block_shared<DownShared<kRank>>();
  const int32_t rank0 = blockIdx.x % p.rank_blocks * kRank;
  const int32_t split = blockIdx.x / p.rank_blocks % p.splits;
  const int64_t row0 = blockIdx.x / p.rank_blocks / p.splits * int64_t{kDownRows};
  const Large<T, kMasked> x(p.x, row0, p.rows, p.ins, p.mask);
  const Large<T, false> a(p.a, rank0, p.rank, p.ins, p.mask);
  const int g = lane_g(), t = lane_t(), warp = warp_index();

  float d[2][kTiles][4] = {};
  const int32_t step = p.splits * kLoraWarps * 32 * kAhead;
  for (int32_t c0 = (split * kLoraWarps + warp) * 32 * kAhead; c0 < p.ins; c0 += step) {
    Vector rows[kAhead][4], ranks[kAhead][kTiles];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int32_t c = c0 + 32 * s + 8 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[s][i] = x.load(8 * i + g, c);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) ranks[s][j] = a.load_cached(8 * j + g, c);
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int32_t c = c0 + 32 * s + 8 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) x.apply(8 * i + g, c, rows[s][i]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        mma_along_columns<T>(d[0][j], rows[s][0], rows[s][1], ranks[s][j]);
        mma_along_columns<T>(d[1][j], rows[s][2], rows[s][3], ranks[s][j]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared.part[warp][16 * m + 8 * (i / 2) + g][8 * j + 2 * t + i % 2] = d[m][j][i];
      }
    }
  }
  block_sync();
  for (int i = threadIdx.x; i < kDownRows * kRank; i += kLoraThreads) {
    const int64_t row = row0 + i / kRank;
    const int32_t j = rank0 + i % kRank;
    if (row >= p.rows || j >= p.rank) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kLoraWarps; ++w) sum += shared.part[w][i / kRank][i % kRank];
    const int64_t at = row * p.rank + j;
    if (p.splits == 1) {
      static_cast<T*>(p.out)[at] = from_float<T>(sum * p.mask.scale);
    } else {
      static_cast<float*>(p.out)[split * p.rows * p.rank + at] = sum;
    }
  }
}

// ---- da = dlow^T x: 128 columns a block, its rows dealt to four pairs of warps.

constexpr int kOuterColumns = 128;
constexpr int kOuterGroups = 4;           // of two warps, 64 columns each
constexpr int kOuterChunk = kOffsetRows;  // rows whose dlow lies in shared memory

struct OuterArguments {
  const void* x;      // [rows, ins]
  const void* small;  // [rows, rank]
  float* out;         // [splits, rank, ins]
  int64_t rows, split_rows;
  int32_t ins, rank, rank_blocks, column_blocks;
  Mask mask;
  float scale;
};

template <typename T, int kRank>
union OuterShared {
  Turned<T, kRank, kOuterChunk> small;
  float part[kOuterGroups][16][kOuterColumns];
};

template <typename T, int kRank, bool kMasked>
__global__ void __launch_bounds__(kLoraThreads, 2)
    outer_kernel(const __grid_constant__ OuterArguments p) {
  constexpr int kTiles = kRank / 16;
  constexpr int kAhead =
      kRank == 16 && !kMasked ? 2 : 1;  // steps of 16 rows in flight: what registers allow
  auto& shared = block_shared<OuterShared<T, kRank>>();
  const int32_t rank0 = blockIdx.x % p.rank_blocks * kRank;
  const int32_t column0 = blockIdx.x / p.rank_blocks % p.column_blocks * kOuterColumns;
  const int64_t split = blockIdx.x / p.rank_blocks / p.column_blocks;
  const int g = lane_g(), t = lane_t(), group = warp_index() / 2;
  const int32_t c = column0 + warp_index() % 2 * 64 + 8 * g;

  float d[kTiles][8][4] = {};
  for (int32_t chunk = 0; chunk < p.split_rows; chunk += kOuterChunk) {
    const int64_t first = split * p.split_rows + chunk;
    const int64_t end = split_end(p, split);
    block_sync();
    shared.small.fill(static_cast<const T*>(p.small), first, end, rank0, p.rank);
    block_sync();
    const Large<T, kMasked> x(p.x, first, end, p.ins, p.mask);
    for (int row = 16 * kAhead * group; row < x.rows; row += 16 * kAhead * kOuterGroups) {
      Vector v[kAhead][4];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[s][i] = x.load(row + 16 * s + 4 * t + i, c);
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x.apply(row + 16 * s + 4 * t + i, c, v[s][i]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t a[4];
          shared.small.operand(16 * tile, row + 16 * s, a);
          mma_along_rows<T>(d[tile], a, v[s]);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    block_sync();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = warp_index() % 2 * 64 + 8 * (2 * t + i % 2) + j;
        shared.part[group][g + 8 * (i / 2)][column] = d[tile][j][i];
      }
    }
    block_sync();
    for (int i = threadIdx.x; i < 16 * kOuterColumns; i += kLoraThreads) {
      const int32_t rank = rank0 + 16 * tile + i / kOuterColumns;
      const int32_t column = column0 + i % kOuterColumns;
      if (rank >= p.rank || column >= p.ins) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kOuterGroups; ++w) {
        sum += shared.part[w][i / kOuterColumns][i % kOuterColumns];
      }
      p.out[(split * p.rank + rank) * p.ins + column] = sum * p.scale;
    }
  }
}

// ---- dlow = dy b and db = dy^T low from one reading: 512 columns a block, 64 a warp; all warps go
// down the same rows together, since each has a part of their dlow.

constexpr int kUpColumns = 64 * kLoraWarps;
constexpr int kUpChunk = 64;  // rows whose low lies in shared memory

struct UpArguments {
  const void* dy;   // [rows, outs]
  const void* low;  // [rows, rank]
  const void* b;    // [outs, rank]
  float* dlow;      // [column_blocks, rows, rank]
  float* db;        // [splits, outs, rank]
  int64_t rows, split_rows;
  int32_t outs, rank, rank_blocks, column_blocks;
  Mask none;
};

template <typename T, int kRank>
struct UpShared {
  Turned<T, kRank, kUpChunk> low;
  alignas(16) T b[kRank][kUpColumns + 32];  // turned; the pitch keeps 16-byte reads off each other
  float part[2][kLoraWarps][16][kRank];  // of dlow, for 16 rows; two, so that one barrier is enough
};

template <typename T, int kRank>
__global__ void __launch_bounds__(kLoraThreads, kRank == 16 ? 2 : 1)
    up_kernel(const __grid_constant__ UpArguments p) {
  auto& shared = block_shared<UpShared<T, kRank>>();
  const int32_t rank0 = blockIdx.x % p.rank_blocks * kRank;
  const int32_t column_block = blockIdx.x / p.rank_blocks % p.column_blocks;
  const int64_t split = blockIdx.x / p.rank_blocks / p.column_blocks;
  const int g = lane_g(), t = lane_t(), warp = warp_index();
  const int32_t block_column = column_block * kUpColumns, warp_column = 64 * warp;
  const int32_t column = block_column + warp_column;

  for (int i = threadIdx.x; i < kRank * kUpColumns; i += kLoraThreads) {
    const int32_t j = i % kRank, c = i / kRank;
    const bool inside = rank0 + j < p.rank && block_column + c < p.outs;
    shared.b[j][c] =
        inside ? static_cast<const T*>(p.b)[(block_column + c) * int64_t{p.rank} + rank0 + j] : T{};
  }
  const int64_t begin = split * p.split_rows;
  const int64_t end = split_end(p, split);
  const auto load_rows = [&](int64_t row, Vector(&v)[2][2]) {
    const Large<T, false> dy(p.dy, row, end, p.outs, p.none);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) v[s][h] = dy.load_cached(8 * h + g, column + 32 * s + 8 * t);
    }
  };

  float db[kRank / 16][8][4] = {};
  Vector next[2][2];  // the rows of the coming step: columns 0 .. 31 and 32 .. 63, rows g and g + 8
  load_rows(begin, next);
  int parity = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kUpChunk) {
    // All have read the chunk before: they met after its last step.
    shared.low.fill(static_cast<const T*>(p.low), chunk, end, rank0, p.rank);
    block_sync();
    for (int row = 0; row < kUpChunk && chunk + row < end; row += 16) {
      const Large<T, false> dy(p.dy, chunk + row, end, p.outs, p.none);
      Vector across[2][2], along[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) across[i / 2][i % 2] = next[i / 2][i % 2];
#pragma unroll
      for (int i = 0; i < 4; ++i) along[i] = dy.load_cached(4 * t + i, column + 8 * g);
      load_rows(chunk + row + 16, next);
#pragma unroll
      for (int j = 0; j < kRank / 8; ++j) {
        float d[4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const Vector w =
              *reinterpret_cast<const Vector*>(&shared.b[8 * j + g][warp_column + 32 * s + 8 * t]);
          mma_along_columns<T>(d, across[s][0], across[s][1], w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          shared.part[parity][warp][8 * (i / 2) + g][8 * j + 2 * t + i % 2] = d[i];
        }
      }
#pragma unroll
      for (int tile = 0; tile < kRank / 16; ++tile) {
        uint32_t a[4];
        shared.low.operand(16 * tile, row, a);
        mma_along_rows<T>(db[tile], a, along);
      }
      block_sync();
      for (int i = threadIdx.x; i < 16 * kRank; i += kLoraThreads) {
        const int64_t r = chunk + row + i / kRank;
        const int32_t j = rank0 + i % kRank;
        if (r >= end || j >= p.rank) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kLoraWarps; ++w) sum += shared.part[parity][w][i / kRank][i % kRank];
        p.dlow[(column_block * p.rows + r) * p.rank + j] = sum;
      }
      parity ^= 1;
    }
  }
#pragma unroll
  for (int tile = 0; tile < kRank / 16; ++tile) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t rank = rank0 + 16 * tile + g + 8 * (i / 2);
        const int32_t c = column + 8 * (2 * t + i % 2) + j;
        if (rank < p.rank && c < p.outs)
          p.db[(split * p.outs + c) * p.rank + rank] = db[tile][j][i];
      }
    }
  }
}

// ---- dx += mask o (dlow a): a warp keeps its columns of a and goes down the rows.

struct AddArguments {
  void* dx;          // [rows, ins]
  const void* dlow;  // [rows, rank]
  const void* a;     // [rank, ins]
  int64_t rows, split_rows;
  int32_t ins, rank, column_blocks;
  Mask mask;
};

// Four numbers of dlow from rank `j`: the words of an operand.
template <typename T>
__device__ __forceinline__ Pair four_ranks(const AddArguments& p, int64_t row, int32_t j) {
  if (row >= p.rows || j >= p.rank) return {};
  const T* from = static_cast<const T*>(p.dlow) + row * p.rank + j;
  if (p.rank % 4 == 0) return *reinterpret_cast<const Pair*>(from);
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = j + i < p.rank ? from[i].bits : 0;
  return {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}};
}

// kSteps: of 16 ranks. kWide: of 32 columns a warp.
template <typename T, int kSteps, int kWide, bool kMasked>
__global__ void __launch_bounds__(kLoraThreads, kSteps == 8 ? 1 : 2)
    add_kernel(const __grid_constant__ AddArguments p) {
  const int g = lane_g(), t = lane_t();
  const int32_t column_block = blockIdx.x % p.column_blocks;
  const int64_t split = blockIdx.x / p.column_blocks;
  const int32_t column0 = (column_block * kLoraWarps + warp_index()) * 32 * kWide;
  T* dx = static_cast<T*>(p.dx);

  // The j-th mma of 32 columns has columns 2 j and 2 j + 1 of each lane's eight.
  uint32_t b[kWide][4][kSteps][2];
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t c = column0 + 32 * w + 8 * (g / 2) + 2 * j + g % 2;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t rank = 16 * s + 4 * t + i;
          const bool inside = rank < p.rank && c < p.ins;
          bits[i] = inside ? static_cast<const T*>(p.a)[rank * int64_t{p.ins} + c].bits : 0;
        }
        b[w][j][s][0] = bits[0] | bits[1] << 16;
        b[w][j][s][1] = bits[2] | bits[3] << 16;
      }
    }
  }
  const int64_t begin = split * p.split_rows;
  const int64_t end = split_end(p, split);
  for (int64_t row = begin; row < end; row += 16) {
    const Large<T, kMasked> out(dx, row, p.rows, p.ins, p.mask);
    Vector v[kWide][2];
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) v[w][h] = out.load(8 * h + g, column0 + 32 * w + 8 * t);
    }
    float d[kWide][4][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const Pair upper = four_ranks<T>(p, row + g, 16 * s + 4 * t);
      const Pair lower = four_ranks<T>(p, row + 8 + g, 16 * s + 4 * t);
      const uint32_t a[4] = {upper.word[0], lower.word[0], upper.word[1], lower.word[1]};
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(d[w][j], a, b[w][j][s]);
      }
    }
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int32_t r = 8 * h + g, c = column0 + 32 * w + 8 * t;
        if (r >= out.rows || c >= p.ins) continue;
        Vector kept{{~0u, ~0u, ~0u, ~0u}};
        out.apply(r, c, kept);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float first, second;
          unpack2<T>(v[w][h].word[j], first, second);
          first += kept.word[j] & 0xFFFFu ? d[w][j][2 * h] * p.mask.scale : 0.0f;
          second += kept.word[j] >> 16 ? d[w][j][2 * h + 1] * p.mask.scale : 0.0f;
          v[w][h].word[j] = pack2<T>(first, second);
        }
        store_vector(dx + row * p.ins + r * p.ins + c, v[w][h]);
      }
    }
  }
}

}  // namespace fasttune::cuda
