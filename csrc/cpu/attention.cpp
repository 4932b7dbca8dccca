// Attention on CPU: for one key head of a batch row at a time, and a block of its rows of scores,
// oneDNN's products of small matrices and between them the softmax with its dropout. Scores are
// float32 and stay in the second-level cache; nothing of size queries x keys leaves a thread; the
// backward computes the scores again.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "attention_rows.h"
#include "brgemm.h"
#include "kernels.h"
#include "pack.h"
#include "products.h"
#include "vector.h"

#ifdef FASTTUNE_VECTORS

namespace fasttune::cpu {
namespace {

// Of 10 or 12 bytes each: a cache of 1 MB. Smaller blocks of long heads pass more often over the
// sums of dK and dV, which is slower by a tenth at 48 Ki.
constexpr int64_t kBlockScores = 96 * 1024;

// A unit is a key head of a batch row with the query heads that share it: unit b * key_heads +
// head. Its rows are those of its scores, query head by query head.
struct Shape {
  int64_t b, key_heads, heads_a_key, queries, keys, width;
  int64_t units() const { return b * key_heads; }
  int64_t rows() const { return heads_a_key * queries; }
  int64_t padded_rows() const { return round_up(rows()); }
  int64_t padded_keys() const { return round_up(keys); }
  int64_t padded_width() const { return std::max(round_up(width), kMultiple); }
  // Of a block; all but the last are as long.
  int64_t block_rows() const {
    const int64_t fitting = std::max(kBlockScores / padded_keys() / kMultiple, int64_t{1});
    const int64_t blocks = (padded_rows() / kMultiple + fitting - 1) / fitting;
    return blocks == 0 ? 0 : round_up((rows() + blocks - 1) / blocks);
  }
};

Shape shape_of(const at::Tensor& query, const at::Tensor& key) {
  return {query.size(0), key.size(1), query.size(1) / key.size(1),
          query.size(2), key.size(2), query.size(3)};
}

// A thread's buffers, and the steps on a unit. Operands have the forms of pack.h.
template <int kWidth, typename T>
struct Worker {
  using P = Pack<kWidth, T>;

  const AttentionCall& call;
  const Shape s;
  const int64_t rows = s.padded_rows(), keys = s.padded_keys(), width = s.padded_width();
  const int64_t block_rows = s.block_rows();
  const float keep_scale = call.p < 1 ? static_cast<float>(1.0 / (1.0 - call.p)) : 0.0f;
  Buffer<T> q{rows * width}, k_turned{keys * width}, packing{std::max(rows, keys) * width};
  Buffer<float> scores{block_rows * keys}, result{std::max(block_rows, keys) * width};
  Buffer<float> mask_rows{2 * keys};
  Buffer<uint16_t> bits{call.p > 0 ? (block_rows * s.keys + kDrawSlack) / 16 : 0};

  FASTTUNE_INLINE explicit Worker(const AttentionCall& attention)
      : call(attention), s(shape_of(attention.query, attention.key)) {
    for (int64_t j = 0; j < 2 * keys; ++j) mask_rows[j] = j % keys < s.keys ? 0.0f : -INFINITY;
  }

  // What a unit has of a tensor [b, heads, length, width].
  FASTTUNE_INLINE Heads<T> part(const at::Tensor& whole, int64_t unit) const {
    const int64_t heads = whole.size(1) / s.key_heads;
    const int64_t head = unit % s.key_heads * heads;
    T* const data = static_cast<T*>(whole.data_ptr()) + unit / s.key_heads * whole.stride(0) +
                    head * whole.stride(1);
    return {data, heads, whole.stride(1), whole.size(2), whole.stride(2), whole.size(3)};
  }

  FASTTUNE_INLINE void load_rows(const at::Tensor& whole, int64_t unit, int64_t length,
                                 T* to) const {
    P::gather(part(whole, unit), length, width, to);
  }

  FASTTUNE_INLINE void prefetch(const at::Tensor& whole, int64_t unit) const {
    if (unit + 1 < s.units()) P::prefetch(part(whole, unit + 1));
  }

  // From rows [length, width] to the other forms.
  FASTTUNE_INLINE void pair(const T* from, int64_t length, T* to) const {
    P::pair(from, length, width, to);
  }
  FASTTUNE_INLINE void turn_rows(const T* from, int64_t length, T* to) const {
    P::turn(from, length, width / kItem<T>, to);
  }
  FASTTUNE_INLINE void turn_pairs(const T* from, int64_t length, T* to) const {
    P::turn(from, length / kItem<T>, width, to);
  }

