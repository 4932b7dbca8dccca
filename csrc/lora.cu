// The skinny products of a LoRA linear layer: which kernel computes them, and how their sums are
// split over blocks. Figures and rejected designs in lora.md.
//
// A plan depends on shapes and device only, so that asking for the workspace and launching agree,
// and so that a result repeats.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "lora_kernels.cuh"
#include "lora_plain.cuh"

namespace fasttune::cuda {
namespace {

// How many blocks share a sum, so that about `wanted` run; none gets fewer than `least` of `steps`.
int32_t split_for(int64_t blocks, int64_t steps, int64_t least, int64_t wanted) {
  if (blocks == 0) return 1;
  const int64_t most = std::max<int64_t>(1, steps / least);
  return static_cast<int32_t>(std::clamp<int64_t>(wanted / blocks, 1, most));
}

bool aligned(std::initializer_list<const void*> pointers) {
  uint64_t all = 0;
  for (const void* pointer : pointers) all |= reinterpret_cast<uint64_t>(pointer);
  return all % kVectorBytes == 0;
}

bool on_tensor_cores(DType dtype, int64_t features) {
  return dtype != DType::kFloat32 && features % 8 == 0 && features <= kMaxColumns;
}

int32_t rank_block(int64_t rank) { return rank <= 16 ? 16 : 32; }

int32_t rank_blocks(int64_t rank) {
  return static_cast<int32_t>(ceil_div(std::max<int64_t>(rank, 1), rank_block(rank)));
}

struct RowSplit {
  int64_t rows;    // a split has, a multiple of 16
  int64_t splits;  // at least 1
};

RowSplit split_rows(int64_t rows, int64_t blocks, int64_t least, int64_t wanted) {
  const int64_t splits = split_for(blocks, ceil_div(rows, 16), ceil_div(least, 16), wanted);
  const int64_t each = std::max<int64_t>(16, ceil_div(ceil_div(rows, splits), 16) * 16);
  return {each, std::max<int64_t>(1, ceil_div(rows, each))};
}

int32_t down_splits(const LoraDownParams& p, const Device& device) {
  const int64_t blocks = ceil_div(p.rows, kDownRows) * rank_blocks(p.rank);
  if (!on_tensor_cores(p.dtype, p.ins) || blocks >= device.multiprocessors) return 1;
  return split_for(blocks, ceil_div(p.ins, 64 * kLoraWarps), 1, 2 * device.multiprocessors);
}

RowSplit outer_split(const LoraDownBackwardParams& p, const Device& device) {
  const bool fast = on_tensor_cores(p.dtype, p.ins);
  const int64_t columns = fast ? kOuterColumns : kPlainThreads;
  const int64_t ranks = fast ? rank_blocks(p.rank) : ceil_div(p.rank, kPlainRanks);
  return split_rows(p.rows, ceil_div(p.ins, columns) * ranks, 128, 2 * device.multiprocessors);
}

RowSplit up_split(const LoraUpBackwardParams& p, const Device& device) {
  const bool fast = on_tensor_cores(p.dtype, p.outs);
  const int64_t columns = fast ? kUpColumns : kPlainThreads;
  const int64_t ranks = fast ? rank_blocks(p.rank) : ceil_div(p.rank, kPlainRanks);
  const int64_t wanted = (p.rank <= 16 ? 2 : 1) * device.multiprocessors;
  return split_rows(p.rows, ceil_div(p.outs, columns) * ranks, 128, wanted);
}

// call(tag of T, integral_constant of the rank block)
template <typename Call>
int with_rank(DType dtype, int64_t rank, Call&& call) {
  const auto ranked = [&](auto tag) {
    return rank <= 16 ? call(tag, std::integral_constant<int, 16>{})
                      : call(tag, std::integral_constant<int, 32>{});
  };
  return dtype == DType::kFloat16 ? ranked(Tag<Half>{}) : ranked(Tag<BFloat16>{});
}

template <typename T, int kSteps, int kWide>
int run_add(const LoraAddParams& p, const Device& device) {
  const int64_t column_blocks = ceil_div(p.ins, kLoraWarps * 32 * kWide);
  const RowSplit split = split_rows(p.rows, column_blocks, 64, 4 * device.multiprocessors);
  const AddArguments arguments{p.dx,
                               p.dlow,
                               p.a,
                               p.rows,
                               split.rows,
                               static_cast<int32_t>(p.ins),
                               static_cast<int32_t>(p.rank),
                               static_cast<int32_t>(column_blocks),
                               make_mask(p.mask.p, p.mask.seed)};
  const auto kernel =
      p.mask.p > 0 ? add_kernel<T, kSteps, kWide, true> : add_kernel<T, kSteps, kWide, false>;
  return launch(kernel, LaunchShape{column_blocks * split.splits, kLoraThreads}, device.stream,
                arguments);
}

template <typename T>
int run_add(const LoraAddParams& p, const Device& device) {
  if (p.rank <= 16) return run_add<T, 1, 2>(p, device);
  if (p.rank <= 32) return run_add<T, 2, 2>(p, device);
  if (p.rank <= 64) return run_add<T, 4, 1>(p, device);
  return run_add<T, 8, 1>(p, device);
}

constexpr int64_t kAddRanks = 128;  // whose part of a fits a warp's registers

}  // namespace

int64_t lora_down_workspace(const LoraDownParams& p, const Device& device) {
  const int64_t splits = down_splits(p, device);
  return splits == 1 ? 0 : splits * p.rows * p.rank;
}

int64_t lora_down_backward_workspace(const LoraDownBackwardParams& p, const Device& device) {
  const RowSplit split = outer_split(p, device);
  return split.splits == 1 ? 0 : split.splits * p.rank * p.ins;
}

int64_t lora_up_backward_workspace(const LoraUpBackwardParams& p, const Device& device) {
  const RowSplit split = up_split(p, device);
  const int64_t db = split.splits == 1 ? 0 : split.splits * p.outs * p.rank;
  return db + ceil_div(p.outs, kUpColumns) * p.rows * p.rank;
}

int lora_down(const LoraDownParams& p, const Device& device) {
  const Mask mask = make_mask(p.mask.p, p.mask.seed);
  if (!on_tensor_cores(p.dtype, p.ins) || !aligned({p.x, p.a})) {
    const PlainDownArguments plain{p.x,    p.a,   p.out, p.rows, p.ins,
                                   p.rank, p.ins, 1,     mask,   p.mask.p > 0};
    return with_dtype(
        p.dtype, [&](auto tag) { return plain_down<typename decltype(tag)::Type>(plain, device); });
  }
  const int32_t splits = down_splits(p, device);
  const DownArguments arguments{p.x,
                                p.a,
                                splits == 1 ? p.out : p.workspace,
                                p.rows,
                                static_cast<int32_t>(p.ins),
                                static_cast<int32_t>(p.rank),
                                rank_blocks(p.rank),
                                splits,
                                mask};
  const int64_t blocks = ceil_div(p.rows, kDownRows) * arguments.rank_blocks * splits;
  return with_rank(p.dtype, p.rank, [&](auto tag, auto width) {
    using T = typename decltype(tag)::Type;
    constexpr int kRank = decltype(width)::value;
    const auto kernel = p.mask.p > 0 ? down_kernel<T, kRank, true> : down_kernel<T, kRank, false>;
    const LaunchShape shape{blocks, kLoraThreads, 1, sizeof(DownShared<kRank>)};
    const int status = launch(kernel, shape, device.stream, arguments);
    if (status != 0 || splits == 1) return status;
    return sum_parts<T>({p.workspace, p.out, p.rows * p.rank, splits, mask.scale}, device);
  });
}

int lora_down_backward(const LoraDownBackwardParams& p, const Device& device) {
  const Mask mask = make_mask(p.mask.p, p.mask.seed);
  const RowSplit split = outer_split(p, device);
  float* out = split.splits == 1 ? p.da : p.workspace;
  int status;
  if (!on_tensor_cores(p.dtype, p.ins) || !aligned({p.x})) {
    const PlainOuterArguments plain{p.x,    p.dlow, out, p.rows, split.rows,   p.ins,
                                    p.rank, p.ins,  1,   mask,   p.mask.p > 0, mask.scale};
    status = with_dtype(p.dtype, [&](auto tag) {
      return plain_outer<typename decltype(tag)::Type>(plain, device);
    });
  } else {
    const OuterArguments arguments{p.x,
                                   p.dlow,
                                   out,
                                   p.rows,
                                   split.rows,
                                   static_cast<int32_t>(p.ins),
                                   static_cast<int32_t>(p.rank),
                                   rank_blocks(p.rank),
                                   static_cast<int32_t>(ceil_div(p.ins, kOuterColumns)),
                                   mask,
                                   mask.scale};
    const int64_t blocks = split.splits * arguments.rank_blocks * arguments.column_blocks;
    status = with_rank(p.dtype, p.rank, [&](auto tag, auto width) {
      using T = typename decltype(tag)::Type;
      constexpr int kRank = decltype(width)::value;
      const auto kernel =
          p.mask.p > 0 ? outer_kernel<T, kRank, true> : outer_kernel<T, kRank, false>;
      const LaunchShape shape{blocks, kLoraThreads, 1, sizeof(OuterShared<T, kRank>)};
      return launch(kernel, shape, device.stream, arguments);
    });
  }
  if (status != 0 || split.splits == 1) return status;
  const auto count = static_cast<int32_t>(split.splits);
  return sum_parts<float>({p.workspace, p.da, p.rank * p.ins, count, 1.0f}, device);
}

int lora_up_backward(const LoraUpBackwardParams& p, const Device& device) {
  const Mask none = make_mask(0.0, 0);
  const RowSplit split = up_split(p, device);
  float* db = split.splits == 1 ? p.db : p.workspace;
  float* dlow = p.workspace + (split.splits == 1 ? 0 : split.splits * p.outs * p.rank);
  int status;
  if (!on_tensor_cores(p.dtype, p.outs) || !aligned({p.dy})) {
    const PlainDownArguments down{p.dy,   p.b, p.dlow, p.rows, p.outs,
                                  p.rank, 1,   p.rank, none,   false};
    const PlainOuterArguments outer{p.dy,   p.low, db,     p.rows, split.rows, p.outs,
                                    p.rank, 1,     p.rank, none,   false,      1.0f};
    status = with_dtype(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      const int first = plain_down<T>(down, device);
      return first != 0 ? first : plain_outer<T>(outer, device);
    });
  } else {
    const UpArguments arguments{p.dy,
                                p.low,
                                p.b,
                                dlow,
                                db,
                                p.rows,
                                split.rows,
                                static_cast<int32_t>(p.outs),
                                static_cast<int32_t>(p.rank),
                                rank_blocks(p.rank),
                                static_cast<int32_t>(ceil_div(p.outs, kUpColumns)),
                                none};
    const int64_t blocks = split.splits * arguments.rank_blocks * arguments.column_blocks;
    status = with_rank(p.dtype, p.rank, [&](auto tag, auto width) {
      using T = typename decltype(tag)::Type;
      constexpr int kRank = decltype(width)::value;
      const LaunchShape shape{blocks, kLoraThreads, 1, sizeof(UpShared<T, kRank>)};
      const int first = launch(up_kernel<T, kRank>, shape, device.stream, arguments);
      if (first != 0) return first;
      return sum_parts<T>({dlow, p.dlow, p.rows * p.rank, arguments.column_blocks, 1.0f}, device);
    });
  }
  if (status != 0 || split.splits == 1) return status;
  const auto count = static_cast<int32_t>(split.splits);
  return sum_parts<float>({p.workspace, p.db, p.outs * p.rank, count, 1.0f}, device);
}

int lora_add(const LoraAddParams& p, const Device& device) {
  if (!on_tensor_cores(p.dtype, p.ins) || !aligned({p.dx, p.dlow}) || p.rank > kAddRanks) {
    const PlainAddArguments plain{
        p.dx, p.dlow, p.a, p.rows, p.ins, p.rank, make_mask(p.mask.p, p.mask.seed), p.mask.p > 0};
    return with_dtype(
        p.dtype, [&](auto tag) { return plain_add<typename decltype(tag)::Type>(plain, device); });
  }
  return p.dtype == DType::kFloat16 ? run_add<Half>(p, device) : run_add<BFloat16>(p, device);
}

}  // namespace fasttune::cuda
