// Matrices between a tensor's strides and the forms that small products (brgemm.h) take.
//
// X [n, w] of T, n and w multiples of 16, is an operand in four forms. An item is 32 bits: a float,
// or two bfloat16.
//   rows          [n, w]         left operand X
//   pairs         [n / 2, w, 2]  right operand X: rows 2i and 2i + 1 item by item; of float, the
//                                rows as they are
//   turned rows   [w / 2, n, 2]  right operand X^T: the rows' items transposed; of float, [w, n]
//   turned pairs  [w, n]         left operand X^T: the pairs' items transposed
#pragma once

#include "vector.h"

#ifdef FASTTUNE_VECTORS

#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <type_traits>

namespace fasttune::cpu {

constexpr int64_t kMultiple = 16;
inline int64_t round_up(int64_t n) { return (n + kMultiple - 1) / kMultiple * kMultiple; }

template <typename T>
constexpr int64_t kItem = 4 / sizeof(T);  // elements in an item

// Memory of one thread, aligned for any vector, not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : memory_(c10::GetCPUAllocator()->allocate(static_cast<size_t>(n) * sizeof(T))) {}
  operator T*() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// `heads` matrices [length, width] one head stride apart, each of rows one row stride apart.
template <typename T>
struct Heads {
  T* data;
  int64_t heads, head_stride, length, row_stride, width;

  // Row r of all, head after head.
  FASTTUNE_INLINE T* row(int64_t r) const {
    return data + r / length * head_stride + r % length * row_stride;
  }
};

template <int kWidth, typename T>
struct Pack {
  using V = Vector<kWidth>;
  using F = typename V::F;
  using U = typename V::U;
  using H = typename V::H;

  // All heads' rows below each other, with zeros up to the padded width and number of rows. A cache
  // line's columns of all rows come first: a load of constant stride is what processors prefetch.
  static FASTTUNE_INLINE void gather(const Heads<T>& from, int64_t padded_rows,
                                     int64_t padded_width, T* rows) {
    constexpr int64_t kLine = 64 / sizeof(T);
    int64_t j = 0;
    for (; j + kLine <= from.width; j += kLine) gather_columns<kLine>(from, j, padded_width, rows);
    for (; j + kMultiple <= from.width; j += kMultiple) {
      gather_columns<kMultiple>(from, j, padded_width, rows);
    }
    for (; j < from.width; ++j) gather_columns<1>(from, j, padded_width, rows);
    const int64_t n = from.heads * from.length;
    for (int64_t r = 0; j < padded_width && r < n; ++r) {
      clear(rows + r * padded_width + j, padded_width - j);
    }
    clear(rows + n * padded_width, (padded_rows - n) * padded_width);
  }

  template <int64_t kColumns>
  static FASTTUNE_INLINE void gather_columns(const Heads<T>& from, int64_t j, int64_t padded_width,
                                             T* rows) {
    T* to = rows + j;
    for (int64_t head = 0; head < from.heads; ++head) {
      const T* row = from.data + head * from.head_stride + j;
      for (int64_t i = 0; i < from.length; ++i, row += from.row_stride, to += padded_width) {
        std::memcpy(static_cast<void*>(to), row, kColumns * sizeof(T));
      }
    }
  }

  // Towards the second-level cache.
  static FASTTUNE_INLINE void prefetch(const Heads<T>& from) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t head = 0; head < from.heads; ++head) {
      const T* row = from.data + head * from.head_stride;
      for (int64_t i = 0; i < from.length; ++i, row += from.row_stride) {
        for (int64_t j = 0; j < from.width; j += kLine) __builtin_prefetch(row + j, 0, 2);
      }
    }
  }

  static FASTTUNE_INLINE void clear(T* to, int64_t n) {
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(n) * sizeof(T));
  }

  // Rows first, first + 1 .. first + n of `to` = factor of its row times that of `from` [n,
  // stride].
  template <typename Factor>
  static FASTTUNE_INLINE void scatter(const float* from, int64_t stride, int64_t first, int64_t n,
                                      const Factor& factor, const Heads<T>& to) {
    for (int64_t r = 0; r < n; ++r, from += stride) {
      T* row = to.row(first + r);
      const float by = factor(r);
      int64_t j = 0;
      for (; j + kWidth <= to.width; j += kWidth) V::store(row + j, V::load(from + j) * by);
      for (; j < to.width; ++j) row[j] = static_cast<T>(from[j] * by);
    }
  }

  static FASTTUNE_INLINE void pair(const T* rows, int64_t n, int64_t width, T* pairs) {
    static_assert(kItem<T> == 2);
    for (int64_t i = 0; i < n; i += 2, rows += 2 * width, pairs += 2 * width) {
      for (int64_t j = 0; j < width; j += kWidth) {
        store_items(pairs + 2 * j, V::bits16(rows + j), V::bits16(rows + width + j));
      }
    }
  }

  // The lower halves of `first` and `second` item by item.
  static FASTTUNE_INLINE void store_items(T* pairs, U first, U second) {
    const U items = first | second << 16;
    std::memcpy(static_cast<void*>(pairs), &items, sizeof items);
  }

  // from: items [rows, columns], multiples of 8; to: [columns, rows].
  static FASTTUNE_INLINE void turn(const void* from, int64_t rows, int64_t columns, void* to) {
    const uint32_t* const in = static_cast<const uint32_t*>(from);
    uint32_t* const out = static_cast<uint32_t*>(to);
    for (int64_t i = 0; i < rows; i += 8) {
      for (int64_t j = 0; j < columns; j += 8) {
        turn_square(in + i * columns + j, columns, out + j * rows + i, rows);
      }
    }
  }

  // Eight by eight: within halves of a row's vector by 32 and 64 bits, then the halves.
  static FASTTUNE_INLINE void turn_square(const uint32_t* from, int64_t from_stride, uint32_t* to,
                                          int64_t to_stride) {
    using Row = typename Vector<8>::U;
    Row a[8], b[8];
    for (int i = 0; i < 8; ++i) std::memcpy(&a[i], from + i * from_stride, sizeof a[i]);
    for (int i = 0; i < 8; i += 2) {
      b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        a[i + 2 * k] = __builtin_shufflevector(b[i + k], b[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        a[i + 2 * k + 1] =
            __builtin_shufflevector(b[i + k], b[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
    }
    for (int i = 0; i < 4; ++i) {
      b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &b[i], sizeof b[i]);
  }
};

}  // namespace fasttune::cpu

#endif  // FASTTUNE_VECTORS