  // Rows [first, first + count) of a unit, with their mask drawn.
  FASTTUNE_INLINE ScoreRows block(int64_t unit, int64_t first, int64_t count) const {
    ScoreRows block{};
    block.first = first;
    block.count = count;
    block.keys = s.keys;
    block.stride = keys;
    block.scale = call.scale;
    block.scores = scores;
    block.stats = call.stats.template mutable_data_ptr<float>() + 2 * (unit * s.rows() + first);
    block.queries = s.queries;
    block.mask_rows = mask_rows;
    if (call.mask.defined()) {
      const int64_t item = static_cast<int64_t>(call.mask.element_size());
      block.mask = static_cast<const char*>(call.mask.const_data_ptr()) +
                   item * (unit / s.key_heads * call.mask.stride(0) +
                           unit % s.key_heads * s.heads_a_key * call.mask.stride(1));
      block.head_bytes = call.mask.stride(1) * item;
      block.query_bytes = call.mask.stride(2) * item;
      block.mask_is_float = call.mask.scalar_type() == at::kFloat;
    }
    if (call.p > 0) {
      const uint64_t element =
          static_cast<uint64_t>(unit * s.rows() + first) * static_cast<uint64_t>(s.keys);
      draw_mask(call.seed, element, count * s.keys, call.p, bits);
      block.kept = bits;
      block.skip = static_cast<int64_t>(element % kElementsPerDraw);
    }
    return block;
  }
};

template <int kWidth, typename T>
struct Forward : Worker<kWidth, T> {
  using W = Worker<kWidth, T>;
  using W::s, W::rows, W::keys, W::width, W::q, W::k_turned, W::packing, W::scores, W::result;
  Buffer<T> v_pairs{keys * width};
  const at::Tensor& out;

  FASTTUNE_INLINE Forward(const AttentionCall& call, const at::Tensor& result)
      : W(call), out(result) {}

  FASTTUNE_INLINE void run(int64_t unit) const {
    W::load_rows(W::call.query, unit, rows, q);
    W::load_rows(W::call.key, unit, keys, packing);
    W::turn_rows(packing, keys, k_turned);
    if constexpr (kItem<T> == 2) {
      W::load_rows(W::call.value, unit, keys, packing);
      W::pair(packing, keys, v_pairs);
    } else {
      W::load_rows(W::call.value, unit, keys, v_pairs);
    }
    W::prefetch(W::call.query, unit);
    W::prefetch(W::call.key, unit);
    W::prefetch(W::call.value, unit);
    const Heads<T> to = W::part(out, unit);
    for (int64_t first = 0; first < s.rows(); first += W::block_rows) {
      const int64_t count = std::min(W::block_rows, s.rows() - first), padded = round_up(count);
      const T* const block_q = q + first * width;
      small_product<T>(padded, keys, width, block_q, width, k_turned, keys, scores, keys, false);
      const ScoreRows block = W::block(unit, first, count);
      RowKernel<kWidth, T>{block}.softmax();
      const T* const weights = reinterpret_cast<const T*>(static_cast<float*>(scores));
      small_product<T>(padded, width, keys, weights, keys * kItem<T>, v_pairs, width, result, width,
                       false);
      const auto factor = [&](int64_t r)
                              FASTTUNE_LAMBDA { return block.stats[2 * r + 1] * W::keep_scale; };
      W::P::scatter(result, width, first, count, factor, to);
    }
  }
};

template <int kWidth, typename T>
struct Backward : Worker<kWidth, T> {
  using W = Worker<kWidth, T>;
  using W::s, W::rows, W::keys, W::width, W::q, W::k_turned, W::packing, W::scores, W::result;
  Buffer<T> k_pairs{keys * width}, v_turned{keys * width};
  Buffer<T> q_turned{rows * width}, dout_rows{rows * width}, dout_turned{rows * width};
  Buffer<T> weights{W::block_rows * keys};
  Buffer<float> dweights{W::block_rows * keys}, dk_turned{keys * width}, dv_turned{keys * width};
  const at::Tensor &dout, &dq, &dk, &dv;

