// Multi-scale deformable attention on CPU. A head's channels lie side by side in value, so that a
// corner of a bilinear sample is a few vectors, and nothing of size queries x points x channels is
// written anywhere.
//
// The backward takes a head of a batch row at a time, its gradient of value in fp32 in the second
// level cache: every sum has one order, whatever the threads.
#include "vector.h"

#ifdef FASTTUNE_VECTORS

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <string>

#include "kernels.h"
#include "pack.h"

namespace fasttune::cpu {
namespace {

constexpr int64_t kQueries = 32;  // of a unit of the forward
constexpr int64_t kReuse = 8;     // readings of a row on average, below which it is fetched ahead
static_assert(kDeformableWidth == kGroup);

// What is said of the points of a query: arrays of `padded` numbers, a vector's points side by
// side. The corners of a point are in the order (top, bottom) x (left, right).
struct Located {
  Buffer<float> weight;
  Buffer<float> right, down;  // parts of a pixel from the left and upper corners
  Buffer<float> area;         // [4, padded], bilinear weights
  Buffer<int32_t> rows;       // [4, padded], of value; s outside the maps

  explicit Located(int64_t padded)
      : weight(padded), right(padded), down(padded), area(4 * padded), rows(4 * padded) {
    std::fill(static_cast<float*>(weight), weight + padded, 0.0f);
  }
};

// A head of a batch row, on one thread.
template <int kWidth, typename T>
struct Slice {
  using V = Vector<kWidth>;
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kParts = kGroup / kWidth;

  const DeformableParams& params;
  const int64_t padded = round_up(params.n);
  Buffer<T> zeros{params.d};                      // a row outside the maps
  Buffer<float> widths{padded}, heights{padded};  // of the point's level
  Buffer<int32_t> firsts{padded};                 // likewise
  Buffer<float> staged{2 * padded}, x{padded}, y{padded};
  Located located[2]{Located(padded), Located(padded)};  // of even and of odd queries
  const bool cold = 4 * params.q * params.n < kReuse * params.s;
  int64_t batch = 0, head = 0;
  const T* value = nullptr;  // row 0

  FASTTUNE_INLINE explicit Slice(const DeformableParams& all) : params(all) {
    Pack<kWidth, T>::clear(zeros, params.d);
    for (float* each : std::initializer_list<float*>{widths, heights, x, y}) {
      std::fill(each, each + padded, 0.0f);
    }
    std::fill(static_cast<int32_t*>(firsts), firsts + padded, 0);
    int64_t i = 0;
    for (int64_t l = 0; l < params.level_count; ++l) {
      const DeformableLevel& level = params.levels[l];
      for (const int64_t end = i + level.points; i < end; ++i) {
        widths[i] = static_cast<float>(level.width);
        heights[i] = static_cast<float>(level.height);
        firsts[i] = static_cast<int32_t>(level.first);
      }
    }
  }

  FASTTUNE_INLINE void choose(int64_t slice) {
    batch = slice / params.heads;
    head = slice % params.heads;
    value = static_cast<const T*>(params.value) + batch * params.batch_stride +
            head * params.head_stride;
  }

  // Of a tensor [b, q, heads, ...].
  FASTTUNE_INLINE int64_t row_of(int64_t query) const {
    return (batch * params.q + query) * params.heads + head;
  }

  static FASTTUNE_INLINE const float* as_float(const void* from, DType dtype, int64_t first,
                                               int64_t n, float* to) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(from) + first;
    const c10::BFloat16* const narrow = static_cast<const c10::BFloat16*>(from) + first;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(narrow[i]);
    return to;
  }

  FASTTUNE_INLINE const Located& at(int64_t query) const { return located[query % 2]; }

