// Attention on CPU, a few heads at a time: PyTorch's batched products, and between them the softmax
// with its dropout over scores that are still in the second-level cache. Nothing of size queries x
// keys leaves a thread; the backward computes the scores again.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "products.h"
#include "vector.h"

#ifdef FASTTUNE_VECTORS

#if defined(__x86_64__)
#define FASTTUNE_X86 1
#define FASTTUNE_AVX2 __attribute__((target("avx2,fma")))
#define FASTTUNE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

namespace fasttune::cpu {
namespace {

constexpr int64_t kScoreBytes =
    384 * 1024;                        // of one block of scores: two of them fit a cache of 1 MB
constexpr int64_t kMultiple = kGroup;  // odd sizes make oneDNN's products up to three times slower

int64_t round_up(int64_t n) { return (n + kMultiple - 1) / kMultiple * kMultiple; }

// b: batch rows. g: query heads that share one key head. q, k: queries and keys. d: width of a
// head.
struct Shape {
  int64_t b, key_heads, g, q, k, d;
  int64_t rows() const { return g * q; }  // of scores, a key head
  int64_t padded_rows() const { return round_up(rows()); }
  int64_t padded_keys() const { return round_up(k); }
  int64_t heads() const { return key_heads * g; }
};

Shape shape_of(const at::Tensor& query, const at::Tensor& key) {
  return {query.size(0), key.size(1), query.size(1) / key.size(1),
          query.size(2), key.size(2), query.size(3)};
}

// A unit is a key head of a batch row, with the query heads that share it; unit b * key_heads +
// head. Units a block holds, and how many blocks cover all.
struct Blocks {
  int64_t units, count;
};

Blocks blocks_of(const Shape& s, int64_t item) {
  const int64_t all = s.b * s.key_heads;
  const int64_t bytes = s.padded_rows() * s.padded_keys() * item;
  const int64_t fitting = std::max<int64_t>(1, kScoreBytes / std::max<int64_t>(bytes, 1));
  // As many blocks as threads can share evenly, and as even as they can be.
  const int64_t threads = at::get_num_threads();
  const int64_t count = ((all + fitting - 1) / fitting + threads - 1) / threads * threads;
  const int64_t units = count == 0 ? 0 : (all + count - 1) / count;
  return {units, units == 0 ? 0 : (all + units - 1) / units};
}

// Inlined, unlike memcpy of a few bytes that the compiler doesn't know.
template <typename T>
void copy_row(T* out, const T* in, int64_t width) {
  constexpr int64_t kPart = 32 / sizeof(T);
  int64_t i = 0;
  for (; i + kPart <= width; i += kPart) std::memcpy(static_cast<void*>(out + i), in + i, 32);
  for (; i < width; ++i) out[i] = in[i];
}

// The rows of a unit in `whole` [b, key heads * g, length, width], of any strides but a unit one
// for the width, beside those in `dense` [units, padded g * length, width]: body(row of whole, of
// dense).
template <typename T, typename Body>
void each_row(const at::Tensor& whole, const at::Tensor& dense, int64_t first, int64_t units,
              int64_t g, const Body& body) {
  const int64_t key_heads = whole.size(1) / g, length = whole.size(2), width = whole.size(3);
  const int64_t row_stride = whole.stride(2), head_stride = whole.stride(1);
  T* const base = static_cast<T*>(whole.data_ptr());
  for (int64_t unit = first; unit < first + units; ++unit) {
    T* row = static_cast<T*>(dense.data_ptr()) + (unit - first) * dense.size(1) * width;
    T* head = base + unit / key_heads * whole.stride(0) + unit % key_heads * g * head_stride;
    for (int64_t j = 0; j < g; ++j, head += head_stride) {
      for (int64_t i = 0; i < length; ++i, row += width) body(head + i * row_stride, row);
    }
  }
}

// Zeros in the padding.
template <typename T>
void pack(const at::Tensor& whole, const at::Tensor& dense, int64_t first, int64_t units,
          int64_t g) {
  const int64_t width = whole.size(3), filled = g * whole.size(2) * width;
  const int64_t unit = dense.size(1) * width;
  each_row<T>(whole, dense, first, units, g,
              [width](const T* from, T* to) { copy_row(to, from, width); });
  for (int64_t u = 0; u < units; ++u) {
    T* to = static_cast<T*>(dense.data_ptr()) + u * unit;
    std::fill(to + filled, to + unit, static_cast<T>(0.0f));
  }
}

template <typename T>
void unpack(const at::Tensor& dense, const at::Tensor& whole, int64_t first, int64_t units,
            int64_t g) {
  const int64_t width = whole.size(3);
  each_row<T>(whole, dense, first, units, g,
              [width](T* to, const T* from) { copy_row(to, from, width); });
}

// What the rows of one block need; dense buffers are [key heads, padded rows, padded keys or
// width].
template <typename T>
struct Rows {
  int64_t first, units;  // of the block
  T* scores;             // raw on entry; the dropped weights afterwards
  T* dweights;  // null in the forward; the gradient of the dropped weights, then of the raw scores
  const char* mask;  // added to the scaled scores, or null: float or T, strides in bytes
  float* mask_row;   // [padded keys]: the mask of one row, 0 without one; -inf in the padding
  int64_t mask_batch, mask_head, mask_query;
  bool mask_is_float;
  const uint16_t* kept;  // bit `skip` is the block's first element; null without dropout
  int64_t skip;
  float scale, keep_scale;  // of the scores; 1 / (1 - p)
  float *wide, *incoming;   // [padded keys] each, one row's
  float* stats;  // [heads x queries, 2]: the maximum, and 1 / sum of exp(score - maximum)
};

// The rows of scores of one block, in groups of sixteen lanes, each a few vectors wide.
template <int kWidth, typename T>
struct RowKernel {
  using V = Vector<kWidth>;
  using F = typename V::F;
  using U = typename V::U;
  static constexpr int kParts = kGroup / kWidth;

