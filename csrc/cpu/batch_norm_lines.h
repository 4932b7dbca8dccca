// The passes of batch normalisation over blocks of rows of [rows, channels].
//
// Few channels are no multiple of a vector, so rows are taken side by side as lines: of 12 channels
// sixteen rows make a line of 192 columns. A column is a channel in a place of its own, lines add
// up lane by lane, and the places of a channel are put together once a block. No sum depends on the
// width of a vector.
#pragma once

#include "vector.h"

#ifdef FASTTUNE_VECTORS

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace fasttune::cpu::norm {

constexpr int64_t kColumns = 64;           // taken at once
constexpr int64_t kPair = 2 * kGroup;      // columns: a multiple of two vectors on every machine
constexpr int64_t kBlockLines = 512;       // at most: so many numbers are added in fp32
constexpr int64_t kBlockElements = 65536;  // at most, but for very long lines
constexpr int64_t kMinLines = 8;
constexpr int64_t kCenterLines = kBlockLines / 16;
// Within a block columns are gone through group by group over so many elements, and lines at most:
// what is read next lies near, and few numbers are added one by one.
constexpr int64_t kNear = 8192;
constexpr int64_t kNearLines = 32;

struct Lines {
  int64_t fold;   // rows in a line
  int64_t width;  // columns of a line: a multiple of kPair
  int64_t count;
  int64_t rest;   // rows that make no whole line
  int64_t block;  // lines

  Lines(int64_t rows, int64_t channels) {
    width = std::lcm(channels, channels < kColumns ? kColumns : kPair);
    fold = width / channels;
    count = rows / fold;
    rest = rows % fold;
    block = std::clamp(kBlockElements / width, kMinLines, kBlockLines);
  }

  int64_t blocks() const { return std::max<int64_t>(1, (count + block - 1) / block); }
};

enum class Pass { kStatistics, kApply, kSums, kGradient, kScale };

struct Call {
  const BatchNormParams& params;
  Lines lines;
  Pass pass;
  std::vector<float> partials;  // [blocks + 1, 2, channels]; the rest's come last

  Call(const BatchNormParams& params, Pass pass)
      : params(params), lines(params.rows, params.channels), pass(pass) {
    if (reduces()) partials.resize(2 * params.channels * (lines.blocks() + 1));
  }

  bool reduces() const { return pass == Pass::kStatistics || pass == Pass::kSums; }
};

// Neighbouring columns in two vectors: of float the first half of them and the second, of bfloat16
// those of even index and those of odd, which takes half the instructions.
template <int kWidth, typename T>
struct Two {
  using V = Vector<kWidth>;
  using F = typename V::F;
  using U = typename V::U;
  static constexpr int64_t kBoth = 2 * kWidth;
  static constexpr bool kInterleaved = std::is_same_v<T, c10::BFloat16>;

  F a, b;

  static FASTTUNE_INLINE Two load(const T* from) {
    if constexpr (kInterleaved) {
      U both;
      __builtin_memcpy(&both, from, sizeof both);
      return {reinterpret_cast<F>(both << 16), reinterpret_cast<F>(both & 0xFFFF0000u)};
    } else {
      return {V::load(from), V::load(from + kWidth)};
    }
  }

  FASTTUNE_INLINE void store(T* to) const {
    if constexpr (kInterleaved) {
      const U both = (rounded(a) >> 16) | (rounded(b) & 0xFFFF0000u);
      __builtin_memcpy(static_cast<void*>(to), &both, sizeof both);
    } else {
      V::store(to, a);
      V::store(to + kWidth, b);
    }
  }

  // As Vector::bits16, in the upper half.
  static FASTTUNE_INLINE U rounded(F v) {
    const U raw = reinterpret_cast<U>(v);
    const U up = raw + 0x7FFFu + ((raw >> 16) & 1u);
    return v == v ? up : U{} + 0x7FC00000u;
  }

  // Where in a buffer of vectors a column stands.
  static FASTTUNE_INLINE int64_t place(int64_t column) {
    if constexpr (!kInterleaved) return column;
    const int64_t within = column % kBoth;
    return column - within + within % 2 * kWidth + within / 2;
  }
};

// [channels], or repeated along a line and in the order of `place`.
struct Factors {
  const float *mean, *scale, *shift, *slope;
};

// What the passes compute of x, dy and the factors at j; N: a vector or a float.
template <typename N>
FASTTUNE_INLINE N load(const float* from) {
  N value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

struct Apply {
  static constexpr bool kTakesX = true, kTakesDy = false;
  template <typename N>
  static FASTTUNE_INLINE N of(N x, N, const Factors& f, int64_t j) {
    return (x - load<N>(f.mean + j)) * load<N>(f.scale + j) + load<N>(f.shift + j);
  }
};

struct Gradient {
  static constexpr bool kTakesX = true, kTakesDy = true;
  template <typename N>
  static FASTTUNE_INLINE N of(N x, N dy, const Factors& f, int64_t j) {
    const N along = (x - load<N>(f.mean + j)) * load<N>(f.slope + j);
    return (dy - load<N>(f.shift + j) - along) * load<N>(f.scale + j);
  }
};

struct Scale {
  static constexpr bool kTakesX = false, kTakesDy = true;
  template <typename N>
  static FASTTUNE_INLINE N of(N, N dy, const Factors& f, int64_t j) {
    return dy * load<N>(f.scale + j);
  }
};

// The two numbers that a value adds.
template <typename N>
struct Terms {
  N first, second;
};

struct Deviations {
  static constexpr bool kTakesDy = false;
  template <typename N>
  static FASTTUNE_INLINE Terms<N> of(N x, N, N center) {
    const N off = x - center;
    return {off, off * off};
  }
};

struct Products {
  static constexpr bool kTakesDy = true;
  template <typename N>
  static FASTTUNE_INLINE Terms<N> of(N x, N dy, N center) {
    return {dy, dy * (x - center)};
  }
};

template <int kWidth, typename T>
struct Kernel {
  using V = Vector<kWidth>;
  using F = typename V::F;
  using Pair = Two<kWidth, T>;
  static constexpr int64_t kBoth = Pair::kBoth;

  // By value: what is stored as bytes may alias anything that is reached by a pointer.
  const Lines lines;
  const Pass pass;
  const int64_t channels;
  const T* const x;
  const T* const dy;
  T* const out;
  const Factors given;  // [channels]
  float* const buffer;  // [4, width]

  FASTTUNE_INLINE Kernel(const Call& call, float* buffer)
      : lines(call.lines),
        pass(call.pass),
        channels(call.params.channels),
        x(static_cast<const T*>(call.params.x)),
        dy(static_cast<const T*>(call.params.dy)),
        out(static_cast<T*>(call.params.out)),
        given{call.params.mean, call.params.scale, call.params.shift, call.params.slope},
        buffer(buffer) {}

  // body(number of pairs of vectors, first column), for all columns of a line.
  template <typename Body>
  FASTTUNE_INLINE void over_columns(const Body& body) const {
    int64_t j = 0;
    for (; j + kColumns <= lines.width; j += kColumns) {
      body(std::integral_constant<int, kColumns / kBoth>{}, j);
    }
    for (; j < lines.width; j += kPair) {
      body(std::integral_constant<int, kPair / kBoth>{}, j);
    }
  }

  FASTTUNE_INLINE const float* along_a_line(const float* by_channel, float* to) const {
    if (by_channel == nullptr) return nullptr;
    for (int64_t i = 0, column = 0; i < lines.fold; ++i) {
      for (int64_t j = 0; j < channels; ++j, ++column) to[Pair::place(column)] = by_channel[j];
    }
    return to;
  }

  // Adds the terms of n lines from `first` on to first_sums and second_sums, by columns [width].
  template <typename Of>
  FASTTUNE_INLINE void add_lines(int64_t first, int64_t n, const float* center, float* first_sums,
                                 float* second_sums) const {
    over_columns([&](auto pairs, int64_t j) FASTTUNE_LAMBDA {
      constexpr int kVectors = 2 * decltype(pairs)::value;
      F middle[kVectors], one[kVectors] = {}, two[kVectors] = {};
      for (int v = 0; v < kVectors; ++v) middle[v] = V::load(center + j + v * kWidth);
      for (int64_t i = first; i < first + n; ++i) {
        for (int v = 0; v < kVectors; v += 2) {
          const int64_t at = i * lines.width + j + v * kWidth;
          const Pair value = Pair::load(x + at);
          const Pair gradient = Of::kTakesDy ? Pair::load(dy + at) : value;
          const Terms<F> a = Of::of(value.a, gradient.a, middle[v]);
          const Terms<F> b = Of::of(value.b, gradient.b, middle[v + 1]);
          one[v] += a.first;
          two[v] += a.second;
          one[v + 1] += b.first;
          two[v + 1] += b.second;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        float* const first_sum = first_sums + j + v * kWidth;
        float* const second_sum = second_sums + j + v * kWidth;
        V::store(first_sum, V::load(first_sum) + one[v]);
        V::store(second_sum, V::load(second_sum) + two[v]);
      }
    });
  }

  template <typename Of>
  FASTTUNE_INLINE void reduce(int64_t first, int64_t n, const float* center, float* first_sums,
                              float* second_sums) const {
    std::fill_n(first_sums, lines.width, 0.0f);
    std::fill_n(second_sums, lines.width, 0.0f);
    const int64_t near = std::clamp(kNear / lines.width, kMinLines, kNearLines);
    for (int64_t i = 0; i < n; i += near) {
      add_lines<Of>(first + i, std::min(near, n - i), center, first_sums, second_sums);
    }
  }

  // Means and sums of squares of a block, [channels]. Around the mean of its first lines, which are
  // a sixteenth of it or more: the square of the distance from there to the mean of all is then at
  // most fifteen times the variance, and four bits are all that can cancel.
  FASTTUNE_INLINE void block_statistics(int64_t first, int64_t n, float* means,
                                        float* squares) const {
    float* const center = buffer;
    float* const sums = center + lines.width;
    float* const square_sums = sums + lines.width;
    std::fill_n(center, lines.width, 0.0f);
    const int64_t few = std::min(n, kCenterLines);
    reduce<Deviations>(first, few, center, sums, square_sums);
    for (int64_t j = 0; j < lines.width; ++j) center[j] = sums[j] / static_cast<float>(few);
    reduce<Deviations>(first, n, center, sums, square_sums);
    for (int64_t j = 0; j < lines.width; ++j) {
      const float off = sums[j] / static_cast<float>(n);
      square_sums[j] = std::max(0.0f, square_sums[j] - sums[j] * off);
      center[j] += off;
    }
    fold(center, means);
    fold(square_sums, squares);
    if (lines.fold == 1) return;
    for (int64_t j = 0; j < channels; ++j) means[j] /= static_cast<float>(lines.fold);
    for (int64_t i = 0, column = 0; i < lines.fold; ++i) {
      for (int64_t j = 0; j < channels; ++j, ++column) {
        const float off = center[Pair::place(column)] - means[j];
        squares[j] += static_cast<float>(n) * (off * off);
      }
    }
  }

  // Sums over the places of each channel.
  FASTTUNE_INLINE void fold(const float* columns, float* folded) const {
    std::fill_n(folded, channels, 0.0f);
    for (int64_t i = 0, column = 0; i < lines.fold; ++i) {
      for (int64_t j = 0; j < channels; ++j, ++column) folded[j] += columns[Pair::place(column)];
    }
  }

  FASTTUNE_INLINE void rest_statistics(float* means, float* squares) const {
    const T* const from = x + lines.count * lines.width;
    const int64_t n = lines.rest * channels;
    for (int64_t i = 0; i < n; ++i) means[i % channels] += static_cast<float>(from[i]);
    for (int64_t j = 0; j < channels; ++j) means[j] /= static_cast<float>(lines.rest);
    for (int64_t i = 0; i < n; ++i) {
      const float off = static_cast<float>(from[i]) - means[i % channels];
      squares[i % channels] += off * off;
    }
  }

  FASTTUNE_INLINE void rest_sums(float* sums, float* products) const {
    for (int64_t i = 0, at = lines.count * lines.width; i < lines.rest * channels; ++i, ++at) {
      const int64_t j = i % channels;
      const float gradient = static_cast<float>(dy[at]);
      sums[j] += gradient;
      products[j] += gradient * (static_cast<float>(x[at]) - given.mean[j]);
    }
  }

  FASTTUNE_INLINE void reduce_blocks(int64_t begin, int64_t end, float* partials) const {
    const float* const center = pass == Pass::kSums ? along_a_line(given.mean, buffer) : nullptr;
    float* const sums = buffer + lines.width;
    float* const products = sums + lines.width;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * lines.block;
      const int64_t n = std::min(lines.block, lines.count - first);
      float* const partial = partials + 2 * channels * block;
      if (n > 0 && pass == Pass::kStatistics) {
        block_statistics(first, n, partial, partial + channels);
      } else if (n > 0) {
        reduce<Products>(first, n, center, sums, products);
        fold(sums, partial);
        fold(products, partial + channels);
      }
      if (lines.rest == 0 || block + 1 < lines.blocks()) continue;
      float* const last = partial + 2 * channels;
      pass == Pass::kStatistics ? rest_statistics(last, last + channels)
                                : rest_sums(last, last + channels);
    }
  }

  // Backwards: what a thread has read last by the pass before is still in its cache.
  template <typename Of>
  FASTTUNE_INLINE void map_blocks(int64_t begin, int64_t end) const {
    const Factors factors = {along_a_line(given.mean, buffer),
                             along_a_line(given.scale, buffer + lines.width),
                             along_a_line(given.shift, buffer + 2 * lines.width),
                             along_a_line(given.slope, buffer + 3 * lines.width)};
    if (end == lines.blocks()) map_rest<Of>();
    for (int64_t block = end - 1; block >= begin; --block) {
      const int64_t first = block * lines.block;
      const int64_t last = std::min(first + lines.block, lines.count);
      for (int64_t i = first; i < last; ++i) map_line<Of>(i * lines.width, factors);
    }
  }

  template <typename Of>
  FASTTUNE_INLINE void map_line(int64_t line, const Factors& factors) const {
    over_columns([&](auto pairs, int64_t j) FASTTUNE_LAMBDA {
      for (int p = 0; p < decltype(pairs)::value; ++p, j += kBoth) {
        Pair value = {}, gradient = {};
        if constexpr (Of::kTakesX) value = Pair::load(x + line + j);
        if constexpr (Of::kTakesDy) gradient = Pair::load(dy + line + j);
        const Pair result = {Of::of(value.a, gradient.a, factors, j),
                             Of::of(value.b, gradient.b, factors, j + kWidth)};
        result.store(out + line + j);
      }
    });
  }

  template <typename Of>
  FASTTUNE_INLINE void map_rest() const {
    for (int64_t i = 0, at = lines.count * lines.width; i < lines.rest * channels; ++i, ++at) {
      const float value = Of::kTakesX ? static_cast<float>(x[at]) : 0.0f;
      const float gradient = Of::kTakesDy ? static_cast<float>(dy[at]) : 0.0f;
      out[at] = static_cast<T>(Of::of(value, gradient, given, i % channels));
    }
  }

  FASTTUNE_INLINE void blocks(int64_t begin, int64_t end, float* partials) const {
    switch (pass) {
      case Pass::kApply:
        return map_blocks<Apply>(begin, end);
      case Pass::kGradient:
        return map_blocks<Gradient>(begin, end);
      case Pass::kScale:
        return map_blocks<Scale>(begin, end);
      case Pass::kStatistics:
      case Pass::kSums:
        return reduce_blocks(begin, end, partials);
    }
  }
};

}  // namespace fasttune::cpu::norm

#endif  // FASTTUNE_VECTORS