  FASTTUNE_INLINE Backward(const AttentionCall& call, const at::Tensor& incoming,
                           const at::Tensor& of_q, const at::Tensor& of_k, const at::Tensor& of_v)
      : W(call), dout(incoming), dq(of_q), dk(of_k), dv(of_v) {}

  FASTTUNE_INLINE void load(int64_t unit) const {
    T* const staged = packing;
    W::load_rows(W::call.query, unit, rows, q);
    W::load_rows(dout, unit, rows, dout_rows);
    W::load_rows(W::call.value, unit, keys, staged);
    W::turn_rows(staged, keys, v_turned);
    if constexpr (kItem<T> == 2) {
      W::load_rows(W::call.key, unit, keys, staged);
      W::turn_rows(staged, keys, k_turned);
      W::pair(staged, keys, k_pairs);
      W::pair(q, rows, staged);
      W::turn_pairs(staged, rows, q_turned);
      W::pair(dout_rows, rows, staged);
      W::turn_pairs(staged, rows, dout_turned);
    } else {
      W::load_rows(W::call.key, unit, keys, k_pairs);
      W::turn_rows(k_pairs, keys, k_turned);
      W::turn_pairs(q, rows, q_turned);
      W::turn_pairs(dout_rows, rows, dout_turned);
    }
  }

  // dV and dK are summed over the blocks of rows, transposed: [width, keys].
  FASTTUNE_INLINE void run(int64_t unit) const {
    load(unit);
    W::prefetch(W::call.query, unit);
    W::prefetch(dout, unit);
    W::prefetch(W::call.key, unit);
    W::prefetch(W::call.value, unit);
    if (s.rows() == 0) {
      Pack<kWidth, float>::clear(dk_turned, keys * width);
      Pack<kWidth, float>::clear(dv_turned, keys * width);
    }
    const float scale = W::call.scale * W::keep_scale;
    for (int64_t first = 0; first < s.rows(); first += W::block_rows) {
      const int64_t count = std::min(W::block_rows, s.rows() - first), padded = round_up(count);
      small_product<T>(padded, keys, width, q + first * width, width, k_turned, keys, scores, keys,
                       false);
      small_product<T>(padded, keys, width, dout_rows + first * width, width, v_turned, keys,
                       dweights, keys, false);
      ScoreRows block = W::block(unit, first, count);
      block.dweights = dweights;
      RowKernel<kWidth, T>{block}.gradient(weights);
      clear_padding(count, padded);
      // A pair of rows of bfloat16 takes the room of two rows of scores.
      float* const packed = kItem<T> == 2 ? scores : dweights;
      const T* const dscores = reinterpret_cast<const T*>(static_cast<float*>(dweights));
      small_product<T>(width, keys, padded, dout_turned + first, rows, weights, keys, dv_turned,
                       keys, first > 0);
      small_product<T>(width, keys, padded, q_turned + first, rows,
                       reinterpret_cast<const T*>(packed), kItem<T> * keys, dk_turned, keys,
                       first > 0);
      small_product<T>(padded, width, keys, dscores, kItem<T> * keys, k_pairs, width, result, width,
                       false);
      W::P::scatter(
          result, width, first, count, [&](int64_t) FASTTUNE_LAMBDA { return scale; },
          W::part(dq, unit));
    }
    store_turned(dk_turned, scale, W::part(dk, unit));
    store_turned(dv_turned, W::keep_scale, W::part(dv, unit));
  }

  // Rows from count on are summed over with the others in dV and dK.
  FASTTUNE_INLINE void clear_padding(int64_t count, int64_t padded) const {
    const int64_t from = (count + kItem<T> - 1) / kItem<T> * kItem<T>, left = padded - from;
    W::P::clear(weights + from * keys, left * keys);
    Pack<kWidth, float>::clear((kItem<T> == 2 ? scores : dweights) + from * keys, left * keys);
  }