  const Shape& s;
  const Rows<T>& rows;

  // kWidth bits from bit i on; the other lanes of v become 0.
  FASTTUNE_INLINE F where_kept(int64_t i, F v) const {
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(rows.kept) + i / 8, sizeof word);
    U bit;
    for (int lane = 0; lane < kWidth; ++lane) bit[lane] = 1u << lane;
    return ((U{} + (word >> (i % 8))) & bit) != 0u ? v : F{};
  }

  FASTTUNE_INLINE F score(const T* scores, int64_t j) const {
    return V::load(scores + j) * rows.scale + V::load(rows.mask_row + j);
  }

  FASTTUNE_INLINE void softmax(T* scores, int64_t bit, float* stats) const {
    F top[kParts], sum[kParts] = {};
    for (int p = 0; p < kParts; ++p) top[p] = V::all(-INFINITY);
    for (int64_t j = 0; j < s.k; j += kGroup) {
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = j + p * kWidth;
        const F v = score(scores, at);
        V::store(rows.wide + at, v);
        top[p] = V::larger(v, top[p]);
      }
    }
    const float max = V::largest(top);
    for (int64_t j = 0; j < s.k; j += kGroup) {
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = j + p * kWidth;
        const F e = V::exp(V::load(rows.wide + at) - max);
        V::store(rows.wide + at, e);
        sum[p] += e;
      }
    }
    const float inverse = 1.0f / V::sum(sum);
    stats[0] = max;
    stats[1] = inverse;
    const float factor = inverse * rows.keep_scale;
    for (int64_t j = 0; j < s.k; j += kWidth) {
      F weight = V::load(rows.wide + j) * factor;
      if (rows.kept != nullptr) weight = where_kept(bit + j, weight);
      V::store(scores + j, weight);
    }
  }

  // w: weight, m: mask / (1 - p), dw: the gradient of m w. That of a raw score is
  // scale w (m dw - sum over the row of w m dw). The sum is also the row's out . dout, but only by
  // its own rounded terms does the difference vanish where one weight is nearly 1.
  FASTTUNE_INLINE void softmax_backward(T* scores, T* dweights, int64_t bit,
                                        const float* stats) const {
    F sums[kParts] = {};
    for (int64_t j = 0; j < s.k; j += kGroup) {
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = j + p * kWidth;
        const F weight = V::exp(score(scores, at) - stats[0]) * stats[1];
        F dropped = weight, incoming = V::load(dweights + at);
        if (rows.kept != nullptr) {
          dropped = where_kept(bit + at, weight * rows.keep_scale);
          incoming = where_kept(bit + at, incoming * rows.keep_scale);
        }
        sums[p] += weight * incoming;
        V::store(scores + at, dropped);
        V::store(rows.wide + at, weight);
        V::store(rows.incoming + at, incoming);
      }
    }
    const float sum = V::sum(sums);
    for (int64_t j = 0; j < s.k; j += kWidth) {
      const F weight = V::load(rows.wide + j), incoming = V::load(rows.incoming + j);
      V::store(dweights + j, weight * rows.scale * (incoming - sum));
    }
  }

  FASTTUNE_INLINE void load_mask(const char* mask) const {
    if (rows.mask_is_float) {
      std::memcpy(rows.mask_row, mask, s.k * sizeof(float));
    } else {
      const T* narrow = reinterpret_cast<const T*>(mask);
      for (int64_t j = 0; j < s.k; ++j) rows.mask_row[j] = static_cast<float>(narrow[j]);
    }
  }

  // Units inside, queries outside: the heads of a batch row mostly share the row of the mask.
  FASTTUNE_INLINE void run() const {
    const char* masked_as = nullptr;
    for (int64_t r = 0; r < s.rows(); ++r) {
      for (int64_t u = 0; u < rows.units; ++u) {
        const int64_t at = u * s.padded_rows() + r, row = u * s.rows() + r;
        if (rows.mask != nullptr) {
          const char* mask = mask_of(rows.first + u, r);
          if (mask != masked_as) load_mask(mask);
          masked_as = mask;
        }
        T* scores = rows.scores + at * s.padded_keys();
        const int64_t bit = rows.skip + row * s.k;
        float* stats = rows.stats + 2 * row;
        if (rows.dweights == nullptr) {
          softmax(scores, bit, stats);
        } else {
          softmax_backward(scores, rows.dweights + at * s.padded_keys(), bit, stats);
        }
      }
    }
  }

  FASTTUNE_INLINE const char* mask_of(int64_t unit, int64_t r) const {
    const int64_t head = unit % s.key_heads * s.g + r / s.q;
    return rows.mask + unit / s.key_heads * rows.mask_batch + head * rows.mask_head +
           r % s.q * rows.mask_query;
  }
};