  // A query ahead of its use. Rows that are read seldom come from memory, and are fetched
  // meanwhile: that halves a decoder's time, and costs half as much again where they are in the
  // cache.
  FASTTUNE_INLINE void locate(int64_t query) {
    const Located& to = at(query);
    const int64_t row = row_of(query), n = params.n;
    const float* const weights = as_float(params.weights, params.weights_dtype, row * n, n, staged);
    for (int64_t i = 0; i < n; ++i) to.weight[i] = weights[i];
    const float* const from =
        as_float(params.locations, params.locations_dtype, 2 * row * n, 2 * n, staged);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = from[2 * i];
      y[i] = from[2 * i + 1];
    }
    for (int64_t i = 0; i < padded; i += kWidth) place(i, to);
    if (!cold) return;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < n; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        const T* const ahead = row_at(to.rows[corner * padded + i]);
        for (int64_t j = 0; j < params.d; j += kLine) __builtin_prefetch(ahead + j);
      }
    }
  }

  // Along one axis: the pixel to the left, or above; the part of a pixel from there; how far that
  // pixel lies outside the map, 0 or less inside, and the same of the next one.
  struct Axis {
    F pixel, part, outside[2];
  };

  // In the roundings of ATen's grid_sample at 2 * location - 1: it fuses the last two where the
  // instruction set can, and so does this. The derivative jumps at the pixels' centres, where
  // models place their first points: other roundings would take the other side.
  //
  // No condition is kept or joined with another: gcc 12 computes such ones lane by lane.
  static FASTTUNE_INLINE Axis along(F location, F size) {
    const F grid = location * 2.0f - 1.0f;
    const F exact = (grid + 1.0f) * (size * 0.5f) - 0.5f;
    F near = exact < -2.0f ? V::all(-2.0f) : exact;  // what an integer can hold
    near = near > size + 1.0f ? size + 1.0f : near;
    const F cut = __builtin_convertvector(__builtin_convertvector(near, I), F);
    const F pixel = cut > near ? cut - 1.0f : cut;
    const F part = near - pixel + (exact - exact);  // NaN of a location that is not finite
    const F next = pixel + 1.0f, last = size - 1.0f;
    return {pixel, part, {V::larger(-pixel, pixel - last), V::larger(-next, next - last)}};
  }

  FASTTUNE_INLINE void place(int64_t i, const Located& to) const {
    const F width = V::load(widths + i);
    const Axis column = along(V::load(x + i), width);
    const Axis line = along(V::load(y + i), V::load(heights + i));
    const I across = __builtin_convertvector(width, I);
    I first;
    std::memcpy(&first, firsts + i, sizeof first);
    first +=
        __builtin_convertvector(line.pixel, I) * across + __builtin_convertvector(column.pixel, I);
    V::store(to.right + i, column.part);
    V::store(to.down + i, line.part);
    const I nowhere = I{} + static_cast<int32_t>(params.s);
    for (int corner = 0; corner < 4; ++corner) {
      const int below = corner / 2, beside = corner % 2;
      const F high = below ? line.part : 1.0f - line.part;
      const F wide = beside ? column.part : 1.0f - column.part;
      const F outside = V::larger(line.outside[below], column.outside[beside]);
      const I there = first + across * below + beside;
      const I row = outside > 0.0f ? nowhere : there;
      V::store(to.area + corner * padded + i, high * wide);
      std::memcpy(to.rows + corner * padded + i, &row, sizeof row);
    }
  }

  FASTTUNE_INLINE const T* row_at(int64_t row) const {
    return row == params.s ? static_cast<const T*>(zeros) : value + row * params.row_stride;
  }

  FASTTUNE_INLINE void forward(int64_t query) const {
    T* const out = static_cast<T*>(params.out) + row_of(query) * params.d;
    int64_t j = 0;
    for (; j + 2 * kGroup <= params.d; j += 2 * kGroup) sum_channels<2>(at(query), j, out);
    if (j < params.d) sum_channels<1>(at(query), j, out);
  }

  template <int kGroups>
  FASTTUNE_INLINE void sum_channels(const Located& points, int64_t j, T* out) const {
    F sum[kGroups * kParts] = {};
    for (int64_t i = 0; i < params.n; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        const float by = points.area[corner * padded + i] * points.weight[i];
        const T* const from = row_at(points.rows[corner * padded + i]) + j;
        for (int p = 0; p < kGroups * kParts; ++p) sum[p] += V::load(from + p * kWidth) * by;
      }
    }
    for (int p = 0; p < kGroups * kParts; ++p) V::store(out + j + p * kWidth, sum[p]);
  }
};