  FASTTUNE_INLINE void store_turned(const float* turned, float scale, const Heads<T>& to) const {
    Pack<kWidth, float>::turn(turned, width, keys, result);
    W::P::scatter(result, width, 0, s.keys, [&](int64_t) FASTTUNE_LAMBDA { return scale; }, to);
  }
};

// The units [begin, end) on this thread.
template <int kWidth, typename T>
FASTTUNE_INLINE void forward_units(int64_t begin, int64_t end, const AttentionCall& call,
                                   const at::Tensor& out) {
  const Forward<kWidth, T> forward(call, out);
  for (int64_t unit = begin; unit < end; ++unit) forward.run(unit);
}

template <int kWidth, typename T>
FASTTUNE_INLINE void backward_units(int64_t begin, int64_t end, const AttentionCall& call,
                                    const at::Tensor& dout, const at::Tensor& dq,
                                    const at::Tensor& dk, const at::Tensor& dv) {
  const Backward<kWidth, T> backward(call, dout, dq, dk, dv);
  for (int64_t unit = begin; unit < end; ++unit) backward.run(unit);
}

using ForwardUnits = void (*)(int64_t, int64_t, const AttentionCall&, const at::Tensor&);
using BackwardUnits = void (*)(int64_t, int64_t, const AttentionCall&, const at::Tensor&,
                               const at::Tensor&, const at::Tensor&, const at::Tensor&);

// An instruction set's code: everything above is inlined into these two.
#define FASTTUNE_UNITS(NAME, ATTRIBUTES, WIDTH)                                            \
  template <typename T>                                                                    \
  struct NAME {                                                                            \
    ATTRIBUTES static void forward(int64_t begin, int64_t end, const AttentionCall& call,  \
                                   const at::Tensor& out) {                                \
      forward_units<WIDTH, T>(begin, end, call, out);                                      \
    }                                                                                      \
    ATTRIBUTES static void backward(int64_t begin, int64_t end, const AttentionCall& call, \
                                    const at::Tensor& dout, const at::Tensor& dq,          \
                                    const at::Tensor& dk, const at::Tensor& dv) {          \
      backward_units<WIDTH, T>(begin, end, call, dout, dq, dk, dv);                        \
    }                                                                                      \
  }
// Multiplies and adds are fused: exp is half of what the rows cost, and a fifth of the whole is
// won.
FASTTUNE_UNITS(UnitsDefault, , 4);
#ifdef FASTTUNE_X86
FASTTUNE_UNITS(UnitsAvx2, FASTTUNE_FUSED_AVX2, 8);
FASTTUNE_UNITS(UnitsAvx512, FASTTUNE_FUSED_AVX512, 16);
#endif
#undef FASTTUNE_UNITS

template <typename T>
struct Units {
  ForwardUnits forward;
  BackwardUnits backward;
};

template <typename T>
Units<T> units_here() {
#ifdef FASTTUNE_X86
  const std::string name = capability();
  if (name == "avx512") return {UnitsAvx512<T>::forward, UnitsAvx512<T>::backward};
  if (name == "avx2") return {UnitsAvx2<T>::forward, UnitsAvx2<T>::backward};
#endif
  return {UnitsDefault<T>::forward, UnitsDefault<T>::backward};
}

template <typename T, typename Run>
void on_all_units(const AttentionCall& call, const Run& run) {
  const int64_t units = shape_of(call.query, call.key).units();
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    run(begin, end);
    end_small_products<T>();
  });
}

template <typename T>
void forward(const AttentionCall& call, const at::Tensor& out) {
  const Units<T> here = units_here<T>();
  on_all_units<T>(call, [&](int64_t begin, int64_t end) { here.forward(begin, end, call, out); });
}

template <typename T>
void backward(const AttentionCall& call, const at::Tensor& dout, const at::Tensor& dq,
              const at::Tensor& dk, const at::Tensor& dv) {
  const Units<T> here = units_here<T>();
  on_all_units<T>(
      call, [&](int64_t begin, int64_t end) { here.backward(begin, end, call, dout, dq, dk, dv); });
}

}  // namespace

bool has_attention(at::ScalarType type) {
  return type == at::kFloat ? has_small_products<float>()
                            : type == at::kBFloat16 && has_small_products<c10::BFloat16>();
}

void attention(const AttentionCall& call, const at::Tensor& out) {
  call.query.scalar_type() == at::kFloat ? forward<float>(call, out)
                                         : forward<c10::BFloat16>(call, out);
}

void attention_backward(const AttentionCall& call, const at::Tensor& dout, const at::Tensor& dq,
                        const at::Tensor& dk, const at::Tensor& dv) {
  call.query.scalar_type() == at::kFloat ? backward<float>(call, dout, dq, dk, dv)
                                         : backward<c10::BFloat16>(call, dout, dq, dk, dv);
}

}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