template <typename T>
using AllRows = void (*)(const Shape&, const Rows<T>&);

template <typename T>
void all_rows_default(const Shape& s, const Rows<T>& rows) {
  RowKernel<4, T>{s, rows}.run();
}

#ifdef FASTTUNE_X86
template <typename T>
FASTTUNE_AVX2 void all_rows_avx2(const Shape& s, const Rows<T>& rows) {
  RowKernel<8, T>{s, rows}.run();
}

template <typename T>
FASTTUNE_AVX512 void all_rows_avx512(const Shape& s, const Rows<T>& rows) {
  RowKernel<16, T>{s, rows}.run();
}
#endif

template <typename T>
AllRows<T> all_rows_here() {
#ifdef FASTTUNE_X86
  const std::string name = capability();
  if (name == "avx512") return all_rows_avx512<T>;
  if (name == "avx2") return all_rows_avx2<T>;
#endif
  return all_rows_default<T>;
}

// A thread's buffers for one block, and which block: units [first, first + units).
template <typename T>
struct Block {
  const AttentionCall& call;
  const Shape s;
  const Blocks blocks;
  at::Tensor q, k, v, out, scores;
  std::vector<uint16_t> bits;
  std::vector<float> wide, incoming, mask_row;
  const AllRows<T> kernel = all_rows_here<T>();
  int64_t first = 0, units = 0;

  Block(const AttentionCall& attention, const Shape& shape, const Blocks& all_blocks)
      : call(attention),
        s(shape),
        blocks(all_blocks),
        wide(s.padded_keys()),
        incoming(s.padded_keys()),
        mask_row(s.padded_keys()) {
    std::fill(mask_row.begin() + s.k, mask_row.end(), -INFINITY);
    q = buffer(s.padded_rows(), s.d);
    k = buffer(s.padded_keys(), s.d);
    v = buffer(s.padded_keys(), s.d);
    out = buffer(s.padded_rows(), s.d);
    scores = buffer(s.padded_rows(), s.padded_keys());
    if (call.p > 0) bits.resize((blocks.units * s.rows() * s.k + kDrawSlack) / 16);
  }

  at::Tensor buffer(int64_t rows, int64_t width) const {
    return at::empty({blocks.units, rows, width}, call.query.options());
  }