template <int kWidth, typename T>
struct BackwardSlice : Slice<kWidth, T> {
  using S = Slice<kWidth, T>;
  using V = typename S::V;
  using F = typename S::F;
  using S::kParts, S::params, S::padded;
  Buffer<float> dvalue{(params.s + 1) * params.d};  // the last row takes what falls outside
  Buffer<float> dots{4 * params.n};                 // [n, 4]: of dout and the corners

  FASTTUNE_INLINE explicit BackwardSlice(const DeformableParams& all) : S(all) {}

  FASTTUNE_INLINE void run(int64_t slice) {
    S::choose(slice);
    Pack<kWidth, float>::clear(dvalue, (params.s + 1) * params.d);
    if (params.q > 0) S::locate(0);
    for (int64_t query = 0; query < params.q; ++query) {
      if (query + 1 < params.q) S::locate(query + 1);
      backward(query);
    }
    T* to =
        static_cast<T*>(params.dvalue) + (S::batch * params.s * params.heads + S::head) * params.d;
    for (int64_t row = 0; row < params.s; ++row, to += params.heads * params.d) {
      const float* const from = dvalue + row * params.d;
      for (int64_t j = 0; j < params.d; j += kWidth) V::store(to + j, V::load(from + j));
    }
  }

  FASTTUNE_INLINE void backward(int64_t query) {
    const Located& points = S::at(query);
    const T* const dout = static_cast<const T*>(params.dout) + S::row_of(query) * params.d;
    std::memset(dots, 0, static_cast<size_t>(4 * params.n) * sizeof(float));
    int64_t j = 0;
    for (; j + 2 * kGroup <= params.d; j += 2 * kGroup) spread_channels<2>(points, j, dout);
    if (j < params.d) spread_channels<1>(points, j, dout);
    store_gradients(points, S::row_of(query));
  }

  template <int kGroups>
  FASTTUNE_INLINE void spread_channels(const Located& points, int64_t j, const T* dout) {
    F incoming[kGroups * kParts];
    for (int p = 0; p < kGroups * kParts; ++p) incoming[p] = V::load(dout + j + p * kWidth);
    for (int64_t i = 0; i < params.n; ++i) {
      F products[4][kParts] = {};
      for (int corner = 0; corner < 4; ++corner) {
        const float by = points.area[corner * padded + i] * points.weight[i];
        const int64_t row = points.rows[corner * padded + i];
        const T* const from = S::row_at(row) + j;
        float* const to = dvalue + row * params.d + j;
        for (int p = 0; p < kGroups * kParts; ++p) {
          products[corner][p % kParts] += V::load(from + p * kWidth) * incoming[p];
          V::store(to + p * kWidth, V::load(to + p * kWidth) + incoming[p] * by);
        }
      }
      float sums[4];
      V::four_sums(products, sums);
      for (int corner = 0; corner < 4; ++corner) dots[4 * i + corner] += sums[corner];
    }
  }

  FASTTUNE_INLINE void store_gradients(const Located& points, int64_t row) {
    const int64_t n = params.n;
    float* const at = S::staged;
    for (int64_t i = 0; i < n; ++i) {
      const float* const dot = dots + 4 * i;
      const float right = points.right[i], down = points.down[i], by = points.weight[i];
      const float dx = (dot[1] - dot[0]) * (1.0f - down) + (dot[3] - dot[2]) * down;
      const float dy = (dot[2] - dot[0]) * (1.0f - right) + (dot[3] - dot[1]) * right;
      at[2 * i] = dx * by * S::widths[i];
      at[2 * i + 1] = dy * by * S::heights[i];
    }
    store(at, 2 * n, params.dlocations, params.locations_dtype, 2 * row * n);
    for (int64_t i = 0; i < n; ++i) {
      const float* const dot = dots + 4 * i;
      at[i] = 0.0f;
      for (int corner = 0; corner < 4; ++corner)
        at[i] += dot[corner] * points.area[corner * padded + i];
    }
    store(at, n, params.dweights, params.weights_dtype, row * n);
  }