  void load(int64_t block) {
    first = block * blocks.units;
    units = std::min(blocks.units, s.b * s.key_heads - first);
    pack(call.query, q, s.g);
    pack(call.key, k, 1);
    pack(call.value, v, 1);
  }

  void pack(const at::Tensor& whole, const at::Tensor& dense, int64_t g) const {
    cpu::pack<T>(whole, dense, first, units, g);
  }

  void unpack(const at::Tensor& dense, const at::Tensor& whole, int64_t g) const {
    cpu::unpack<T>(dense, whole, first, units, g);
  }

  // result [units, n, m] = a [units, n, l] b [units, l, m]
  void product(const at::Tensor& result, const at::Tensor& a, const at::Tensor& b) const {
    if (units == blocks.units) {
      at::bmm_out(const_cast<at::Tensor&>(result), a, b);
    } else {
      at::Tensor used = result.narrow(0, 0, units);
      at::bmm_out(used, a.narrow(0, 0, units), b.narrow(0, 0, units));
    }
  }

  void run_rows(const at::Tensor& dweights) {
    const int64_t first_row = first * s.rows();
    Rows<T> rows{};
    rows.first = first;
    rows.units = units;
    rows.scores = scores.mutable_data_ptr<T>();
    rows.stats = call.stats.mutable_data_ptr<float>() + 2 * first_row;
    rows.wide = wide.data();
    rows.incoming = incoming.data();
    rows.mask_row = mask_row.data();
    rows.scale = call.scale;
    rows.keep_scale = 1.0f;
    if (dweights.defined()) rows.dweights = dweights.mutable_data_ptr<T>();
    if (call.mask.defined()) {
      const int64_t item = static_cast<int64_t>(call.mask.element_size());
      rows.mask = static_cast<const char*>(call.mask.const_data_ptr());
      rows.mask_batch = call.mask.stride(0) * item;
      rows.mask_head = call.mask.stride(1) * item;
      rows.mask_query = call.mask.stride(2) * item;
      rows.mask_is_float = call.mask.scalar_type() == at::kFloat;
    }
    if (call.p > 0) {
      const uint64_t element = static_cast<uint64_t>(first_row) * static_cast<uint64_t>(s.k);
      draw_mask(call.seed, element, units * s.rows() * s.k, call.p, bits.data());
      rows.kept = bits.data();
      rows.skip = static_cast<int64_t>(element % kElementsPerDraw);
      rows.keep_scale = call.p < 1 ? static_cast<float>(1.0 / (1.0 - call.p)) : 0.0f;
    }
    kernel(s, rows);
  }
};

template <typename T>
void forward(const AttentionCall& call, const at::Tensor& out) {
  const Shape s = shape_of(call.query, call.key);
  const Blocks blocks = blocks_of(s, sizeof(T));
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // a worker thread knows of no mode yet
    Block<T> block(call, s, blocks);
    for (int64_t i = begin; i < end; ++i) {
      block.load(i);
      block.product(block.scores, block.q, block.k.transpose(1, 2));
      block.run_rows({});
      block.product(block.out, block.scores, block.v);
      block.unpack(block.out, out, s.g);
    }
  });
}

template <typename T>
void backward(const AttentionCall& call, const at::Tensor& dout, const at::Tensor& dq,
              const at::Tensor& dk, const at::Tensor& dv) {
  const Shape s = shape_of(call.query, call.key);
  const Blocks blocks = blocks_of(s, sizeof(T));
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Block<T> block(call, s, blocks);
    const at::Tensor dout_block = at::empty_like(block.q);
    const at::Tensor dscores = at::empty_like(block.scores);
    for (int64_t i = begin; i < end; ++i) {
      block.load(i);
      block.pack(dout, dout_block, s.g);
      block.product(block.scores, block.q, block.k.transpose(1, 2));
      block.product(dscores, dout_block, block.v.transpose(1, 2));
      block.run_rows(dscores);
      block.product(block.v, block.scores.transpose(1, 2), dout_block);
      block.unpack(block.v, dv, 1);
      block.product(block.out, dscores, block.k);
      block.unpack(block.out, dq, s.g);
      block.product(block.k, dscores.transpose(1, 2), block.q);
      block.unpack(block.k, dk, 1);
    }
  });
}

}  // namespace

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