  static FASTTUNE_INLINE void store(const float* from, int64_t n, void* to, DType dtype,
                                    int64_t first) {
    if (dtype == DType::kFloat32) {
      std::memcpy(static_cast<float*>(to) + first, from, static_cast<size_t>(n) * sizeof(float));
    } else {
      c10::BFloat16* const narrow = static_cast<c10::BFloat16*>(to) + first;
      for (int64_t i = 0; i < n; ++i) narrow[i] = static_cast<c10::BFloat16>(from[i]);
    }
  }
};

int64_t blocks_of(const DeformableParams& params) { return (params.q + kQueries - 1) / kQueries; }

// Units [begin, end): blocks of queries of a head of a batch row, its blocks one after the other.
template <int kWidth, typename T>
FASTTUNE_INLINE void forward_units(const DeformableParams& params, int64_t begin, int64_t end) {
  Slice<kWidth, T> slice(params);
  const int64_t blocks = blocks_of(params);
  for (int64_t unit = begin; unit < end; ++unit) {
    slice.choose(unit / blocks);
    const int64_t first = unit % blocks * kQueries, past = std::min(first + kQueries, params.q);
    slice.locate(first);
    for (int64_t query = first; query < past; ++query) {
      if (query + 1 < past) slice.locate(query + 1);
      slice.forward(query);
    }
  }
}

template <int kWidth, typename T>
FASTTUNE_INLINE void backward_units(const DeformableParams& params, int64_t begin, int64_t end) {
  BackwardSlice<kWidth, T> slice(params);
  for (int64_t unit = begin; unit < end; ++unit) slice.run(unit);
}

using Units = void (*)(const DeformableParams&, int64_t, int64_t);

// An instruction set's code: everything above is inlined into these.
#define FASTTUNE_UNITS(NAME, ATTRIBUTES, WIDTH)                                            \
  template <typename T>                                                                    \
  struct NAME {                                                                            \
    ATTRIBUTES static void forward(const DeformableParams& p, int64_t from, int64_t to) {  \
      forward_units<WIDTH, T>(p, from, to);                                                \
    }                                                                                      \
    ATTRIBUTES static void backward(const DeformableParams& p, int64_t from, int64_t to) { \
      backward_units<WIDTH, T>(p, from, to);                                               \
    }                                                                                      \
  }
FASTTUNE_UNITS(UnitsDefault, , 4);
#ifdef FASTTUNE_X86
FASTTUNE_UNITS(UnitsAvx2, FASTTUNE_FUSED_AVX2, 8);
FASTTUNE_UNITS(UnitsAvx512, FASTTUNE_FUSED_AVX512, 16);
#endif
#undef FASTTUNE_UNITS

template <typename T>
Units units_here(bool backward) {
#ifdef FASTTUNE_X86
  const std::string name = capability();
  if (name == "avx512") return backward ? UnitsAvx512<T>::backward : UnitsAvx512<T>::forward;
  if (name == "avx2") return backward ? UnitsAvx2<T>::backward : UnitsAvx2<T>::forward;
#endif
  return backward ? UnitsDefault<T>::backward : UnitsDefault<T>::forward;
}

void run(const DeformableParams& params, int64_t units, bool backward) {
  const Units here = params.dtype == DType::kFloat32 ? units_here<float>(backward)
                                                     : units_here<c10::BFloat16>(backward);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { here(params, begin, end); });
}

}  // namespace

void deformable_attention(const DeformableParams& params) {
  run(params, params.b * params.heads * blocks_of(params), false);
}

void deformable_attention_backward(const DeformableParams& params) {
  run(params, params.b * params.heads, true);
}

}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
